"""Runs programs written by `torch.export.save`, without torch's reader of them.

That reader unpickles, evaluates text and calls whatever function of torch's a file names. Here the archive's JSON is
the program, and nothing else of it is looked at: numbers are read as bytes, every step is an operator of `OPERATORS`,
by its exact name, and sizes are plain integers. An operator's result depends on its arguments alone, and it changes
nothing but, where its name says so, an intermediate result. Before images of a new shape are looked at, the steps are
run on tensors without numbers: so a file of some kilobytes cannot ask for terabytes.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from refine.checkpoints import archives
from refine.checkpoints.foreign.container import saying
from refine.checkpoints.pickles.inert import Blob, Refused, shown
from refine.checkpoints.pickles.tensors import Storage, TensorRef
from refine.metrics.operators import ARITHMETIC, CHECKS, IN_PLACE, LIKE, OFF, OPERATORS

MAX_NUMBERS = 1 << 24  # of one result, per image; Inception's largest has 1.4 million
MAX_NUMBERS_IN_ALL = 1 << 30  # of all results, per image
_MAX_JSON_BYTES, _MAX_STEPS = 16 << 20, 3000  # those of a large transformer are 1500; each is rehearsed in 0.5 ms

# As torch numbers them in these files.
_DTYPES = {1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16}
_DTYPES |= {7: torch.float32, 8: torch.float64, 12: torch.bool, 13: torch.bfloat16}
_MEMORY_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 4: torch.preserve_format}
_STRIDED = 7
_WORDS = {"none", "tanh", "floor", "trunc", "constant", "reflect", "replicate", "circular", "same", "valid"}


@dataclass(frozen=True)
class _Name:
    """A value that is known once the program runs."""

    name: str


_DEVICE = _Name("")  # that of the images


@dataclass(frozen=True)
class _Step:
    """A call: what, with what, and the names of what it gives; a name alone, or a list where it gives several."""

    name: str
    call: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    gives: str | Sequence[str]
    over: tuple[str, ...]  # names that are not needed any more
    writes: bool


@dataclass(frozen=True)
class _Input:
    """What the images must be: a number, or the text of an expression, for each axis."""

    name: str
    dtype: torch.dtype
    sizes: tuple[int | str, ...]
    ranges: Mapping[str, tuple[int, int]]  # of expressions that are a letter


class ExportedProgram(torch.nn.Module):
    """A program of torch.export: images → features."""

    def __init__(self, path: Path, steps: Sequence[_Step], held: Mapping[str, torch.Tensor], takes: _Input, gives: str):
        super().__init__()
        self._path, self._steps, self._input, self._gives = path, steps, takes, gives
        self._names = list(held)
        for index, tensor in enumerate(held.values()):
            self.register_buffer(f"held{index}", tensor)
        self._rehearsed: set[tuple[int, ...]] = set()

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features of images.

        Raises:
            ValueError: The images are not those that the program is for, or a step cannot be computed.
        """
        with saying(str(self._path)):
            self._check_input(images)
            held = dict(zip(self._names, self.buffers(), strict=True))
            if tuple(images.shape) not in self._rehearsed:
                without = {name: tensor.to("meta") for name, tensor in held.items()}
                self._run(images.to("meta"), without, _Numbers(len(images), without))
                self._rehearsed.add(tuple(images.shape))
            return self._run(images, held, None)

    def _check_input(self, images: torch.Tensor) -> None:
        wanted, letters = self._input, dict[str, int]()
        fits = images.dtype == wanted.dtype and images.ndim == len(wanted.sizes)
        for size, known in zip(images.shape, wanted.sizes, strict=False):
            low, high = wanted.ranges.get(str(known), (1, 1 << 40))
            fits = fits and (size == known if isinstance(known, int) else letters.setdefault(known, size) == size)
            fits = fits and low <= size <= high
        if not fits:
            sizes = ["any" if isinstance(size, str) else size for size in wanted.sizes]
            found = f"{str(images.dtype).removeprefix('torch.')} images {list(images.shape)}"
            raise Refused(f"it takes {str(wanted.dtype).removeprefix('torch.')} {sizes} and got {found}")

    def _run(self, images: torch.Tensor, held: Mapping[str, torch.Tensor], numbers: _Numbers | None) -> torch.Tensor:
        values: dict[str, Any] = {**held, self._input.name: images}
        kept = {tensor.untyped_storage().data_ptr() for tensor in values.values()}
        for step in self._steps:
            args = [_filled(arg, values, images.device) for arg in step.args]
            kwargs = {name: _filled(arg, values, images.device) for name, arg in step.kwargs.items()}
            if step.writes and numbers is None and args[0].untyped_storage().data_ptr() in kept:
                raise Refused(f"its step {step.name} changes a weight or the images")
            try:
                result = step.call(*args, **kwargs)
            except (TypeError, ValueError, IndexError, AttributeError, ArithmeticError, NotImplementedError) as error:
                raise Refused(f"its step {step.name} fails ({_line(error)})") from None
            given = [result] if isinstance(step.gives, str) else list(result)
            names = [step.gives] if isinstance(step.gives, str) else step.gives
            if len(given) != len(names):
                raise Refused(f"its step {step.name} gives {len(given)} results, not {len(names)}")
            if numbers is not None:
                numbers.count(step.name, given)
            values.update(zip(names, given, strict=True))
            for name in step.over:
                del values[name]
        return values[self._gives]


