"""State dicts of StyleGAN3 generators (t and r) under NVIDIA's names, as `torch.save(G.state_dict())` writes them.

Sizes follow from names and shapes, the rest of the layers from the schedule that StyleGAN3 has unless it is told
otherwise; the stored filters say whether that is theirs. What leaves no trace is taken as StyleGAN3 has it, and said.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from refine.checkpoints import registry
from refine.checkpoints.foreign.container import FileNetwork, Members, merged
from refine.checkpoints.foreign.flat import Flat, generators, shape_of
from refine.checkpoints.foreign.rosinality import MEAN_OF, estimate_w_avg
from refine.checkpoints.foreign.stylegan2_names import mapping_sizes
from refine.checkpoints.foreign.stylegan3 import LAYER_OPTIONS
from refine.checkpoints.pickles.inert import Refused, shown
from refine.checkpoints.pickles.tensors import TensorRef

FAMILY = "a state dict of a StyleGAN3"
ANCHOR = "synthesis.input.freqs"
#: What changes images and is in no tensor, with the values that are taken.
ASSUMED: dict[str, Any] = {"conv_clamp": 256, "output_scale": 0.25, "mapping_kwargs.lr_multiplier": 0.01}
_LAYER = re.compile(r"synthesis\.(L(\d{1,3})_(\d{1,5})_(\d{1,5}))\.weight")
_MAX_SIZE, _MAX_LAYERS = 8192, 100
_FILTERS = (".up_filter", ".down_filter")
_UPSAMPLING = 2  # of the nonlinearity; the first layer's filter has as many times `filter_size` taps
_OF_VALUES = ("conv_clamp", "magnitude_ema_beta")  # what has nothing to do with a layer's filters
MOST_NUMBERS = 1 << 16  # that are read for a filter
_TOLERANCE = 5e-3  # between filters, in units of the largest tap: they may be stored in bfloat16
OF_SCHEDULE = ("num_critical", "first_cutoff", "first_stopband", "last_stopband_rel", "margin_size")


def members(flat: Flat, given: Mapping[str, Any] | None) -> Members | None:
    """The generators of a file's tensors; None = there are none of these names."""
    found: Members = {}
    for name, at in generators(flat, ANCHOR).items():
        found[name] = ("generator", functools.partial(describe_generator, flat.under(at), given))
    return found or None


def describe_generator(tensors: Mapping[str, TensorRef], given: Mapping[str, Any] | None = None) -> FileNetwork:
    """Arguments, inferred from names and shapes, and tensors of a generator.

    Args:
        tensors: By their names in the generator.
        given: Arguments that are laid over the inferred ones.

    Raises:
        Refused: its layers are none that the arguments make.
    """
    given = dict(given or {})
    registry.check_init_kwargs(given)
    tensors = {name: ref for name, ref in tensors.items() if "." in name}  # without counters
    layers = layers_of(tensors)
    if [layer.number for layer in layers] != list(range(len(layers))):
        raise Refused("its layers are not numbered from 0 on, as those of a StyleGAN3 are")
    kwargs = merged(_sizes(tensors, layers, given), given)
    notes: list[str] = []
    assume(kwargs, given, notes)
    made = _schedule(kwargs, layers)
    if [name for name, *_ in made] != [layer.name for layer in layers]:
        raise Refused(other_layers(layers[-2].name, given))
    same = True
    with contextlib.suppress(TypeError, ValueError, ArithmeticError):  # building the network will say what is wrong
        same = fits(made, made[0][1], tensors)
    if not same:
        raise Refused(other_layers(layers[-2].name, given))
    return described("stylegan3.Generator", kwargs, tensors, notes, given)


def assume(kwargs: dict[str, Any], given: Mapping[str, Any], notes: list[str]) -> None:
    """Sets what is in no tensor and is not given, and says so in the notes."""
    for name, value in ASSUMED.items():
        part, _, key = name.rpartition(".")
        if key not in (given.get(part, {}) if part else given):
            notes.append(f"{key} is taken as {value}, which no state dict tells; --gan-kwargs can say otherwise")
            (kwargs[part] if part else kwargs).setdefault(key, value)


def described(
    class_name: str, kwargs: dict[str, Any], tensors: dict[str, TensorRef], notes: list[str], given: Mapping[str, Any]
) -> FileNetwork:
    """The network, and what its file may lack: the filters, the transform, and the mean of w."""
    stored = has_filters(tensors)
    if not stored:
        notes.append("no filters are stored: they are computed")
    computed = {name for name in ("mapping.w_avg", "synthesis.input.transform") if name not in tensors}
    if "mapping.w_avg" in computed:
        notes.append(f"no mean of w is stored, which truncation needs: it is estimated from {MEAN_OF:,} draws")

    def finish(network: Any) -> None:
        source = network.synthesis.input
        if not float(source.freqs.norm(dim=1).max()) <= source.signal.cutoff * (1 + _TOLERANCE):
            raise Refused(other_layers("its Fourier features", given))
        if "mapping.w_avg" in computed:
            estimate_w_avg(network)

    return FileNetwork(
        class_name,
        kwargs,
        tensors,
        computed=lambda name: name in computed or (not stored and name.endswith(_FILTERS)),
        finish=finish,
        notes=notes,
    )


class Layer(NamedTuple):
    """What the name of a layer tells: its samples along an axis, margins included, and its channels."""

    name: str
    number: int
    size: int
    channels: int


