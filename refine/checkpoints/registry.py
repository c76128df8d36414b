"""Which network classes a native file may name, and how one is built from its init kwargs without trusting them.

A file names a class by a string of this table; nothing else can be imported through a file.
"""

import importlib
import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from refine.networks.bases import Network

# Far above every published network, far below what would hang a build.
_MAX = {"img_resolution": 4096, "num_layers": 32, "num_blocks": 32, "M": 10_000, "num_steps": 10_000}
_MAX_INT = 1 << 20  # any other size or count
_MAX_VALUES = 1000  # numbers and strings in all init kwargs of one network
_MAX_TAPS = 144  # of a filter: every layer that resamples has one of its own, squared where it is separable
_MAX_TENSORS = 3000  # parameters and buffers of one network; the largest published ones have about 1000
_SPARE_TENSORS, _SPARE_ELEMENTS = 256, 1 << 23  # what a constructor may make beyond a file's: filters, noise, scratch

_FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.randn, torch.rand}
_SCALINGS = {torch.Tensor.mul, torch.Tensor.div, torch.Tensor.add, torch.Tensor.sub}


@dataclass(frozen=True)
class NetworkClass:
    """Where a class lives, and what its networks are: 'generator', 'discriminator', 'teacher' or 'classifier'."""

    module: str
    name: str
    kind: str


NETWORK_CLASSES: dict[str, NetworkClass] = {
    "stylegan2.Generator": NetworkClass("refine.networks.stylegan2", "Generator", "generator"),
    "stylegan2.Discriminator": NetworkClass("refine.networks.stylegan2", "Discriminator", "discriminator"),
    "r3gan.Generator": NetworkClass("refine.networks.r3gan", "Generator", "generator"),
    "stylegan3.Generator": NetworkClass("refine.networks.stylegan3", "Generator", "generator"),
    "stylegan_xl.Generator": NetworkClass("refine.networks.stylegan_xl", "Generator", "generator"),
    "one_step.OneStepGenerator": NetworkClass("refine.networks.one_step", "OneStepGenerator", "generator"),
    "edm.EDMPrecond": NetworkClass("refine.networks.edm", "EDMPrecond", "teacher"),
    "edm.VPPrecond": NetworkClass("refine.networks.edm", "VPPrecond", "teacher"),
    "edm.VEPrecond": NetworkClass("refine.networks.edm", "VEPrecond", "teacher"),
    "edm.iDDPMPrecond": NetworkClass("refine.networks.edm", "iDDPMPrecond", "teacher"),
    "edm2.Precond": NetworkClass("refine.networks.edm2", "Precond", "teacher"),
    "ddpm.DDPMPrecond": NetworkClass("refine.networks.ddpm", "DDPMPrecond", "teacher"),
    "adm.ADMPrecond": NetworkClass("refine.networks.adm", "ADMPrecond", "teacher"),
    "adm.CMPrecond": NetworkClass("refine.networks.adm", "CMPrecond", "teacher"),
    # A name, not an import: this layer knows nothing of metrics until a file with a detector in it is opened.
    "digits.DigitsDetector": NetworkClass("refine.metrics.digits", "DigitsDetector", "classifier"),
}


def kind_of(class_name: str) -> str:
    """'generator', 'discriminator', 'teacher', 'classifier', or 'unknown'."""
    if class_name == "custom":  # a generator of the user's own code, which only `sources.custom` can build
        return "generator"
    return NETWORK_CLASSES[class_name].kind if class_name in NETWORK_CLASSES else "unknown"


def registry_name(network: torch.nn.Module) -> str:
    """The name under which the class of `network` is written to a file.

    Raises:
        ValueError: the class is not one of the table (subclasses are not: they could not be told apart when reading).
    """
    cls = type(network)
    for name, entry in NETWORK_CLASSES.items():
        if (cls.__module__, cls.__qualname__) == (entry.module, entry.name):
            return name
    raise ValueError(
        f"networks of class {cls.__module__}.{cls.__qualname__} cannot be saved natively; "
        f"expected one of {', '.join(NETWORK_CLASSES)}"
    )


def build_empty(class_name: str, init_kwargs: dict[str, Any], held: tuple[int, int] | None = None) -> Network:
    """The network with its names, shapes and dtypes, but no memory for its weights: every large tensor is on 'meta'.

    The random number generators are left as they were.

    Args:
        class_name: A key of `NETWORK_CLASSES`.
        init_kwargs: Constructor arguments as plain JSON values; checked here.
        held: How many tensors, and numbers in all of them, the file has for it. Building ends as soon as the network
            asks for clearly more, so that small files cannot keep us busy with large ones. None = not known.

    Raises:
        ValueError: unknown class, arguments of impossible type or size, or the constructor refuses them.
    """
    if class_name not in NETWORK_CLASSES:
        raise ValueError(
            f"unknown network class {str(class_name)[:60]!r}; expected one of {', '.join(NETWORK_CLASSES)}"
        )
    check_init_kwargs(init_kwargs)
    entry = NETWORK_CLASSES[class_name]
    cls = getattr(importlib.import_module(entry.module), entry.name)
    try:
        inspect.signature(cls).bind(**init_kwargs)
        with without_weights(held):
            return cls(**init_kwargs)
    except (TypeError, ValueError, AssertionError, ArithmeticError, LookupError, AttributeError, RuntimeError) as error:
        lines = str(error).strip().splitlines()
        reason = lines[0][:200] if lines else type(error).__name__
        raise ValueError(f"{class_name} cannot be built from these init kwargs: {reason}") from None


