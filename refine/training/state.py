"""training-state-*.pt: everything that a resumed run needs, on disk.

The three networks and the average, both optimisers, counters, skipped steps, the means since the last tick, the best
metric, the random state, and the checksums of the files that the run was made from. All processes of a run draw the
same random numbers, so one random state serves all of them, also when there are more or fewer of them after a resume.
Labels are drawn, not read from a data set, and neither numpy's nor Python's random numbers are used while training.
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from refine.checkpoints import archives
from refine.checkpoints.foreign.torch_save import load_plain
from refine.checkpoints.pickles.inert import shown
from refine.checkpoints.writers import patient
from refine.dnnlib import replaced_atomically
from refine.training.finding import training_states
from refine.training.snapshots import Standing
from refine.training.trainer import Trainer


@dataclass
class Progress:
    """What a run itself counts, beside its trainer; in a training state by these names."""

    elapsed: float = 0.0  # seconds of this run, over resumes
    begun: bool = False  # whether what comes before the first step is done
    tick_start: int = 0  # images at the last progress line
    rollbacks: int = 0  # how often the run went back after its numbers diverged; each halves both rates


def gather_state(trainer: Trainer, progress: Progress, standing: Standing, files: Mapping[str, str]) -> dict[str, Any]:
    """Everything that a resumed run needs; plain tensors, numbers and texts. Every process must come here.

    Args:
        trainer, progress, standing: What changes in the course of a run.
        files: SHA-256 of the file that each of the options --gan, --teacher and --ref means.
    """
    return {
        **trainer.state_dict(),
        "config": json.dumps(trainer.config.as_dict()),
        "files": dict(files),
        **dataclasses.asdict(progress),
        **dataclasses.asdict(standing),
    }


def restore_state(state: dict[str, Any], trainer: Trainer) -> tuple[Progress, Standing]:
    """Go on from `gather_state`'s result, with networks made from the same files.

    Raises:
        ValueError: The state is of other networks, or lacks something.
    """
    try:
        trainer.load_state_dict(state)
        # Older states know nothing of rollbacks.
        usual = dataclasses.asdict(Progress())
        progress = Progress(**{name: type(value)(state.get(name, value)) for name, value in usual.items()})
        standing = Standing.of_state(state)
        trainer.rate_factor = 0.5**progress.rollbacks
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"the training state is incomplete: {type(error).__name__} {reason}") from None
    return progress, standing


def save_training_state(
    folder: Path, state: dict[str, Any], number: str, keep: int, protected: Path | None = None
) -> Path:
    """Write training-state-<number>.pt, then remove all but the `keep` newest states and the protected one.

    Args:
        folder: Of the run.
        state: Plain tensors, numbers, texts; `nimg` among them.
        number: As `finding` makes it.
        keep: How many states are kept.
        protected: A state that is kept besides.

    Raises:
        OSError: The folder is gone or cannot be written, or the disk is full; older states are as they were.
    """
    path = folder / f"training-state-{number}.pt"
    with replaced_atomically(path) as temporary, patient(temporary) as file:
        torch.save(state, file)
    for old in training_states(folder)[keep:]:
        if old not in (path, protected):
            with contextlib.suppress(FileNotFoundError):
                old.unlink()
    return path


def _is_text(table: Any) -> bool:
    """Whether it is a dict of texts by name."""
    return isinstance(table, dict) and all(isinstance(text, str) for part in table.items() for text in part)


def load_training_state(path: Path) -> dict[str, Any]:
    """Read a training state; nothing in the file is executed.

    Raises:
        ValueError: The file is no training state of this toolkit, or its weights are NaN.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise ValueError("it is no regular file")
        with archives.opened(path, archives.MAX_STATE_ENTRIES) as archive:  # torch.load does not look at the checksums
            archives.check_inflation(archive.infolist(), size)
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{shown(damaged)} does not have its checksum")
        state = load_plain(path)
        complete = isinstance(state, dict) and {"config", "networks", "rng", "skips"} <= set(state)
        counts = [state.get(name) for name in ("nimg", "warmup_steps_done")] if complete else []
        complete &= all(type(count) is int and 0 <= count < 2**48 for count in counts)
        complete = complete and _is_text(state.get("files", {}))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; expected a training-state-*.pt") from None
    except (RuntimeError, EOFError, OSError, TypeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:100] or "the file ends early"
        raise ValueError(f"{path} cannot be read as a training state: {reason}") from None
    if not complete:
        raise ValueError(
            f"{path} holds something else; expected a training state of this toolkit (a network is given as --gan)"
        )
    if broken := _with_nan(state["networks"]):
        raise ValueError(f"{path} holds NaN in {broken}: the run had diverged")
    return state


def _with_nan(networks: Any) -> str | None:
    """The name of a tensor with NaN. Infinity may belong to a network: the mask of an attention layer is a buffer."""
    if not isinstance(networks, dict) or not all(isinstance(values, dict) for values in networks.values()):
        return None  # told by whoever loads it
    tensors = ((f"{net}.{name}", x) for net, values in networks.items() for name, x in values.items())
    return next((name for name, x in tensors if isinstance(x, torch.Tensor) and x.isnan().any()), None)


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
