"""The teacher with and without a label: classifier-free guidance."""

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
                f"--guidance: found {guidance:g}, but --teacher {what}; expected a teacher that knows a missing label"
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
