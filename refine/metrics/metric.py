"""What a metric is: its names and needs, how it is computed from what was seen of the images, and how it is shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch

from refine.metrics.detectors import Detector, FeatureSpace
from refine.metrics.references import Reference
from refine.metrics.statistics import FeatureStatistics

#: Which values of a number are better; 'information' = neither.
Direction = Literal["lower", "higher", "information"]
#: What a metric needs of the reference; 'classes' = features, and the class of each.
ReferenceNeed = Literal["nothing", "statistics", "features", "classes"]
#: What a metric needs of the detector beside features: class probabilities of any kind ('probabilities'), or, where the
#: detector has them, those of the classes that generators are conditioned on ('judgement').
DetectorNeed = Literal["features", "probabilities", "judgement"]
#: When a comparison measures it: always; where both networks have classes; when it is asked for, as it takes longer.
Occasion = Literal["always", "classes", "asked"]

#: At the end of names of numbers in a feature space that were measured against images of a teacher.
VS_TEACHER = "-vs-teacher"


def _check(what: str, found: str, expected: Any) -> None:
    if found not in get_args(expected):
        raise ValueError(f"{what} is {found!r}; expected one of {', '.join(get_args(expected))}")


def is_better(direction: str, value: float, than: float) -> bool:
    """Whether a value is strictly better than another one.

    Raises:
        ValueError: The direction is neither 'lower' nor 'higher'.
    """
    if direction not in ("lower", "higher"):
        raise ValueError(f"the direction is {direction!r}; expected lower or higher, where values are to be judged")
    return value < than if direction == "lower" else value > than


@dataclass(frozen=True)
class Row:
    """One number of a metric: what results call it, and a row of tables and reports.

    Attributes:
        name: In what `Metric.compute` returns. Results call it `name`, or `name_<space>` if it depends on the space.
        direction: Which values are better.
        explanation: What it says, with its unit, for people.
        in_space: Whether the number depends on the scale of the feature space, and so carries the space's name.
        fid_name: What results call it in the space of FID; None = `name`.
        beside: Name of the row that this number accompanies, such as its standard deviation; it then stands in results
            and logs as that row's key with the rest of the name behind it, and is neither compared nor shown.
        aspect: What a change of it shows, in one word for the summary of a comparison; empty = not mentioned there.
        needs_reference: Whether its name has to say so where it was compared with images of a teacher.
        in_curve: Whether the curve of a run shows it beside the leading distance; only for shares between 0 and 1.
    """

    name: str
    direction: Direction
    explanation: str
    in_space: bool = False
    fid_name: str | None = None
    beside: str | None = None
    aspect: str = ""
    in_curve: bool = False
    needs_reference: bool = True

    def __post_init__(self) -> None:
        _check(f"the direction of {self.name}", self.direction, Direction)

    def key(self, space: FeatureSpace) -> str:
        """What results call the number in this space: fid or fd_digits, precision, is_digits_std, and
        fd_digits-vs-teacher where images of a teacher stand for the data, which is never called FID."""
        stem = self.beside or self.name
        key = stem
        if self.in_space:
            vs_teacher = space.against_teacher and self.needs_reference
            key = (self.fid_name or stem) if space.is_fid and not vs_teacher else f"{stem}_{space.slug}"
            key += VS_TEACHER if vs_teacher else ""
        return key + self.name.removeprefix(stem)


class Observed(NamedTuple):
    """What was seen of one batch.

    Attributes:
        images: uint8 [N, C, H, W].
        classes: Asked for, int64 [N], or None.
        judgement: The detector's probabilities of the classes that generators are conditioned on, float32
            [N, classes]; None if it does not judge these.
    """

    images: torch.Tensor
    classes: torch.Tensor | None
    judgement: torch.Tensor | None


class Collector(Protocol):
    """What a metric itself remembers of the images, where features, probabilities and classes are not enough."""

    def update(self, batch: Observed) -> None:
        """Adds a batch."""

    def merge(self, other: Any) -> None:
        """Adds what another process has collected."""


@dataclass
class Sample:
    """What is known of all images when metrics are computed.

    Attributes:
        detector: Made the features.
        statistics: Mean and covariance of the features.
        reference: What is compared with; there is one if the metric needs something of it.
        probabilities: Class probabilities, float32 [N, classes], if a metric needs and the detector has them.
        classes: Asked for, int64 [N], if there are classes.
        collected: Name of a metric → what it collected itself.
        with_contributions: Whether contributions of single images are asked for.
        device: Where the features were made, and where metrics of all pairs are computed.
    """

    detector: Detector
    statistics: FeatureStatistics
    reference: Reference | None = None
    probabilities: torch.Tensor | None = None
    classes: torch.Tensor | None = None
    collected: Mapping[str, Any] = field(default_factory=dict)
    with_contributions: bool = False
    device: torch.device | str = "cpu"

    @property
    def features(self) -> torch.Tensor:
        """float32 [N, D] on the CPU, in the order of the images; for metrics that keep features."""
        return self.statistics.features

    @cached_property
    def both_features(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the reference [M, D] and of the images [N, D], float32 on `device`, for metrics of all pairs."""
        return self.real_features.to(self.device), self.features.to(self.device)

    @property
    def real(self) -> Reference:
        """The reference, for metrics that need one."""
        assert self.reference is not None
        return self.reference

    @property
    def real_features(self) -> torch.Tensor:
        """float32 [M, D], for metrics that need features of the reference."""
        assert self.real.features is not None
        return self.real.features