def layers_of(tensors: Mapping[str, TensorRef]) -> list[Layer]:
    """The layers by their number, ToRGB the last.

    Raises:
        Refused: there are too few or too many, two have one number, or one is of an impossible size.
    """
    found = [match for name in tensors if (match := _LAYER.fullmatch(name))]
    layers = sorted((Layer(m[1], int(m[2]), int(m[3]), int(m[4])) for m in found), key=lambda layer: layer.number)
    if not 2 <= len(layers) <= _MAX_LAYERS or len({layer.number for layer in layers}) < len(layers):
        raise Refused(f"it has {len(layers)} layers; expected 2 to {_MAX_LAYERS}, each of another number")
    if not all(0 < layer.size <= _MAX_SIZE and layer.channels for layer in layers):
        raise Refused(f"its layers have impossible sizes, such as {shown(layers[0].name)}")
    return layers


def _sizes(tensors: Mapping[str, TensorRef], layers: Sequence[Layer], given: Mapping[str, Any]) -> dict[str, Any]:
    w_dim = shape_of(tensors, "synthesis.input.affine.weight", 2)[1]
    z_dim, c_dim, mapping = mapping_sizes(tensors, w_dim)
    resolution, img_channels = layers[-1].size, layers[-1].channels
    kwargs: dict[str, Any] = {"z_dim": z_dim, "c_dim": c_dim, "w_dim": w_dim, "img_resolution": resolution}
    kwargs |= {"img_channels": img_channels, "mapping_kwargs": mapping, "num_layers": len(layers) - 1}
    return kwargs | convolution(tensors, layers[0].name) | _channels(layers, resolution, given)


def convolution(tensors: Mapping[str, TensorRef], name: str) -> dict[str, Any]:
    """Kernel and filters of a layer that keeps the sampling rate, as arguments of `SynthesisLayer`."""
    kernel = shape_of(tensors, f"synthesis.{name}.weight", 4)[2]
    up, down = (tensors.get(f"synthesis.{name}{kind}") for kind in _FILTERS)
    options = {"conv_kernel": kernel, "use_radial_filters": kernel == 1 if down is None else len(down.shape) == 2}
    if up is not None and len(up.shape) == 1:
        options["filter_size"] = max(up.shape[0] // _UPSAMPLING, 1)
    return options


def _channels(layers: Sequence[Layer], resolution: int, given: Mapping[str, Any]) -> dict[str, float]:
    """channel_base and channel_max: the roundest base among those that give these numbers of channels."""
    most = max(layer.channels for layer in layers[:-1])
    made = _schedule({**given, "img_resolution": resolution}, layers)
    cutoffs = [signal.cutoff for _, signal, _ in made[:-1]]
    pairs = list(zip(cutoffs, (layer.channels for layer in layers[:-1]), strict=True))
    low = max(2 * cutoff * (channels - 0.5) for cutoff, channels in pairs)
    below = [2 * cutoff * (channels + 0.5) for cutoff, channels in pairs if channels < most]
    high = min(below, default=2 * low)
    if low > high:
        raise Refused(other_layers(layers[-2].name, given))
    step = 1 << 30
    while step > 1 and -(-low // step) * step > high:
        step //= 2
    return {"channel_base": int(-(-low // step) * step), "channel_max": most}


def _schedule(kwargs: Mapping[str, Any], layers: Sequence[Layer]) -> list[Any]:
    """The layers that these arguments make."""
    from refine.networks import stylegan3

    known = {*inspect.signature(stylegan3.schedule).parameters, *LAYER_OPTIONS}
    usual = {"img_channels": layers[-1].channels, "num_layers": len(layers) - 1}
    try:
        return stylegan3.schedule(**{**usual, **{name: kwargs[name] for name in known if name in kwargs}})
    except (TypeError, ValueError, ArithmeticError) as error:
        raise Refused(f"no StyleGAN3 has its {len(layers)} layers: {error}"[:200]) from None


def has_filters(tensors: Iterable[str]) -> bool:
    """Whether any filter is among the tensors."""
    return any(name.endswith(_FILTERS) for name in tensors)


def fits(layers: Iterable[tuple[str, Any, Mapping[str, Any]]], source: Any, tensors: Mapping[str, TensorRef]) -> bool:
    """Whether the filters of a file, as far as it has them, are those of these layers.

    Args:
        layers: Arguments of `SynthesisNetwork`.
        source: The signal before the first of them.
        tensors: Of the file, by their names in the generator.

    Raises:
        TypeError, ValueError, ArithmeticError: there are no such layers.
    """
    from refine.networks.stylegan3_layers import SynthesisLayer

    for name, target, options in layers:
        stored = {kind: ref for kind in _FILTERS if (ref := tensors.get(f"synthesis.{name}{kind}")) is not None}
        of_filters = {key: value for key, value in options.items() if key not in _OF_VALUES}
        with registry.without_weights():
            layer = SynthesisLayer(1, source._replace(channels=1), target._replace(channels=1), **of_filters)
        for kind, ref in stored.items():
            made = getattr(layer, kind[1:])
            if made is None or not is_filter(ref, made):
                return False
        source = target
    return True


def is_filter(ref: TensorRef, made: torch.Tensor) -> bool:
    """Whether a filter of a file is this one."""
    if ref.shape != made.shape or ref.span > MOST_NUMBERS:
        return False
    return float((ref.read() - made).abs().max()) < _TOLERANCE * float(made.abs().max())


def other_layers(which: str, given: Mapping[str, Any]) -> str:
    """What is said of layers that are not those of the usual arguments and the given ones."""
    from refine.networks import stylegan3

    usual = inspect.signature(stylegan3.schedule).parameters
    values = {name: given.get(name, usual[name].default) for name in OF_SCHEDULE}
    told = (f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items())
    listed = ", ".join(map(shown, told))
    return f"its layers, such as {which}, are not those of {listed}; say with --gan-kwargs what it was made with"
