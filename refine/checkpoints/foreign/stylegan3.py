"""Pickles of StyleGAN3, StyleGAN-XL and StyleSAN-XL.

They are NVIDIA's containers (`nvidia.py`). Those of StyleGAN-XL are written by dill, which spells numpy's arrays in its
own way, and hold a discriminator of modules of other programs with functions inside. It stands before the generator, so
it is read past: all of it stays closed boxes (`Unknown`), and nothing of it may be part of a generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from refine.checkpoints.foreign.container import FileNetwork, plain
from refine.checkpoints.foreign.nvidia import ModuleDict, Persistent, collect, describe_discriminator, named
from refine.checkpoints.pickles.inert import Refused, Stub, Unknown, shown, unknown_stub
from refine.checkpoints.pickles.machine import COMMON_RULES
from refine.checkpoints.pickles.names import is_harmless
from refine.checkpoints.pickles.tensors import NUMPY_RULES, Array, TensorRef

_TOLERANCE = 1e-6  # between numbers of a file and those that follow from others of it
_MAX_LAYERS = 100

# Rules.


def _get_attr(module: Any, name: Any) -> Any:
    """numpy's functions, as old dill names them; whatever else is asked for stays closed."""
    known = isinstance(module, str) and isinstance(name, str)
    return NUMPY_RULES.get(f"{module}.{name}" if known else "", unknown_stub("dill._dill._get_attr"))


def _import_module(name: Any) -> Any:
    core = {"numpy.core._multiarray_umath": "numpy.core", "numpy._core._multiarray_umath": "numpy._core"}
    return f"{core[name]}.multiarray" if name in core else Unknown("dill._dill._import_module")


def _load_type(name: Any) -> Any:
    return COMMON_RULES["builtins.set"] if name == "set" else unknown_stub("dill._dill._load_type")


def _create_array(function: Any, args: Any, state: Any, attributes: Any = None) -> Any:
    if not isinstance(function, Stub) or not isinstance(args, tuple):
        raise Refused("it makes an array in an unusual way")
    if function not in NUMPY_RULES.values() or not function.name.endswith("._reconstruct"):
        raise Refused(f"it makes an array by {function.name}")
    assert function.call is not None
    array = function.call(*args)
    array.build(state)
    return array


FAMILY, XL = "a StyleGAN3 pickle", "a StyleGAN-XL pickle"
EMBEDDING = Stub("torch.nn.modules.sparse.Embedding", new=ModuleDict)
_STUBS = (
    Stub("dill._dill._get_attr", call=_get_attr),
    Stub("dill._dill._import_module", call=_import_module),
    Stub("dill._dill._load_type", call=_load_type),
    Stub("dill._dill._create_array", call=_create_array),
    Stub("builtins.getattr", call=lambda *args: unknown_stub("builtins.getattr")),
    EMBEDDING,
)
RULES = {stub.name: stub for stub in _STUBS}  # to read past a discriminator, beside `nvidia.rules`
_OF_CLOSURES = {"builtins.setattr", "functools.partial", "dill._dill"}
_THEIR_MODULES = ("timm.", "pg_modules.", "feature_networks.")


def is_of_xl(named: Iterable[str]) -> bool:
    """Whether a reading that ended at the last of these globals could go on as one of StyleGAN-XL."""
    last = list(named)[-1:]
    return any(name == EMBEDDING.name or name.startswith(("dill._dill.", *_THEIR_MODULES)) for name in last)


def harmless(module: str, name: str) -> bool:
    """Whether an object of this name can stay in a file of StyleGAN-XL unread: its discriminator holds functions."""
    full = f"{module}.{name}"
    if full in _OF_CLOSURES or (full.startswith("dill._dill._create_") and full.isascii() and len(full) < 60):
        return True
    return is_harmless(module, name) or (name == "__dict__" and f"{module}.".startswith(_THEIR_MODULES))


# What is in a file.


def members(value: Any) -> tuple[str, dict[str, tuple[str, Callable[[], FileNetwork]]]] | None:
    """What a snapshot's table holds: (family, name → (kind, how to describe the network)); None = no such table."""
    found = named(value, _is_stylegan3)
    generators = {name: found[name] for name in ("G_ema", "G") if name in found}
    if not generators or not all(_is_stylegan3(item) for item in generators.values()):
        return None
    result: dict[str, tuple[str, Callable[[], FileNetwork]]] = {}
    for name, item in generators.items():
        _check_that_all_is_known(item)
        result[name] = ("generator", _later(describe_xl if is_xl(item) else describe_generator, item))
    if any(is_xl(item) for item in generators.values()):
        return XL, result
    if "D" in found:
        result["D"] = ("discriminator", _later(describe_discriminator, found["D"]))
    return FAMILY, result


