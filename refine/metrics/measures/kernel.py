"""Kernel distance (Bińkowski et al. 2018, "Demystifying MMD GANs"): KID when the features are Inception's."""

from __future__ import annotations

import torch

from refine.metrics.blocks import squared_mmd
from refine.metrics.metric import Metric, Numbers, Row, Sample


def polynomial(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(x·y / D + 1)³ of all pairs of [n, D] and [m, D], the kernel of KID."""
    return torch.addmm(x.new_ones([1]), x, y.T, alpha=1 / x.shape[1]).pow_(3)


def kernel_distance(fake: torch.Tensor, real: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Squared maximum mean discrepancy with the kernel (x·y / D + 1)³, and the influence of each of `fake` on it.

    All pairs are used, not random subsets (for these see `kernel_subsets.py`): the variance is smaller, nothing is
    random. Unlike a Fréchet distance it has no bias in the number of images; for equal distributions it can be slightly
    negative. Arguments and results are those of `refine.metrics.blocks.squared_mmd`.
    """
    return squared_mmd(fake, real, polynomial)


def _compute(sample: Sample) -> Numbers:
    real, fake = sample.both_features
    distance, influence = kernel_distance(fake, real)
    return Numbers({"kid": distance}, {"kid": influence.cpu()})


METRIC = Metric(
    name="kid",
    place=30,
    rows=(Row("kid", "lower", "kernel distance", in_space=True),),
    compute=_compute,
    reference="features",
    keeps_features=True,
    occasion="always",
    named_like="kid50k_full",
    measured_with=("classes", "spread"),
)
