"""What is measured of every network of a comparison, with the same seeds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from refine.errors import option
from refine.evaluation.sides import Side
from refine.metrics.detectors import Detector, classifies
from refine.metrics.evaluate import Measurement, measure
from refine.metrics.pipeline import my_share, rank_and_world
from refine.metrics.references import Reference
from refine.metrics.registry import ON_REQUEST, USUAL, WITH_CLASSES, chosen, near_to
from refine.metrics.sampling import with_progress

MIN_RANGES = 3


@dataclass(frozen=True)
class Job:
    """Images per seed range, the ranges, and what is asked of the images.

    Attributes:
        detector, reference: The feature space.
        num: Images per seed range; range k holds the seeds k·num … (k+1)·num − 1.
        kinds: Names of metrics.
        batch: Images per batch of the networks that are compared.
        device: Where the detector is.
        progress: Show bars with the time left on stderr.
    """

    detector: Detector
    reference: Reference
    num: int
    seed_ranges: tuple[int, ...]
    kinds: tuple[str, ...]
    batch: int
    device: torch.device | str
    progress: bool

    @property
    def seeds(self) -> list[str]:
        """The ranges, for people."""
        return [f"{index * self.num}-{(index + 1) * self.num - 1}" for index in self.seed_ranges]

    def run(self, side: Side, name: str) -> list[Measurement]:
        """Measurements on each seed range."""
        runs = []
        rank, world = rank_and_world()
        interval = 0.1 if sys.stderr.isatty() else 10.0  # seconds; a log file wants few lines
        shown = {"total": self.num * len(self.seed_ranges), "desc": f"{name} {side.name}", "unit": "img"}
        with tqdm(**shown, disable=not self.progress or rank > 0, mininterval=interval) as bar:
            for index in self.seed_ranges:
                seeds = my_share(range(index * self.num, (index + 1) * self.num), self.batch)
                with option(f"--{name}"):
                    images = with_progress(side.sample(seeds), lambda count: bar.update(count * world))
                    runs.append(measure(images, self.detector, self.reference, self.kinds, contributions=True))
        return runs


def check_numbers(num: int, seed_ranges: Sequence[int], batch: int | None) -> None:
    """Raises ValueError for numbers with which no comparison is possible."""
    if num < 2:
        raise ValueError(f"--num is {num}; expected at least 2")
    if batch is not None and batch < 1:
        raise ValueError(f"--batch is {batch}; expected at least 1")
    text = ",".join(map(str, seed_ranges))
    if len(set(seed_ranges)) < len(seed_ranges) or len(seed_ranges) < MIN_RANGES:
        raise ValueError(f"--seeds is {text}; expected at least {MIN_RANGES} different seed ranges")
    if min(seed_ranges) < 0 or (max(seed_ranges) + 1) * num > 2**32:
        raise ValueError(f"--seeds is {text}; expected ranges of {num} seeds within 0 to 4294967295")


def chosen_kinds(also: Sequence[str], detector: Detector, sides: Sequence[Side]) -> tuple[str, ...]:
    """Names of the metrics to be measured. Raises ValueError if one is unknown, or the detector cannot serve it."""
    with option("--also"):
        if unknown := set(also) - set(ON_REQUEST):
            for metric, other in filter(None, map(near_to, sorted(unknown))):
                raise ValueError(f"{other.upper()} is not measured here; expected {metric.name}, which is near to it")
            raise ValueError(f"{', '.join(sorted(unknown))} is unknown; expected some of {', '.join(ON_REQUEST)}")
        for metric in chosen(also):
            if metric.detector == "probabilities" and not classifies(detector):
                raise ValueError(f"{metric.name} needs a detector that classifies, found {detector.name}")
    with_classes = WITH_CLASSES if all(side.num_classes > 1 for side in sides) else ()
    return (*USUAL, *with_classes, *also)
