"""Checks of options that several commands have; torch is imported only where it is needed."""

from __future__ import annotations

import os
from pathlib import Path


def choose_device(name: str | None) -> str:
    """'cpu', 'cuda' or 'cuda:N', if this machine has it; None = CUDA where there is one.

    Raises:
        ValueError: There is no such device.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"found {name!r}; expected cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"found {name!r}; expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"found {name!r}, but this machine has {torch.cuda.device_count()} CUDA devices")
    return name


def check_outdir(path: str | os.PathLike) -> Path:
    """The folder as a Path, if files can be written to it or it can be made; it is not made here.

    Raises:
        ValueError: Something else is there, or it cannot be written to.
    """
    folder = Path(path)
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise ValueError(f"{existing} is a file; expected a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{existing} cannot be written to; expected a folder that can")
    return folder


def parse_ints(text: str, limit: int = 1_000_000) -> list[int]:
    """Integers and ranges, each once and in order: '0-3,7,2' → [0, 1, 2, 3, 7].

    Raises:
        ValueError: It is no such list, or holds more than `limit` numbers.
    """
    numbers: dict[int, None] = {}
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()) or (dash and int(high) < int(low)):
            raise ValueError(f"{text!r} is no list of numbers; expected e.g. 0-35,40")
        span = range(int(low), int(high or low) + 1)
        if len(span) + len(numbers) > limit:
            raise ValueError(f"{text!r} holds more than {limit:,} numbers")
        numbers.update(dict.fromkeys(span))
    return list(numbers)
