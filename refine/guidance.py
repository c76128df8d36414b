"""A teacher, extrapolated away from a worse one: from itself without a label, or from another network.

    D_w(x; σ, c) = D_0 + w (D(x; σ, c) − D_0),    w = 1 is D itself

| class        | D_0                                                                   |                             |
|--------------|-----------------------------------------------------------------------|-----------------------------|
| `Guided`     | D(x; σ), the teacher asked without a label                            | classifier-free guidance    |
| `Autoguided` | D_g(x; σ, c), a smaller or less trained network of the same images    | autoguidance                |

Neither is the expected clean image of any noised data, so a student that learns from it inherits its lost diversity.
"""

from typing import Any

import torch

from refine.networks.bases import Denoiser


class Guided(Denoiser):
    """A denoiser under classifier-free guidance: D(x; σ) + w (D(x; σ, c) − D(x; σ)) (Ho & Salimans 2022).

    Args:
        teacher: Denoiser that was trained with label dropout.
        guidance: w; 1 = none; larger values pull images towards what is typical of their class.

    Raises:
        ValueError: The teacher does not know a missing label.
    """

    def __init__(self, teacher: Denoiser, guidance: float):
        super().__init__()
        if not teacher.has_null_label:
            what = "was trained without label dropout" if teacher.label_dim else "has no classes"
            raise ValueError(
                f"--guidance: found {guidance:g}, but --teacher {what}; expected a teacher that knows a missing label, "
                "or another network as its --guide"
            )
        self.teacher, self.guidance = teacher, guidance
        self.img_resolution, self.img_channels = teacher.img_resolution, teacher.img_channels
        self.label_dim, self.sigma_min, self.sigma_max = teacher.label_dim, teacher.sigma_min, teacher.sigma_max

    @property
    def has_null_label(self) -> bool:
        return True

    def round_sigma(self, sigma: torch.Tensor | float) -> torch.Tensor:
        return self.teacher.round_sigma(sigma)

    def forward(
        self, x: torch.Tensor, sigma: torch.Tensor | float, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Denoise, see `Denoiser.forward`; class_labels None = no guidance."""
        if class_labels is None:
            return self.teacher(x, sigma)
        if not isinstance(sigma, torch.Tensor):
            sigma = torch.full([], sigma, device=x.device)
        sigma = sigma.to(x.device).reshape(-1, 1, 1, 1).expand(len(x), -1, -1, -1)
        class_labels = class_labels.expand(len(x), -1)
        # one batch of both: no larger peak than aux's own backward pass, and half the launches
        twice = self.teacher(
            torch.cat([x, x]), torch.cat([sigma, sigma]), torch.cat([torch.zeros_like(class_labels), class_labels])
        )
        free, labelled = twice.chunk(2)
        return free + self.guidance * (labelled - free)


class Autoguided(Denoiser):
    """A denoiser under autoguidance: D_g + w (D − D_g) with a worse network D_g (Karras et al. 2024, arXiv 2406.02507).

    Both get the same images, noise levels and labels; a guide without classes ignores these, which makes it
    classifier-free guidance with a network of its own. With w = 1 the guide is not asked.

    Args:
        teacher: D.
        guide: D_g, a denoiser of the same images.
        guidance: w.

    Raises:
        ValueError: The guide does not fit.
    """

    def __init__(self, teacher: Denoiser, guide: Denoiser, guidance: float):
        super().__init__()
        check_guide(teacher, guide)
        self.teacher, self.guide, self.guidance = teacher, guide, guidance
        self.img_resolution, self.img_channels = teacher.img_resolution, teacher.img_channels
        self.label_dim = teacher.label_dim
        self.sigma_min = max(teacher.sigma_min, guide.sigma_min)
        self.sigma_max = min(teacher.sigma_max, guide.sigma_max)

    @property
    def has_null_label(self) -> bool:
        return self.teacher.has_null_label and (self.guide.label_dim == 0 or self.guide.has_null_label)

    def round_sigma(self, sigma: torch.Tensor | float) -> torch.Tensor:
        return self.teacher.round_sigma(sigma)

    def forward(
        self, x: torch.Tensor, sigma: torch.Tensor | float, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Denoise, see `Denoiser.forward`."""
        D_x = self.teacher(x, sigma, class_labels)
        if self.guidance == 1:
            return D_x
        guide = self.guide(x, sigma, class_labels if self.guide.label_dim else None)
        return torch.lerp(guide, D_x, self.guidance)


def check_guide(teacher: Any, guide: Any) -> None:
    """Whether a network can guide a teacher.

    Args:
        teacher, guide: Networks, or what `refine.checkpoints.peek` says of them.

    Raises:
        ValueError: It cannot.
    """
    for name, found, expected in (
        ("img_resolution", guide.img_resolution, teacher.img_resolution),
        ("img_channels", guide.img_channels, teacher.img_channels),
        ("classes", guide.label_dim, teacher.label_dim),
    ):
        if found != expected and not (name == "classes" and found == 0):
            wanted = f"{expected}, or none" if name == "classes" and expected else expected
            raise ValueError(f"--guide has {name} {found}, but the teacher has {expected}; expected {wanted}")
