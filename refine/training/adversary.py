"""`--adversarial`: a critic that compares the student's images with images of the teacher, or with real ones.

A reverse KL divergence, which the objectives follow, hardly notices what a student leaves out; a critic that sees
images of both sources does. Student and critic play the relativistic game on pairs of one class (Jolicoeur-Martineau
2018, arXiv 1807.00734), with zero-centred penalties on the critic's gradient at both images (Mescheder et al. 2018,
arXiv 1801.04406; R1 and R2), which is known to keep all modes (Huang et al. 2024, arXiv 2501.05441):

    critic   softplus(f(x) − f(y)) + γ/2 (‖∇f(y)‖² + ‖∇f(x)‖²)
    student  softplus(f(y) − f(x))                                   y: the other source, x: the student
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from refine.networks.critic import Critic
from refine.training.optimise import GuardedAdam

LEARNING_RATE, BETAS = 1e-3, (0.0, 0.99)
GAMMA = 1.0  # of the penalties
PENALTY_EVERY = 4  # critic steps between two penalties, which then weigh four times as much
SHIFT = 0.3  # how often an image is moved by up to a sixteenth of its size, so that few images last longer


class Others:
    """The images that the student is compared with.

    Args:
        images: uint8 (M, C, R, R), of the teacher's size.
        classes: int64 (M,), or None: then labels play no part.
        num_classes: Number of classes; 0 = none.
        device: Where they are kept.

    Raises:
        ValueError: A class has no image, or there is none at all.
    """

    def __init__(self, images: torch.Tensor, classes: torch.Tensor | None, num_classes: int, device: torch.device):
        self.num_classes = num_classes if classes is not None else 0
        count = torch.tensor([len(images)])
        if classes is not None and self.num_classes:
            order = classes.argsort(stable=True)
            images, count = images[order], torch.bincount(classes, minlength=self.num_classes)
        if len(count) > max(self.num_classes, 1):
            raise ValueError(f"they have classes up to {len(count) - 1}; expected {self.num_classes} classes")
        if missing := (count == 0).nonzero().flatten().tolist():
            raise ValueError(f"there is no image{f' of class {missing[0]}' if self.num_classes else ''}")
        self._images = images.to(device)
        self._count, self._first = count.to(device), (count.cumsum(0) - count).to(device)

    def __len__(self) -> int:
        return len(self._images)

    def draw(self, n: int, c: torch.Tensor | None) -> torch.Tensor:
        """Images (n, C, R, R), float32 in [-1, 1], of the classes of the one-hot labels c where these play a part."""
        index = c.argmax(dim=1) if self.num_classes and c is not None else torch.zeros_like(self._count[:1]).expand(n)
        part = torch.rand(n, device=self._count.device)  # one number per image, as `RowsOfBatch` wants it
        row = self._first[index] + (part * self._count[index]).long().clamp(max=self._count[index] - 1)
        return self._images[row].float() / 127.5 - 1


@dataclass(frozen=True)
class Verdict:
    """The critic's losses of a batch, (N,), and how often it holds the other image for the more real one, (N,)."""

    loss: torch.Tensor
    right: torch.Tensor


class Adversary:
    """The critic, its optimiser, and the two sides of the game.

    Args:
        others: What the student is compared with.
        img_resolution, img_channels: Size of the images, those of the teacher.
        device: Where it is.

    Attributes:
        critic, optimizer: The network, and its Adam.
    """

    def __init__(self, others: Others, img_resolution: int, img_channels: int, device: torch.device):
        self.others = others
        self.critic = Critic(img_resolution, img_channels, others.num_classes).to(device)
        self.optimizer = GuardedAdam(self.critic.parameters(), BETAS, None, "fp32", device)

    def judge(self, x: torch.Tensor, c: torch.Tensor | None, penalised: bool) -> Verdict:
        """The critic's loss on images of the student, without gradient to them; differentiable by the critic."""
        x, y = _shifted(x.detach()), _shifted(self.others.draw(len(x), c))
        c = c if self.others.num_classes else None
        x, y = x.requires_grad_(penalised), y.requires_grad_(penalised)
        f_x, f_y = self.critic(x, c), self.critic(y, c)
        loss = F.softplus(f_x - f_y)
        if penalised:
            gradients = torch.autograd.grad((f_x + f_y).sum(), [x, y], create_graph=True)
            squares = sum(gradient.square().sum(dim=[1, 2, 3]) for gradient in gradients)
            loss = loss + PENALTY_EVERY * GAMMA / 2 * squares
        return Verdict(loss, (f_y > f_x).float().detach())

    def gradient(self, x: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        """The gradient of the student's loss on its images, (N, C, R, R)."""
        x = x.detach().requires_grad_(True)
        y = _shifted(self.others.draw(len(x), c))
        c = c if self.others.num_classes else None
        with torch.enable_grad():
            loss = F.softplus(self.critic(y, c).detach() - self.critic(_shifted(x), c))
            (gradient,) = torch.autograd.grad(loss.sum(), x)
        return gradient


def _shifted(x: torch.Tensor) -> torch.Tensor:
    """Some of the images are moved by whole pixels, with the border repeated; differentiable."""
    n, _, height, width = x.shape
    reach = max(min(height, width) // 16, 1)
    drawn = torch.rand(n, 3, device=x.device)
    offset = ((2 * reach + 1) * drawn[:, :2]).long() - reach
    offset = torch.where(drawn[:, 2:] < SHIFT, offset, 0)
    rows = (torch.arange(height, device=x.device) + offset[:, :1]).clamp(0, height - 1)
    columns = (torch.arange(width, device=x.device) + offset[:, 1:]).clamp(0, width - 1)
    image = torch.arange(n, device=x.device)[:, None, None]
    return x[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
