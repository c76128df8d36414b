"""Sliced Wasserstein distance of features (Rabin et al. 2011; Bonneel et al. 2015).

The squared 2-Wasserstein distance of the features' projections on a direction, averaged over all directions. In one
dimension the best way to move one set onto the other is to keep the order, so it is exact, and no shape is assumed of
the features: a Fréchet distance moves Gaussians of the same mean and covariance, this one the features themselves. In
D dimensions it is at most a D-th of what full transport costs. It has nothing to do with the SWD of Progressive GAN,
which compares patches of pixels.

Directions are orthonormal bases of random orientation, as many as make at least 1000 directions. Over a whole basis the
squared projections of a vector add up to its squared length: the part of a distance that comes from a shift of the mean
is exact, |shift|² / D, whatever the basis.
"""

from __future__ import annotations

import numpy as np
import torch

from refine.metrics.blocks import check_pair
from refine.metrics.metric import Metric, Numbers, Row, Sample

DIRECTIONS = 1000  # at least; whole bases
SEED = 0
_LARGEST_BASIS = 2048  # directions of one basis: with more features it is a part of one
_HELD = 1 << 23  # projections held at once: 64 MiB in float64, and some copies of it
_ROWS = 4096  # vectors that are projected at once


def directions(dim: int, seed: int = SEED) -> torch.Tensor:
    """Orthonormal bases, the same on every machine up to rounding: float64 [L, D], L ≥ 1000."""
    rng, size = np.random.RandomState(seed), min(dim, _LARGEST_BASIS)
    bases = [np.linalg.qr(rng.standard_normal([dim, size]))[0].T for _ in range(-(-DIRECTIONS // size))]
    return torch.from_numpy(np.concatenate(bases))


def sliced_wasserstein(fake: torch.Tensor, real: torch.Tensor, theta: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Mean squared 2-Wasserstein distance of the projections, and the influence of each of `fake` on it.

    The influence is the mean of Kantorovich's potentials φ, which have φ'(x) = 2·(x − T(x)), T being the map that keeps
    the order: what it costs to have a little more of the set at x. Memory beside the features: about 0.6 GB.

    Args:
        fake: [N, D], N ≥ 1.
        real: [M, D], M ≥ 1, on the same device.
        theta: Directions of length 1 [L, D].

    Returns:
        The distance, squared, in squared units of the features; and float64 [N] of mean 0.

    Raises:
        ValueError: If a set is empty, or dimensions differ.
    """
    check_pair(fake, real, (1, 1))
    mine, theirs, shares = (part.to(fake.device) for part in _matching(len(fake), len(real)))
    # where one vector of `fake` ends and the next begins: what is next to it on the other side, from both sides
    steps = torch.arange(1, len(fake), device=fake.device) * len(real)
    before, after = (steps - 1) // len(fake), steps // len(fake)
    total = torch.zeros([], dtype=torch.float64, device=fake.device)
    influence = torch.zeros(len(fake), dtype=torch.float64, device=fake.device)
    for part in theta.to(fake.device, torch.float64).split(max(_HELD // (len(fake) + len(real)), 1)):
        x, order = _projected(fake, part).sort(dim=1)
        y = _projected(real, part).sort(dim=1).values
        total += (x[:, mine] - y[:, theirs]).square_() @ shares @ shares.new_ones(len(part))
        step = x.diff(dim=1) * (x[:, 1:] + x[:, :-1] - y[:, before] - y[:, after])
        potential = torch.cat([step.new_zeros([len(part), 1]), step.cumsum(dim=1)], dim=1)
        influence.index_add_(0, order.flatten(), potential.flatten())
    influence /= len(theta)
    return total.item() / len(theta), influence - influence.mean()


def _matching(n: int, m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How n sorted values of weight 1/n go to m of weight 1/m in order: which, to which, and how much of the whole."""
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()  # in units of 1/(n·m)
    lengths = ends.diff(prepend=ends.new_zeros(1))
    return (ends - 1) // m, (ends - 1) // n, lengths.double() / (n * m)


def _projected(features: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """float64 [L, N]."""
    return torch.cat([theta @ rows.to(torch.float64).T for rows in features.split(_ROWS)], dim=1)


def _compute(sample: Sample) -> Numbers:
    real, fake = sample.both_features
    distance, influence = sliced_wasserstein(fake, real, directions(real.shape[1]))
    return Numbers({"sliced": distance}, {"sliced": influence.cpu()})


METRIC = Metric(
    name="sliced",
    place=25,
    rows=(Row("sliced", "lower", "squared Wasserstein distance, mean over 1-d projections", in_space=True),),
    compute=_compute,
    reference="features",
    keeps_features=True,
    named_like="sliced50k_full",
    resembles=("mind",),
    measured_with=("classes", "spread"),
)
