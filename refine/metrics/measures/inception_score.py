"""Inception Score (Salimans et al. 2016, "Improved techniques for training GANs").

The exponential of the mean KL divergence between each image's class probabilities and those of all images: high if
images are of clear and of many classes.
"""

from __future__ import annotations

import itertools

import torch

from refine.metrics.metric import Metric, Numbers, Row, Sample

SPLITS = 10


def inception_score(probabilities: torch.Tensor, splits: int = SPLITS) -> tuple[float, float]:
    """Mean and standard deviation (divided by the number of splits, as in the literature) over splits.

    Args:
        probabilities: Class probabilities [N, classes], in the order of the images.
        splits: Consecutive parts of the images that are scored by themselves; at most N.

    Raises:
        ValueError: There are fewer images than splits.
    """
    if len(probabilities) < splits or splits < 1:
        raise ValueError(f"an Inception Score of {splits} splits needs as many images, found {len(probabilities)}")
    bounds = [len(probabilities) * index // splits for index in range(splits + 1)]
    scores = [_score(probabilities[low:high]) for low, high in itertools.pairwise(bounds)]
    values = torch.tensor(scores, dtype=torch.float64)
    return values.mean().item(), values.std(correction=0).item()


def _score(probabilities: torch.Tensor) -> float:
    p = probabilities.to(torch.float64)
    # p·log p is 0 where p is 0
    divergence = (torch.xlogy(p, p) - torch.xlogy(p, p.mean(dim=0))).sum(dim=1)
    return divergence.mean().exp().item()


def _compute(sample: Sample) -> Numbers:
    if sample.probabilities is None:
        return Numbers({})
    mean, std = inception_score(sample.probabilities, min(SPLITS, len(sample.probabilities)))
    return Numbers({"is": mean, "is_std": std})


METRIC = Metric(
    name="is",
    place=40,
    rows=(
        Row("is", "higher", "Inception Score: clear images, many classes", in_space=True, needs_reference=False),
        Row(
            *("is_std", "information", "its standard deviation over the splits"),
            in_space=True,
            beside="is",
            needs_reference=False,
        ),
    ),
    compute=_compute,
    detector="probabilities",
    named_like="is50k",
    measured_with=("classes", "spread"),
)
