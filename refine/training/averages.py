"""Power-function averages of the student, whose length is chosen after the run (Karras et al. 2024, EDM2, section 3).

An average at time t weighs the networks of the run so far by p(τ) ∝ τ^γ, 0 < τ ≤ t, so that its length is a share of
the run, not a number of images: early networks are forgotten as the run goes on. The length is told by the standard
deviation of p relative to t. A snapshot keeps two lengths; averages of any other length, at any time of the run, are
linear combinations of those, found by least squares between the profiles p (EDM2, appendix C).
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from torch import nn

from refine.checkpoints.native import load_networks, read_metadata
from refine.training.ema import update_emas

LONGEST = 1 / math.sqrt(12)  # of the plain mean of the whole run, γ = 0


def relative_std(gamma: float) -> float:
    """Standard deviation of the profile t^γ on (0, 1]."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def gamma_of(length: float) -> float:
    """γ of the profile with this relative standard deviation.

    Raises:
        ValueError: No profile with γ ≥ 0 has it.
    """
    if not 0.005 <= length <= LONGEST:
        raise ValueError(f"found {length:g}; expected a length of 0.005 to {LONGEST:.3f} of the run")
    return float(brentq(lambda gamma: relative_std(gamma) - length, 0.0, 1 / 0.005**2))


def average_name(length: float) -> str:
    """Of an average in a snapshot: 'G_avg050' for 0.05."""
    return f"G_avg{round(length * 1000):03d}"


@dataclass(frozen=True)
class Profile:
    """p(τ) = (γ + 1) τ^γ / t^(γ + 1) on (0, t]; integrates to 1. The unit of t is free, but the same for all."""

    gamma: float
    t: float

    @classmethod
    def of(cls, length: float, t: float) -> "Profile":
        return cls(gamma_of(length), t)

    def product(self, other: "Profile") -> float:
        """The integral of p·q over time, in closed form."""
        early, late = sorted((self, other), key=lambda profile: profile.t)
        gammas = early.gamma + late.gamma + 1
        return (early.gamma + 1) * (late.gamma + 1) * (early.t / late.t) ** late.gamma / (late.t * gammas)


def combination(stored: Sequence[Profile], wanted: Profile) -> np.ndarray:
    """Coefficients with which the stored averages come nearest to the wanted one, in the least squares sense.

    They are made to sum to 1: what all networks of the run share, which is most of a pretrained network, must stay.

    Returns:
        float64 (len(stored),). They are not confined to [0, 1].
    """
    scale = wanted.t  # all times relative to it: products of order 1
    relative = [Profile(profile.gamma, profile.t / scale) for profile in stored]
    target = Profile(wanted.gamma, 1.0)
    gram = np.array([[a.product(b) for b in relative] for a in relative])
    right = np.array([profile.product(target) for profile in relative])
    # Of the Lagrangian: the normal equations, bordered by the constraint.
    n = len(relative)
    bordered = np.block([[gram, np.ones((n, 1))], [np.ones((1, n)), np.zeros((1, 1))]])
    return np.linalg.lstsq(bordered, np.append(right, 1.0), rcond=1e-12)[0][:n]


class PowerAverages:
    """Running averages of a network, one for each length.

    Args:
        network: As it is before the first update.
        lengths: Relative standard deviations of the profiles.

    Attributes:
        networks: length → the average, in eval mode, without gradients. Before the first update, the network itself.
    """

    def __init__(self, network: nn.Module, lengths: Sequence[float]):
        self.networks: dict[float, Any] = {
            length: copy.deepcopy(network).eval().requires_grad_(False) for length in lengths
        }
        self._gammas = {length: gamma_of(length) for length in lengths}

    def update(self, network: nn.Module, before: float, now: float) -> None:
        """Take in the network that the run has at time `now`; the last update was at `before`."""
        share = before / now
        update_emas([(self.networks[length], share ** (gamma + 1)) for length, gamma in self._gammas.items()], network)

    def longest(self) -> Any:
        """The longest average; None where there is none."""
        return self.networks[max(self.networks)] if self.networks else None

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """length, as text → the average's state."""
        return {str(length): average.state_dict() for length, average in self.networks.items()}

    def load_state_dict(self, state: Mapping[str, dict[str, torch.Tensor]]) -> None:
        """Go on from `state_dict`'s result. Raises ValueError where it has other lengths."""
        if set(state) != {str(length) for length in self.networks}:
            raise ValueError(f"it holds averages of the lengths {', '.join(state) or 'none'}")
        for length, average in self.networks.items():
            average.load_state_dict(state[str(length)])


def reconstruct(snapshots: Sequence[tuple[float, Path]], length: float, kimg: float) -> tuple[nn.Module, float]:
    """The average of a length at a time of a run, from what its snapshots keep.

    Args:
        snapshots: (kimg, file) of the run's snapshots.
        length: Relative standard deviation of its profile.
        kimg: The end of the profile.

    Returns:
        The generator, and the relative error of its profile: 0 = exactly this average.

    Raises:
        ValueError: The snapshots keep no averages, or the length is impossible.
    """
    stored = [(path, name, Profile.of(kept, time)) for time, path in snapshots for name, kept in kept_in(path).items()]
    if not stored:
        raise ValueError("its snapshots keep no averages of the student; expected a run with --average=power")
    wanted = Profile.of(length, kimg)
    profiles = [profile for _, _, profile in stored]
    coefficients = combination(profiles, wanted)
    gram = np.array([[a.product(b) for b in profiles] for a in profiles])
    distance = coefficients @ gram @ coefficients - 2 * coefficients @ [p.product(wanted) for p in profiles]
    error = math.sqrt(max(distance / wanted.product(wanted) + 1, 0.0))
    totals: dict[str, torch.Tensor] = {}
    for (path, name, _), coefficient in zip(stored, coefficients, strict=True):
        network = load_networks(path, [name])[name]  # one at a time: a run may keep many
        for key, value in network.state_dict().items():
            if value.is_floating_point():
                totals.setdefault(key, torch.zeros_like(value, dtype=torch.float64)).add_(value.double() * coefficient)
    state = network.state_dict()
    state |= {key: total.to(state[key].dtype) for key, total in totals.items()}
    network.load_state_dict(state)
    return network, error


def kept_in(path: Path) -> dict[str, float]:
    """name → length of the averages in a snapshot."""
    names = read_metadata(path)["networks"]
    return {name: int(name[5:]) / 1000 for name in names if name.startswith("G_avg")}
