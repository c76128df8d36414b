"""Integral KL divergence, the objective of Diff-Instruct (Luo et al. 2023, arXiv 2305.18455)."""

from dataclasses import dataclass

from refine.diff_instruct import student_gradient
from refine.noise import Weighting
from refine.objectives.base import Guidance, Objective


@dataclass(frozen=True)
class Ikl(Objective):
    """w (D_aux − D_teacher), see `refine.diff_instruct`."""

    name = "ikl"

    def __call__(self, teacher, aux, x, c, sigma, noise, weighting: Weighting) -> Guidance:
        return Guidance(*student_gradient(teacher, aux, x, c, sigma, noise, weighting))
