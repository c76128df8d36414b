"""Density and coverage (Naeem et al. 2020, "Reliable fidelity and diversity metrics for generative models").

Like precision and recall on balls around features that reach to the k-th nearest neighbour, but only around the real
ones. Density: in how many real balls a generated image lies, over k; unlike precision it can exceed 1, and one real
outlier with a wide ball does not raise it to its limit. Coverage: the part of the real balls that hold a generated
image; unlike recall it does not depend on balls around generated outliers. For equal distributions the expected density
is 1 and the expected coverage of N real by M generated images 1 − (N−1)⋯(N−k) / ((N+M−1)⋯(N+M−k)), about 1 − 2^(−k).
"""

from __future__ import annotations

import torch

from refine.metrics.blocks import check_pair, pairs, squared_distances, squared_radii
from refine.metrics.metric import Metric, Numbers, Row, Sample

NEIGHBOURS = 5


def density_coverage(real: torch.Tensor, fake: torch.Tensor, k: int = NEIGHBOURS) -> tuple[torch.Tensor, torch.Tensor]:
    """What each image adds to density and coverage, which are the means.

    Args:
        real: [N, D], N > k.
        fake: [M, D], on the same device.
        k: The neighbour that a ball reaches to.

    Returns:
        Number of real balls that each of `fake` lies in, over k, float64 [M]; and which of the balls around `real` hold
        one of `fake`, bool [N].

    Raises:
        ValueError: If there is no k-th neighbour, or dimensions differ.
    """
    check_pair(real, fake, (k + 1, 1))
    centre = real.mean(dim=0).to(torch.float64)
    radii = squared_radii(real, k, centre)
    counts = torch.zeros(len(fake), dtype=torch.float64, device=fake.device)
    held = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, columns, x, y in pairs(fake, real, centre):
        inside = squared_distances(x, y) <= radii[columns]
        counts[rows] += inside.sum(dim=1)
        held[columns] |= inside.any(dim=0)
    return counts / k, held


def _compute(sample: Sample) -> Numbers:
    if len(sample.real_features) <= NEIGHBOURS:
        return Numbers({})
    densities, held = (part.cpu() for part in density_coverage(*sample.both_features))
    values = {"density": densities.mean().item(), "coverage": held.double().mean().item()}
    return Numbers(values, {"density": densities})


METRIC = Metric(
    name="dc",
    place=60,
    rows=(
        Row("density", "higher", "real balls around an image, over k; 1 = as dense as the real ones", aspect="quality"),
        Row("coverage", "higher", "part of the real balls that hold an image", aspect="diversity"),
    ),
    compute=_compute,
    reference="features",
    keeps_features=True,
    named_like="dc50k5_full",
    neighbours=NEIGHBOURS,
    measured_with=("classes", "spread"),
)
