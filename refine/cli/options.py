"""Checks of options that several commands have; torch is imported only where it is needed."""

from __future__ import annotations

import os
from pathlib import Path

from refine.cli.main import option

OPS_HELP = "Compiled ops: auto = where they can be had, native = or an error, ref = plain torch."


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


def choose_ops(mode: str | None, device: str) -> None:
    """Which form of the ops runs from here on.

    Args:
        mode: 'auto', 'native' or 'ref'; None = as REFINE_OPS says, else auto.
        device: Where they will run.

    Raises:
        ValueError: The compiled ops are asked for and cannot be had on this device, or REFINE_OPS is no such word.
    """
    from torch_utils import custom_ops

    if mode is not None:
        custom_ops.set_mode(mode)
    if custom_ops.get_mode() == "native":
        try:
            kind = device.partition(":")[0]
            for op in custom_ops.OPS.get(kind, custom_ops.OPS["cpu"]):
                custom_ops.load(op, kind)
        except custom_ops.NativeUnavailable as error:
            raise ValueError(f"--ops=native: {error}") from None


def prepare_device(name: str | None, ops: str | None) -> str:
    """The device of this process, under torchrun a GPU of its own, with threads and ops chosen for it.

    Args:
        name: As for `choose_device`.
        ops: As for `choose_ops`.

    Raises:
        ValueError: As these say; the message begins with the option.
    """
    from torch_utils.distributed import local_device
    from torch_utils.threads import set_threads

    set_threads()
    with option("--device"):
        device = local_device(choose_device(name))
    choose_ops(ops, device)
    return device


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
