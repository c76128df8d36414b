"""Precision and recall on k-nearest-neighbour manifolds.

From Kynkäänniemi et al. 2019, "Improved precision and recall metric for assessing generative models". Precision: the
part of the generated images that lie on the manifold of the real ones (quality). Recall: the part of the real ones
that lie on the manifold of the generated (diversity). A mode-seeking method raises the first and lowers the second,
which one distance alone does not show. The values depend on both numbers of images: compare equal ones.
"""

from __future__ import annotations

import torch

from refine.metrics.blocks import check_pair, pairs, squared_distances, squared_radii
from refine.metrics.metric import Metric, Numbers, Row, Sample

NEIGHBOURS = 3


def precision_recall(real: torch.Tensor, fake: torch.Tensor, k: int = NEIGHBOURS) -> tuple[torch.Tensor, torch.Tensor]:
    """What each image adds to precision and recall, which are the means: whether it lies on the other set's manifold.

    A manifold is the union of balls around a set's features, each reaching to its k-th nearest neighbour in the set.

    Args:
        real: [N, D].
        fake: [M, D], on the same device.
        k: The neighbour that a ball reaches to.

    Returns:
        Which of `fake` lie on the manifold of `real`, bool [M], and which of `real` on that of `fake`, bool [N].

    Raises:
        ValueError: If a set has no k-th neighbour, i.e. fewer than k + 1 features, or dimensions differ.
    """
    check_pair(real, fake, (k + 1, k + 1))
    centre = real.mean(dim=0).to(torch.float64)
    real_radii, fake_radii = (squared_radii(part, k, centre) for part in (real, fake))
    precise, recalled = (torch.zeros(len(part), dtype=torch.bool, device=part.device) for part in (fake, real))
    for rows, columns, x, y in pairs(fake, real, centre):
        distances = squared_distances(x, y)
        precise[rows] |= (distances <= real_radii[columns]).any(dim=1)
        recalled[columns] |= (distances <= fake_radii[rows, None]).any(dim=0)
    return precise, recalled


def _compute(sample: Sample) -> Numbers:
    if min(len(sample.real_features), sample.statistics.num) <= NEIGHBOURS:
        return Numbers({})
    precise, recalled = (part.cpu().double() for part in precision_recall(*sample.both_features))
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
