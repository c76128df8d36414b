"""Metrics by name, as training runs ask for them: `fid50k_full`, `kid50k_full`, `pr50k3_full`, `is50k`, `fd5k-digits`.

A name is `<kind><N>[k][_full][-<detector>]`. The kind says what leads the results; N is a number of images, `k` counts
thousands; `_full` is what NVIDIA's tools add where the reference is the whole training set, and changes nothing here:
the reference is the one that is given. Without a detector it is Inception-2015-12-05.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from refine.metrics.detectors import INCEPTION_SPACE, load_detector, metric_names, score_name
from refine.metrics.evaluate import evaluate
from refine.metrics.pipeline import my_share, rank_and_world
from refine.metrics.references import Looking, load_reference
from refine.metrics.sampling import sample_images, with_progress

EXAMPLES = "fid50k_full, kid50k_full, pr50k3_full, is50k, fidinf50k_full, or fd5k-<detector>, such as fd5k-digits"


class _Kind(NamedTuple):
    asked: tuple[str, ...]  # of `evaluate`
    features: bool  # whether the reference has to hold them
    direction: str  # which values are better


_KINDS = {
    "fid": _Kind(("fd", "kid", "pr", "classes"), False, "lower"),
    "fd": _Kind(("fd", "kid", "pr", "classes"), False, "lower"),
    "kid": _Kind(("kid", "classes"), True, "lower"),
    "pr": _Kind(("pr", "classes"), True, "higher"),
    "is": _Kind(("is", "classes"), False, "higher"),
    "fidinf": _Kind(("fd", "fdinf"), False, "lower"),
    "fdinf": _Kind(("fd", "fdinf"), False, "lower"),
}
_PATTERN = re.compile(r"(fidinf|fdinf|fid|fd|kid|pr|is)(\d+)(?:(k)(3(?=_|-|$))?)?(_full)?(?:-(.+))?")


class NamedMetric:
    """A metric of generators, measured on the seeds 0 … N−1, led by the number its name stands for.

    Args:
        name: See the module, e.g. fid50k_full, fd2k-digits, kid5k-/path/of/a/detector.pt.
        reference: File, folder or name of what is compared with, see `load_reference`; None for an Inception Score.
        device: Where images of a reference are looked at.
        batch: Images per batch.
        cache: Keep the statistics of a reference that is images.

    Attributes:
        name: As given, a detector's path shortened to its file's name: fit for file names and tags.
        key: Of the leading number in the results.
        direction: 'lower' or 'higher': which values of it are better.
        num: Number of images.

    Raises:
        ValueError: The name is no metric, or detector and reference cannot be read or do not fit.
    """

    direction = "lower"

    def __init__(
        self,
        name: str,
        reference: str | None,
        *,
        device: torch.device | str = "cpu",
        batch: int = 100,
        cache: bool = True,
    ):
        match = _PATTERN.fullmatch(name)
        if not match or int(match[2]) == 0 or (match[1] in ("fd", "fdinf") and not match[6]):
            raise ValueError(f"unknown metric {name!r}; expected {EXAMPLES}")
        if match[4] and match[1] != "pr":
            raise ValueError(f"unknown metric {name!r}: only pr50k3_full has neighbours; expected {EXAMPLES}")
        kind = _KINDS[match[1]]
        self.num = int(match[2]) * (1000 if match[3] else 1)
        if self.num < 2:
            raise ValueError(f"{name} measures {self.num} image; expected at least 2")
        detector = match[6] or INCEPTION_SPACE
        self.name = name.removesuffix(detector) + Path(detector).stem if match[6] and "/" in detector else name
        self.direction, self._asked, self._batch = kind.direction, kind.asked, batch
        self._detector = load_detector(detector)
        if match[1] in ("fid", "fidinf") and not self._detector.fid_basis:
            found = f"{self._detector.name} (sha256 {self._detector.sha256[:12]}…)"
            raise ValueError(
                f"{name} is measured with Inception-2015-12-05 only, found {found}; expected fd{match[2]}…-…"
            )
        self._reference = None
        if reference is not None:
            looking = Looking(batch=batch, device=device, cache=cache)
            self._reference = load_reference(reference, self._detector.to(device), looking)
        elif match[1] != "is":
            raise ValueError(f"{name} needs a reference to compare with")
        if kind.features and self._reference.features is None:
            raise ValueError(f"{name} needs features of the reference, but {self._reference.name} holds none of them")
        self.key = self._key(match[1])

    def measure(self, G: torch.nn.Module, device: torch.device | str, progress: bool = False) -> dict[str, Any]:
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
            results = evaluate(counted, detector, self._reference, self._asked)
        if self.key not in results:
            raise ValueError(f"{self.name} could not be measured: {detector.name} and the reference do not allow it")
        return {**results, "seeds": f"0-{self.num - 1}"}

    def _key(self, kind: str) -> str:
        frechet, kernel = metric_names(self._detector)
        if kind in ("fidinf", "fdinf"):
            return frechet.replace("fid", "fidinf").replace("fd_", "fdinf_")
        leading = {"kid": kernel, "pr": "precision", "is": score_name(self._detector)}
        return leading.get(kind, frechet)
