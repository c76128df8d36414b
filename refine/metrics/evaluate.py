"""All numbers of one set of images: from batches through a detector to distances, diversity and class statistics."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from refine.images import QUANTISATION
from refine.metrics.detectors import Detector, metric_names
from refine.metrics.frechet import frechet_distance
from refine.metrics.kernel import kernel_distance
from refine.metrics.precision_recall import precision_recall
from refine.metrics.references import Reference
from refine.metrics.sampling import Batch
from refine.metrics.statistics import FeatureStatistics


def evaluate(batches: Iterable[Batch], detector: Detector, reference: Reference) -> dict[str, Any]:
    """Measures images against a reference. Needs memory for the features of all images, never for the images.

    Args:
        batches: Images on the detector's device, with the classes asked for where there are any.
        detector: The feature space.
        reference: Made with the same detector.

    Returns:
        JSON-able dict. Numbers, each only where it can be computed:
            fd_<space> (or fid): Fréchet distance, see `metric_names`.
            kid_<space> (or kid), precision, recall: if the reference holds features.
            label_accuracy: part of the images that the classifier takes for the class asked for; if it is a classifier
                and classes were asked for.
            confidence: the classifier's mean probability of the class it decides for.
            class_histogram: part of the images that fall into each class.
            spread: within-class spread, see `ClassSpread`.
        and what they stand on: num, detector, reference, quantisation, versions, seconds.

    Raises:
        ValueError: If detector and reference do not fit, there are fewer than two images, or features are not finite.
    """
    start = time.monotonic()
    reference.check_detector(detector)
    statistics = FeatureStatistics(keep_features=reference.features is not None)
    judge, spread = ClassJudge(), ClassSpread()
    for images, classes in batches:
        with torch.no_grad():
            features, probabilities = detector(images), detector.classify(images)
        if statistics.num == 0:
            reference.check_detector(detector)  # a TorchScript detector knows its dimension only now
        statistics.update(features)
        if probabilities is not None:
            judge.update(probabilities, classes)
        seen = classes if classes is not None else None if probabilities is None else probabilities.argmax(dim=1)
        spread.update(images, seen)
    return {
        **distances(statistics, detector, reference),
        **judge.result(),
        "spread": spread.result(),
        "num": statistics.num,
        "detector": describe_detector(detector),
        "reference": describe_reference(reference),
        "quantisation": QUANTISATION,
        "versions": library_versions(),
        "seconds": round(time.monotonic() - start, 2),
    }


def distances(statistics: FeatureStatistics, detector: Detector, reference: Reference) -> dict[str, float]:
    """The metrics that need features only."""
    frechet, kernel = metric_names(detector)
    values = {frechet: frechet_distance(statistics.mean, statistics.covariance, reference.mu, reference.sigma)}
    if reference.features is not None:
        values[kernel] = kernel_distance(reference.features, statistics.features)
        if min(len(reference.features), statistics.num) > 3:  # needs third neighbours
            values["precision"], values["recall"] = precision_recall(reference.features, statistics.features)
    return values


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

    def result(self) -> float:
        """The spread; 0 if no class has two images."""
        spreads = []
        for num, total, squares in self._sums.values():
            if num >= 2:
                variance = (squares - total.square() / num) / (num - 1)
                spreads.append(math.sqrt(2 * max(variance.mean().item(), 0.0)) / 127.5)
        return sum(spreads) / len(spreads) if spreads else 0.0


def describe_detector(detector: Detector) -> dict[str, Any]:
    """JSON-able: name, space, sha256, feature_dim."""
    return {
        "name": detector.name,
        "space": detector.space,
        "sha256": detector.sha256,
        "feature_dim": detector.feature_dim,
    }


def describe_reference(reference: Reference) -> dict[str, Any]:
    """JSON-able: name, sha256, num."""
    return {"name": reference.name, "sha256": reference.sha256, "num": reference.num}


def library_versions() -> dict[str, str]:
    """Versions of what the numbers were computed with."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
