"""Opens a raw pickle: NVIDIA's snapshots, legacy TensorFlow tuples, `.pt` files from before torch 1.6."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from refine.checkpoints.foreign import contents, nvidia, stylegan3, tensorflow, torch_save
from refine.checkpoints.foreign.container import Container, saying
from refine.checkpoints.pickles.inert import Refused
from refine.checkpoints.pickles.machine import Machine

_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # a pickle of torch.save's old magic number


def open_pickle(path: Path, stream: BinaryIO, expected: str, kwargs: Mapping[str, Any] | None = None) -> Container:
    """The networks of a raw pickle; for `kwargs` see `opening.open_container`.

    Raises:
        ValueError: it is broken, holds what is not allowed, or is of another family.
    """
    if is_legacy_torch(stream):
        return torch_save.open_legacy(path, stream, expected, kwargs)
    size, seen = os.fstat(stream.fileno()).st_size, list[str]()
    rules = nvidia.rules(seen) | tensorflow.RULES
    machine = Machine(stream, size, rules | {stylegan3.EMBEDDING.name: stylegan3.EMBEDDING}, lenient=True)
    try:
        value = machine.load()
    except Refused as error:
        if stylegan3.is_of_xl(machine.globals):
            stream.seek(0)
            machine = Machine(stream, size, rules | stylegan3.RULES, lenient=True, harmless=stylegan3.harmless)
            with saying(str(path)):
                of_xl = stylegan3.members(machine.load())
            if of_xl is None:
                raise ValueError(f"{path} is {stylegan3.XL} without a generator; expected {expected}") from None
            return _container(path, stream, machine, (*of_xl, False))
        # Files of other families often hold globals of their own: then the family is the more helpful answer.
        named = nvidia.family(None, seen)
        if named is not None and "has no place" in str(error):
            raise ValueError(f"{path} is {named}; expected {expected}") from None
        raise ValueError(f"{path}: {error}") from None
    with saying(str(path)):
        found = contents.find(value, path, kwargs)
    if found is None:
        named = tensorflow.family(value) or nvidia.family(value, seen) or _plainly(value)
        raise ValueError(f"{path} is {named}; expected {expected}")
    return _container(path, stream, machine, found)


def _container(path: Path, stream: BinaryIO, machine: Machine, found: Any) -> Container:
    resizable = machine.protocol in (1, 2) and not machine.framed
    family, members, takes_kwargs = found
    writable = family not in contents.STATE_DICTS and machine.protocol > 0
    more = {"resizable": resizable, "writable": writable, "takes_kwargs": takes_kwargs}
    return Container(path, stream, family, members, **more)


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
