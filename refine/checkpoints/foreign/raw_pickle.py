"""Opens a raw pickle: NVIDIA's snapshots, legacy TensorFlow tuples, `.pt` files from before torch 1.6."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

from refine.checkpoints.foreign import contents, edm_names, nvidia, rosinality, stylegan2_names, tensorflow, torch_save
from refine.checkpoints.foreign.container import Container, saying
from refine.checkpoints.pickles.inert import Refused
from refine.checkpoints.pickles.machine import Machine

_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # a pickle of torch.save's old magic number

# Pickles of state dicts, which few programs write.
_NOT_WRITTEN_BACK = {edm_names.FAMILY, rosinality.FAMILY, stylegan2_names.FAMILY}


def open_pickle(path: Path, stream: BinaryIO, expected: str, **given: Any) -> Container:
    """The networks of a raw pickle.

    Raises:
        ValueError: it is broken, holds what is not allowed, or is of another family.
    """
    if is_legacy_torch(stream):
        return torch_save.open_legacy(path, stream, expected, **given)
    seen: list[str] = []
    rules = nvidia.rules(seen) | tensorflow.RULES
    machine = Machine(stream, os.fstat(stream.fileno()).st_size, rules, lenient=True)
    try:
        value = machine.load()
    except Refused as error:
        # Files of other families often hold globals of their own: then the family is the more helpful answer.
        named = nvidia.family(None, seen, machine.globals)
        if named is not None and "has no place" in str(error):
            raise ValueError(f"{path} is {named}; expected {expected}") from None
        raise ValueError(f"{path}: {error}") from None
    with saying(str(path)):
        found = contents.find(value, given.get("init_kwargs"))
    if found is None:
        named = tensorflow.family(value) or nvidia.family(value, seen, machine.globals) or _plainly(value)
        raise ValueError(f"{path} is {named}; expected {expected}")
    family, members = found
    resizable = machine.protocol == 2 and not machine.framed
    writable = family not in _NOT_WRITTEN_BACK
    return Container(path, stream, family, members, resizable=resizable, writable=writable)


def is_legacy_torch(stream: BinaryIO) -> bool:
    """Whether a stream begins as torch.save before torch 1.6 wrote it; it is left at its start."""
    head = stream.read(len(_LEGACY_TORCH))
    stream.seek(0)
    return head == _LEGACY_TORCH


def _plainly(value: Any) -> str:
    if isinstance(value, dict):
        keys = ", ".join(repr(str(key)[:20]) for key in list(value)[:4])
        return f"a pickle of a table with the keys {keys}" if keys else "a pickle of an empty table"
    return f"a pickle of a {type(value).__name__}"
