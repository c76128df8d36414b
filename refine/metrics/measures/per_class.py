"""Fréchet distance of each class by itself: which classes a generator draws badly, where it is conditional."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from refine.metrics.detectors import Detector
from refine.metrics.measures.frechet import frechet_distance
from refine.metrics.metric import Metric, Numbers, Sample, Table, mean_and_std, plus_minus
from refine.metrics.references import Reference
from refine.metrics.statistics import FeatureStatistics

MAX_CLASSES = 100  # a Fréchet distance for each


def reference_classes(
    reference: Reference, detector: Detector, device: torch.device | str = "cpu"
) -> torch.Tensor | None:
    """Classes of a reference's features, int64 [N]: as its file or else the detector, on `device`, says; None if
    neither."""
    if reference.classes is not None or reference.features is None:
        return reference.classes
    classify = getattr(detector, "classify_features", None)
    with torch.no_grad():
        return None if classify is None else classify(reference.features.to(device)).argmax(dim=1).cpu()


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


def _compute(sample: Sample) -> Numbers:
    real_classes = None if sample.classes is None else reference_classes(sample.real, sample.detector, sample.device)
    if sample.classes is None or real_classes is None:
        return Numbers({})
    tables = class_distances(sample.features, sample.classes, sample.real_features, real_classes)
    return Numbers({"per_class": tables} if tables else {})


def _combine(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Class → mean and std of its Fréchet distance, for the classes that all seed ranges measured."""
    if not all("per_class" in result for result in results):
        return {}
    by_class: dict[int, list[dict[str, Any]]] = {}
    for result in results:
        for row in result["per_class"]:
            by_class.setdefault(row["class"], []).append(row)
    whole = {index: rows for index, rows in sorted(by_class.items()) if len(rows) == len(results)}
    means = [
        {"class": index, "num": sum(row["num"] for row in rows), **mean_and_std([row["fd"] for row in rows])}
        for index, rows in whole.items()
    ]
    return {"per_class": means}


def _table(before: Mapping[str, Any], after: Mapping[str, Any]) -> Table | None:
    """Fréchet distance of each class before and after, where both have it."""
    tables = [{row["class"]: row for row in side.get("per_class", [])} for side in (before, after)]
    rows = [
        (str(index), plus_minus(old), plus_minus(tables[1][index]), f"{tables[1][index]['mean'] - old['mean']:+.3g}")
        for index, old in tables[0].items()
        if index in tables[1]
    ]
    note = (
        "Fréchet distance of each class by itself. Few images of a class bias it upwards: compare the columns, not a "
        "class with the whole."
    )
    return Table("Classes", ("class", "before", "after", "difference"), rows, note) if rows else None


METRIC = Metric(
    name="per_class",
    place=90,
    rows=(),
    compute=_compute,
    reference="classes",
    keeps_features=True,
    occasion="classes",
    combine=_combine,
    table=_table,
)
