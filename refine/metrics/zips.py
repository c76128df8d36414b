"""Zip files of very many images: their list in a microsecond an entry, and the images themselves.

Python's `zipfile` makes an object of each entry, which takes ten times as long and a kilobyte of memory. Here the list
is taken apart by NumPy, nothing but the names are kept of it, and an entry is looked up when it is read. What is read
is what `zipfile` reads, or is refused: an archive that is not laid out as programs lay them out (between the entries of
its list there is nothing, no name holds the mark of an entry or a zero byte, deflated data end where they say) is
called broken.
"""

from __future__ import annotations

import struct
import threading
import zlib
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from refine.checkpoints.pickles.inert import Refused
from refine.dnnlib import format_bytes

MAX_ENTRIES, BYTES_PER_ENTRY = 1_300_000, 1 << 14  # as many as ImageNet has, and one more for each 16 KiB of an archive
MAX_LIST_BYTES, BYTES_PER_LIST_BYTE = 96 << 20, 128  # likewise
_ENTRY, _LOCAL, _END, _END64, _LOCATOR64 = (b"PK" + mark for mark in (b"\1\2", b"\3\4", b"\5\6", b"\6\6", b"\6\7"))
_ENTRY_FIELDS = struct.Struct("<4s4x4H3I3H8xI")  # flags, method, time (2), crc, packed, size, name, extra, comment, at
_END_BYTES, _END64_BYTES, _ENTRY_BYTES, _LOCAL_BYTES = 22, 56 + 20, 46, 30
_NEWEST = 63  # the newest version of the format that `zipfile` reads, times ten
_ENCRYPTED, _PATCHED, _UTF8 = 1 | 1 << 6, 1 << 5, 1 << 11  # flags
_STORED, _DEFLATED = 0, 8  # methods
_SMALL = np.frombuffer(bytes(range(256)).lower(), np.uint8).astype(np.int64)
_MAX_32 = (1 << 32) - 1  # instead of a number that is in the extra field