def _later(describe: Callable[[Persistent], FileNetwork], item: Persistent) -> Callable[[], FileNetwork]:
    return lambda: describe(item)


def _child(item: Any, *path: str) -> Any:
    """A module below, or None."""
    for name in path:
        modules = item.state.get("_modules") if isinstance(item, Persistent | ModuleDict) else None
        item = modules.get(name) if isinstance(modules, dict) else None
    return item if isinstance(item, Persistent | ModuleDict) else None


def _is_stylegan3(item: Persistent) -> bool:
    synthesis = _child(item, "synthesis")
    return synthesis is not None and _child(synthesis, "input") is not None and "layer_names" in synthesis.state


def is_xl(item: Persistent) -> bool:
    """Whether a generator has StyleGAN-XL's mapping network, which keeps a plain table of vectors, used or not."""
    return isinstance(_child(item, "mapping", "embed"), ModuleDict)


def _check_that_all_is_known(item: Persistent) -> None:
    """Raises Refused if anything of a generator is an object of another program."""
    todo: list[Any] = [item]
    seen: set[int] = set()
    while todo:
        value = todo.pop()
        if isinstance(value, Unknown) or (isinstance(value, Stub) and value.unknown):
            raise Refused(f"its generator holds {shown(value.name)}, which has no place in one; nothing of it was run")
        if id(value) in seen:
            continue
        if isinstance(value, Persistent | ModuleDict):
            value = value.state
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list | tuple):
            seen.add(id(value))
            todo.extend(value)


_POSITIONAL = ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels", "mapping_kwargs")


def describe_generator(item: Persistent) -> FileNetwork:
    """Arguments and tensors of a StyleGAN3 generator, whose layers follow from its arguments."""
    given, args = item.state.get("_init_kwargs"), item.state.get("_init_args", ())
    if not isinstance(given, dict) or not isinstance(args, tuple) or len(args) > len(_POSITIONAL):
        raise Refused("its objects do not tell the arguments that they were made with")
    kwargs = plain(dict(zip(_POSITIONAL, args, strict=False))) | plain(given)
    kwargs.pop("synthesis_kwargs", None)  # options stand among the others; StyleGAN2's place for them is empty
    return _network("stylegan3.Generator", kwargs, item)


def describe_xl(item: Persistent) -> FileNetwork:
    """Arguments and tensors of a StyleGAN-XL generator, from its layers: those of a super-resolution stage name a file
    of whoever trained it, which is never looked for."""
    tensors = collect(item)
    mapping, synthesis = _child(item, "mapping"), _child(item, "synthesis")
    kwargs = {name: _number(item, name, int) for name in _POSITIONAL[:-1]}
    made = mapping.state.get("_init_kwargs", {})
    if not isinstance(made, dict):
        raise Refused("its mapping network does not tell the arguments that it was made with")
    embed = tensors.get("mapping.embed.weight")
    options = {name: plain(made[name], name) for name in ("lr_multiplier", "w_avg_beta") if name in made}
    options["num_layers"] = sum(f"mapping.fc{index}.weight" in tensors for index in range(_MAX_LAYERS))
    options["embedding"] = list(embed.shape) if embed is not None else []
    layers = [_layer(name, _child(synthesis, name)) for name in layer_names(synthesis)]
    kwargs |= {"layers": layers, "input_channels": _number(_child(synthesis, "input"), "channels", int)}
    kwargs |= {"output_scale": _number(synthesis, "output_scale"), "mapping_kwargs": options}
    return _network("stylegan_xl.Generator", kwargs, item)


def _network(class_name: str, kwargs: dict[str, Any], item: Persistent) -> FileNetwork:
    names = layer_names(_child(item, "synthesis"))
    layers = {name: _child(item, "synthesis", name) for name in names}
    source = _child(item, "synthesis", "input")
    return FileNetwork(class_name, kwargs, collect(item), finish=lambda network: _compare(network, source, layers))


def layer_names(synthesis: Any) -> list[str]:
    """Names of the layers in their order, as the file lists them."""
    names = synthesis.state.get("layer_names") if synthesis is not None else None
    if not isinstance(names, list) or not 1 <= len(names) <= _MAX_LAYERS or not all(isinstance(n, str) for n in names):
        raise Refused("it does not list the names of its layers")
    return [str(name) for name in names]


# Layers tell their own arguments; these are the ones of `SynthesisLayer` that may be left out, with their defaults.
LAYER_OPTIONS: dict[str, int | float] = {
    "conv_kernel": 3,
    "filter_size": 6,
    "lrelu_upsampling": 2,
    "use_radial_filters": False,
    "conv_clamp": 256,
}
LAYER_OPTIONS |= {"magnitude_ema_beta": 0.999, "is_torgb": False, "is_critically_sampled": False, "use_fp16": False}


