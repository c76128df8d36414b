"""Bytes of a file into memory, by a few threads: most of the time goes to the system, which hands out memory page by
page, to several threads at once.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from typing import Any, BinaryIO

_THREADS = min(4, os.cpu_count() or 1)


def read_at(stream: BinaryIO, offset: int, view: memoryview) -> int:
    """Fills a writable view of bytes from a place of a file; the stream's own position stays.

    Args:
        stream: A file, or bytes in memory.
        offset: The place.
        view: What is filled.

    Returns:
        The number of bytes read, fewer than asked for where the file ends.
    """
    if isinstance(stream, BytesIO):
        found = stream.getbuffer()[offset : offset + len(view)]
        view[: len(found)] = found
        return len(found)
    filled = 0
    while filled < len(view) and (count := os.preadv(stream.fileno(), [view[filled:]], offset + filled)):
        filled += count  # one call reads 2 GiB at most
    return filled


def in_threads(work: Callable[[Iterator[Any]], None], items: Iterable[Any]) -> None:
    """Calls `work` in a few threads, this one among them, which share the items; the others have ended on return.

    After a fault no further item is given out; one of the faults is raised.
    """
    todo, helpers = iter(list(items)), list[Future]()

    def share() -> None:
        try:
            work(todo)
        finally:
            deque(todo, maxlen=0)  # nothing is left for the others

    with ThreadPoolExecutor(_THREADS) as pool:
        with suppress(RuntimeError):  # no further thread can be started
            for _ in range(_THREADS - 1):
                helpers.append(pool.submit(share))
        share()
    for helper in helpers:
        helper.result()
