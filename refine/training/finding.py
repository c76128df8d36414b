"""Which training states a run folder holds, the newest first, and how snapshots and states are called."""

import os
import re
from pathlib import Path

from refine.checkpoints.sniff import sniff
from refine.dnnlib import format_kimg

_STATE = re.compile(r"training-state-(?P<kimg>\d+)(\.(?P<images>\d{3}))?\.pt")


def kimg_name(nimg: int, exact: bool) -> str:
    """The number in the names of snapshots and states: `000123` for 123_456 images, exactly `000123.456`."""
    return f"{format_kimg(nimg)}.{nimg % 1000:03d}" if exact else format_kimg(nimg)


def snapshot_number(folder: Path, nimg: int, exact: bool) -> str:
    """The number in the names of the snapshot at `nimg` images, and of its state.

    Whole kimg, unless `exact` or a snapshot or state of another count of images has that name.
    """
    whole = kimg_name(nimg, exact=False)
    if exact or any(images not in (None, nimg) for images in _counts_called(folder, whole)):
        return kimg_name(nimg, exact=True)
    return whole


def _counts_called(folder: Path, number: str) -> list[int | None]:
    """Images of the snapshot and of the state of that number, where they exist; None = the file does not say."""
    from refine.checkpoints.native import read_metadata  # torch

    counts: list[int | None] = []
    if (snapshot := folder / f"network-snapshot-{number}.safetensors").is_file():
        try:
            counts.append(round(read_metadata(snapshot)["provenance"]["kimg"] * 1000))
        except (ValueError, KeyError, TypeError):
            counts.append(None)
    if (state := folder / f"training-state-{number}.pt").is_file():
        counts.append(_images_inside(state))
    return counts


def _images_inside(path: Path) -> int | None:
    """The count of images that a state itself holds; its tensors are not read."""
    from refine.checkpoints.foreign.torch_save import load_entry  # torch

    try:
        return int(load_entry(path, "nimg")) if path.is_file() else None
    except (OSError, ValueError, OverflowError):  # whatever is damaged is told by whoever loads it
        return None


def training_states(folder: str | os.PathLike) -> list[Path]:
    """The training states in a run folder, that with the most images first.

    A state whose name carries whole kimg only is looked into where there is another of the same kimg. Times of files
    mean nothing: copying changes them.
    """
    found = [
        (match, path) for path in Path(folder).glob("training-state-*.pt") if (match := _STATE.fullmatch(path.name))
    ]
    kimgs = [int(match["kimg"]) for match, _ in found]

    def images(match: re.Match[str], path: Path) -> tuple[int, int]:
        kimg = int(match["kimg"])
        if match["images"] is not None:
            return kimg, int(match["images"])
        inside = _images_inside(path) if kimgs.count(kimg) > 1 else None
        return kimg, 0 if inside is None else inside - 1000 * kimg

    return [path for *_, path in sorted(((images(match, path), path) for match, path in found), reverse=True)]


def find_training_states(path: str | os.PathLike) -> list[Path]:
    """What --resume=PATH means, the state to go on from first and older ones, for when it is damaged, after it.

    Args:
        path: A training state; a snapshot, which has its state beside it; a run folder; or an `outdir`, of which the
            newest run with a state is taken.

    Raises:
        ValueError: There is none.
    """
    path = Path(path)
    if path.is_file() and path.name.startswith("network-snapshot-"):
        number = path.name.removeprefix("network-snapshot-").removesuffix(path.suffix)
        state = path.with_name(f"training-state-{number}.pt")
        if not state.is_file():
            kept = ", ".join(other.name for other in training_states(path.parent)) or "none"
            raise ValueError(
                f"{path} has no {state.name} beside it; training states that were kept: {kept}; "
                f"to begin a new run with this network, give it as --gan"
            )
        return [state]
    if path.is_file():
        if (found := sniff(path)).kind in ("native", "safetensors", "pickle", "npz"):
            raise ValueError(
                f"{path} is {found.description}, no training state; to begin a new run with this network, "
                f"give it as --gan={path}"
            )
        return [path]
    states = newest_states(path)
    if not states:
        raise ValueError(f"{path} holds no training-state-*.pt; expected a run folder, or a folder of runs")
    return states


def newest_states(path: Path) -> list[Path]:
    """The states of a run folder, or of the newest run in a folder of runs that has some; empty = there are none."""
    runs = sorted((run for run in path.glob("[0-9]*") if run.is_dir()), key=_run_number, reverse=True)
    return next((states for folder in (path, *runs) if (states := training_states(folder))), [])


def _run_number(path: Path) -> int:
    return int(re.split(r"\D", path.name, maxsplit=1)[0])
