"""Precision and recall on k-nearest-neighbour manifolds.

From Kynkäänniemi et al. 2019, "Improved precision and recall metric for assessing generative models". Precision: the
part of the generated images that lie on the manifold of the real ones (quality). Recall: the part of the real ones
that lie on the manifold of the generated (diversity). A mode-seeking method raises the first and lowers the second,
which one distance alone does not show. The values depend on both numbers of images: compare equal ones.
"""

from __future__ import annotations

import torch

from refine.metrics.metric import Metric, Numbers, Row, Sample

BLOCK_ELEMENTS = 1 << 20  # distances held at once: 8 MiB in float64
NEIGHBOURS = 3


def precision_recall(real: torch.Tensor, fake: torch.Tensor, k: int = NEIGHBOURS) -> tuple[torch.Tensor, torch.Tensor]:
    """What each image adds to precision and recall, which are the means: whether it lies on the other set's manifold.

    A manifold is the union of balls around a set's features, each reaching to its k-th nearest neighbour in the set.

    Args:
        real: [N, D].
        fake: [M, D].
        k: The neighbour that a ball reaches to.

    Returns:
        Which of `fake` lie on the manifold of `real`, bool [M], and which of `real` on that of `fake`, bool [N].

    Raises:
        ValueError: If a set has no k-th neighbour, i.e. fewer than k + 1 features, or dimensions differ.
    """
    if min(len(real), len(fake)) <= k or real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"features have shapes {list(real.shape)} and {list(fake.shape)}, "
            f"expected [N, D] and [M, D] with N and M at least {k + 1}"
        )
    centre = real.to(torch.float64).mean(dim=0)  # near the origin |x|² + |y|² − 2x·y loses least
    real, fake = real.to(torch.float64) - centre, fake.to(torch.float64) - centre
    return covered(fake, real, k), covered(real, fake, k)


def covered(points: torch.Tensor, manifold: torch.Tensor, k: int) -> torch.Tensor:
    """Which of `points` [M, D] lie in at least one ball of the manifold of `manifold` [N, D], bool [M].

    Both are float64.
    """
    norms = manifold.square().sum(dim=1)
    # The tolerance is rounding of |x|² + |y|² − 2x·y: a ball of radius 0 still covers the points that coincide in it.
    radii = kth_neighbour_distances(manifold, k) + 1e-12 * norms.max()
    inside = [
        torch.addmm(norms - radii, block, manifold.T, alpha=-2).amin(dim=1) <= -block.square().sum(dim=1)
        for block in points.split(_rows(manifold))
    ]
    return torch.cat(inside)


def kth_neighbour_distances(points: torch.Tensor, k: int) -> torch.Tensor:
    """Squared distance from each of `points` [N, D], float64, to its k-th nearest other point [N]."""
    norms = points.square().sum(dim=1)
    nearest = [  # the nearest of all is the point itself
        torch.addmm(norms, block, points.T, alpha=-2).topk(k + 1, dim=1, largest=False).values[:, -1]
        for block in points.split(_rows(points))
    ]
    return (torch.cat(nearest) + norms).clamp_(min=0)


def _rows(points: torch.Tensor) -> int:
    """Rows per block of distances to `points`; |x|² is the same along a row and added only where needed."""
    return max(BLOCK_ELEMENTS // len(points), 1)


def _compute(sample: Sample) -> Numbers:
    if min(len(sample.real_features), sample.statistics.num) <= NEIGHBOURS:
        return Numbers({})
    precise, recalled = (part.double() for part in precision_recall(sample.real_features, sample.features))
    return Numbers({"precision": precise.mean().item(), "recall": recalled.mean().item()}, {"precision": precise})


METRIC = Metric(
    name="pr",
    place=50,
    rows=(
        Row("precision", "higher", "part of the images that look real", aspect="quality", in_curve=True),
        Row("recall", "higher", "part of the real images that are covered", aspect="diversity", in_curve=True),
    ),
    compute=_compute,
    reference="features",
    keeps_features=True,
    occasion="always",
    named_like="pr50k3_full",
    neighbours=NEIGHBOURS,
    measured_with=("classes", "spread"),
)
