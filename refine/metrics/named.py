"""Metrics by name, as training runs ask for them: `fid50k_full`, `kid50k_full`, `pr50k3_full`, `is50k`, `fd5k-digits`.

A name is `<kind><N>[k][_full][-<detector>]`. The kind says what leads the results; N is a number of images, `k` counts
thousands; `_full` is what NVIDIA's tools add where the reference is the whole training set, and changes nothing here:
the reference is the one that is given. Without a detector it is Inception-2015-12-05. In a run, `teacher` is
its own teacher as a detector (`refine.metrics.teacher_features`), and images of that as a reference.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from refine.checkpoints.teachers import TeacherSource
from refine.config import MAX_IMAGES, TEACHER
from refine.metrics.detectors import INCEPTION_SPACE, check_takes, load_detector, source_of, space_of
from refine.metrics.dinov2_detector import split_mode
from refine.metrics.evaluate import evaluate
from refine.metrics.metric import VS_TEACHER, Direction, Metric
from refine.metrics.pipeline import my_share, rank_and_world
from refine.metrics.references import Looking, NotDrawn, Reference, load_reference
from refine.metrics.registry import METRICS, near_to
from refine.metrics.sampling import sample_images, with_progress
from refine.networks.bases import Generator


def _named() -> dict[str, Metric]:
    """How names begin → metric; some have another beginning in the space of FID: fid50k_full, fd5k-digits."""
    found: dict[str, Metric] = {}
    for metric in METRICS:
        if metric.named_like is not None:
            found |= {metric.name: metric, metric.rows[0].fid_name or metric.name: metric}
    return found


_NAMED = _named()
EXAMPLES = ", ".join(metric.named_like for metric in METRICS if metric.named_like)
EXAMPLES += ", or fd5k-<detector>, such as fd5k-digits"
_KINDS = "|".join(sorted(_NAMED, key=len, reverse=True))
_NUMBER = r"(?P<num>\d+)(?:(?P<k>k)(?P<neighbours>\d(?=_|-|$))?)?"
_PATTERN = re.compile(rf"(?P<kind>{_KINDS}){_NUMBER}(_full)?(?:-(?P<detector>.+))?")


class NamedMetric:
    """A metric of generators, measured on the seeds 0 … N−1, led by the number its name stands for.

    Args:
        name: See the module, e.g. fid50k_full, fd2k-digits, kid5k-/path/of/a/detector.pt.
        reference: File, folder or name of what is compared with, see `load_reference`; None for an Inception Score.
        device: Where images of a reference are looked at.
        batch: Images per batch.
        cache: Keep the statistics of a reference that is images.
        trust: Run a detector that is TorchScript.
        teacher: What `teacher` means, as the detector and as the reference; None = it means nothing.
        draw: Draw images of a teacher that is the reference, where they are not there; without them nothing can be
            measured, but everything else is checked.
        progress: Show a bar while images of the reference are drawn and looked at.
        image_shape: [C, H, W] of the images that will be measured, if it is known.

    Attributes:
        name: As given, a detector's path shortened to its file's name: fit for file names and tags.
        key: Name of the leading number in the results.
        metric: The metric of the registry.
        direction: 'lower' or 'higher': which values of the leading number are better.
        num: Number of images.

    Raises:
        ValueError: The name is not a metric, or detector and reference cannot be read or do not fit, or the detector
            cannot look at such images.
    """

    direction: Direction = "lower"

    def __init__(
        self,
        name: str,
        reference: str | None,
        *,
        device: torch.device | str = "cpu",
        batch: int = 100,
        cache: bool = True,
        trust: bool = False,
        teacher: str | os.PathLike | TeacherSource | None = None,
        draw: bool = True,
        progress: bool = False,
        image_shape: Sequence[int] | None = None,
    ):
        kind, self.num, detector = _parsed(name)
        self.metric = _NAMED[kind]
        self.name = name
        if detector is not None:
            self.name = name.removesuffix(detector) + _short(detector)
        self.direction, self._batch = self.metric.rows[0].direction, batch
        self._detector = load_detector(_meant(detector, teacher, name) or INCEPTION_SPACE, trust)
        if kind != self.metric.name and not self._detector.fid_basis:
            found = f"{self._detector.name} (sha256 {self._detector.sha256[:12]}…)"
            raise ValueError(
                f"{name} is measured with Inception-2015-12-05 only, found {found}; "
                f"expected {self.metric.name}{self.num}-…"
            )
        if image_shape is not None:
            check_takes(self._detector.to(device), image_shape, device)
        self._reference: Reference | None = None
        if reference == TEACHER and self.metric.reference == "nothing":
            reference = None  # no images are drawn for a metric that would not look at them
        if reference is not None:
            looking = Looking(batch, device, bank=self.num, draw=draw, cache=cache, progress=progress)
            with contextlib.suppress(NotDrawn):
                meant = _meant(reference, teacher, f"the reference of {name}")
                self._reference = load_reference(meant, self._detector.to(device), looking)
        elif self.metric.reference != "nothing":
            raise ValueError(f"{name} needs a reference to compare with")
        against_teacher = self._reference is not None and self._reference.is_teacher
        if against_teacher and kind != self.metric.name:
            self.name += VS_TEACHER  # files and tags, too, say that it is no FID
        self.key = self.metric.rows[0].key(space_of(self._detector, against_teacher))
        if draw and not self.metric.is_possible(self._detector, self._reference):
            where = "" if self._reference is None else f", but {self._reference.name} holds none of them"
            raise ValueError(f"{name} needs {self.metric.reference} of the reference{where}")

    @property
    def shortage(self) -> str | None:
        """See `Reference.shortage`."""
        return None if self._reference is None else self._reference.shortage

    @property
    def reference_sha256(self) -> str | None:
        """Of the file or images that are compared with, if any are."""
        return None if self._reference is None else self._reference.sha256

    def measure(self, G: Generator, device: torch.device | str, progress: bool = False) -> dict[str, Any]:
        """Results of `evaluate`, and `seeds`; neither the network nor the caller's random state changes.

        A process measures alone, unless all call this within `refine.metrics.pipeline.sharing`.

        Args:
            G: Generator in eval mode on `device`.
            device: Where images are made and looked at.
            progress: Show a bar with the time left on stderr, if that is a terminal.
        """
        detector, (rank, world) = self._detector.to(device), rank_and_world()
        images = sample_images(G, my_share(range(self.num), self._batch), batch=self._batch, device=device)
        disable = None if progress and rank == 0 else True
        with tqdm(total=self.num, unit="img", desc=self.name, leave=False, disable=disable) as bar:
            counted = with_progress(images, lambda count: bar.update(count * world))
            results = evaluate(counted, detector, self._reference, (self.metric.name, *self.metric.measured_with))
        if self.key not in results:
            raise ValueError(f"{self.name} could not be measured: {detector.name} and the reference do not allow it")
        return {**results, "seeds": f"0-{self.num - 1}"}


def _meant(text: str | None, teacher: str | os.PathLike | TeacherSource | None, what: str) -> Any:
    """The file or name that a detector or reference is, where it may be the teacher of a run."""
    if text != TEACHER:
        return text
    if teacher is None:
        raise ValueError(f"{what} is measured with the teacher of a run; outside of one, name its file")
    return teacher


def detector_of(name: str) -> str:
    """The file, URL or name of the detector that a metric is measured with. Raises ValueError: it is no metric."""
    return source_of(_parsed(name)[2] or INCEPTION_SPACE)


def _short(detector: str) -> str:
    """A detector's name, fit for file names: of a path its file, and a mode behind it."""
    text, mode = split_mode(detector)
    return "-".join(filter(None, [Path(text).stem if "/" in text else text, mode]))


def _parsed(name: str) -> tuple[str, int, str | None]:
    """How a name begins, its number of images, and its detector if there is one."""
    match = _PATTERN.fullmatch(name)
    if match is None and (near := near_to(name)) is not None:
        metric, other = near
        instead = f"{metric.name}{name[len(other) :]}, which is near to it and not the same (docs/metrics.md)"
        raise ValueError(f"{name!r}: {other.upper()} is not measured here; expected {instead}")
    if match is None or int(match["num"]) == 0:
        raise ValueError(f"unknown metric {name!r}; expected {EXAMPLES}")
    metric = _NAMED[match["kind"]]
    in_no_space = match["kind"] == metric.name and metric.rows[0].fid_name and not match["detector"]  # fd5k
    if in_no_space or match["neighbours"] not in (None, str(metric.neighbours)):
        raise ValueError(f"unknown metric {name!r}; expected {EXAMPLES}")
    num = int(match["num"]) * (1000 if match["k"] else 1)
    if num < 2:
        raise ValueError(f"{name} measures {num} image; expected at least 2")
    if num > MAX_IMAGES:
        raise ValueError(f"{name} measures {num} images; expected at most {MAX_IMAGES}")
    return match["kind"], num, match["detector"]
