"""Maximum mean discrepancy with a Gaussian kernel, the distance of CMMD (Jayasumana et al. 2024, "Rethinking FID").

1000 times the squared discrepancy for exp(−|x − y|² / (2σ²)), in any feature space. The kernel is bounded and sees all
moments, so nothing is assumed about the shape of the features, unlike with a Fréchet distance. Only with the embeddings
of CLIP (ViT-L/14, 336 px) is it CMMD. No such detector ships with the toolkit, and nothing here is called so.
"""

from __future__ import annotations

import torch

from refine.metrics.blocks import squared_distances, squared_mmd
from refine.metrics.metric import Metric, Numbers, Row, Sample

SCALE = 1000.0
#: The published bandwidth, which is for features of length 1, such as normalised embeddings of CLIP.
UNIT_BANDWIDTH = 10.0
_UNIT = 1e-3  # how far lengths may be from 1
_LOOKED_AT = 1000  # features of the reference that the bandwidth is taken from


def bandwidth_for(real: torch.Tensor) -> float:
    """σ for a reference: 10 if all its features have length 1, as published, otherwise the median of their distances.

    Where features have no common length, a fixed σ would mean something else in each space; the median of the distances
    between different features fits itself to the space. It is that of at most 1000
    features at even steps. It depends on the reference alone, so that all that is compared with it has one kernel.

    Args:
        real: [M, D], M ≥ 2.

    Returns:
        σ in units of the features; 0 if they are all the same.
    """
    if ((real.norm(dim=1) - 1).abs() < _UNIT).all():
        return UNIT_BANDWIDTH
    some = real[:: -(-len(real) // _LOOKED_AT)].to(torch.float64)
    distances = torch.pdist(some)
    distances = distances[distances > 0]
    return distances.quantile(0.5).item() if len(distances) else 0.0


def gaussian_mmd(fake: torch.Tensor, real: torch.Tensor, bandwidth: float) -> tuple[float, torch.Tensor]:
    """1000 times the unbiased squared discrepancy, and the influence of each of `fake` on it.

    Args:
        fake: [N, D], N ≥ 2.
        real: [M, D], M ≥ 2, on the same device.
        bandwidth: σ > 0.

    Returns:
        The distance, at most 2000, and float64 [N] of mean 0.

    Raises:
        ValueError: If there are fewer than two vectors in a set, or their dimensions differ.
    """

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return squared_distances(x, y).clamp_(min=0).mul_(-0.5 / bandwidth**2).exp_()

    distance, influence = squared_mmd(fake, real, kernel)
    return SCALE * distance, SCALE * influence


def _compute(sample: Sample) -> Numbers:
    real, fake = sample.both_features
    bandwidth = bandwidth_for(real)
    if bandwidth == 0:
        return Numbers({})
    distance, influence = gaussian_mmd(fake, real, bandwidth)
    return Numbers({"mmd": distance, "mmd_bandwidth": bandwidth}, {"mmd": influence.cpu()})


METRIC = Metric(
    name="mmd",
    place=35,
    rows=(
        Row("mmd", "lower", "1000 times the squared discrepancy with a Gaussian kernel", in_space=True),
        Row("mmd_bandwidth", "information", "σ of its kernel, in units of the features", in_space=True, beside="mmd"),
    ),
    compute=_compute,
    reference="features",
    keeps_features=True,
    named_like="mmd50k_full",
    resembles=("cmmd",),
    measured_with=("classes", "spread"),
)
