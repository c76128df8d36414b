"""Fréchet distance of each class by itself: which classes a generator draws badly, where it is conditional."""

from __future__ import annotations

from typing import Any

import torch

from refine.metrics.detectors import Detector
from refine.metrics.frechet import frechet_distance
from refine.metrics.references import Reference
from refine.metrics.statistics import FeatureStatistics

MAX_CLASSES = 100  # a Fréchet distance for each


def reference_classes(reference: Reference, detector: Detector) -> torch.Tensor | None:
    """Classes of a reference's features, int64 [N]: as its file or else the detector says; None if neither."""
    if reference.classes is not None or reference.features is None:
        return reference.classes
    classify = getattr(detector, "classify_features", None)
    with torch.no_grad():
        return None if classify is None else classify(reference.features).argmax(dim=1)


def class_distances(
    fake: torch.Tensor, fake_classes: torch.Tensor, real: torch.Tensor, real_classes: torch.Tensor
) -> list[dict[str, Any]]:
    """For each class of at least two images on both sides: class, num, num_real, fd. Empty beyond `MAX_CLASSES`.

    Distances of few images are biased upwards: compare them between generators at equal N, not with that of all images.
    """
    tables = []
    classes = fake_classes.unique().tolist()
    for index in classes if len(classes) <= MAX_CLASSES else []:
        mine, theirs = fake[fake_classes == index], real[real_classes == index]
        if min(len(mine), len(theirs)) >= 2:
            a, b = FeatureStatistics().update(mine), FeatureStatistics().update(theirs)
            distance = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
            tables.append({"class": index, "num": len(mine), "num_real": len(theirs), "fd": distance})
    return tables
