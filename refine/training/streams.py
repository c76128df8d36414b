"""What a run prints may be lost; the run itself goes on, and log.txt holds every line.

The reader of a pipe leaves (`| tee` and Ctrl-C), a terminal is closed, the disk of `> file` is full: then Python's
streams raise at every line, wherever it is printed from.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast


class Lasting:
    """A text stream whose failures to write end its output and nothing else."""

    def __init__(self, stream: TextIO, name: str):
        self._stream, self._name, self._lost = stream, name, False

    def write(self, text: str) -> int:
        if not self._lost:
            try:
                return self._stream.write(text)
            except (OSError, ValueError) as error:  # ValueError: closed
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        if not self._lost:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._lose(error)

    def _lose(self, error: Exception) -> None:
        self._lost = True
        with contextlib.suppress(OSError, ValueError):  # what is still buffered must not fail once more at the end
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        if self._name == "stdout":
            reason = error.strerror if isinstance(error, OSError) else error
            print(f"stdout is lost ({reason}): the run goes on, and log.txt holds what it says", file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """For as long as the block lasts, nothing fails because stdout or stderr does."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        cast(TextIO, Lasting(stream, name)) for stream, name in zip(before, ("stdout", "stderr"), strict=True)
    )
    try:
        yield
    finally:
        sys.stdout.flush()  # here, where a failure is nothing
        sys.stdout, sys.stderr = before