@contextmanager
def without_weights(held: tuple[int, int] | None = None) -> Iterator[None]:
    """What is built within has no memory for its weights, see `build_empty`."""
    with torch.random.fork_rng(devices=[]), _LargeTensorsOnMeta(held):
        yield


def fill(network: torch.nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Puts tensors into a network in the places of its own, by their names in its state_dict; no number is copied.

    As `load_state_dict(values, assign=True)`, several times faster, for names and shapes that have been checked.
    """
    for path, module in network.named_modules():
        prefix = f"{path}." if path else ""
        for name, made in module._parameters.items():
            if made is not None and prefix + name in values:
                module._parameters[name] = torch.nn.Parameter(values[prefix + name], made.requires_grad)
        for name in module._buffers:
            if prefix + name in values:
                module._buffers[name] = values[prefix + name]


class _LargeTensorsOnMeta(TorchFunctionMode):
    """Creates tensors of more than 4096 elements on the meta device, and no more tensors than a file can fill.

    Unlike under `torch.device('meta')`, a constructor can compute the few numbers it needs (filters, σ tables), and
    what a hostile file can make it allocate is bounded all the same.
    """

    def __init__(self, held: tuple[int, int] | None):
        super().__init__()
        tensors, elements = held or (_MAX_TENSORS, math.inf)
        self.most_tensors = min(2 * tensors + _SPARE_TENSORS, _MAX_TENSORS)
        self.most_elements = elements + _SPARE_ELEMENTS
        self.tensors = self.elements = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _FACTORIES:
            size = kwargs.get("size", args[0] if args and isinstance(args[0], tuple | list) else args)
            elements = math.prod(size if isinstance(size, tuple | list) else (size,))
            self.tensors, self.elements = self.tensors + 1, self.elements + max(elements, 0)
            if self.tensors > self.most_tensors:
                raise ValueError(f"more than {self.most_tensors} tensors, which the file cannot fill")
            if self.elements > self.most_elements:
                raise ValueError("they ask for many more numbers than the file has")
            if elements > 4096:
                kwargs = {**kwargs, "device": "meta"}
                if func is not torch.full:  # on meta, random numbers import torch's symbolic shapes (1 s)
                    func = torch.empty
        elif func in _SCALINGS and len(args) == 2 and args[0].is_meta and isinstance(args[1], int | float):
            return args[0]  # has no values to scale; the first arithmetic on meta would import torch's compiler (5 s)
        elif getattr(func, "__module__", None) == "torch.nn.init" and "tensor" in kwargs and kwargs["tensor"].is_meta:
            return kwargs["tensor"]
        return func(*args, **kwargs)


def check_init_kwargs(init_kwargs: Any) -> None:
    """Checks that init kwargs are plain JSON of harmless size, before anything is built from them.

    Raises:
        ValueError: not a dict of JSON values, NaN, too many or too large values, resolution above 4096.
    """
    if not isinstance(init_kwargs, dict):
        raise ValueError(f"init kwargs must be a table, got {type(init_kwargs).__name__}")
    taps = 0
    for count, (name, value) in enumerate(_leaves(init_kwargs, "init_kwargs", depth=0)):
        if count >= _MAX_VALUES:
            raise ValueError(f"init kwargs hold more than {_MAX_VALUES} values")
        if value is None or isinstance(value, bool | str):
            continue
        if not isinstance(value, int | float):
            raise ValueError(f"init kwarg {name!r} must be a plain JSON value, got {type(value).__name__}")
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"init kwarg {name!r} is NaN")
        limit = _MAX.get(name, _MAX_INT)
        if isinstance(value, int) and abs(value) > limit:
            raise ValueError(f"init kwarg {name!r} is {value}; expected at most {limit}")
        taps += name == "resample_filter"
        if taps > _MAX_TAPS:
            raise ValueError(f"init kwarg {name!r} has more than {_MAX_TAPS} values")


def _leaves(value: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
    """(name of the nearest key, value) for every value that is neither a table nor a list."""
    if depth > 4:
        raise ValueError("init kwargs are nested more than four levels deep")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"init kwargs must have names as keys, got {key!r}")
            yield from _leaves(item, key, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item, name, depth + 1)
    else:
        yield name, value
