"""Writing to what may not be read: a pipe whose reader was stopped, a terminal after Ctrl-S."""

import _thread
import contextlib
import io
import os
import time
from typing import Any


class Outlet:
    """A file descriptor that is written to by threads, so that nobody has to wait for its reader.

    Neither `select` nor a descriptor that does not block would do: a terminal with room for one byte counts as ready,
    and O_NONBLOCK would hold for every process that has the same pipe or terminal. The threads are bare ones: a signal
    handler may start them at any place of the program, and they do not keep it from ending.
    """

    def __init__(self, file: int):
        self._file = file
        self._idle = _thread.allocate_lock()
        self._error: OSError | None = None

    @property
    def stuck(self) -> bool:
        """Whether what was given before still waits for its reader."""
        return self._idle.locked()

    def write(self, data: bytes, seconds: float) -> bool:
        """Write, and wait that long for it at most.

        Returns:
            Whether all of it is written. Otherwise the outlet is stuck, and the data is written as soon as it can be;
            what is given to a stuck outlet is dropped.

        Raises:
            OSError: The descriptor is lost: its reader left, or its disk is full.
        """
        if not self._idle.acquire(blocking=False):
            return False
        try:
            _thread.start_new_thread(self._work, (data,))
        except BaseException:  # out of threads, or a second Ctrl-C
            self._idle.release()
            raise
        if not self._idle.acquire(timeout=seconds):
            return False
        self._idle.release()
        if self._error is not None:
            raise self._error
        return True

    def _work(self, data: bytes) -> None:
        try:
            while data:
                data = data[self._some(data) :]
        except OSError as error:
            self._error = error
        finally:
            self._idle.release()

    def _some(self, data: bytes) -> int:
        try:
            return os.write(self._file, data)
        except BlockingIOError:  # somebody else, who has it too, made it one that does not block
            time.sleep(0.05)
            return 0


def descriptor(stream: Any) -> int | None:
    """What a text stream writes to, if it does nothing but that; None for those of notebooks and of tests."""
    buffer = getattr(stream, "buffer", None)
    raw = buffer.raw if isinstance(buffer, io.BufferedWriter) else buffer  # no buffer with `python -u`
    if not isinstance(stream, io.TextIOWrapper) or not isinstance(raw, io.FileIO):
        return None
    with contextlib.suppress(OSError, ValueError):  # closed
        return raw.fileno()
    return None


def tell(text: str, seconds: float, file: int = 2, encoding: str = "utf-8") -> None:
    """One text to the process's stderr, past Python's streams, if that takes it in time."""
    data = text.encode(encoding, errors="replace")
    with contextlib.suppress(OSError):
        try:
            Outlet(file).write(data, seconds)
        except RuntimeError:  # there is no thread to be had, which may be what is told
            os.write(file, data)
