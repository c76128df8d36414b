"""Tensors of a file that have not been read yet, and the globals by which pickles make them.

A `TensorRef` knows where the numbers lie, in which dtype and layout, and how the network's own numbers follow from
them. It can therefore be read into memory exactly once, straight into its tensor, and written back to the same place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any, NamedTuple

import torch

from refine.checkpoints.pickles.inert import Blob, Buildable, Refused, Stub, shown
from refine.checkpoints.pickles.machine import Machine, make_ordered
from refine.checkpoints.reading import in_threads

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001  # of torch.save before torch 1.6
_HEADER_BYTES = 1024  # of a legacy stream of one storage; about 244 are used
_HEADER_OPCODES = 200
_STORAGE_COST = 40  # opcodes in a usual header
_PIECE = 1 << 19  # numbers that are converted at a time: few enough to stay in the processor's cache

_STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_NUMPY_DTYPES = {
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "u1": torch.uint8,
    "u2": torch.uint16,
    "u4": torch.uint32,
    "u8": torch.uint64,
    "b1": torch.bool,
}


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """`numel` numbers in a row, from byte `start` of a blob; `swapped` where their bytes are in big-endian order."""

    dtype: torch.dtype
    numel: int
    blob: Blob
    start: int
    swapped: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class TensorRef:
    """A tensor in a file: values = flip(view of the storage) · scale + shift, in float32.

    Attributes:
        storage: The numbers.
        offset: Where the first number is, in elements.
        shape, stride: Layout of the view, in elements.
        flip: Axes along which the values run the other way round.
        scale, shift: Arithmetic between the file's values and the network's.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    flip: tuple[int, ...] = ()
    scale: float = 1.0
    shift: float = 0.0

    @classmethod
    def checked(cls, storage: Any, offset: Any, shape: Any, stride: Any) -> TensorRef:
        """The view, if it lies inside its storage and no element occurs twice.

        Raises:
            Refused: it does not.
        """
        if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
            raise Refused("it makes a tensor of something that is not a storage, or with an impossible shape")
        numbers = (offset, *shape, *stride)
        whole = {*map(type, numbers)} == {int} and min(numbers) >= 0 and max(numbers) < 1 << 48
        if len(shape) != len(stride) or len(shape) > 8 or not whole:
            raise Refused("it has a tensor with an impossible shape, stride or offset")
        ref = cls(storage, offset, shape, stride)
        if offset + ref.span > storage.numel:
            raise Refused(
                f"it has a tensor of shape {list(shape)} that reaches beyond its storage of {storage.numel} numbers"
            )
        reach = 1  # elements spanned by the axes of smaller stride
        for step, size in sorted(zip(stride, shape, strict=True)):
            if size > 1 and step < reach:
                raise Refused(f"it has a tensor of shape {list(shape)} whose elements overlap in memory")
            reach += step * (size - 1)
        return ref

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def span(self) -> int:
        """Elements of the storage from the first to the last one used."""
        if 0 in self.shape:
            return 0
        last = 0
        for size, step in zip(self.shape, self.stride, strict=True):
            last += (size - 1) * step
        return last + 1

    @property
    def nbytes(self) -> int:
        """Bytes that are read for it."""
        return self.span * self.storage.dtype.itemsize

    def permute(self, *axes: int) -> TensorRef:
        """The same values with axes in another order; before any flip."""
        self._check_rank(len(axes))
        shape, stride = (tuple(values[axis] for axis in axes) for values in (self.shape, self.stride))
        return replace(self, shape=shape, stride=stride)

    def flipped(self, *axes: int) -> TensorRef:
        self._check_rank(max(axes) + 1)
        return replace(self, flip=axes)

    def without_leading(self, count: int) -> TensorRef:
        """The same values without `count` leading axes of size 1."""
        self._check_rank(count)
        if any(size != 1 for size in self.shape[:count]):
            raise Refused(f"a tensor of shape {list(self.shape)} should begin with {count} axes of size 1")
        return replace(self, shape=self.shape[count:], stride=self.stride[count:])

    def squeezed(self) -> TensorRef:
        """The same values without axes of size 1."""
        kept = [axis for axis, size in enumerate(self.shape) if size != 1]
        return replace(self, shape=tuple(self.shape[a] for a in kept), stride=tuple(self.stride[a] for a in kept))

    def affine(self, scale: float = 1.0, shift: float = 0.0) -> TensorRef:
        return replace(self, scale=scale, shift=shift)

    def _check_rank(self, rank: int) -> None:
        if len(self.shape) < rank:
            raise Refused(f"a tensor of shape {list(self.shape)} should have at least {rank} axes")

    def read(self, room: torch.Tensor | None = None) -> torch.Tensor:
        """The values: float32, contiguous, on the CPU, in memory of their own; for `room` see `read_all`."""
        room = self.room() if room is None else room
        values = self._arranged(self._filled(room)) if len(room) else self.read_exact().to(room.dtype)
        return values.mul_(self.scale).add_(self.shift) if self.scale != 1 or self.shift != 0 else values

    def room(self, halves: bool = False) -> torch.Tensor:
        """Memory for the values, of one axis; none where more is read than used. Float32, but if `halves` float16 for
        what the file has in it, single numbers excepted."""
        as_it_is = halves and self.shape and self.storage.dtype == torch.float16 and self.scale == 1 and self.shift == 0
        size = self.span if self.span == self.numel else 0
        return torch.empty(size, dtype=torch.float16 if as_it_is else torch.float32)

    def read_exact(self) -> torch.Tensor:
        """The values as the file has them, in its dtype, contiguous; without scale and shift."""
        return self._arranged(self._stored())

    def read_as_laid_out(self) -> torch.Tensor:
        """The values as the file has them, in its dtype and in its order in memory; without flip, scale and shift."""
        return self._view(self._stored())

    def item(self) -> float | int | bool:
        """The one value of a tensor of no axes, as the file has it."""
        if self.shape:
            raise Refused(f"an array of shape {list(self.shape)} stands where a number is expected")
        return self._stored().item()

    def encoded(self, values: torch.Tensor) -> bytes:
        """What must stand from element `offset` on so that `read` gives `values`; unchanged ones keep their bits."""
        flat = self._stored()
        view = self._view(flat)
        values = values.detach().to("cpu", torch.float32).reshape(self.shape)
        wanted = (values.double() - self.shift) / self.scale if self.scale != 1 or self.shift != 0 else values
        same = self.read() == values
        if self.flip:
            wanted, same = wanted.flip(self.flip), same.flip(self.flip)
        view.copy_(torch.where(same, view, wanted.to(view.dtype)))
        return as_bytes(self._in_order(flat)).tobytes()

    def place(self) -> tuple[Blob, int]:
        """The blob, and the byte within it from which on `encoded` belongs."""
        return self.storage.blob, self.storage.start + self.offset * self.storage.dtype.itemsize

    def _stored(self) -> torch.Tensor:
        """The numbers from the first to the last one, in their order in the file, in its dtype."""
        return self._filled(torch.empty(self.span, dtype=self.storage.dtype))

    def _filled(self, flat: torch.Tensor) -> torch.Tensor:
        """The same, put into memory of another dtype."""
        stored = self.storage.dtype
        if not len(flat):
            return flat
        blob, start = self.place()
        if flat.dtype == stored:
            blob.read_into(start, as_bytes(flat))
            return self._in_order(flat)
        size = min(_PIECE, len(flat)) if blob.text_length is None else len(flat)  # text is decoded from its beginning
        piece = torch.empty(size, dtype=stored)
        for part in flat.split(size):
            blob.read_into(start, as_bytes(piece[: len(part)]))
            part.copy_(self._in_order(piece[: len(part)]))
            start += size * stored.itemsize
        return flat

    def _in_order(self, flat: torch.Tensor) -> torch.Tensor:
        """The machine's order of bytes from the file's, or the other way round."""
        if not self.storage.swapped or not flat.numel():
            return flat
        return flat.view(torch.uint8).reshape(-1, flat.element_size()).flip(1).reshape(-1).view(flat.dtype)

    def _arranged(self, flat: torch.Tensor) -> torch.Tensor:
        values = self._view(flat)
        return (values.flip(self.flip) if self.flip else values).contiguous()

    def _view(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.as_strided(self.shape, self.stride) if len(flat) else flat.reshape(self.shape)


def as_bytes(flat: torch.Tensor) -> memoryview:
    """The memory of a tensor of one axis."""
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def read_all(refs: Sequence[TensorRef], halves: bool = False) -> list[torch.Tensor]:
    """The values of several tensors, see `TensorRef.read`. The room for them is made by one thread, filled by a few.

    Args:
        refs: Where they are.
        halves: Leave float16 as it is, but for single numbers.

    Raises:
        Refused: the file ends before them.
    """
    rooms, values = {index: ref.room(halves) for index, ref in enumerate(refs)}, list[Any](refs)
    inference = torch.is_inference_mode_enabled()  # of this thread

    def read(indices: Iterable[int]) -> None:
        with torch.inference_mode(inference):
            for index in indices:
                values[index] = refs[index].read(rooms.pop(index))  # what is arranged anew needs it no longer

    in_threads(read, range(len(refs)))
    return values


def total_bytes(refs: Iterable[TensorRef]) -> int:
    """Bytes that are read for all of them."""
    return sum(ref.nbytes for ref in refs)


# torch's globals.


def load_storage(blob: Any) -> Storage:
    """`torch.storage._load_from_bytes`: one storage in the format of torch.save before torch 1.6.

    Five small pickles (magic number, version, system, persistent id of the storage, its key), the number of elements,
    the elements.

    Raises:
        Refused: it is not exactly that.
    """
    if not isinstance(blob, Blob):
        raise Refused("it makes a storage of something that is not bytes")
    if blob.storage is None:
        blob.storage = _parse_storage(blob)
    return blob.storage


# What torch.save writes behind the beginning, for up to 2³¹ numbers: recognised in a third of a machine's time.
_USUAL = re.compile(
    rb"\x80\x02\(X\x07\0\0\0storageq\0ctorch\n(?P<kind>Float|Half)Storage\nq\x01X(?P<size>.)\0\0\0(?P<key>\d+)q\x02"
    rb"X(?:\x03\0\0\0cpu|\x06\0\0\0cuda:\d)q\x03(?:K(?P<k>.)|M(?P<m>..)|J(?P<j>...[\0-\x7f]))Ntq\x04Q\."
    rb"\x80\x02]q\0X(?P=size)\0\0\0(?P=key)q\x01a\.",
    re.DOTALL,
)


def _parse_storage(blob: Blob) -> Storage:
    data = blob.read(0, min(blob.length, _HEADER_BYTES))
    header = BytesIO(data)
    _skip_beginning(header)
    usual = _USUAL.match(data, header.tell())
    if usual is not None and usual["size"][0] == len(usual["key"]):
        dtype = _STORAGE_DTYPES[f"{usual['kind'].decode()}Storage"]
        numel = int.from_bytes(usual["k"] or usual["m"] or usual["j"], "little")
        header.seek(usual.end())
    else:
        machine = Machine(header, _HEADER_BYTES, STORAGE_RULES, _persistent_storage, _HEADER_OPCODES)
        found, keys = machine.load(), machine.load()
        if not isinstance(found, StorageId) or keys != [found.key]:
            raise Refused("it holds a storage that is not a stream of torch.save")
        dtype, numel = found.dtype, found.numel
    start = header.tell() + 8
    if blob.length != start + numel * dtype.itemsize:
        raise Refused(f"it holds a storage that does not have the {numel} numbers it claims")
    if int.from_bytes(header.read(8), "little") != numel:
        raise Refused("it holds a storage that tells two numbers of elements")
    return Storage(dtype, numel, blob, start)


_beginnings = [b""]  # the last one that was found right: those of a file are the same, bytes for bytes


def _skip_beginning(header: BytesIO) -> None:
    """Checks magic number, version and system, and steps over them."""
    known = _beginnings[0]
    if known and header.read(len(known)) == known:
        return
    header.seek(0)
    machine = Machine(header, _HEADER_BYTES, {}, budget=_HEADER_OPCODES)
    magic, version, system = machine.load(), machine.load(), machine.load()
    if (
        magic != _MAGIC
        or version != _VERSION
        or not isinstance(system, dict)
        or system.get("little_endian") is not True
    ):
        raise Refused("it holds a storage that is not a little-endian stream of torch.save")
    _beginnings[0] = header.getvalue()[: header.tell()]


def _persistent_storage(value: Any) -> StorageId:
    found = storage_id(value)
    if len(value) == 6 and value[5] is not None:
        raise Refused("it holds a storage that is a view of another one")
    return found


class StorageId(NamedTuple):
    """What a file says of a storage: type of its numbers, name, how many there are."""

    dtype: torch.dtype
    key: str
    numel: int


def storage_id(value: Any) -> StorageId:
    """What a persistent id ('storage', type, key, location, numel[, view]) says."""
    if not isinstance(value, tuple) or len(value) not in (5, 6) or value[0] != "storage":
        raise Refused("it refers to something outside that is not a storage")
    kind, key, location, numel = value[1:5]
    if not isinstance(kind, Stub) or not kind.name.startswith("torch.") or not isinstance(key, str):
        raise Refused("it refers to a storage of unknown type or name")
    if not isinstance(location, str) or type(numel) is not int or not 0 <= numel < 1 << 48:
        raise Refused("it refers to a storage of impossible size or place")
    return StorageId(_STORAGE_DTYPES[kind.name.removeprefix("torch.")], key, numel)


def _rebuild_tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None) -> TensorRef:
    return TensorRef.checked(storage, offset, size, stride)


