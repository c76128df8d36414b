"""What detectors and cached statistics look like in pickles, `.pt` and safetensors files; nothing in them is run.

The allow-list of the checkpoints' reader is extended by torch's own layers (a detector's modules) and by nothing else;
they are read as tables of tensors, whatever their class.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from refine.checkpoints.foreign import nvidia, raw_pickle, state_dicts, torch_save
from refine.checkpoints.foreign.container import saying
from refine.checkpoints.pickles.inert import Refused, Stub
from refine.checkpoints.pickles.machine import Machine
from refine.checkpoints.pickles.tensors import Array, TensorRef
from refine.checkpoints.sniff import read_safetensors_header, sniff

_LAYERS = {
    "activation": ("ReLU", "Softmax"),
    "batchnorm": ("BatchNorm2d",),
    "container": ("ModuleDict", "ModuleList", "Sequential"),
    "conv": ("Conv2d",),
    "dropout": ("Dropout",),
    "flatten": ("Flatten",),
    "linear": ("Identity", "Linear"),
    "module": ("Module",),
    "pooling": ("AdaptiveAvgPool2d", "AvgPool2d", "MaxPool2d"),
}
LAYER_RULES = {
    stub.name: stub
    for module, names in _LAYERS.items()
    for name in names
    for stub in [Stub(f"torch.nn.modules.{module}.{name}", new=nvidia.ModuleDict)]
}
_MAX_VALUES, _MAX_DEPTH = 200_000, 12
_SPARE_BYTES = 64 << 20  # that arrays may take beyond twice the file: views of one storage can overlap


def read_stored(path: str | os.PathLike, expected: str) -> Any:
    """The value of a pickle or a `.pt` file: tables, lists, numbers and text, arrays as tensors in memory.

    Objects of torch's or NVIDIA's classes become a table of their tensors, named as in a state_dict.

    Raises:
        ValueError: The file is of another kind, is broken, or holds something that is not allowed.
    """
    with opened(path, expected) as value:
        return in_memory(path, value)


@contextmanager
def opened(path: str | os.PathLike, expected: str) -> Iterator[Any]:
    """As `read_stored`, also of safetensors, for as long as the block lasts; arrays are still in the file.

    What is refused within the block is said of the file.
    """
    found = sniff(path)
    with open(path, "rb") as stream, saying(str(path)):
        if found.kind == "torch":
            yield torch_save.read_zip(Path(path), stream, expected)[0]
        elif found.kind == "pickle":
            yield _read_pickle(Path(path), stream, expected)
        elif found.kind == "safetensors":
            yield state_dicts.tensor_refs(stream, read_safetensors_header(path)[0])
        else:
            raise ValueError(f"{path} is {found.description}; expected {expected}")


def in_memory(path: str | os.PathLike, value: Any) -> Any:
    """What `opened` gave, as `read_stored` gives it."""
    return _Loading(os.path.getsize(path)).loaded(value, depth=0)


def _read_pickle(path: Path, stream: Any, expected: str) -> Any:
    if raw_pickle.is_legacy_torch(stream):
        return torch_save.read_legacy(path, stream, expected)[0]
    rules = nvidia.rules([]) | LAYER_RULES
    return Machine(stream, os.fstat(stream.fileno()).st_size, rules).load()


class _Loading:
    """Brings values into memory, each array once, and no more than a file of this size can hold."""

    def __init__(self, size: int):
        self._values, self._bytes = _MAX_VALUES, 2 * size + _SPARE_BYTES
        self._arrays: dict[int, torch.Tensor] = {}

    def loaded(self, value: Any, depth: int) -> Any:
        self._values -= 1
        if depth > _MAX_DEPTH or self._values < 0:
            raise Refused("it holds too many values, or too deeply nested ones")
        if isinstance(value, Array):
            value = value.ref
        if isinstance(value, TensorRef):
            return self._array(value)
        if isinstance(value, nvidia.Persistent | nvidia.ModuleDict):
            return self.loaded(nvidia.collect(value), depth + 1)
        if isinstance(value, dict):
            return {str(key): self.loaded(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.loaded(item, depth + 1) for item in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, str):
            return str(value)
        return None  # text and bytes that nothing here needs

    def _array(self, ref: TensorRef) -> torch.Tensor:
        if id(ref) not in self._arrays:
            self._bytes -= ref.nbytes
            if self._bytes < 0:
                raise Refused("its arrays take many times the memory that the file is long")
            self._arrays[id(ref)] = ref.read_exact()  # in the file's own dtype: statistics are float64
        return self._arrays[id(ref)]


def tensors_in(value: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """(dotted name, tensor) of every tensor in a value of `read_stored`, in the file's order."""
    if isinstance(value, torch.Tensor):
        yield prefix, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors_in(item, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from tensors_in(item, f"{prefix}.{index}" if prefix else str(index))
