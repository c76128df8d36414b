"""The family of objectives around the same three networks: `--objective=ikl|dmd|sid|sim`, or a sum such as `ikl+sid`.

An objective is called as (teacher, aux, x, c, sigma, noise, weighting) and gives the student's images a gradient, with
which the caller goes on as `x.backward(gradient)`, and mean|D_aux − D_teacher| per image. Below, x_σ is x + σn, D_T and
D_φ are teacher and aux at (x_σ, σ), w is the weighting, n = mean|x − D_T| over one image's pixels.

| name | gradient on x, or loss L                                   | through both networks | source                  |
|------|------------------------------------------------------------|-----------------------|-------------------------|
| ikl  | w (D_φ − D_T)                                              | no                    | Luo et al., 2305.18455  |
| dmd  | w (D_φ − D_T) / n                                          | no                    | Yin et al., 2311.18828  |
| sid  | L = w ⟨D_T − D_φ, (D_T − x) − α (D_T − D_φ)⟩ / n           | yes                   | Zhou et al., 2404.04057 |
| sim  | L = w ⟨u, x − D_φ⟩, u = (D_φ − D_T) / √(‖D_φ − D_T‖² + C²) | yes                   | Luo et al., 2410.16794  |

ikl and dmd follow the KL divergence between the diffused student and the diffused data, sid and sim the distance of
their scores. The two latter have a value, and its gradient goes through x_σ into both networks, whose parameters are
frozen.

A new objective is a file here, with a frozen dataclass that derives from `Objective`, or from `LossObjective` where a
loss is all there is to write, and a line in `REGISTRY`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from refine.objectives.base import Guidance, LossObjective, Objective, inverse_distance
from refine.objectives.combine import Sum
from refine.objectives.dmd import Dmd
from refine.objectives.ikl import Ikl
from refine.objectives.sid import Sid
from refine.objectives.sim import Sim

__all__ = [
    "REGISTRY",
    "Dmd",
    "Guidance",
    "Ikl",
    "LossObjective",
    "Objective",
    "Sid",
    "Sim",
    "Sum",
    "inverse_distance",
    "make_objective",
]

REGISTRY: dict[str, type[Objective]] = {kind.name: kind for kind in (Ikl, Dmd, Sid, Sim)}


def make_objective(text: str, options: Mapping[str, Any] | None = None) -> Objective:
    """The objective that a text names.

    Args:
        text: A name of `REGISTRY`; or a sum of several, each with a weight if it is not 1: 'ikl+sid',
            'ikl:0.7+sid:0.3'. See `Sum`.
        options: Parameters of the objectives, as NAME_PARAMETER: `sid_alpha` is alpha of sid. Those that are missing
            keep their defaults, other options are not looked at.

    Raises:
        ValueError: An unknown name, one that comes twice, or an impossible weight.
    """
    terms = [term.strip().partition(":") for term in text.split("+")]
    parts = tuple(_make(name, options or {}) for name, _, _ in terms)
    if len(parts) == 1 and not terms[0][1]:
        return parts[0]
    if len({part.name for part in parts}) < len(parts) or len(parts) == 1:
        raise ValueError(f"found {text!r}; expected a sum of different objectives, such as ikl:0.7+sid:0.3")
    return Sum(parts, tuple(_weight(number) if colon else 1.0 for _, colon, number in terms))


def _make(name: str, options: Mapping[str, Any]) -> Objective:
    if name not in REGISTRY:
        raise ValueError(f"unknown objective {name!r}; expected one of {', '.join(REGISTRY)}, or a sum such as ikl+sid")
    kind = REGISTRY[name]
    names = {field.name: f"{name}_{field.name}" for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{field: options[option] for field, option in names.items() if option in options})


def _weight(text: str) -> float:
    try:
        weight = float(text)
        if not 0 < weight < math.inf:
            raise ValueError
    except ValueError:
        raise ValueError(f"found a weight of {text!r}; expected a number > 0, as in ikl:0.7+sid:0.3") from None
    return weight