class ZipList:
    """What a zip file holds. Reading is safe from several threads.

    Args:
        path: A regular file.

    Attributes:
        names: Of all entries, in the archive's order, folders among them.

    Raises:
        Refused: It is broken, or has more entries than there can be images.
    """

    def __init__(self, path: Path):
        self._file, self._lock = open(path, "rb"), threading.Lock()  # noqa: SIM115 - for as long as this object is
        size = self._file.seek(0, 2)
        start, length, self._shift = self._find_list(size)
        if length > MAX_LIST_BYTES + size // BYTES_PER_LIST_BYTE:
            raise Refused(f"has a list of entries of {format_bytes(length)}; expected larger images, or a folder")
        self._list = self._at(start, length)
        self._starts, ends, flags = _entries(self._list, MAX_ENTRIES + size // BYTES_PER_ENTRY, size)
        self._ends = ends  # of names
        self.names = _names(self._list, self._starts + _ENTRY_BYTES, ends, flags)

    def ending(self, suffixes: tuple[str, ...]) -> np.ndarray:
        """Which names end in one of these, of at most seven letters, small or capital: bool [N]."""
        data, room = np.frombuffer(self._list, np.uint8), self._ends - self._starts - _ENTRY_BYTES
        found = np.zeros(len(room), bool)
        for length in {len(suffix) for suffix in suffixes}:
            wanted = [int.from_bytes(suffix.encode(), "big") for suffix in suffixes if len(suffix) == length]
            last = sum(_SMALL[data[self._ends - 1 - place]] << 8 * place for place in range(length))
            found |= np.isin(last, wanted) & (room >= length)
        return found

    def read(self, index: int, limit: int) -> bytes:
        """The contents of an entry, of at most so many bytes.

        Raises:
            Refused: They are more, encrypted, compressed in an unusual way, or damaged.
        """
        start = int(self._starts[index])
        fields: tuple[Any, ...] = _ENTRY_FIELDS.unpack_from(self._list, start)
        _, flags, method, _, _, crc, packed, size, len_name, len_extra, _, at = fields
        name = self._list[start + _ENTRY_BYTES : start + _ENTRY_BYTES + len_name]
        extra = self._list[start + _ENTRY_BYTES + len_name : start + _ENTRY_BYTES + len_name + len_extra]
        if extra:
            size, packed, at = _long_numbers(extra, [size, packed, at])
        if size > limit:
            raise Refused(f"has {size} bytes; expected at most {limit}")
        if flags & _ENCRYPTED:
            raise Refused("is encrypted; expected an archive without a password")
        if method not in (_STORED, _DEFLATED) or flags & _PATCHED:
            raise Refused("is compressed in an unusual way; expected deflate or none")
        if packed != size if method == _STORED else packed > 2 * size + 1024:
            raise _broken()
        at += self._shift
        local = self._at(at, _LOCAL_BYTES + len_name)
        same = local[_LOCAL_BYTES:] == name and int.from_bytes(local[26:28], "little") == len_name
        if local[:4] != _LOCAL or not same or (flags ^ int.from_bytes(local[6:8], "little")) & _UTF8:
            raise _broken()
        data = self._at(at + len(local) + int.from_bytes(local[28:30], "little"), packed)
        if method == _DEFLATED:
            try:
                data = zlib.decompressobj(-15).decompress(data, size + 1)
            except zlib.error:
                raise _broken() from None
        if len(data) != size or zlib.crc32(data) != crc:
            raise _broken()
        return data

    def _at(self, position: int, length: int) -> bytes:
        """So many bytes of the file."""
        if position < 0:
            raise _broken()
        with self._lock:
            self._file.seek(position)
            data = self._file.read(length)
        if len(data) != length:
            raise _broken()
        return data

    def _find_list(self, size: int) -> tuple[int, int, int]:
        """Where the list begins, its length, and by how much all positions in it are to be shifted.

        They are where something was put before a finished archive.
        """
        tail = self._at(max(0, size - _END_BYTES - (1 << 16)), min(size, _END_BYTES + (1 << 16)))
        found = len(tail) - _END_BYTES
        if tail[found:][:4] != _END or tail[-2:] != b"\0\0":  # there is a comment behind it
            found = tail.rfind(_END)
        if found < 0 or found + _END_BYTES > len(tail):
            raise _broken()
        length, start = struct.unpack_from("<II", tail, found + 12)
        end = size - len(tail) + found
        before = self._at(end - _END64_BYTES, _END64_BYTES) if end >= _END64_BYTES else b""
        if before[56:60] == _LOCATOR64:  # then the other record is right before it, and it is of one disk
            if before[:4] != _END64 or before[60:64] != bytes(4) or before[73:] != bytes(3) or before[72] > 1:
                raise _broken()
            length, start = struct.unpack_from("<QQ", before, 40)
            end -= _END64_BYTES
        if length > end:
            raise _broken()
        return end - length, length, end - length - start


def _entries(listed: bytes, most: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where entries begin, where their names end, and their flags: int64 [N] each."""
    mark = int.from_bytes(_ENTRY, "little")
    words = (
        np.frombuffer(listed, "<u4", max(len(listed) - shift, 0) // 4, min(shift, len(listed))) for shift in range(4)
    )
    starts = np.sort(np.concatenate([4 * np.flatnonzero(part == mark) + shift for shift, part in enumerate(words)]))
    if len(starts) > most:
        raise Refused(f"has more than {most} entries in {format_bytes(size)}; expected larger images, or a folder")
    data = np.frombuffer(listed, np.uint8)
    if len(data) and (not len(starts) or starts[-1] + _ENTRY_BYTES > len(data)):
        raise _broken()

    def number(offset: int) -> np.ndarray:
        return data[starts + offset].astype(np.int64) | data[starts + offset + 1].astype(np.int64) << 8

    name_ends = starts + _ENTRY_BYTES + number(28)
    following = np.concatenate([[0], name_ends + number(30) + number(32)])
    if not np.array_equal(following, np.concatenate([starts, [len(data)]])) or (data[starts + 6] > _NEWEST).any():
        raise _broken()
    return starts, name_ends, number(8)


def _names(listed: bytes, starts: np.ndarray, ends: np.ndarray, flags: np.ndarray) -> list[str]:
    text = listed.decode("latin-1")
    names = [text[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    if "\0" in "".join(names):  # at which `zipfile` cuts a name
        raise _broken()
    unicode = flags & _UTF8 != 0
    for encoding, chosen in (("utf-8", unicode), ("cp437", ~unicode)):
        part = list(compress(names, chosen))
        if "".join(part).isascii():
            continue
        try:
            decoded = "\0".join(part).encode("latin-1").decode(encoding).split("\0")  # all at once
        except UnicodeDecodeError:
            raise _broken() from None
        for index, name in zip(np.flatnonzero(chosen).tolist(), decoded, strict=True):
            names[index] = name
    return names


def _long_numbers(extra: bytes, numbers: list[int]) -> list[int]:
    """Those that 32 bits do not hold, from the field that has them in this order."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        field, extra = extra[4 : 4 + length], extra[4 + length :]
        if len(field) < length:
            raise _broken()
        for index, number in enumerate(numbers):
            if kind == 1 and number == _MAX_32:
                if len(field) < 8:
                    raise _broken()
                numbers[index], field = int.from_bytes(field[:8], "little"), field[8:]
    return numbers


def _broken() -> Refused:
    return Refused("is broken or cut off")
