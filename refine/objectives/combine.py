"""Several objectives at once: `--objective=ikl+sid`."""

from dataclasses import dataclass

import torch
from torch import nn

from refine.noise import Weighting
from refine.objectives.base import Guidance, LossObjective, Objective, ask


@dataclass(frozen=True)
class Sum(Objective):
    """A weighted mean of the gradients of several objectives, which are first made equally long.

    Each further gradient, over all images of the call, is scaled to the 2-norm of the first one:
    Σ wᵢ (‖g₁‖ / ‖gᵢ‖) gᵢ / Σ wᵢ. So the weights are shares, whatever units the parts have, and the learning rate of
    the first part stays right. All parts see the same noise, and each denoiser is evaluated once.

    Attributes:
        parts: The objectives; each kind once.
        weights: Their weights > 0, as many.
    """

    name = "sum"
    parts: tuple[Objective, ...]
    weights: tuple[float, ...]

    @property
    def further_networks(self) -> tuple[str, ...]:  # type: ignore[override]  # a sum knows it of its parts
        return tuple(name for part in self.parts for name in part.further_networks)

    @property
    def logs(self) -> tuple[str, ...]:
        return tuple(tag for part in self.parts for tag in (*part.logs, _tag(part)))

    def __call__(self, teacher, aux, x, c, sigma, noise, weighting: Weighting) -> Guidance:
        through = [part for part in self.parts if isinstance(part, LossObjective)]
        answers = ask(teacher, aux, x, c, sigma, noise, graph=bool(through))
        recorded = Recorded(answers.D_teacher.detach()), Recorded(answers.D_aux.detach())
        total, reference = torch.zeros_like(x), None
        logged: dict[str, torch.Tensor] = {}
        for part, weight in zip(self.parts, self.weights, strict=True):
            if isinstance(part, LossObjective):
                found = part.differentiate(answers, sigma, weighting, keep=part is not through[-1])
            else:
                found = part(*recorded, x, c, sigma, noise, weighting)
            norm = torch.linalg.vector_norm(found.gradient)
            reference = norm if reference is None else reference
            scale = torch.where(norm > 0, reference / norm, 0.0)  # a part that asks for nothing adds nothing
            total += weight / sum(self.weights) * scale * found.gradient
            logged |= {**found.logged, _tag(part): found.gradient.square().mean(dim=[1, 2, 3])}
        return Guidance(total, answers.gap, logged)


def _tag(part: Objective) -> str:
    return f"Loss/{part.name}_gradient"  # mean square over pixels, before scaling


class Recorded(nn.Module):
    """A denoiser that gives the answer it gave before, whatever it is asked."""

    def __init__(self, D_x: torch.Tensor):
        super().__init__()
        self.D_x = D_x

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        return self.D_x