def _rebuild_parameter(tensor, requires_grad, hooks, state=None) -> TensorRef:
    if not isinstance(tensor, TensorRef):
        raise Refused("it makes a parameter of something that is not a tensor")
    return tensor


def _path(*parts: Any) -> str:
    """A path of the machine that trained; only its last part is kept, the rest may be private."""
    return shown(str(parts[-1])) if parts and isinstance(parts[-1], str) else ""


# Inert as they are: attributes of modules, options of data sets.
VALUE_RULES = {
    f"torch.{name}": Stub(f"torch.{name}") for name in ("float16", "bfloat16", "float32", "float64", "int64")
}
VALUE_RULES |= {
    name: Stub(name, call=_path) for name in ("pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.WindowsPath")
}
STORAGE_RULES = {f"torch.{name}": Stub(f"torch.{name}") for name in _STORAGE_DTYPES}
TENSOR_RULES = {
    stub.name: stub
    for stub in (
        Stub("torch._utils._rebuild_tensor_v2", call=_rebuild_tensor),
        Stub("torch._utils._rebuild_parameter", call=_rebuild_parameter),
        Stub("torch._utils._rebuild_parameter_with_state", call=_rebuild_parameter),
        Stub("torch.storage._load_from_bytes", call=load_storage, cost=_STORAGE_COST),
        Stub("torch.Size", call=lambda sizes: tuple(sizes) if isinstance(sizes, tuple | list) else ()),
        Stub("torch.device", call=lambda *args: str(args[0])[:20] if args and isinstance(args[0], str) else "cpu"),
        Stub("collections.OrderedDict", call=make_ordered),
    )
}


