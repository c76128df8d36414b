"""When a run is to end before its time: signals and time limits, obeyed between two iterations."""

import os
import signal
import time
from collections.abc import Callable
from enum import IntEnum
from types import FrameType
from typing import Any

from refine.dnnlib import tell

# SLURM sends SIGTERM before it kills, and USR1 where `sbatch --signal=USR1@120` asks for a warning. SIGHUP comes from a
# terminal that is closed.
_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))

Handler = Callable[[int, FrameType | None], Any] | int | None  # what Python's signal module takes and gives


class StopReason(IntEnum):
    """What follows an iteration; of several reasons the largest counts, in all processes alike."""

    GO_ON = 0
    SAVE = 1  # the training state, and go on
    TIME_IS_UP = 2
    SIGNALLED = 3
    NO_BETTER = 4  # than the best of the last snapshots
    RECALL_LOST = 5
    ASKED = 6  # by a callback


class StopRequests:
    """A context in which the first signal only leaves a note, and the second ends the program at once.

    Args:
        time_limit: Seconds after which the run is to have ended, its state saved. None = no limit.
        since: From when they count, by `time.monotonic`; None = from now.

    Attributes:
        signal: The first signal that came.
        asked: Whether a callback asked for the end.
    """

    def __init__(self, time_limit: float | None = None, since: float | None = None):
        self.signal: int | None = None
        self.asked = False
        self._limit, self._begin = time_limit, time.monotonic() if since is None else since
        self._slowest, self._last = 0.0, time.monotonic()
        self._noted_at = 0.0
        self._before: dict[int, Handler] = {}

    def __enter__(self) -> "StopRequests":
        try:
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS if not _under_nohup(number)}
        except ValueError:  # not the main thread, as in somebody's notebook: signals are theirs
            self._before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._noted_at = number, now
            if os.environ.get("RANK", "0") == "0":
                # Past Python's streams: one that was being written to may not be entered again.
                tell(f"\n{signal.Signals(number).name}: stopping after this iteration; once more stops at once\n", 0.2)
        elif now - self._noted_at > self._echo(number):
            for other in self._before:
                signal.signal(other, signal.SIG_DFL)  # and a third one, should we hang, is not ours to handle
            raise KeyboardInterrupt

    def _echo(self, number: int) -> float:
        """Seconds within which a second signal is the first one again, by another way."""
        if "TORCHELASTIC_RUN_ID" in os.environ:  # a terminal's Ctrl-C reaches workers from there and from torchrun
            return 3
        # A SIGTERM to a group of processes reaches us itself, and from make, srun or a shell that hands it on.
        return 0.5 if number == self.signal == signal.SIGTERM else 0

    def ask(self) -> None:
        """For a callback: the run is to end."""
        self.asked = True

    def reason(self) -> StopReason:
        """What has been asked for; to be called once an iteration, see `time_is_up`."""
        time_is_up = self.time_is_up()
        if self.asked:
            return StopReason.ASKED
        if self.signal:
            return StopReason.SIGNALLED
        return StopReason.TIME_IS_UP if time_is_up else StopReason.GO_ON

    def time_is_up(self) -> bool:
        """Whether another iteration as slow as the slowest so far, twice, might end past the limit.

        To be asked once an iteration; what happens between two calls, such as saving, counts as part of one.
        """
        now = time.monotonic()
        self._slowest, self._last = max(self._slowest, now - self._last), now
        return self._limit is not None and now + 2 * self._slowest > self._begin + self._limit


def _under_nohup(number: int) -> bool:
    return signal.Signals(number).name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN
