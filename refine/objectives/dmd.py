"""Distribution matching distillation, without its regression loss (Yin et al. 2024, arXiv 2311.18828)."""

from dataclasses import dataclass

from refine.diff_instruct import student_gradient
from refine.noise import Weighting
from refine.objectives.base import Guidance, Objective, inverse_distance


@dataclass(frozen=True)
class Dmd(Objective):
    """The integral KL divergence with one more factor in the weight, the normaliser: w / mean|x − D_teacher|."""

    name = "dmd"

    def __call__(self, teacher, aux, x, c, sigma, noise, weighting: Weighting) -> Guidance:
        def normalised(sigma, x, D_teacher):
            return weighting(sigma, x, D_teacher) * inverse_distance(x, D_teacher)

        return Guidance(*student_gradient(teacher, aux, x, c, sigma, noise, normalised))
