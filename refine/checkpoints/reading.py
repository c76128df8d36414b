"""Bytes of a file into memory, by a few threads: most of the time goes to the system, which hands out memory page by
page, and to several threads at once."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
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
    """Calls `work` in a few threads, which share the items among them and have ended when this returns or raises.

    After a fault no further item is given out; one of the faults is raised.
    """
    todo = iter(list(items))
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            workers = [pool.submit(work, todo) for _ in range(_THREADS)]
            wait(workers, return_when=FIRST_EXCEPTION)
        finally:
            deque(todo, maxlen=0)  # nothing is left
    for worker in workers:
        worker.result()
