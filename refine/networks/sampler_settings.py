"""How a diffusion model is sampled: the parameters of EDM's algorithms 1 and 2, and which ones suit which network."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

MAX_STEPS = 10_000
OF_CHURN = ("S_min", "S_max", "S_noise")  # without S_churn they mean nothing


@dataclass(frozen=True)
class SamplerSettings:
    """Parameters of `refine.networks.sampler.heun_sampler`, under the names of Karras et al. 2022.

    Attributes:
        steps: Noise levels; 2 · steps − 1 evaluations of the network.
        rho: How the levels are spaced: evenly in sigma^(1/rho).
        sigma_min, sigma_max: The last and the first of them, clamped to the network's own range.
        S_churn: Fresh noise along the way; 0 = none, the sampler is deterministic.
        S_min, S_max: Noise levels between which noise is added.
        S_noise: Standard deviation of that noise.

    Raises:
        ValueError: A value is impossible; the message begins with its option.
    """

    steps: int = 18
    rho: float = 7.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    S_churn: float = 0.0
    S_min: float = 0.0
    S_max: float = math.inf
    S_noise: float = 1.0

    def __post_init__(self) -> None:
        wrong = {
            "steps": not 1 <= self.steps <= MAX_STEPS and f"a whole number, 1 to {MAX_STEPS}",
            "rho": not 0 < self.rho < math.inf and "a number > 0",
            "sigma_min": not 0 < self.sigma_min < math.inf and "a number > 0",
            "sigma_max": not self.sigma_min < self.sigma_max < math.inf and f"a number > {self.sigma_min:g}",
            "S_churn": not 0 <= self.S_churn < math.inf and "a number ≥ 0",
            "S_min": not 0 <= self.S_min < math.inf and "a number ≥ 0",
            "S_max": not self.S_min <= self.S_max and f"a number ≥ {self.S_min:g}",
            "S_noise": not 0 <= self.S_noise < math.inf and "a number ≥ 0",
        }
        for name, expected in wrong.items():
            if expected:
                raise ValueError(f"{flag(name)} is {getattr(self, name):g}; expected {expected}")

    @property
    def is_stochastic(self) -> bool:
        return self.S_churn > 0

    def describe(self) -> str:
        """In words, what differs from the defaults: '18 Heun steps', '256 Heun steps, S_churn 40, S_min 0.05'."""
        usual = SamplerSettings()
        names = [field.name for field in dataclasses.fields(self)][1:]
        names = names if self.is_stochastic else [name for name in names if name not in OF_CHURN]
        changed = [f"{name} {getattr(self, name):g}" for name in names if getattr(self, name) != getattr(usual, name)]
        return ", ".join([f"{self.steps} Heun steps", *changed])


def flag(name: str) -> str:
    """The option of a field: '--sigma-min', '--s-churn'."""
    return "--" + name.lower().replace("_", "-")


class Described(Protocol):
    """What is known of a network before it is built, see `refine.checkpoints.NetworkInfo`."""

    @property
    def img_resolution(self) -> int: ...
    @property
    def label_dim(self) -> int: ...
    @property
    def class_name(self) -> str: ...


#: EDM's settings for ImageNet at 64×64 with classes, the only ones of its table with fresh noise.
IMAGENET_64 = SamplerSettings(256, S_churn=40, S_min=0.05, S_max=50, S_noise=1.003)


def usual_settings(network: Described) -> tuple[SamplerSettings, str]:
    """The settings that Karras et al. 2022 (table 2 and appendix) and 2024 (EDM2) sample a network with, and why.

    Files do not say what a network was trained on, so it is told from the size of its images and its classes.
    """
    if network.class_name == "edm2.Precond":
        return SamplerSettings(32), "as published for EDM2's"
    if network.img_resolution == 64 and network.label_dim == 1000:
        return IMAGENET_64, "as published for EDM's of ImageNet at 64x64"
    if network.img_resolution < 64:
        return SamplerSettings(18), "as published for EDM's of 32x32 images (CIFAR-10)"
    return SamplerSettings(40), "as published for EDM's of 64x64 images (FFHQ, AFHQ)"


@dataclass(frozen=True)
class SamplerChoice:
    """What a user asked for of a sampler; the rest is what suits the network.

    Attributes:
        given: Field of `SamplerSettings` → value.
    """

    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def resolve(self, network: Described) -> tuple[SamplerSettings, str]:
        """The settings for a network, and where they come from. Raises ValueError as `SamplerSettings` does."""
        usual, reason = usual_settings(network)
        if not self.given:
            return usual, reason
        chosen = dataclasses.replace(usual, **self.given)
        if not chosen.is_stochastic and (idle := next((name for name in OF_CHURN if name in self.given), None)):
            raise ValueError(f"{flag(idle)} is about fresh noise, and there is none; expected --s-churn beside it")
        asked = ", ".join(flag(name) for name in self.given)
        left = set(self.given) < {field.name for field in dataclasses.fields(SamplerSettings)}
        return chosen, f"{asked} as asked for" + (f", the rest {reason}" if left else "")
