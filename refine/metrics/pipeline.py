"""How images get from where they are made to the statistics: in batches, ahead of the detector, on every process.

Under torchrun (an initialised `torch.distributed`) each process takes its own share of the seeds or files; what they
have seen is merged, so that all hold the same numbers. With one process nothing of this happens.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed

T = TypeVar("T")
_AHEAD = 2  # batches that wait for the detector


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
def joined_processes() -> Iterator[None]:
    """Under torchrun: one group of all processes for as long as the block lasts. It is gloo's, since they exchange
    statistics on the CPU. Otherwise, and where there is a group already, nothing."""
    mine = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized()
    if mine:
        torch.distributed.init_process_group("gloo")
    try:
        yield
    finally:
        if mine:
            torch.distributed.destroy_process_group()


def rank_and_world() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def my_share(items: Sequence[T], batch: int = 1) -> Sequence[T]:
    """This process's part of a sequence: consecutive items, in whole batches, cut as one process would cut them."""
    rank, world = rank_and_world()
    batches = -(-len(items) // batch)
    low, high = batches * rank // world * batch, batches * (rank + 1) // world * batch
    return items[low:high]


def gathered(value: T) -> list[T]:
    """The values of all processes, in the order of their numbers."""
    if rank_and_world()[1] == 1:
        return [value]
    everyone: list[Any] = [None] * rank_and_world()[1]
    torch.distributed.all_gather_object(everyone, value)
    return everyone
