"""What a classifier sees: the classes of the images, its confidence, and whether they are the classes asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from refine.metrics.metric import Bars, Metric, Numbers, Observed, Row, Sample


class ClassJudge:
    """What a classifier says of images: class histogram, confidence, and agreement with the classes asked for."""

    def __init__(self) -> None:
        self._counts: torch.Tensor | None = None
        self._confidence = 0.0
        self._asked = self._right = 0

    def update(self, batch: Observed) -> None:
        """Adds what the classifier says of a batch, and how often it sees the classes asked for."""
        if batch.judgement is None:
            return
        confidence, predicted = batch.judgement.cpu().max(dim=1)
        counts = predicted.bincount(minlength=batch.judgement.shape[1])
        self._counts = counts if self._counts is None else self._counts + counts
        self._confidence += confidence.sum(dtype=torch.float64).item()
        if batch.classes is not None:
            self._asked += len(batch.classes)
            self._right += int((predicted == batch.classes.cpu()).sum())

    def merge(self, other: ClassJudge) -> None:
        """Adds what another process has judged."""
        if other._counts is not None:
            self._counts = other._counts if self._counts is None else self._counts + other._counts
        self._confidence += other._confidence
        self._asked, self._right = self._asked + other._asked, self._right + other._right

    def result(self) -> dict[str, Any]:
        """label_accuracy, confidence, class_histogram; empty if nothing was judged."""
        if self._counts is None:
            return {}
        total = int(self._counts.sum())
        accuracy = {"label_accuracy": self._right / self._asked} if self._asked else {}
        histogram = [round(count / total, 6) for count in self._counts.tolist()]
        return {**accuracy, "confidence": self._confidence / total, "class_histogram": histogram}


def _compute(sample: Sample) -> Numbers:
    return Numbers(sample.collected["classes"].result())


def _combine(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean class histogram."""
    if "class_histogram" not in results[0]:
        return {}
    columns = zip(*(result["class_histogram"] for result in results), strict=True)
    return {"class_histogram": [sum(column) / len(results) for column in columns]}


def _bars(before: Mapping[str, Any], after: Mapping[str, Any]) -> Bars | None:
    if "class_histogram" not in before or "class_histogram" not in after:
        return None
    return Bars(
        before["class_histogram"],
        after["class_histogram"],
        xlabel="class seen by the classifier",
        ylabel="part of the images",
        level=1 / len(before["class_histogram"]),
        level_label="uniform",
    )


METRIC = Metric(
    name="classes",
    place=70,
    rows=(
        Row("label_accuracy", "higher", "class asked for = class seen", aspect="obedience to labels"),
        Row("confidence", "information", "classifier's mean confidence"),
    ),
    compute=_compute,
    detector="judgement",
    occasion="always",
    collector=ClassJudge,
    combine=_combine,
    bars=_bars,
)
