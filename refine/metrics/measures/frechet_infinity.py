"""Fréchet distance for infinitely many images: FID∞ with Inception (Chong and Forsyth, "Effectively unbiased FID").

The distance of N images is biased upwards by about c/N, with a c that differs between generators. So it is measured on
subsets of several sizes, and a straight line in 1/N is drawn through them to 1/N = 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from refine.metrics.measures.frechet import frechet_distance
from refine.metrics.metric import Metric, Numbers, Row, Sample
from refine.metrics.statistics import FeatureStatistics

POINTS = 15
_SMALLEST = 0.1  # of all images, in the smallest subset


class FrechetInfinity(NamedTuple):
    """The extrapolated distance, and the (number of images, distance) pairs behind it."""

    value: float
    points: list[tuple[int, float]]


def frechet_infinity(
    features: torch.Tensor, mu: torch.Tensor, sigma: torch.Tensor, points: int = POINTS, seed: int = 0
) -> FrechetInfinity:
    """Extrapolates the Fréchet distance of `features` to a reference. Costs `points` Fréchet distances.

    Args:
        features: [N, D]. The line is straight from about 2·D images on; smaller subsets bend it.
        mu, sigma: Mean [D] and covariance [D, D] of the reference.
        points: Subsets; their sizes are evenly spaced between a tenth of N and N.
        seed: Seed of the random subsets.

    Raises:
        ValueError: There are too few features for two sizes of subsets.
    """
    low = max(int(len(features) * _SMALLEST), 2)
    sizes = sorted({int(size) for size in np.linspace(low, len(features), points)})
    if len(sizes) < 2:
        raise ValueError(f"an extrapolation needs subsets of different size, found {len(features)} images")
    rng = np.random.RandomState(seed)
    pairs = []
    for size in sizes:
        chosen = torch.from_numpy(rng.permutation(len(features))[:size])
        statistics = FeatureStatistics().update(features[chosen])
        pairs.append((size, frechet_distance(statistics.mean, statistics.covariance, mu, sigma)))
    slope_and_value = np.polyfit([1 / size for size, _ in pairs], [value for _, value in pairs], 1)
    return FrechetInfinity(float(slope_and_value[1]), pairs)


def _compute(sample: Sample) -> Numbers:
    found = frechet_infinity(sample.features, sample.real.mu, sample.real.sigma)
    return Numbers({"fdinf": found.value, "fdinf_points": found.points})


METRIC = Metric(
    name="fdinf",
    place=20,
    rows=(Row("fdinf", "lower", "Fréchet distance for infinitely many images", in_space=True, fid_name="fidinf"),),
    compute=_compute,
    reference="statistics",
    keeps_features=True,
    named_like="fidinf50k_full",
    measured_with=("fd",),
)