class Numbers(NamedTuple):
    """What a metric found.

    Attributes:
        values: Name of a row → float; and what is not a number (lists, tables) under its own name. Empty if the images
            do not allow it, for instance if there are too few.
        contributions: Name of a row → what each image contributes to it, float64 [N] in the order of the images: its
            first-order influence. A statistic T of N images changes, when image i counts a little more, by its
            influence: T(weights) ≈ T + mean(w_i·I_i), so that a bootstrap over images resamples numbers (the
            infinitesimal jackknife; Efron 1982), and with the same seeds for two networks the common part of a latent
            cancels. Rows that are not named here get their interval from the seed ranges, which is far wider.
    """

    values: Mapping[str, Any]
    contributions: Mapping[str, torch.Tensor] = {}


class Table(NamedTuple):
    """A table of its own in the report; the first cell of a row is its head."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str


class Bars(NamedTuple):
    """Bars before and after in the report's figure, and a level to compare them with."""

    before: Sequence[float]
    after: Sequence[float]
    xlabel: str
    ylabel: str
    level: float
    level_label: str


#: Results of one network in several seed ranges → what their summary holds of this metric beside the rows.
Combine = Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]


@dataclass(frozen=True)
class Metric:
    """One metric; see the files of `refine.metrics.measures`.

    Attributes:
        name: What `evaluate` and `--also` call it.
        place: Its place among the others in results and tables, from small to large; the first one leads comparisons.
        rows: Its numbers; the first one leads where training runs ask for it by name.
        compute: What was seen of the images → its numbers.
        reference, detector: What it needs; it is left out where that is missing.
        keeps_features: Whether it needs the features of all images, 4·N·D bytes.
        occasion: When comparisons measure it.
        named_like: An example of what training runs call it, such as fid50k_full; None = they cannot ask for it.
        neighbours: The digit that such a name may carry behind the number of images, as in pr50k3_full.
        resembles: Names of published metrics that it is near to and may not be called, for who asks for one of these.
        measured_with: Names of the metrics that are measured along with it where it is asked for by such a name.
        collector: Makes what it collects itself, while images are seen.
        combine: See `Combine`.
        table, bars: (summary before, summary after) → what the report shows of them; None = nothing.
    """

    name: str
    place: int
    rows: tuple[Row, ...]
    compute: Callable[[Sample], Numbers]
    reference: ReferenceNeed = "nothing"
    detector: DetectorNeed = "features"
    keeps_features: bool = False
    occasion: Occasion = "asked"
    named_like: str | None = None
    neighbours: int | None = None
    resembles: tuple[str, ...] = ()
    measured_with: tuple[str, ...] = ()
    collector: Callable[[], Collector] | None = None
    combine: Combine | None = None
    table: Callable[[Mapping[str, Any], Mapping[str, Any]], Table | None] | None = None
    bars: Callable[[Mapping[str, Any], Mapping[str, Any]], Bars | None] | None = None

    def __post_init__(self) -> None:
        _check(f"what {self.name} needs of the reference", self.reference, ReferenceNeed)
        _check(f"what {self.name} needs of the detector", self.detector, DetectorNeed)
        _check(f"the occasion of {self.name}", self.occasion, Occasion)

    def is_possible(self, detector: Detector, reference: Reference | None) -> bool:
        """Whether the reference has what the metric needs. (What a detector can do shows only when it sees images.)"""
        if self.reference == "nothing" or reference is None:
            return self.reference == "nothing"
        if self.reference == "statistics":
            return True
        has_classes = reference.classes is not None or hasattr(detector, "classify_features")
        return reference.features is not None and (self.reference == "features" or has_classes)

    def wants_probabilities(self, detector: Detector) -> bool:
        """Whether the detector has to classify the images."""
        return self.detector == "probabilities" or (self.detector == "judgement" and detector.judges_classes)


def plus_minus(value: Mapping[str, Any], sign: str = "") -> str:
    """Mean ± standard deviation in digits that fit the size of the mean; `sign` '+' shows that of positive means."""
    digits = 4 if abs(value["mean"]) < 0.1 else 3 if abs(value["mean"]) < 10 else 2
    return f"{value['mean']:{sign}.{digits}f} ± {value['std']:.{digits}f}"


def mean_and_std(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (N − 1) and the values themselves."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
    return {"mean": mean, "std": math.sqrt(variance), "values": list(values)}
