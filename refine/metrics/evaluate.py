"""All numbers of one set of images: from batches through a detector to distances, diversity and class statistics."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import refine
from refine.images import QUANTISATION
from refine.metrics.contributions import frechet_contributions, kernel_contributions
from refine.metrics.detectors import Detector, metric_names, observe, score_name
from refine.metrics.frechet import frechet_distance
from refine.metrics.frechet_infinity import frechet_infinity
from refine.metrics.inception_score import SPLITS, inception_score
from refine.metrics.kernel import kernel_distance
from refine.metrics.per_class import class_distances, reference_classes
from refine.metrics.pipeline import gathered, prefetched
from refine.metrics.precision_recall import coverage
from refine.metrics.references import Reference
from refine.metrics.sampling import Batch
from refine.metrics.statistics import FeatureStatistics

#: What can be asked of `evaluate`: Fréchet distance, kernel distance, precision and recall, Fréchet distance for
#: infinitely many images, Inception Score, classes and within-class spread, Fréchet distance of each class.
KINDS = ("fd", "kid", "pr", "fdinf", "is", "classes", "per_class")
#: Everything that costs next to nothing beside the images.
USUAL = ("fd", "kid", "pr", "classes")


@dataclass
class Measurement:
    """Numbers of a set of images.

    Attributes:
        results: JSON-able, see `evaluate`.
        contributions: Metric → what each image contributes to it, float64 [N] in the order of the images; only where
            they were asked for.
        features: float32 [N, D] where they were kept.
    """

    results: dict[str, Any]
    contributions: dict[str, torch.Tensor] = field(default_factory=dict)
    features: torch.Tensor | None = None


def evaluate(
    batches: Iterable[Batch], detector: Detector, reference: Reference | None, kinds: Collection[str] = USUAL
) -> dict[str, Any]:
    """Measures images against a reference.

    Memory: never for the images; for a Fréchet distance alone none that grows with their number N; kernel distance,
    precision, recall and FID∞ keep 4·N·D bytes of features, an Inception Score 4·N bytes times the number of classes.

    Args:
        batches: This process's images on the detector's device, with the classes asked for where there are any.
        detector: The feature space.
        reference: Made with the same detector. None = only what needs no reference.
        kinds: Of `KINDS`; what cannot be computed is left out.

    Returns:
        JSON-able dict. Numbers, each only where it can be computed:
            fd_<space> (or fid): Fréchet distance, see `metric_names`.
            kid_<space> (or kid), precision, recall: if the reference holds features.
            fdinf_<space> (or fidinf): Fréchet distance for infinitely many images, and fdinf_points behind it.
            is_<space> (or is): Inception Score, and its std over the splits in <name>_std; if the detector classifies.
            label_accuracy: part of the images that the classifier takes for the class asked for; if it judges the
                classes of generators and classes were asked for.
            confidence: the classifier's mean probability of the class it decides for.
            class_histogram: part of the images that fall into each class.
            spread: within-class spread, see `ClassSpread`.
            per_class: a table for each class, see `class_distances`.
        and what they stand on: num, detector, reference, quantisation, covariance, versions, seconds.

    Raises:
        ValueError: If detector and reference do not fit, there are fewer than two images, or features are not finite.
    """
    return measure(batches, detector, reference, kinds).results


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
    seen = _look(batches, detector, reference, kinds, contributions)
    seen.statistics.mean, seen.statistics.covariance  # noqa: B018 - refuse fewer than two images before anything else
    found: dict[str, Any] = {}
    parts: dict[str, torch.Tensor] = {}
    if reference is not None:
        found, parts = _distances(seen, detector, reference, kinds, contributions)
    if "is" in kinds and seen.probabilities:
        name, probabilities = score_name(detector), torch.cat(seen.probabilities)
        found[name], found[f"{name}_std"] = inception_score(probabilities, min(SPLITS, len(probabilities)))
    if "classes" in kinds:
        found |= seen.judge.result() | {"spread": seen.spread.result()}
    if "per_class" in kinds and reference is not None and (tables := _per_class(seen, detector, reference)):
        found["per_class"] = tables
    facts = {
        "num": seen.statistics.num,
        "detector": describe_detector(detector),
        "reference": None if reference is None else describe_reference(reference),
        "quantisation": QUANTISATION,
        "covariance": "divided by N - 1",
        "versions": library_versions(),
        "seconds": round(time.monotonic() - start, 2),
    }
    features = seen.statistics.features if seen.statistics.keep_features else None
    return Measurement({**found, **facts}, parts, features)


@dataclass
class _Seen:
    """What is remembered of the images."""

    statistics: FeatureStatistics
    judge: ClassJudge
    spread: ClassSpread
    probabilities: list[torch.Tensor] = field(default_factory=list)
    classes: list[torch.Tensor] = field(default_factory=list)

    def merge(self, other: _Seen) -> None:
        self.statistics.merge(other.statistics)
        self.judge.merge(other.judge)
        self.spread.merge(other.spread)
        self.probabilities += other.probabilities
        self.classes += other.classes


def _look(batches, detector, reference, kinds: Collection[str], contributions: bool) -> _Seen:
    """Everything that is kept of the images of all processes; an error in one of them is raised in all."""
    needs = (
        {"kid", "pr", "fdinf", "per_class"} if reference is not None and reference.features is not None else {"fdinf"}
    )
    keep = contributions or bool(needs & set(kinds))
    seen = _Seen(FeatureStatistics(keep_features=keep), ClassJudge(), ClassSpread())
    error = None
    try:
        for images, classes in prefetched(batches):
            _look_at(seen, images, classes, detector, reference, kinds)
    except Exception as caught:  # noqa: BLE001 - raised below, once the others, who would wait for this one, know
        error = caught
    parts = gathered((seen, error and (str(error) or type(error).__name__)))
    if error is not None:
        raise error
    for _, failure in parts:
        if failure is not None:
            raise ValueError(failure)
    whole = parts[0][0]
    for part, _ in parts[1:]:
        whole.merge(part)
    return whole


@torch.no_grad()
def _look_at(seen: _Seen, images, classes, detector: Detector, reference, kinds: Collection[str]) -> None:
    judged = "classes" in kinds and detector.judges_classes
    features, probabilities = observe(detector, images, classes=judged or "is" in kinds)
    if seen.statistics.num == 0 and reference is not None:
        reference.check_detector(detector)  # some detectors know their dimension only now
    seen.statistics.update(features)
    if "is" in kinds and probabilities is not None:
        seen.probabilities.append(probabilities.cpu())
    if classes is not None:
        seen.classes.append(classes.cpu())
    if "classes" not in kinds:
        return
    if judged and probabilities is not None:
        seen.judge.update(probabilities, classes)
    predicted = probabilities.argmax(dim=1) if judged and probabilities is not None else None
    seen.spread.update(images, predicted if classes is None else classes)


def _distances(
    seen: _Seen, detector: Detector, reference: Reference, kinds: Collection[str], contributions: bool
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The metrics that need a reference, and what each image contributes to them."""
    statistics, real = seen.statistics, reference.features
    frechet, kernel = metric_names(detector)
    values: dict[str, Any] = {}
    parts: dict[str, torch.Tensor] = {}
    moments = (statistics.mean, statistics.covariance, reference.mu, reference.sigma)
    if "fd" in kinds:
        values[frechet] = frechet_distance(*moments)
        if contributions:
            parts[frechet] = frechet_contributions(statistics.features, *moments)
    if "kid" in kinds and real is not None:
        values[kernel] = kernel_distance(real, statistics.features)
        if contributions:
            parts[kernel] = kernel_contributions(statistics.features, real)
    if "pr" in kinds and real is not None and min(len(real), statistics.num) > 3:  # needs third neighbours
        precise, recalled = coverage(real, statistics.features)
        values["precision"], values["recall"] = (part.double().mean().item() for part in (precise, recalled))
        if contributions:
            parts["precision"] = precise.double()
    if "fdinf" in kinds:
        name = frechet.replace("fid", "fidinf").replace("fd_", "fdinf_")
        values[name], values["fdinf_points"] = frechet_infinity(statistics.features, reference.mu, reference.sigma)
    return values, parts


