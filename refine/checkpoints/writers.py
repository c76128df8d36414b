"""Files that other libraries write. What they hide in exceptions of their own is an OSError here, as elsewhere."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import safetensors.torch
import torch

from refine import dnnlib


def save_safetensors(path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes contiguous CPU tensors, none of which shares memory with another, as safetensors.

    Raises:
        OSError: the file cannot be written, or the disk is full; the file that was there is as it was.
    """
    with dnnlib.replaced_atomically(path) as temporary:
        try:
            safetensors.torch.save_file(dict(tensors), temporary, metadata=dict(metadata))
        except safetensors.SafetensorError as error:
            if (number := re.search(r"os error (\d+)", str(error))) is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


@contextlib.contextmanager
def patient(path: Path) -> Iterator[IO[bytes]]:
    """A new file for a writer of torch's: on a full disk these raise RuntimeError, or end the process.

    Raises:
        OSError: at the end of the block, if something could not be written.
    """
    with open(path, "wb") as file:
        patient_file = _Patient(file)
        yield cast(IO[bytes], patient_file)
        patient_file.flush()
        patient_file.check()


class _Patient:
    """A file whose first failure to write is kept for later, and that takes all that comes after."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        if self._error is None:
            try:
                return self._file.write(data)
            except OSError as error:
                self._error = error
        return len(data)

    def flush(self) -> None:
        if self._error is None:
            try:
                self._file.flush()
            except OSError as error:
                self._error = error

    def check(self) -> None:
        """Raises the OSError that happened, if one did."""
        if self._error is not None:
            raise self._error
