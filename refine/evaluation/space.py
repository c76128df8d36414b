"""The feature space of a comparison: which detector looks at the images, what it does to them, and the reference."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from refine.checkpoints.pickles.inert import shown
from refine.errors import option
from refine.metrics.detectors import EXPECTED, Detector, check_takes, load_detector
from refine.metrics.references import Looking, NeedsDetector, Reference, load_reference

_NAME = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")  # of a detector that needs no file


def load_space(
    detector: str | os.PathLike | None,
    ref: str | os.PathLike,
    image_shape: Sequence[int],
    looking: Looking,
    trust: bool = False,
) -> tuple[Detector, Reference]:
    """Detector and reference; two black images tell, before any long work, whether all go together.

    Args:
        detector: See `refine.metrics.detectors.load_detector`. None = the one that the reference was made with.
        ref: See `refine.metrics.references.load_reference`.
        image_shape: [C, H, W] of the images.
        looking: How the images of a reference are looked at.
        trust: Whether a detector that is TorchScript is run.

    Raises:
        ValueError: One of them cannot be used, or no detector is named; the message begins with the option.
    """
    if detector is None:
        judge = _detector_of(ref)
    else:
        with option("--detector"):
            judge = load_detector(detector, trust)
    judge = judge.to(looking.device)
    with option("--detector"):
        check_takes(judge, image_shape, looking.device)
    with option("--ref"):
        return judge, load_reference(ref, judge, looking)


def _detector_of(ref: str | os.PathLike) -> Detector:
    """The detector that a reference was made with, if it says so, and a detector of that name is at hand."""
    with option("--ref"):
        try:
            made = load_reference(ref)
        except NeedsDetector:
            made = None
    if made is None or made.detector is None:
        what = "is images or a network, which name none" if made is None else "does not say what it was made with"
        raise ValueError(f"--detector is missing, and --ref={ref} {what}; expected {EXPECTED}")
    with option("--detector"):
        told = f"--ref={ref} was made with the detector {shown(made.detector)}"
        try:
            if not _NAME.fullmatch(made.detector) or Path(made.detector).exists():
                raise ValueError("it is a file's")  # which a reference from elsewhere is not to choose, nor a URL
            judge = load_detector(made.detector)
            made.check_detector(judge)
        except ValueError as error:
            raise ValueError(f"--detector is missing; {told}, and none of that name fits ({error})") from None
    return judge
