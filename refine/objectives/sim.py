"""Score implicit matching (Luo et al. 2024, arXiv 2410.16794)."""

from dataclasses import dataclass

import torch

from refine.objectives.base import LossObjective


@dataclass(frozen=True)
class Sim(LossObjective):
    """The pseudo-Huber distance d(y) = √(‖y‖² + C²) − C of y = D_aux − D_teacher.

    For any field u, E⟨u(x_σ), D_q(x_σ) − x⟩ = 0 over the student's x; differentiating this by the student turns the
    gradient of E d(y), in which the student's own denoiser stands, into that of −E⟨d′(y), D_aux − x⟩, in which it does
    not. With d(y) = ‖y‖² / 2 that loss is sid's at α = 1 without the normaliser.

    Attributes:
        huber: C / √d for d numbers in an image; the default is the value of consistency models (Song & Dhariwal 2024,
            arXiv 2310.14189). It only rounds off the kink of ‖·‖ at zero.
    """

    name = "sim"
    huber: float = 0.00054

    def loss(self, x: torch.Tensor, D_teacher: torch.Tensor, D_aux: torch.Tensor) -> torch.Tensor:
        y = D_aux - D_teacher
        squared = y.square().sum(dim=[1, 2, 3], keepdim=True)
        C = self.huber * y[0].numel() ** 0.5
        return y / (squared + C**2).sqrt() * (x - D_aux)
