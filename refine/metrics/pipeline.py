"""How images get from where they are made to the statistics: in batches, ahead of the detector, on every process.

Under torchrun, within `sharing`, each process takes its own share of the seeds or files; what they have seen is merged,
so that all hold the same numbers.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
_AHEAD = 2  # batches that wait for the detector
_PATIENCE = timedelta(hours=24)  # processes may be of unequal speed, and meet only once all images are seen
_groups: list[dist.ProcessGroup] = []  # of the blocks of `sharing` that are open


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
    """For as long as the block lasts, all processes of torchrun measure together, each its share; all have to enter.

    Outside of it a process measures alone, as the first one does while the others of a training run wait. What they
    exchange are statistics on the CPU, over gloo; a process may be late by hours. With one process this is nothing.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not dist.is_initialized():
        yield
        return
    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    _groups.append(dist.new_group(backend="gloo", timeout=_PATIENCE))
    try:
        yield
    finally:
        _groups.pop()
        if mine:
            dist.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """This process's number, and how many measure together."""
    return (dist.get_rank(), dist.get_world_size()) if _groups else (0, 1)


def my_share(items: Sequence[T], batch: int = 1) -> Sequence[T]:
    """This process's part of a sequence: consecutive items, in whole batches, cut as one process would cut them."""
    rank, world = rank_and_world()
    batches = -(-len(items) // batch)
    low, high = batches * rank // world * batch, batches * (rank + 1) // world * batch
    return items[low:high]


def gathered(value: T) -> list[T]:
    """The values of all processes that measure together, in the order of their numbers."""
    world = rank_and_world()[1]
    if world == 1:
        return [value]
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, value, group=_groups[-1])
    return everyone
