"""Score identity distillation (Zhou et al. 2024, arXiv 2404.04057)."""

from dataclasses import dataclass

import torch

from refine.objectives.base import LossObjective, inverse_distance


@dataclass(frozen=True)
class Sid(LossObjective):
    """The Fisher divergence of the diffused distributions, without the score of the student.

    The divergence is E‖D_T − D_q‖² with D_q the student's own, unknown denoiser. Because x is, on average over what
    gave x_σ, D_q(x_σ), the product ⟨D_T − D_q, D_T − x⟩ has the same mean as ‖D_T − D_q‖²; putting aux for D_q gives
    one estimate, ‖D_T − D_φ‖² another. The loss is the first minus α times the second: α = 1 leaves
    ⟨D_T − D_φ, D_φ − x⟩.

    Attributes:
        alpha: α; published with 1.0 to 1.2.
    """

    name = "sid"
    alpha: float = 1.0

    def loss(self, x: torch.Tensor, D_teacher: torch.Tensor, D_aux: torch.Tensor) -> torch.Tensor:
        gap = D_teacher - D_aux
        return inverse_distance(x, D_teacher) * gap * ((D_teacher - x) - self.alpha * gap)