class _Numbers:
    """Counts what a program would need for some images."""

    def __init__(self, images: int, held: Mapping[str, torch.Tensor]):
        self._images, self._total = images, 0
        self._spare = sum(tensor.numel() for tensor in held.values())

    def count(self, name: str, results: Sequence[Any]) -> None:
        for result in results:
            size = result.numel() if isinstance(result, torch.Tensor) else 0
            self._total += size
            if size > MAX_NUMBERS * self._images + self._spare or self._total > MAX_NUMBERS_IN_ALL * self._images:
                raise Refused(f"its step {name} asks for {size} numbers, of {self._total} in all; that is too many")


def is_exported(path: Path) -> bool:
    """Whether a zip file is an archive of torch.export (.pt2)."""
    try:
        with archives.opened(path) as archive:
            return any(name.endswith("/archive_format") or "/models/" in name for name in archive.namelist())
    except Refused:
        return False


def load_exported(path: Path) -> ExportedProgram:
    """The program of a file of `torch.export.save`. Nothing of it is run yet.

    Raises:
        ValueError: The file is broken, or holds more than a computation on tensors.
    """
    with saying(str(path)), archives.opened(path) as archive:
        try:
            return _program(path, archive)
        except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
            if isinstance(error, Refused):
                raise
            raise Refused("it is no whole archive of torch.export, or one of another version of torch") from None


def _program(path: Path, archive: zipfile.ZipFile) -> ExportedProgram:
    document = _json(archive, "/models/model.json")
    module = document["graph_module"]
    graph, inputs, outputs = module["graph"], module["signature"]["input_specs"], module["signature"]["output_specs"]
    if len(graph["nodes"]) > _MAX_STEPS or len(inputs) > _MAX_STEPS:
        raise Refused(f"it has more than {_MAX_STEPS:,} steps, or tensors")
    held, images = _held(path, archive, inputs)
    (returned,) = outputs
    result = returned["user_output"]["arg"]["as_tensor"]["name"]
    defined = {*held, images}
    last = _last_uses(graph["nodes"], result)
    steps = []
    for index, node in enumerate(graph["nodes"]):
        if node["target"] not in CHECKS:
            steps.append(_step(node, defined, last.get(index, ())))
    if result not in defined:
        raise Refused("it returns something that it does not compute")
    return ExportedProgram(path, steps, held, _input(images, graph["tensor_values"][images], document), result)


def _json(archive: zipfile.ZipFile, ending: str) -> Any:
    (info,) = (info for info in archive.infolist() if f"/{info.filename}".endswith(ending))
    return json.loads(archives.read_member(archive, info, _MAX_JSON_BYTES))


# The tensors that a program holds.


