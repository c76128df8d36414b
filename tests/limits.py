"""Runs a reader in a process of its own, where a hostile file can do no more than end it."""

import os
import resource
import signal
from pathlib import Path

SECONDS = 2  # of processor time
BYTES = 1 << 30  # of address space above what this process and the file take


def outcome(read, path: Path) -> str:
    """What `read(path)` says: '' for a result, otherwise the one line of its ValueError.

    Raises:
        AssertionError: It ended in another way, or took more time or memory than a file may.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            limit = own + os.stat(path).st_size + BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            spent = int(sum(os.times()[:2]))
            resource.setrlimit(resource.RLIMIT_CPU, (spent + SECONDS + 1, spent + SECONDS + 1))
            signal.alarm(60)
            os.write(writer, _said(read, path).encode())
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