# numpy's globals.


class DType(Buildable):
    """A numeric dtype; byte order comes with BUILD."""

    __slots__ = ("dtype", "swapped")

    def __init__(self, code: Any, align: Any = False, copy: Any = True):
        self.swapped = isinstance(code, str) and code.startswith(">")
        code = code.lstrip("<>|=") if isinstance(code, str) else None
        if code not in _NUMPY_DTYPES:
            raise Refused("it holds an array of objects, or of numbers of an unusual type")
        self.dtype = _NUMPY_DTYPES[code]

    def build(self, state: Any) -> None:
        plain = isinstance(state, tuple) and 8 <= len(state) <= 9 and state[1] in ("<", ">", "|", "=")
        if not plain or any(part is not None for part in state[2:5]):
            raise Refused("it holds numbers of an unusual type (with fields)")
        self.swapped = state[1] == ">"


class Array(Buildable):
    """An array of numpy; `ref` is set by BUILD."""

    __slots__ = ("ref",)

    def __init__(self) -> None:
        self.ref: TensorRef | None = None

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or self.ref is not None:
            raise Refused("it holds an array with an unusual state")
        _, shape, dtype, fortran, data = state
        self.ref = _array_ref(data, dtype, shape, "F" if fortran else "C")


def _array_ref(data: Any, dtype: Any, shape: Any, order: Any) -> TensorRef:
    if not isinstance(data, Blob) or not isinstance(dtype, DType) or not isinstance(shape, tuple):
        raise Refused("it holds an array of objects, or one without shape, type or data")
    if len(shape) > 8 or not all(type(size) is int and 0 <= size < 1 << 40 for size in shape):
        raise Refused("it holds an array of impossible shape")
    numel, itemsize = math.prod(shape), dtype.dtype.itemsize
    if data.length != numel * itemsize:
        found = f"{data.length} bytes instead of {numel * itemsize}"
        raise Refused(f"it holds an array of shape {list(shape)} with {found}")
    steps, step = [], 1
    for size in shape if order == "F" else reversed(shape):
        steps.append(step)
        step *= max(size, 1)
    stride = tuple(steps if order == "F" else reversed(steps))
    return TensorRef.checked(Storage(dtype.dtype, numel, data, 0, dtype.swapped), 0, shape, stride)


def _scalar(dtype: Any, data: Any) -> TensorRef:
    return _array_ref(data, dtype, (), "C")


def _reconstruct(cls: Any, shape: Any, code: Any) -> Array:
    if not isinstance(cls, Stub) or cls.name != "numpy.ndarray":
        raise Refused("it makes an array of an unusual class")
    return Array()


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> Array:
    if order not in ("C", "F"):
        raise Refused("it holds an array of unusual order")
    array = Array()
    array.ref = _array_ref(data, dtype, shape, order)
    return array


def _numpy_rules() -> dict[str, Stub]:
    stubs = [Stub("numpy.dtype", call=DType), Stub("numpy.ndarray")]
    for core in ("numpy.core", "numpy._core"):  # numpy 1, numpy 2
        stubs += [
            Stub(f"{core}.multiarray.scalar", call=_scalar),
            Stub(f"{core}.multiarray._reconstruct", call=_reconstruct),
            Stub(f"{core}.numeric._frombuffer", call=_from_buffer),
        ]
    return {stub.name: stub for stub in stubs}


NUMPY_RULES = _numpy_rules()