def _held(path: Path, archive: zipfile.ZipFile, specs: Sequence[Any]) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of the program by their names in the graph, and the name of the images."""
    infos = {info.filename: info for info in archive.infolist() if re.search(r"/(weight|tensor)_\d+$", info.filename)}
    spare = archives.check_inflation(infos.values(), path.stat().st_size) + archives.SPARE_BYTES
    tables = [
        (folder, _json(archive, f"/data/{folder}/model_{folder}_config.json")["config"])
        for folder in ("weights", "constants")
    ]
    places: dict[str, list[str]] = {}  # folder/file → where that is in the archive
    for name in infos:
        places.setdefault("/".join(name.rsplit("/", 2)[-2:]), []).append(name)
    storages: dict[str, bytes] = {}
    held: dict[str, torch.Tensor] = {}
    images = []
    for spec in specs:
        ((kind, content),) = spec.items()
        if kind == "user_input":
            images.append(content["arg"]["as_tensor"]["name"])
            continue
        if kind not in ("parameter", "buffer", "tensor_constant"):
            raise Refused(f"it takes a {shown(kind)}, which a detector does not need")
        key = content[f"{kind}_name"]
        folder, entry = _entry(tables, key)
        file = str(entry["path_name"])
        if entry["use_pickle"] is not False or not re.fullmatch(r"(weight|tensor)_\d+", file):
            raise Refused(f"it holds an object {shown(file)} that is no plain tensor")
        (name,) = (name for name in places[f"{folder}/{file}"] if name.endswith(f"/data/{folder}/{file}"))
        if name not in storages:
            storages[name] = archives.read_member(archive, infos[name], infos[name].file_size)
        tensor = held[content["arg"]["name"]] = _tensor(storages[name], entry["tensor_meta"])
        spare -= tensor.nbytes
        if spare < 0:
            raise Refused("its tensors take more memory than the file is long")
    (only,) = images
    return held, only


def _entry(tables: Sequence[tuple[str, Any]], key: str) -> tuple[str, Any]:
    for folder, table in tables:
        if key in table:
            return folder, table[key]
    raise Refused(f"it does not hold its tensor {shown(str(key))}")


def _tensor(data: bytes, meta: Mapping[str, Any]) -> torch.Tensor:
    dtype = _DTYPES[meta["dtype"]]
    if meta["layout"] != _STRIDED or len(data) % dtype.itemsize:
        raise Refused("it holds a tensor of an unusual layout")
    storage = Storage(dtype, len(data) // dtype.itemsize, Blob(BytesIO(data), 0, len(data)), 0)
    sizes, strides = (tuple(size["as_int"] for size in meta[key]) for key in ("sizes", "strides"))
    return TensorRef.checked(storage, meta["storage_offset"]["as_int"], sizes, strides).read_exact()


def _input(name: str, meta: Mapping[str, Any], document: Mapping[str, Any]) -> _Input:
    sizes: list[int | str] = []
    ranges: dict[str, tuple[int, int]] = {}
    for size in meta["sizes"]:
        ((kind, value),) = size.items()
        sizes.append(_integer(value) if kind == "as_int" else str(value["expr_str"])[:1000])
    for letter, limits in document["range_constraints"].items():
        low, high = limits.get("min_val"), limits.get("max_val")
        limits = (1 if low is None else _integer(low), 1 << 40 if high is None else _integer(high))
        ranges |= {text: limits for text in sizes if isinstance(text, str) and text.startswith(f"Symbol('{letter}'")}
    return _Input(name, _DTYPES[meta["dtype"]], tuple(sizes), ranges)


# The steps.


def _step(node: Mapping[str, Any], defined: set[str], over: tuple[str, ...]) -> _Step:
    """A node of the graph; the names that it gives are added to those that are defined."""
    target = node["target"]
    given = {entry["name"] or str(index): _value(entry["arg"]) for index, entry in enumerate(node["inputs"])}
    for name in _names(list(given.values())):
        if name and name not in defined:
            raise Refused(f"its step {shown(str(target))} uses {shown(name)} before it is there")
    gives = _gives(node["outputs"])
    for name in [gives] if isinstance(gives, str) else gives:
        if name in defined:
            raise Refused(f"it computes {shown(name)} twice")
        defined.add(name)
    over = tuple(name for name in over if name in defined)
    if target == "torch.ops.aten.sym_size.int":
        return _Step("sym_size", _size, list(given.values()), {}, gives, over, False)
    if target in ARITHMETIC:
        return _Step(target, _arithmetic(ARITHMETIC[target]), list(given.values()), {}, gives, over, False)
    name = str(target).removeprefix("torch.ops.aten.")
    if name not in OPERATORS or target != f"torch.ops.aten.{name}":
        raise Refused(f"it calls {shown(str(target))!r}, which a detector does not need; nothing of it was run")
    packet, overload = name.split(".")
    function = getattr(getattr(torch.ops.aten, packet), overload)
    args, kwargs = _bound(packet, function._schema, given)
    return _Step(name, function, args, kwargs, gives, over, name in IN_PLACE)


def _bound(packet: str, schema: Any, given: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments in the schema's order; those that decide the device of a new tensor are ours."""
    args, kwargs = [], {}
    for argument in schema.arguments:
        value = given.pop(argument.name, _MISSING)
        if argument.name == OFF.get(packet) and value is not _MISSING and value != 0:
            raise Refused(f"it holds {packet} in training; export the network in eval mode")
        if argument.name == "device" and argument.kwarg_only:
            value = _MISSING if packet in LIKE else _DEVICE
        if argument.name == "pin_memory":
            value = _MISSING
        if argument.kwarg_only:
            kwargs.update({} if value is _MISSING else {argument.name: value})
        elif value is not _MISSING:
            args.append(value)
        elif argument.has_default_value():
            args.append(argument.default_value)
        else:
            raise Refused(f"its step {packet} lacks the argument {argument.name}")
    if given:
        raise Refused(f"its step {packet} has an unknown argument {shown(min(given))}")
    return args, kwargs


