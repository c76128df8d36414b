"""How the noise level σ is drawn, and how the difference of two denoisers is weighted across noise levels."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from refine.config import SigmaOptions

LAWS = ("lognormal", "loguniform", "karras")
WEIGHTINGS = ("1", "sigma^P")


@dataclass(frozen=True)
class SigmaLaw(SigmaOptions):
    """A distribution of noise levels, confined to [sigma_min, sigma_max].

    Attributes:
        name: 'lognormal': ln σ ~ N(P_mean, P_std²), truncated to the range (Karras et al. 2022, table 1);
            'loguniform': ln σ uniform over the range; 'karras': σ^(1/ρ) uniform over the range, the density of the
            EDM sampler's steps (Karras et al. 2022, eq. 5), which favours coarse scales.
        P_mean, P_std: Mean and standard deviation of ln σ, for 'lognormal'.
        rho: ρ, for 'karras'.
        sigma_min, sigma_max: The range, in units of [-1, 1] images.

    Raises:
        ValueError: An unknown name, or numbers that give no distribution.
    """

    def __post_init__(self):
        if self.name not in LAWS:
            raise ValueError(f"unknown distribution of sigma {self.name!r}; expected one of {', '.join(LAWS)}")
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(f"sigma range is {self.sigma_min:g} to {self.sigma_max:g}; expected 0 < min < max")
        if not (self.P_std > 0 and self.rho > 0 and math.isfinite(self.P_mean)):
            raise ValueError(
                f"P_mean {self.P_mean:g}, P_std {self.P_std:g}, rho {self.rho:g}; P_std and rho must be > 0"
            )

    def sample(self, n: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Draw n noise levels, float32 (n, 1, 1, 1), from the default random generator of `device`."""
        u = torch.rand([n, 1, 1, 1], device=device, dtype=torch.float64)
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        if self.name == "loguniform":
            sigma = (low + u * (high - low)).exp()
        elif self.name == "karras":
            low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
            sigma = (low + u * (high - low)) ** self.rho
        else:  # inverse of the normal distribution function between the two ends
            low, high = _normal_cdf((low - self.P_mean) / self.P_std), _normal_cdf((high - self.P_mean) / self.P_std)
            if not low < high:
                raise ValueError(f"ln sigma ~ N({self.P_mean:g}, {self.P_std:g}²) has no mass in the range of sigma")
            sigma = (self.P_mean + self.P_std * torch.special.ndtri(low + u * (high - low))).exp()
        return sigma.clamp(self.sigma_min, self.sigma_max).float()


def _normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


Weighting = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def make_weighting(text: str) -> Weighting:
    """The weight on D_aux − D_teacher, as a function (sigma, x, D_teacher) → a tensor that broadcasts to x.

    Args:
        text: '1': none, which is w(σ) = σ² on the difference of scores (Luo et al. 2023, Diff-Instruct);
            'sigma^P' with a number P, such as 'sigma^-1': σ^P.

    Raises:
        ValueError: Any other text.
    """
    if text == "1":
        return lambda sigma, x, D_teacher: torch.ones_like(sigma)
    if text == "dmd":
        raise ValueError("the normaliser of DMD belongs to its objective: --objective=dmd")
    name, _, power = text.partition("^")
    try:
        if name != "sigma" or not math.isfinite(float(power)):
            raise ValueError
    except ValueError:
        raise ValueError(f"unknown weighting {text!r}; expected one of {', '.join(WEIGHTINGS)}") from None
    return lambda sigma, x, D_teacher: sigma ** float(power)
