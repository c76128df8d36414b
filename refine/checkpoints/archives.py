"""Zip archives from elsewhere, NumPy's among them: what is taken into memory is bounded by the file's size.

An archive can claim what it does not hold, and a megabyte can unpack to terabytes; some methods of compression give out
a gigabyte at a single call. So the claims are added up before anything is unpacked, only the two methods that people's
programs use are unpacked at all, and an array has as many bytes as its shape says.
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from refine.checkpoints.pickles.inert import Refused, shown
from refine.checkpoints.sniff import MAX_NETWORK_ENTRIES, zip_entries

MAX_STATE_ENTRIES = 20_000  # of three networks and their optimisers, which are looked at once
MAX_INFLATION, SPARE_BYTES = 4, 64 << 20  # compressed weights: 1.1 times, or 2 where they are rounded
_MAX_INFLATED_BYTES = 768 << 20  # above the file's
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_KINDS = "fiubUS"  # of NumPy's types: numbers and text
_MAX_HEADER_BYTES = 10_000
_HEADER = re.compile(  # Python 2 wrote long integers
    r"\{\s*'descr': '([<>|=]?[A-Za-z]\d{1,8})', 'fortran_order': (True|False), "
    r"'shape': \(((?:\d{1,18}L?, ?)*(?:\d{1,18}L?)?)\),?\s*\}\s*"
)

#: What Python's zip and NumPy's header readers raise for broken files.
BROKEN: tuple[type[Exception], ...] = (
    *(zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError, KeyError, IndexError),
    *(struct.error, ValueError, OverflowError, SyntaxError, TypeError, AttributeError, RecursionError),
)


@contextmanager
def opened(file: str | os.PathLike | BinaryIO, most: int = MAX_NETWORK_ENTRIES) -> Iterator[zipfile.ZipFile]:
    """A zip archive, for as long as the block lasts.

    Args:
        file: Its path, or the open file.
        most: Entries that it may have.

    Raises:
        Refused: It is none, is broken, or has more entries than that; also for what the block meets.
    """
    try:
        if zip_entries(file) > most:
            raise Refused(f"it has more than {most} entries")
        with zipfile.ZipFile(file) as archive:
            yield archive
    except Refused:
        raise
    except BROKEN:
        raise Refused("it is a broken or cut-off zip archive") from None


def check_method(info: zipfile.ZipInfo) -> None:
    """Raises Refused for a compression that can give out gigabytes at once."""
    if info.compress_type not in _METHODS:
        raise Refused(f"{shown(info.filename)} is compressed in an unusual way; expected deflate or none")


def check_inflation(infos: Iterable[zipfile.ZipInfo], size: int) -> int:
    """The bytes that entries claim to unpack to.

    Args:
        infos: The entries that are to be read.
        size: Of the archive, in bytes.

    Raises:
        Refused: They are many times the file, or compressed in an unusual way.
    """
    infos = list(infos)
    for info in infos:
        check_method(info)
    inflated = sum(info.file_size for info in infos)
    if inflated > min(MAX_INFLATION * size + SPARE_BYTES, size + _MAX_INFLATED_BYTES):
        raise Refused("its entries claim many times the memory that the file is long")
    return inflated


def read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int) -> bytes:
    """One entry, of at most so many bytes.

    Raises:
        Refused: It claims more, or is compressed in an unusual way.
    """
    check_method(info)
    if info.file_size > limit:
        raise Refused(f"{shown(info.filename)} claims {info.file_size} bytes; expected at most {limit}")
    return archive.read(info)


def npy_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and dtype of a plain array; the stream is left at the data.

    NumPy's own reader evaluates the header as Python text.

    Raises:
        Refused: It is no array, or one of objects or with fields.
    """
    magic = stream.read(8)
    if magic[:6] != b"\x93NUMPY" or magic[6:7] not in (b"\x01", b"\x02", b"\x03"):
        raise Refused("it holds a member that is no array")
    length = int.from_bytes(stream.read(2 if magic[6] == 1 else 4), "little")
    text = stream.read(length).decode("latin-1") if length <= _MAX_HEADER_BYTES else ""
    match = _HEADER.fullmatch(text)
    if match is None:
        raise Refused(f"it holds what is not a plain array of numbers or text ({shown(text[:60].strip())})")
    shape = tuple(int(number.strip(" L")) for number in match[3].split(",") if number.strip())
    if len(shape) > 32 or any(size >= 1 << 48 for size in shape):
        raise Refused("it holds an array of an impossible shape")
    return shape, match[2] == "True", np.dtype(match[1])


def read_arrays(path: Path, skip: str = "") -> dict[str, np.ndarray]:
    """The arrays of an .npz by name, in the machine's byte order: numbers and text.

    Args:
        path: The file.
        skip: An array that is only named, and comes empty.

    Raises:
        Refused: The file is broken, holds objects, or claims many times its size.
    """
    with opened(path) as archive:
        infos = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        check_inflation((info for name, info in infos.items() if name != skip), os.path.getsize(path))
        return {name: np.empty(0) if name == skip else read_npy(archive, info) for name, info in infos.items()}


def read_npy(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """One array, in the machine's byte order; for its limits see `read_arrays`."""
    with archive.open(info) as stream:
        shape, fortran, dtype = npy_header(stream)
        if dtype.kind not in _KINDS or (dtype.kind == "f" and dtype.itemsize > 8):
            raise Refused(f"{shown(info.filename)} has dtype {shown(str(dtype))}; expected plain numbers or text")
        nbytes = dtype.itemsize
        for length in shape:
            nbytes *= length
        if any(length < 0 for length in shape) or stream.tell() + nbytes != info.file_size:
            raise Refused(f"{shown(info.filename)} has other data than its shape {list(shape)[:8]} says")
        data = bytearray(stream.read())
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    return array.astype(dtype.newbyteorder("="), copy=False)