_MISSING = object()


def _value(arg: Mapping[str, Any]) -> Any:
    """An argument: a plain value, names in place of what is computed."""
    ((kind, value),) = arg.items()
    plural = {"as_tensors": "as_tensor", "as_ints": "as_int", "as_sym_ints": "as_sym_int", "as_floats": "as_float"}
    plural |= {"as_bools": "as_bool"}
    if kind in plural:
        wrapped = value if kind == "as_sym_ints" else [{plural[kind]: item} for item in value]
        return [_symbol(item) for item in wrapped] if kind == "as_sym_ints" else [_value(item) for item in wrapped]
    if kind == "as_optional_tensors":
        return [_value(item) for item in value]
    if kind == "as_optional_tensor":
        return _value(value)
    if kind == "as_none":
        return None
    if kind == "as_tensor":
        return _Name(_text(value["name"]))
    if kind in ("as_sym_int", "as_sym_bool"):
        return _symbol(value)
    if kind == "as_int":
        return _integer(value)
    if kind == "as_float" and isinstance(value, int | float | str):
        return float(value)
    if kind == "as_bool" and isinstance(value, bool):
        return value
    if kind == "as_string" and value in _WORDS:
        return value
    if kind == "as_device":
        return _DEVICE
    table: dict[str, Mapping[int, Any]] = {"as_scalar_type": _DTYPES, "as_memory_format": _MEMORY_FORMATS}
    table["as_layout"] = {_STRIDED: torch.strided}
    if kind in table and type(value) is int and value in table[kind]:
        return table[kind][value]
    raise Refused(f"it has an argument {shown(kind)} {shown(str(value)[:40])!r}, which a detector does not need")


def _symbol(value: Mapping[str, Any]) -> Any:
    ((kind, content),) = value.items()
    return _Name(_text(content)) if kind == "as_name" else _value({kind: content})


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise Refused("it has a value without a name")
    return value


def _integer(value: Any) -> int:
    if type(value) is not int or not -(1 << 63) <= value < 1 << 63:
        raise Refused("it has a size that is no integer")
    return value


def _gives(outputs: Sequence[Any]) -> str | list[str]:
    """Names of what a node gives: the only one, or all of a list."""
    names = []
    for output in outputs:
        ((kind, value),) = output.items()
        if kind == "as_tensors":
            return [_text(item["name"]) for item in value]
        if kind not in ("as_tensor", "as_sym_int", "as_sym_bool"):
            raise Refused(f"a step gives {shown(kind)}, which a detector does not need")
        names.append(_text(value["name"] if kind == "as_tensor" else value["as_name"]))
    return names[0] if len(names) == 1 else names


def _names(values: Sequence[Any]) -> list[str]:
    """Of everything in arguments that is computed."""
    names = []
    for value in values:
        if isinstance(value, list):
            names += _names(value)
        elif isinstance(value, _Name):
            names.append(value.name)
    return names


def _last_uses(nodes: Sequence[Any], result: str) -> dict[int, tuple[str, ...]]:
    """Number of a step → names that no later one uses; a step that is left out hands its own on."""
    last: dict[str, int] = {}
    for index, node in enumerate(nodes):
        if node["target"] in CHECKS:
            continue
        gives = _gives(node["outputs"])
        for name in [
            *([gives] if isinstance(gives, str) else gives),
            *_names([_value(i["arg"]) for i in node["inputs"]]),
        ]:
            last[name] = index
    last.pop(result, None)
    over: dict[int, tuple[str, ...]] = {}
    for name, index in last.items():
        if name:
            over[index] = (*over.get(index, ()), name)
    return over


def _filled(arg: Any, values: Mapping[str, Any], device: torch.device) -> Any:
    if isinstance(arg, list):
        return [_filled(item, values, device) for item in arg]
    if isinstance(arg, _Name):
        return values[arg.name] if arg.name else device
    return arg


def _size(tensor: torch.Tensor, dim: int) -> int:
    return tensor.shape[dim]


def _arithmetic(function: Callable[..., Any]) -> Callable[..., Any]:
    """On sizes: whole numbers that stay as small as sizes are."""

    def operation(*numbers: Any) -> Any:
        if not all(isinstance(number, int) for number in numbers):
            raise TypeError("arithmetic on something that is no size")
        result = function(*numbers)
        return result if isinstance(result, bool) else _integer(result)

    return operation


def _line(error: Exception) -> str:
    return shown((str(error).strip().splitlines() or [type(error).__name__])[0])
