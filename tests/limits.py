"""Runs a reader in a process of its own, where a hostile file can do no more than end it."""

import os
import resource
import signal
import struct
import zlib
from collections.abc import Sequence
from itertools import chain, repeat
from pathlib import Path

SECONDS = 2  # of processor time
BYTES = 1 << 30  # of address space above what this process and the file take


def zip_of(path: Path, names: Sequence[bytes], size: int = 0, filler: int = 0) -> Path:
    """A zip that says that it has one file, and lists many: all of them the same `size` zeros, none of them packed.

    Args:
        path: What is written.
        names: Of the files.
        size: Of each.
        filler: How many bytes are before the list; they take no room on the disk.
    """
    crc = zlib.crc32(b"\0" * size)
    first = struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, 0, 0, 0, 33, crc, size, size, 0, 0)
    with open(path, "wb") as file:
        file.write(first + b"\0" * size)
        file.seek(filler, os.SEEK_CUR)
        start = file.tell()
        lengths = [len(name).to_bytes(2, "little") for name in names]
        head = struct.pack("<4s6H3I", b"PK\x01\x02", 20, 20, 0, 0, 0, 33, crc, size, size)
        file.write(b"".join(chain.from_iterable(zip(repeat(head), lengths, repeat(bytes(16)), names))))
        length = file.tell() - start
        file.write(struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, length, start, 0))
    return path


def outcome(read, path: Path, part: int = 1) -> str:
    """What `read(path)` says: '' for a result, otherwise the one line of its ValueError.

    Args:
        read: What is called.
        path: The file.
        part: The file holds one in so many of what it might, and may take as small a part of the time and the memory.

    Raises:
        AssertionError: It ended in another way, or took more time or memory than a file may.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            limit = own + os.stat(path).st_size + BYTES // part
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            spent = int(sum(os.times()[:2]))
            resource.setrlimit(resource.RLIMIT_CPU, (spent + SECONDS + 1, spent + SECONDS + 1))
            signal.alarm(60)
            before = sum(os.times()[:2])
            said = _said(read, path)
            taken = sum(os.times()[:2]) - before
            if part > 1 and taken > (SECONDS + 1) / part:
                said = f"took {taken:.2f} s: {said}"
            os.write(writer, said.encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as stream:
        said = stream.read().decode()
    status = os.waitpid(child, 0)[1]
    assert status == 0, f"ended by signal {status}"
    kind, _, text = said.partition(" ")
    assert kind in ("read", "refused"), said
    assert kind == "read" or ("\n" not in text and text.isprintable() and str(path.parent) in text and len(text) < 600)
    return text


def _said(read, path: Path) -> str:
    try:
        read(path)
    except ValueError as error:
        return f"refused {error}"
    except BaseException as error:  # noqa: BLE001 - told to the parent
        return f"{type(error).__name__} {error}"
    return "read "