def _per_class(seen: _Seen, detector: Detector, reference: Reference) -> list[dict[str, Any]]:
    if not seen.classes or reference.features is None:
        return []
    real_classes = reference_classes(reference, detector)
    if real_classes is None:
        return []
    return class_distances(seen.statistics.features, torch.cat(seen.classes), reference.features, real_classes)


class ClassJudge:
    """What a classifier says of images: class histogram, confidence, and agreement with the classes asked for."""

    def __init__(self) -> None:
        self._counts: torch.Tensor | None = None
        self._confidence = 0.0
        self._asked = self._right = 0

    def update(self, probabilities: torch.Tensor, classes: torch.Tensor | None) -> None:
        """Adds probabilities [N, classes] and the classes asked for, int64 [N], or None."""
        confidence, predicted = probabilities.cpu().max(dim=1)
        counts = predicted.bincount(minlength=probabilities.shape[1])
        self._counts = counts if self._counts is None else self._counts + counts
        self._confidence += confidence.sum(dtype=torch.float64).item()
        if classes is not None:
            self._asked += len(classes)
            self._right += int((predicted == classes.cpu()).sum())

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


class ClassSpread:
    """Within-class spread of images: root mean square difference per pixel between two images of one class.

    In units of [-1, 1] images; averaged over the classes that have at least two images. The mean over all pairs
    follows exactly from each class's sums, so neither images nor pairs are kept. It falls when a generator draws
    the same few images of a class again and again. Images without a class are one class.
    """

    def __init__(self) -> None:
        self._sums: dict[
            int, tuple[int, torch.Tensor, torch.Tensor]
        ] = {}  # class → (num, sum, sum of squares) per pixel

    def update(self, images: torch.Tensor, classes: torch.Tensor | None) -> None:
        """Adds uint8 images [N, C, H, W] and their classes, int64 [N], or None."""
        pixels = images.flatten(1).to(torch.float64)  # sums of integers: exact in any order
        classes = torch.zeros(len(pixels), dtype=torch.int64) if classes is None else classes.cpu()
        for index in classes.unique().tolist():
            mine = pixels[(classes == index).to(pixels.device)]
            num, total, squares = self._sums.get(index, (0, 0, 0))
            self._sums[index] = (num + len(mine), total + mine.sum(dim=0), squares + mine.square().sum(dim=0))

    def merge(self, other: ClassSpread) -> None:
        """Adds what another process has seen."""
        for index, (num, total, squares) in other._sums.items():
            mine = self._sums.get(index, (0, 0, 0))
            self._sums[index] = (mine[0] + num, mine[1] + total, mine[2] + squares)

    def result(self) -> float:
        """The spread; 0 if no class has two images."""
        spreads = []
        for num, total, squares in self._sums.values():
            if num >= 2:
                variance = (squares - total.square() / num) / (num - 1)
                spreads.append(math.sqrt(2 * max(variance.mean().item(), 0.0)) / 127.5)
        return sum(spreads) / len(spreads) if spreads else 0.0


def describe_detector(detector: Detector) -> dict[str, Any]:
    """JSON-able: name, space, sha256, feature_dim, resize, and why it counts as the detector of FID, or None."""
    return {
        "name": detector.name,
        "space": detector.space,
        "sha256": detector.sha256,
        "feature_dim": detector.feature_dim,
        "resize": detector.resize,
        "fid_basis": detector.fid_basis,
    }


def describe_reference(reference: Reference) -> dict[str, Any]:
    """JSON-able: name, sha256, num, form."""
    return {"name": reference.name, "sha256": reference.sha256, "num": reference.num, "form": reference.form}


def library_versions() -> dict[str, str]:
    """Versions of what the numbers were computed with."""
    versions = {"refine": refine.__version__, "python": platform.python_version()}
    return versions | {"torch": torch.__version__, "numpy": np.__version__}