def _layer(name: str, item: Any) -> dict[str, Any]:
    """A layer as `stylegan_xl.Generator` takes it."""
    given = _arguments(name, item)
    options = {key: plain(given[key], key) for key in LAYER_OPTIONS if key in given}
    return layer_table(name, _signal(given, "out"), options)


def layer_table(name: str, signal: Sequence[float], options: Mapping[str, Any]) -> dict[str, Any]:
    """A layer as `stylegan_xl.Generator` takes it.

    Args:
        name: L{index}_{size}_{channels}.
        signal: The fields of its output `Signal`.
        options: Further arguments of `SynthesisLayer`; those that have their default values are left out.
    """
    told = dict(zip(("channels", "size", "rate", "cutoff", "half_width"), signal, strict=True))
    return {"name": name} | told | {key: value for key, value in options.items() if value != LAYER_OPTIONS[key]}


def _arguments(name: str, item: Any) -> Mapping[str, Any]:
    given = item.state.get("_init_kwargs") if isinstance(item, Persistent) else None
    if not isinstance(given, dict):
        raise Refused(f"its layer {shown(name)} does not tell the arguments that it was made with")
    return given


def _signal(given: Mapping[str, Any], side: str) -> tuple[int, int, float, float, float]:
    """Channels, size, sampling rate, cutoff and half width on one side of a layer."""
    keys = [f"{side}_{key}" for key in ("channels", "size", "sampling_rate", "cutoff", "half_width")]
    if missing := [key for key in keys if key not in given]:
        raise Refused(f"a layer does not tell its {missing[0]}")
    channels, size, *numbers = (_plain_number(given[key], key) for key in keys)
    if channels != int(channels) or size != int(size):
        raise Refused(f"a layer has a {keys[0]} or {keys[1]} that is not a whole number")
    return int(channels), int(size), *(int(n) if n == int(n) else n for n in numbers)  # type: ignore[return-value]


def _plain_number(value: Any, what: str) -> int | float:
    """A number of a file; of sizes [width, height] the one that both are."""
    if isinstance(value, Array):
        value = value.ref
    if isinstance(value, TensorRef) and value.shape == (2,):
        value = value.read_exact().tolist()
    if isinstance(value, list | tuple) and len(value) == 2:
        if value[0] != value[1]:
            raise Refused(f"its {what} is {shown(str(value))}; expected squares")
        value = value[0]
    value = plain(value, what)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1 << 31:
        raise Refused(f"its {what} is not a number")
    return value


def _number(item: Any, name: str, kind: type = float) -> Any:
    if item is None or name not in item.state:
        raise Refused(f"it does not tell its {name}")
    value = _plain_number(item.state[name], name)
    if kind is int and value != int(value):
        raise Refused(f"its {name} is not a whole number")
    return int(value) if value == int(value) else value


def _compare(network: torch.nn.Module, source: Any, layers: Mapping[str, Any]) -> None:
    """Raises Refused unless the network has the layers that the file says it has, with their geometry."""
    synthesis: Any = network.synthesis
    if synthesis.layer_names != list(layers):
        raise Refused("its layers are not those that its arguments make")
    signal = synthesis.input.signal
    pairs: list[tuple[str, Sequence[float], Sequence[float]]] = []
    pairs.append(("input", (signal.channels, signal.size, signal.rate, signal.cutoff), _source(source)))
    for name, item in layers.items():
        layer, given, state = getattr(synthesis, name), _arguments(name, item), item.state
        pairs += [(name, layer.source, _signal(given, "in")), (name, layer.target, _signal(given, "out"))]
        padding = state.get("padding")
        geometry = [state.get("up_factor"), state.get("down_factor"), *(padding if isinstance(padding, list) else [])]
        found = [_plain_number(value, "up_factor, down_factor or padding") for value in geometry]
        pairs.append((name, (layer.up, layer.down, *layer.padding), found))
        pairs.append((name, [layer.conv_clamp or 0], [_plain_number(state.get("conv_clamp") or 0, "conv_clamp")]))
    for name, made, told in pairs:
        close = [abs(a - b) <= _TOLERANCE * max(abs(a), 1) for a, b in zip(made, told, strict=False)]
        if len(made) != len(told) or not all(close):
            raise Refused(f"its layer {shown(name)} is another than its arguments make")


def _source(item: Any) -> list[float]:
    return [_number(item, name) for name in ("channels", "size", "sampling_rate", "bandwidth")]
