"""All numbers of one set of images: from batches through a detector to the metrics of the registry."""

from __future__ import annotations

import platform
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import refine
from refine.images import QUANTISATION
from refine.metrics.detectors import Detector, observe, space_of
from refine.metrics.metric import Collector, Metric, Observed, Sample
from refine.metrics.pipeline import made_by_all, prefetched
from refine.metrics.references import Reference
from refine.metrics.registry import USUAL, chosen, rows_in
from refine.metrics.sampling import Batch
from refine.metrics.statistics import FeatureStatistics
from refine.torch_utils.misc import exact_products


@dataclass
class Measurement:
    """Numbers of a set of images.

    Attributes:
        results: JSON-able, see `evaluate`.
        contributions: Key of a number → what each image contributes to it, float64 [N] in the order of the images; only
            where they were asked for, and for the numbers of which they are known.
    """

    results: dict[str, Any]
    contributions: dict[str, torch.Tensor] = field(default_factory=dict)


def evaluate(
    batches: Iterable[Batch], detector: Detector, reference: Reference | None, kinds: Collection[str] = USUAL
) -> dict[str, Any]:
    """Measures images against a reference.

    Memory: never for the images; for a Fréchet distance alone none that grows with their number N; metrics that keep
    features take 4·N·D bytes, those of class probabilities 4·N bytes times the number of classes.

    Args:
        batches: This process's images on the detector's device, with the classes asked for where there are any.
        detector: The feature space.
        reference: Made with the same detector. None = only what needs no reference.
        kinds: Names of metrics of `refine.metrics.registry`; what cannot be computed is left out.

    Returns:
        JSON-able dict: the numbers of the metrics, see docs/metrics.md and the files of `refine.metrics.measures`, and
        what they are based on: num, detector, reference, quantisation, covariance, versions, seconds.

    Raises:
        ValueError: If a metric is unknown, detector and reference do not fit, there are fewer than two images, or
            features are not finite.
    """
    return measure(batches, detector, reference, kinds).results


@exact_products()
def measure(
    batches: Iterable[Batch],
    detector: Detector,
    reference: Reference | None,
    kinds: Collection[str] = USUAL,
    contributions: bool = False,
) -> Measurement:
    """As `evaluate`; with `contributions` also what each image contributes, for which features are kept."""
    start = time.monotonic()
    if reference is not None:
        reference.check_detector(detector)
    metrics = [metric for metric in chosen(kinds) if metric.is_possible(detector, reference)]
    seen = _look(batches, detector, reference, metrics, contributions)
    seen.statistics.mean, seen.statistics.covariance  # noqa: B018 - refuse fewer than two images before anything else
    sample = Sample(
        detector,
        seen.statistics,
        reference,
        torch.cat(seen.probabilities) if seen.probabilities else None,
        torch.cat(seen.classes) if seen.classes else None,
        seen.collected,
        contributions,
        seen.device,
    )
    found = _numbers(metrics, sample)
    facts = {
        "num": seen.statistics.num,
        "detector": describe_detector(detector, seen.shape),
        "reference": None if reference is None else describe_reference(reference),
        "quantisation": QUANTISATION,
        "covariance": "divided by N - 1",
        "versions": library_versions(),
        "seconds": round(time.monotonic() - start, 2),
    }
    return Measurement({**found.results, **facts}, found.contributions)


def _numbers(metrics: Sequence[Metric], sample: Sample) -> Measurement:
    """What the metrics found, under the keys of this feature space."""
    space = space_of(sample.detector, sample.reference is not None and sample.reference.is_teacher)
    keys = {row.name: key for key, row in rows_in(space, beside=True).items()}
    found = Measurement({})
    for metric in metrics:
        values, contributions = metric.compute(sample)
        own = {row.name for row in metric.rows}
        assert contributions.keys() <= values.keys() & own
        assert all(name in own or not isinstance(value, float) for name, value in values.items()), "a number has a row"
        found.results |= {keys.get(name, name): value for name, value in values.items()}
        if sample.with_contributions:
            found.contributions |= {keys[name]: value for name, value in contributions.items()}
    return found


