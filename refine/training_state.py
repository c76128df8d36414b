"""training-state-*.pt: everything that a resumed run needs, on disk."""

import contextlib
import pickle
from pathlib import Path
from typing import Any

import torch

from dnnlib import format_kimg, replaced_atomically


def save_training_state(folder: Path, state: dict[str, Any]) -> Path:
    """Write a state (plain tensors, numbers, texts; `nimg` among them) beside the snapshots, and remove older ones."""
    path = folder / f"training-state-{format_kimg(state['nimg'])}.pt"
    with replaced_atomically(path) as temporary:
        torch.save(state, temporary)
    for old in folder.glob("training-state-*.pt"):
        if old != path:
            with contextlib.suppress(FileNotFoundError):
                old.unlink()
    return path


def load_training_state(path: Path) -> dict[str, Any]:
    """Read a training state; nothing in the file is executed.

    Raises:
        ValueError: The file is no training state of this toolkit.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        complete = {"config", "networks", "nimg", "rng"} <= set(state)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; expected a training-state-*.pt") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be read as a training state: {str(error).splitlines()[0][:100]}") from None
    if not complete:
        raise ValueError(f"{path} holds something else; expected a training state of this toolkit")
    return state
