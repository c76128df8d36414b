"""training-state-*.pt: everything that a resumed run needs, on disk.

The three networks and the average, both optimisers, counters, skipped steps, the means since the last tick, the best
metric and the random state. All processes of a run draw the same random numbers, so one random state serves all of
them, also when there are more or fewer of them after a resume. Labels are drawn, not read from a data set, and neither
numpy's nor Python's random numbers are used while training.
"""

import contextlib
import dataclasses
import json
import pickle
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch

from refine.checkpoints.foreign.torch_save import load_plain
from refine.checkpoints.pickles.inert import shown
from refine.dnnlib import replaced_atomically
from refine.training.run_dir import kimg_name, training_states
from refine.training.snapshots import Standing
from refine.training.trainer import Trainer


@dataclass
class Progress:
    """What a run itself counts, beside its trainer; in a training state by these names."""

    elapsed: float = 0.0  # seconds of this run, over resumes
    begun: bool = False  # whether what comes before the first step is done
    tick_start: int = 0  # images at the last progress line


def gather_state(trainer: Trainer, progress: Progress, standing: Standing) -> dict[str, Any]:
    """Everything that a resumed run needs; plain tensors, numbers and texts. Every process must come here."""
    return {
        **trainer.state_dict(),
        "config": json.dumps(trainer.config.as_dict()),
        **dataclasses.asdict(progress),
        **dataclasses.asdict(standing),
    }


def restore_state(state: dict[str, Any], trainer: Trainer) -> tuple[Progress, Standing]:
    """Go on from `gather_state`'s result, with networks made from the same files.

    Raises:
        ValueError: The state is of other networks.
    """
    trainer.load_state_dict(state)
    progress = Progress(**{field.name: state[field.name] for field in dataclasses.fields(Progress)})
    return progress, Standing.of_state(state)


def save_training_state(folder: Path, state: dict[str, Any], exact_name: bool, keep: int) -> Path:
    """Write a state (plain tensors, numbers, texts; `nimg` among them), then remove all but the newest `keep`.

    Raises:
        OSError: The folder is gone or cannot be written, or the disk is full; older states are as they were.
    """
    path = folder / f"training-state-{kimg_name(state['nimg'], exact_name)}.pt"
    with replaced_atomically(path) as temporary, open(temporary, "wb") as file:
        # To a file of Python's, whose errors are OSErrors; torch's own writer hides a full disk in a RuntimeError.
        checked = _Checked(file)
        torch.save(state, cast(IO[bytes], checked))
        checked.flush()
        checked.check()
    for old in training_states(folder)[keep:]:
        if old != path:
            with contextlib.suppress(FileNotFoundError):
                old.unlink()
    return path


class _Checked:
    """A file whose first failure to write is the error that is seen: torch's writer fails again while it closes."""

    def __init__(self, file):
        self._file, self._error = file, None

    def write(self, data) -> int:
        if self._error is None:
            try:
                return self._file.write(data)
            except OSError as error:
                self._error = error
        return len(data)

    def flush(self) -> None:
        if self._error is None:
            try:
                self._file.flush()
            except OSError as error:
                self._error = error

    def check(self) -> None:
        """Raises the OSError that happened, if one did."""
        if self._error is not None:
            raise self._error


def load_training_state(path: Path) -> dict[str, Any]:
    """Read a training state; nothing in the file is executed.

    Raises:
        ValueError: The file is no training state of this toolkit.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if damaged := archive.testzip():
                raise ValueError(f"{shown(damaged)} does not have its checksum")
        state = load_plain(path)
        complete = {"config", "networks", "nimg", "rng", "skips"} <= set(state)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; expected a training-state-*.pt") from None
    except (
        *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error),
        *(RuntimeError, EOFError, OSError, TypeError, ValueError, KeyError),
    ) as error:
        reason = " ".join(str(error).split())[:100] or "the file ends early"
        raise ValueError(f"{path} cannot be read as a training state: {reason}") from None
    if not complete:
        raise ValueError(f"{path} holds something else; expected a training state of this toolkit")
    return state


@dataclass(frozen=True)
class FoundState:
    """A training state to go on from, and a line for each newer one that could not be read."""

    path: Path
    state: dict[str, Any]
    damaged: list[str]


def load_newest(paths: list[Path]) -> FoundState:
    """The first state that can be read.

    Raises:
        ValueError: None can.
    """
    damaged: list[str] = []
    for path in paths:
        try:
            return FoundState(path, load_training_state(path), damaged)
        except ValueError as error:  # noqa: PERF203 - a handful of files
            damaged.append(str(error))
    raise ValueError(damaged[0] + (f"; nor can the {len(paths) - 1} before it" if len(paths) > 1 else ""))
