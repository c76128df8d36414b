"""The snapshots of a run folder, and the one of them that is judged."""

from __future__ import annotations

import contextlib
import filecmp
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from refine.checkpoints.foreign.diffusers_folder import find_weights
from refine.checkpoints.native import read_metadata

# Whole kimg; where snapshots come more often, or at any other number of images, these follow: 000001.600. Behind them
# EDM2 has the length of the average: 0000123-0.050. The last network of some programs has no number.
_NUMBER = r"(?P<kimg>\d+)(\.(?P<images>\d{3}))?(-(?P<average>0\.\d+))?"
_SNAPSHOT = re.compile(rf"network-(snapshot-)?(?P<number>(?<=snapshot-){_NUMBER}|best|final)\.(safetensors|pkl)")


class Snapshot(NamedTuple):
    """A network of a run, when it was saved, and which average it is where there are several."""

    kimg: float
    path: Path
    average: str = ""


@dataclass(frozen=True)
class RunFolder:
    """What is in the folder of a run.

    Attributes:
        path: The folder.
        snapshots: In order.
        judged: The one that the run itself found best by its first metric, otherwise the last. It is not among the
            others where only a pickle of it is left, which does not say when it was saved.
        has_best: Whether the run kept a best one.
    """

    path: Path
    snapshots: tuple[Snapshot, ...]
    judged: Snapshot
    has_best: bool

    @property
    def others(self) -> tuple[Snapshot, ...]:
        """All snapshots but the judged one."""
        return tuple(snapshot for snapshot in self.snapshots if snapshot != self.judged)

    def describe(self) -> str:
        """Which snapshot is judged, and why; a sentence."""
        return f"Judged of {self.path.name}: {self._which()}."

    def taken(self) -> str:
        """The same, for commands that take one network of the folder."""
        return f"Taken from {self.path.name}: {self._which()}."

    def _which(self) -> str:
        reason = "the best by the run's own metric" if self.has_best else "the last, as the run kept no best one"
        kimg = f" ({self.judged.kimg:g} kimg)" if math.isfinite(self.judged.kimg) else ""
        return f"{self.judged.path.name}{kimg}, {reason}"


def read_run_folder(path: str | os.PathLike) -> RunFolder | None:
    """The snapshots in a folder; None if the path is not a folder, or is one of a diffusion model.

    Where a snapshot is there as a native file and as a pickle, the native file is taken.

    Raises:
        ValueError: The folder holds no snapshots.
    """
    folder, files = Path(path), {}
    if not folder.is_dir() or _is_network(folder):
        return None
    for file in sorted(folder.iterdir()):  # .pkl before .safetensors, which takes its place
        if match := _SNAPSHOT.fullmatch(file.name):
            files[match["number"]] = file, match
    if not files:
        raise ValueError(f"{folder} holds no network-snapshot-*; expected a run folder or a network's file")
    best, final = (files.pop(name, (None, None))[0] for name in ("best", "final"))
    snapshots = sorted(_numbered(file, match) for file, match in files.values())
    if final is not None and all(not filecmp.cmp(one.path, final, shallow=False) for one in snapshots):
        last = Snapshot(_kimg_in(final, math.nan), final)
        if best is None and not math.isfinite(last.kimg):  # nothing says when, but it is the last
            return RunFolder(folder, tuple(snapshots), last, has_best=False)
        snapshots = sorted([*snapshots, last]) if math.isfinite(last.kimg) else snapshots
    if best is None:
        return RunFolder(folder, tuple(snapshots), snapshots[-1], has_best=False)
    judged = next((one for one in snapshots if filecmp.cmp(one.path, best, shallow=False)), None)
    if judged is None:  # the one that it is a copy of was deleted
        judged = Snapshot(_kimg_in(best, math.nan), best)
        snapshots = sorted([*snapshots, judged]) if math.isfinite(judged.kimg) else snapshots
    return RunFolder(folder, tuple(snapshots), judged, has_best=True)


def network_in(path: str) -> tuple[str, str | None]:
    """The file of a network, for commands that take a run folder as well: (the path, or the judged snapshot's; what
    to say of the choice, or None).

    Raises:
        ValueError: It is a folder without snapshots.
    """
    run = read_run_folder(path)
    return (path, None) if run is None else (str(run.judged.path), run.taken())


def _numbered(file: Path, match: re.Match[str]) -> Snapshot:
    kimg = int(match["kimg"]) + int(match["images"] or 0) / 1000
    return Snapshot(_kimg_in(file, kimg), file, match["average"] or "")


def _is_network(folder: Path) -> bool:
    """Whether a folder is not one of a run, but of a diffusion model."""
    try:
        find_weights(str(folder))
    except ValueError:
        return False
    return True


def _kimg_in(file: Path, otherwise: float) -> float:
    """When a network was saved, as its file says: names may carry whole kimg only."""
    kimg = None
    if file.suffix == ".safetensors":
        with contextlib.suppress(ValueError, OSError, AttributeError):  # it is told when its networks are loaded
            kimg = read_metadata(file).get("provenance", {}).get("kimg")
    return float(kimg) if isinstance(kimg, int | float) else otherwise