@dataclass
class _Seen:
    """What is remembered of the images."""

    statistics: FeatureStatistics
    collected: dict[str, Collector]
    shape: list[int] | None = None  # of an image
    device: torch.device | str = "cpu"
    probabilities: list[torch.Tensor] = field(default_factory=list)
    classes: list[torch.Tensor] = field(default_factory=list)

    def merge(self, other: _Seen) -> None:
        self.statistics.merge(other.statistics)
        self.shape = self.shape or other.shape
        for name, collector in self.collected.items():
            collector.merge(other.collected[name])
        self.probabilities += other.probabilities
        self.classes += other.classes


def _look(
    batches: Iterable[Batch],
    detector: Detector,
    reference: Reference | None,
    metrics: Sequence[Metric],
    contributions: bool,
) -> _Seen:
    """Everything that is kept of the images of all processes; an error in one of them is raised in all."""
    keep = contributions or any(metric.keeps_features for metric in metrics)
    collected = {metric.name: metric.collector() for metric in metrics if metric.collector is not None}
    seen = _Seen(FeatureStatistics(keep_features=keep), collected)

    def look() -> _Seen:
        for images, classes in prefetched(batches):
            _look_at(seen, images, classes, detector, reference, metrics)
        return seen

    whole, *others = made_by_all(look)
    whole.device = seen.device  # each process computes on its own
    for part in others:
        whole.merge(part)
    return whole


@torch.no_grad()
def _look_at(
    seen: _Seen,
    images: torch.Tensor,
    classes: torch.Tensor | None,
    detector: Detector,
    reference: Reference | None,
    metrics: Sequence[Metric],
) -> None:
    classify = any(metric.wants_probabilities(detector) for metric in metrics)
    features, probabilities = observe(detector, images, classify)
    if seen.statistics.num == 0 and reference is not None:
        reference.check_detector(detector)  # some detectors know their dimension only now
    seen.statistics.update(features)
    seen.shape, seen.device = list(images.shape[1:]), features.device
    if probabilities is not None and any(metric.detector == "probabilities" for metric in metrics):
        seen.probabilities.append(probabilities.cpu())
    if classes is not None:
        seen.classes.append(classes.cpu())
    batch = Observed(images, classes, probabilities if detector.judges_classes else None)
    for collector in seen.collected.values():
        collector.update(batch)


def image_note(detector: Detector, shape: Sequence[int] | None) -> str | None:
    """What a detector does to images [C, H, W] that people should know of; None if nothing."""
    note = getattr(detector, "image_note", None)
    return None if note is None or shape is None else note(shape)


def describe_detector(detector: Detector, shape: Sequence[int] | None = None) -> dict[str, Any]:
    """JSON-able: name, space, sha256, feature_dim, resize, and why it counts as the detector of FID, or None.

    With `note`, what distances in this space are, where the detector says it; and `image_note`, where it does something
    to images of that shape, [C, H, W], that people should know of.
    """
    notes = {"note": getattr(detector, "note", None), "image_note": image_note(detector, shape)}
    return {
        "name": detector.name,
        "space": detector.space,
        "sha256": detector.sha256,
        "feature_dim": detector.feature_dim,
        "resize": detector.resize,
        "fid_basis": detector.fid_basis,
        **{name: note for name, note in notes.items() if note is not None},
    }


def describe_reference(reference: Reference) -> dict[str, Any]:
    """JSON-able: name, sha256, num, form; and teacher, which is True, where it is images of one."""
    facts = {"name": reference.name, "sha256": reference.sha256, "num": reference.num, "form": reference.form}
    return {**facts, "teacher": True} if reference.is_teacher else facts


def library_versions() -> dict[str, str]:
    """Versions of what the numbers were computed with."""
    versions = {"refine": refine.__version__, "python": platform.python_version()}
    return versions | {"torch": torch.__version__, "numpy": np.__version__}
