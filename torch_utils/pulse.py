"""Whether the other processes are alive, and calls that must not wait for them for ever.

Neither a stopped process nor one that hangs closes its connections, and what waits for them in C++ cannot be
interrupted. So every process counts in the store, in a thread of its own, and looks whether the others' counts move.
"""

import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from refine.dnnlib import tell

T = TypeVar("T")


def within(seconds: float, function: Callable[..., T], *args: object) -> T:
    """function(*args), waited for no longer than that; then it is left to itself.

    Raises:
        TimeoutError: It did not end in time.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(function(*args))
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True, name="within")
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return results[0]


class Pulse:
    """Ends this process, whatever it waits for, once another one has been silent for too long.

    Args:
        store: A connection to the store for this alone: while the store does not answer, it is blocked.
        rank, world: This process's number, and how many there are.
        limit: Seconds of silence.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, limit: float):
        self._store, self._rank, self._limit = store, rank, limit
        self._counts: dict[int, int] = {other: -1 for other in range(world) if other != rank}
        self._heard = dict.fromkeys(self._counts, time.monotonic())
        self._answered = time.monotonic()
        self._stop = threading.Event()
        for work in (self._beat, self._watch):
            threading.Thread(target=work, daemon=True, name="pulse").start()

    def stop(self) -> None:
        """No more of both: the processes part."""
        self._stop.set()

    def _beat(self) -> None:
        while True:  # at once, for those that wait already
            try:
                self._store.add(f"beat/{self._rank}", 1)
                for other, before in self._counts.items():
                    count = self._store.add(f"beat/{other}", 0)
                    if count != before:
                        self._counts[other], self._heard[other] = count, time.monotonic()
            except RuntimeError:  # its holder is gone, and with it the connections that everybody works with
                return
            self._answered = time.monotonic()
            if self._stop.wait(self._limit / 20):
                return

    def _watch(self) -> None:
        pause = self._limit / 50
        before = time.monotonic()
        while not self._stop.wait(pause):
            now = time.monotonic()
            if now - before > 5 * pause + 5:  # we were stopped ourselves, as a batch queue stops whole jobs
                self._answered = now
                self._heard = dict.fromkeys(self._heard, now)
            before = now
            silent = [other for other, heard in self._heard.items() if now - heard > self._limit]
            if now - self._answered > self._limit:  # then nothing is known of the others
                silent = [0]
            if silent and not self._stop.is_set():
                self._give_up(silent)

    def _give_up(self, silent: list[int]) -> None:
        names = ", ".join(map(str, silent))
        text = f"Error: rank {self._rank} lost another process: nothing was heard of rank {names} for "
        text += f"{self._limit:.0f} s; it was stopped, hangs, or its machine is gone\n"
        try:
            tell(text, 1)
        finally:
            os._exit(2)
