"""How images get from where they are made to the statistics: in batches, ahead of the detector, on every process.

Under torchrun, within `sharing`, each process takes its own share of the seeds or files; what they have seen is merged,
so that all hold the same numbers.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from refine.torch_utils import distributed

T = TypeVar("T")
_AHEAD = 2  # batches that wait for the detector
_open: list[bool] = []  # blocks of `sharing`, and whether there are other processes in them


def prefetched(items: Iterable[T]) -> Iterator[T]:
    """The same items, made in a thread of their own while the previous ones are used. Errors come out where they are
    iterated over; a consumer that stops early ends the thread."""
    waiting: queue.Queue[tuple[str, Any]] = queue.Queue(_AHEAD)
    stop = threading.Event()

    def put(kind: str, value: Any = None) -> bool:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                waiting.put((kind, value), timeout=0.1)
                return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end")
        except BaseException as error:  # noqa: BLE001 - handed over, and raised in the consumer
            put("error", error)

    thread = threading.Thread(target=work, daemon=True, name="images")
    thread.start()
    try:
        while True:
            kind, value = waiting.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def sharing() -> Iterator[None]:
    """For as long as the block lasts, all processes of a `distributed.session` measure together, each its share.

    All have to enter, and may be late by hours. Outside of it a process measures alone.
    """
    _open.append(distributed.is_joined())
    try:
        yield
    finally:
        _open.pop()


def rank_and_world() -> tuple[int, int]:
    """This process's number, and how many measure together."""
    return (distributed.rank(), distributed.world_size()) if any(_open) else (0, 1)


def my_share(items: range, batch: int = 1) -> range:
    """This process's part of seeds or indices: consecutive, in whole batches, cut as one process would cut them."""
    rank, world = rank_and_world()
    batches = -(-len(items) // batch)
    low, high = batches * rank // world * batch, batches * (rank + 1) // world * batch
    return items[low:high]


def gathered(value: T) -> list[T]:
    """The values of all processes that measure together, in the order of their numbers."""
    return distributed.gathered(value) if any(_open) else [value]


def made_by_all(work: Callable[[], T]) -> list[T]:
    """What all processes make of their shares, in the order of their numbers; an error in one is raised in all.

    Nobody waits for one that failed. It raises its own error, the others a ValueError with the same message.
    """
    try:
        made = work()
    except Exception as error:
        gathered((None, str(error) or type(error).__name__))
        raise
    parts = gathered((made, None))
    if failure := next((failure for _, failure in parts if failure is not None), None):
        raise ValueError(failure)
    return [part for part, _ in parts]
