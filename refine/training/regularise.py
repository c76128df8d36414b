"""Dropout and augmentation of what aux learns from; neither is used where the student is judged."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

AUGMENT_DIM = 9  # numbers in an augmentation label
SCALE = ANISOTROPY = 2**0.2  # factor of one standard deviation
SHIFT = 1 / 8  # one standard deviation, as a share of the image's width


def set_dropout(network: nn.Module, rate: float) -> None:
    """Give all dropout of a network this rate; it acts in train mode.

    Raises:
        ValueError: The network has none.
    """
    found = False
    for module in network.modules():
        name = "p" if isinstance(module, nn.Dropout) else "dropout"
        if isinstance(getattr(module, name, None), int | float):
            setattr(module, name, rate)
            found = True
    if not found:
        raise ValueError(f"--aux-dropout is {rate:g}, but the network of --teacher has no layers with dropout")


@dataclass(frozen=True)
class Augmentation:
    """Random geometric transformations, each with the same probability, and the labels that tell a network of them.

    | transformation (in this order)     | parameters                          | label                    |
    |------------------------------------|-------------------------------------|--------------------------|
    | flip left–right                    | a₀ 0 or 1                           | a₀                       |
    | flip top–bottom                    | a₁ 0 or 1                           | a₁                       |
    | scale by 2^(a₂ / 5)                | a₂ ~ N(0, 1)                        | a₂                       |
    | rotate by a₃                       | a₃ uniform in (−π, π)               | cos a₃ − 1, sin a₃       |
    | scale by 2^(a₅ / 5) along angle a₄ | a₄ uniform in (−π, π), a₅ ~ N(0, 1) | a₅ cos a₄, a₅ sin a₄     |
    |   and by 2^(−a₅ / 5) across it     |                                     |                          |
    | shift by (a₆, a₇) / 8 of the width | a₆, a₇ ~ N(0, 1)                    | a₆, a₇                   |

    Labels of all zeros mean "as it was": asked so, the network answers for images that were not transformed (Karras et
    al. 2022, appendix F.2, after Jun et al. 2020). A network without such labels cannot tell the two apart; with
    `labelled` off the images are only flipped left–right and shifted by whole pixels, and aux takes these for the
    student's own.

    Attributes:
        probability: How often each transformation happens, 0 to 1.
        labelled: Whether the network takes labels of `AUGMENT_DIM` numbers.
    """

    probability: float
    labelled: bool

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Transformed images, and their labels (N, 9) or None.

        Args:
            x: Images (N, C, R, R). What moves out of the frame is mirrored back in.
        """
        on = (torch.rand(len(x), 6, device=x.device) < self.probability).float()
        uniform, normal = torch.rand(len(x), 4, device=x.device), torch.randn(len(x), 4, device=x.device)
        scaled, turned, stretched, shifted = on[:, 2:].unbind(dim=1)
        flip_x, flip_y = (on[:, :2] * uniform[:, :2].round()).unbind(dim=1)
        turn, along = ((2 * uniform[:, 2:] - 1) * math.pi).unbind(dim=1)
        turn, size, stretch = turned * turn, scaled * normal[:, 0], stretched * normal[:, 1]
        right, down = (shifted[:, None] * normal[:, 2:]).unbind(dim=1)
        x = torch.where(flip_x[:, None, None, None] > 0, x.flip(3), x)
        if not self.labelled:
            return shift_by_pixels(x, torch.stack([right, down], dim=1) * SHIFT * x.shape[3]), None
        x = torch.where(flip_y[:, None, None, None] > 0, x.flip(2), x)
        inverse = _rotation(-turn) @ _stretch(along, -stretch) * SCALE ** -size[:, None, None]
        back = inverse @ torch.stack([right, down], dim=1)[:, :, None] * (-2 * SHIFT)  # the frame is 2 wide
        grid = F.affine_grid(torch.cat([inverse, back], dim=2), list(x.shape), align_corners=False)
        moved = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
        x = torch.where((on[:, 2:] > 0).any(dim=1)[:, None, None, None], moved, x)  # others stay sharp
        labels = [flip_x, flip_y, size, turn.cos() - 1, turn.sin(), stretch * along.cos(), stretch * along.sin()]
        return x, torch.stack([*labels, right, down], dim=1)


def _rotation(angle: torch.Tensor) -> torch.Tensor:
    """(N, 2, 2)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)


def _stretch(angle: torch.Tensor, amount: torch.Tensor) -> torch.Tensor:
    """(N, 2, 2): by ANISOTROPY^amount along an angle, and by its inverse across it."""
    factors = torch.stack([ANISOTROPY**amount, ANISOTROPY**-amount], dim=1)
    return _rotation(angle) @ (factors[:, :, None] * _rotation(-angle))


def shift_by_pixels(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Images (N, C, R, R) moved right and down by (N, 2) pixels, rounded; what leaves the frame is mirrored back."""
    size = x.shape[3]
    source = torch.arange(size, device=x.device) - shift.round().long()[:, :, None]  # [N 2 R]
    source = source.remainder(2 * size)
    column, row = torch.where(source < size, source, 2 * size - 1 - source).unbind(dim=1)
    rows = torch.arange(len(x), device=x.device)[:, None, None]
    return x.permute(0, 2, 3, 1)[rows, row[:, :, None], column[:, None, :]].permute(0, 3, 1, 2)
