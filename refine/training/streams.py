"""What a run prints may be lost; the run itself goes on, and log.txt holds every line.

The reader of a pipe leaves (`| tee` and Ctrl-C), a terminal is closed, the disk of `> file` is full: then Python's
streams raise at every line, wherever it is printed from. Or the reader is stopped and does not read any more: then they
wait, and would do so for ever.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO, cast

from refine.dnnlib import Outlet, descriptor

PATIENCE = 5.0  # seconds for a reader to go on reading; what is printed meanwhile after that is dropped
BUFFER = 8192  # characters without the end of a line


class Lasting:
    """A text stream whose failures to write end its output and nothing else; it is not waited for longer than PATIENCE.

    A stream that is not read is tried again: nothing is printed until it is read, and then how much is missing.
    """

    def __init__(self, stream: TextIO, name: str):
        self._stream, self._name, self._lost = stream, name, False
        self._lock = threading.RLock()
        self._text, self._dropped, self._told = "", 0, False
        file = descriptor(stream)
        self._outlet = None if file is None else Outlet(file)

    def write(self, text: str) -> int:
        with self._lock, self._failures():
            if self._outlet is None and not self._lost:
                return self._stream.write(text)
            self._text += text
            if "\n" in text or "\r" in text or len(self._text) > BUFFER:  # as Python's own streams of terminals
                self.flush()
        return len(text)

    def flush(self) -> None:
        with self._lock, self._failures():
            text, self._text = self._text, ""
            if self._lost:
                return
            self._stream.flush()
            if self._outlet is not None and text:
                self._give(self._outlet, text)

    def end(self) -> None:
        """What is not read by now is not waited for by anybody later, either."""
        self.flush()
        if self._outlet is not None and self._outlet.stuck:
            self._to_nowhere()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:  # closed; out of threads
            self._lost = True
            self._to_nowhere()
            self._complain(f"is lost ({error.strerror if isinstance(error, OSError) else error})")

    def _give(self, outlet: Outlet, text: str) -> None:
        if outlet.stuck:
            self._dropped += text.count("\n")
            return
        if self._dropped:
            text = f"… {self._dropped} lines were not printed …\n{text}"
        written = outlet.write(text.encode(self._stream.encoding, errors="replace"), PATIENCE)
        self._dropped = 0
        if not written and not self._told:
            self._told = True
            self._complain("is not read")

    def _complain(self, reason: str) -> None:
        if self._name == "stdout":
            print(f"stdout {reason}: the run goes on, and log.txt holds what it says", file=sys.stderr)

    def _to_nowhere(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # what is still buffered must not fail once more at the end
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """For as long as the block lasts, nothing fails because stdout or stderr does, and nothing waits for their readers.

    Nor does a thread print a traceback of an OSError: TensorBoard's writer raises it once more, where it is handled.
    """
    before, hook = (sys.stdout, sys.stderr), threading.excepthook

    def without_files(failure: threading.ExceptHookArgs) -> None:
        if not issubclass(failure.exc_type, OSError):
            hook(failure)

    threading.excepthook = without_files
    lasting = [Lasting(stream, name) for stream, name in zip(before, ("stdout", "stderr"), strict=True)]
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in lasting)
    try:
        yield
    finally:
        for stream in lasting:  # here, where a failure is nothing
            stream.end()
        sys.stdout, sys.stderr = before
        threading.excepthook = hook
