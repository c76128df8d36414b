"""What is told of a build while it runs: one line on stderr."""

import os
import sys


class _Line:
    """One line on stderr per build: begun when it begins, ended by how it ended. Of the processes of a node the first
    alone writes."""

    def __init__(self) -> None:
        self._is_open, self._told = False, set[str]()

    def begin(self, device_type: str, text: str) -> None:
        self._write(device_type, f"{text} … ")
        self._is_open = True

    def end(self, device_type: str, text: str, once: bool = False) -> None:
        if self._is_open or not once or device_type not in self._told:
            self._write(device_type, f"{text}\n")
        if once:
            self._told.add(device_type)
        self._is_open = False

    def finish(self) -> None:
        """For what another process has done."""
        if self._is_open:
            self.end("", "done")

    def break_off(self) -> None:
        """For an error that will be printed on a line of its own."""
        if self._is_open:
            self.end("", "stopped")

    def _write(self, device_type: str, text: str) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            start = "" if self._is_open else f"ops ({device_type}): "
            print(f"{start}{text}", end="", file=sys.stderr, flush=True)


line = _Line()
