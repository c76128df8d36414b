"""Opens what torch.save writes: its zip format, and the stream format from before torch 1.6.

Both go through the same machine as all pickles; torch.load is not used. What such files hold is for `contents` to say.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch

from refine.checkpoints import archives
from refine.checkpoints.foreign import adm, contents, nvidia
from refine.checkpoints.foreign.container import Container, saying
from refine.checkpoints.pickles.inert import Blob, Buildable, Refused, Stub, Text, shown
from refine.checkpoints.pickles.machine import Machine
from refine.checkpoints.pickles.tensors import STORAGE_RULES, Array, Storage, TensorRef, storage_id

_STATE_OPCODES = 1_500_000  # a training state has a few tensors for each one of the networks
_MAX_DEPTH, _SPARE_BYTES = 20, 64 << 20
_MAX_PICKLE_BYTES = 32 << 20  # of the pickle inside a zip; a generator's has about 30 kB


class Namespace(Buildable):
    """`argparse.Namespace`: the training script's options, which are not needed."""

    __slots__ = ()

    def build(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise Refused("it gives a Namespace an unusual state")


def _rules(seen: list[str]) -> dict[str, Stub]:
    return nvidia.rules(seen) | STORAGE_RULES | {"argparse.Namespace": Stub("argparse.Namespace", new=Namespace)}


# The two containers of torch.save.


def open_zip(path: Path, stream: BinaryIO, expected: str, kwargs: Mapping[str, Any] | None = None) -> Container:
    """The networks of a `.pt` in torch.save's zip format.

    Args:
        path, stream, expected: As for `read_zip`.
        kwargs: See `opening.open_container`.

    Raises:
        ValueError: it is broken, holds what is not allowed, or is of another family.
    """
    value, seen, inflated = read_zip(path, stream, expected, lenient=True)
    return _container(path, stream, value, seen, expected, kwargs, inflated)


def read_zip(
    path: Path, stream: BinaryIO, expected: str, budget: int | None = None, lenient: bool = False
) -> tuple[Any, list[str], int]:
    """What was saved, tensors as `TensorRef`; the names of NVIDIA's classes met on the way; bytes when unpacked.

    Args:
        path, stream: The file, open.
        expected: What a refusal says was expected.
        budget, lenient: See `Machine`.

    Raises:
        ValueError: it is broken, or holds what is not allowed.
    """
    size = os.fstat(stream.fileno()).st_size
    most = archives.MAX_NETWORK_ENTRIES if budget is None else archives.MAX_STATE_ENTRIES
    try:
        with archives.opened(stream, most) as archive:
            entries = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
            pickled = entries["data.pkl"]
            archives.check_inflation((info for info in entries.values() if info.compress_type), size)
            data = archives.read_member(archive, pickled, min(size, _MAX_PICKLE_BYTES))
            swapped = (
                "byteorder" in entries and archives.read_member(archive, entries["byteorder"], 16)[:6] != b"little"
            )
    except Refused as error:
        raise ValueError(f"{path}: {error}") from None
    blobs: dict[str, Blob] = {}
    unpacked = _Unpacked(stream)

    def persistent_load(value: Any) -> Storage:
        dtype, key, numel = storage_id(value)
        if f"data/{key}" not in entries:
            raise Refused(f"it refers to the storage {shown(key)}, which is not in the file")
        if key not in blobs:
            blobs[key] = _zip_entry(stream, entries[f"data/{key}"], size, unpacked)
        return _storage(blobs[key], dtype, numel, swapped)

    seen: list[str] = []
    machine = Machine(BytesIO(data), len(data), _rules(seen), persistent_load, budget, lenient)
    value = _unpickle(path, machine, seen, expected)
    return value, seen, sum(info.file_size for info in entries.values())


def load_plain(path: Path) -> Any:
    """What torch.save wrote, as torch.load would give it: tables, lists, numbers, text, bytes, and tensors on the CPU.

    Raises:
        ValueError: It is broken, or holds something else; the message does not name the file.
    """
    try:
        with open(path, "rb") as stream, saying(str(path)):
            value = read_zip(path, stream, "plain tensors and numbers", _STATE_OPCODES)[0]
            return _Plain(os.fstat(stream.fileno()).st_size).value(value, 0)
    except ValueError as error:
        raise ValueError(str(error).removeprefix(f"{path}: ")) from None


def load_entry(path: Path, name: str) -> Any:
    """One number or text of a table that torch.save wrote; nothing else of the file is brought into memory.

    Raises:
        ValueError: The file is broken, or holds something else.
    """
    with open(path, "rb") as stream, saying(str(path)):
        table = read_zip(path, stream, "plain tensors and numbers", _STATE_OPCODES)[0]
        if not isinstance(table, dict) or not isinstance(table.get(name), bool | int | float | str):
            raise Refused(f"it holds no {name}")
        return table[name]


class _Plain:
    """Brings values into memory: each text and tensor once, and no more than a file of this size can hold."""

    def __init__(self, size: int):
        self._values, self._bytes = _STATE_OPCODES, size + _SPARE_BYTES
        self._known: dict[int, Any] = {}  # by the identity of what the machine made

    def value(self, item: Any, depth: int) -> Any:
        self._values -= 1
        if depth > _MAX_DEPTH or self._values < 0:
            raise Refused("it holds too many values, or too deeply nested ones")
        if isinstance(item, dict):
            keys = [str(key) if isinstance(key, str) else key for key in item]
            return dict(zip(keys, (self.value(part, depth + 1) for part in item.values()), strict=True))
        if isinstance(item, list | tuple | set):
            return type(item)(self.value(part, depth + 1) for part in item)
        if item is None or isinstance(item, bool | int | float):
            return item
        if isinstance(item, str):
            return str(item)
        if id(item) not in self._known:
            self._known[id(item)] = self._large(item)
        return self._known[id(item)]

    def _large(self, item: Any) -> Any:
        if isinstance(item, TensorRef):
            self._bytes -= item.nbytes
            if self._bytes < 0:
                raise Refused("its tensors take more memory than the file is long")
            return item.read_as_laid_out()
        if isinstance(item, Blob):
            return item.read(0, item.length)
        if isinstance(item, Text):
            item.stream.seek(item.offset)
            return item.stream.read(item.length).decode("utf-8")
        raise Refused(f"it holds a {type(item).__name__}")


class _Unpacked:
    """The entries of a compressed zip, as whoever packs a `.pt` again by hand makes it; each is unpacked when asked."""

    def __init__(self, stream: BinaryIO):
        self.stream = stream
        self.archive: zipfile.ZipFile | None = None

    def entry(self, info: zipfile.ZipInfo) -> BytesIO:
        """Raises Refused: it is broken."""
        self.archive = self.archive or zipfile.ZipFile(self.stream)
        try:
            return BytesIO(self.archive.read(info))  # no longer than the entry says
        except archives.BROKEN:
            raise Refused("its zip is broken") from None


def _zip_entry(stream: BinaryIO, info: zipfile.ZipInfo, size: int, unpacked: _Unpacked) -> Blob:
    """The bytes of an entry: found behind its local header, or unpacked."""
    if info.compress_type != zipfile.ZIP_STORED:
        return Blob(unpacked.entry(info), 0, info.file_size)
    stream.seek(info.header_offset)
    header = stream.read(30)
    if header[:4] != b"PK\x03\x04":
        raise Refused("its zip is broken")
    start = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if start + info.file_size > size:
        raise Refused("its zip is cut off")
    return Blob(stream, start, info.file_size)


def open_legacy(path: Path, stream: BinaryIO, expected: str, kwargs: Mapping[str, Any] | None = None) -> Container:
    """The networks of a `.pt` in the stream format of torch.save before torch 1.6; arguments as for `open_zip`.

    Raises:
        ValueError: it is broken, holds what is not allowed, or is of another family.
    """
    return _container(path, stream, *read_legacy(path, stream, expected, lenient=True), expected, kwargs)


def read_legacy(path: Path, stream: BinaryIO, expected: str, lenient: bool = False) -> tuple[Any, list[str]]:
    """As `read_zip`, of the stream format, in which nothing is packed.

    Raises:
        ValueError: it is broken, or holds what is not allowed.
    """
    stream.seek(0)
    size = os.fstat(stream.fileno()).st_size
    seen: list[str] = []
    blobs: dict[str, Blob] = {}
    ids: dict[str, tuple[torch.dtype, int]] = {}

    def persistent_load(value: Any) -> Storage:
        dtype, key, numel = storage_id(value)
        if len(value) == 6 and value[5] is not None:
            raise Refused("it holds a storage that is a view of another one")
        if ids.setdefault(key, (dtype, numel)) != (dtype, numel):
            raise Refused("it describes a storage in two ways")
        # Where the storage lies is known only at the end of the file.
        blob = blobs.setdefault(key, Blob(stream, 0, numel * dtype.itemsize))
        return _storage(blob, dtype, numel)

    values = []
    for index in range(5):
        rules, load = (_rules(seen), persistent_load) if index == 3 else ({}, None)
        machine = Machine(stream, size, rules, load, lenient=lenient and index == 3)
        values.append(_unpickle(path, machine, seen, expected))
    with saying(str(path)):
        system, keys = values[2], values[4]
        if values[1] != 1001 or not isinstance(system, dict) or system.get("little_endian") is not True:
            raise Refused("it is not a little-endian stream of torch.save")
        if not isinstance(keys, list) or len(keys) != len(ids) or not all(isinstance(key, str) for key in keys):
            raise Refused("its list of storages is not that of its tensors")
        for key in keys:
            if key not in ids or blobs[key].offset:
                raise Refused("its list of storages is not that of its tensors")
            if int.from_bytes(stream.read(8), "little") != ids[key][1]:
                raise Refused("it is cut off, or a storage has another size than its tensors say")
            blobs[key].offset = stream.tell()
            if blobs[key].offset + blobs[key].length > size:
                raise Refused("it is cut off")
            stream.seek(blobs[key].offset + blobs[key].length)
    return values[3], seen


def _storage(blob: Blob, dtype: torch.dtype, numel: int, swapped: bool = False) -> Storage:
    if blob.length != numel * dtype.itemsize:
        raise Refused(f"it holds a storage that does not have the {numel} numbers it claims")
    blob.storage = blob.storage or Storage(dtype, numel, blob, 0, swapped)
    if blob.storage.dtype != dtype:
        raise Refused("it describes a storage in two ways")
    return blob.storage


def _unpickle(path: Path, machine: Machine, seen: list[str], expected: str) -> Any:
    try:
        return machine.load()
    except Refused as error:
        if seen and "has no place" in str(error):
            raise ValueError(f"{path} is {_family(None, seen)}; expected {expected}") from None
        raise ValueError(f"{path}: {error}") from None


# What is in it.


def _container(
    path: Path,
    stream: BinaryIO,
    value: Any,
    seen: list[str],
    expected: str,
    kwargs: Mapping[str, Any] | None,
    nbytes: int = 0,
) -> Container:
    with saying(str(path)):
        found = contents.find(value, path, kwargs)
    if found is None:
        named = adm.family(value, path) or _family(value, seen)
        raise ValueError(f"{path} is {named}; expected {expected}")
    family, members, takes_kwargs = found
    return Container(path, stream, family, members, nbytes=nbytes, takes_kwargs=takes_kwargs)


def _family(value: Any, seen: list[str]) -> str:
    table = value if isinstance(value, dict) else {}
    keys = [str(key) for key in list(table)[:2000] if isinstance(key, str)]
    if "aux_optimizer" in table and "networks" in table:
        return "a training state of this toolkit (its networks are in network-snapshot-*.safetensors beside it)"
    if "optimizer_state" in table and "net" in table:
        return "a training state of EDM (its average is in network-snapshot-*.pkl beside it)"
    state = table.get("state_dict")
    if any(
        isinstance(key, str) and key.startswith("decoder.conv1.conv.")
        for key in (state if isinstance(state, dict) else table)
    ):
        return "a pSp/e4e checkpoint (an encoder, with a rosinality generator in it)"
    if {"optimizer", "optimizer_state_dict", "optim", "optimizers"} & set(keys):
        return "a training state"
    named = nvidia.family(value, seen)
    if named is not None:
        return named
    if table and all(isinstance(item, TensorRef | Array) for item in table.values()):
        return f"a PyTorch state dict of another network (with {shown(keys[0]) if keys else 'numbers'} in it)"
    held = f" of a table with the keys {', '.join(repr(shown(key)) for key in keys[:5])}" if keys else ""
    return f"a PyTorch file{held}"
