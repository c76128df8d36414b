"""State dicts of StyleGAN3 generators (t and r) under NVIDIA's names, as `torch.save(G.state_dict())` writes them.

Sizes follow from names and shapes, the rest of the layers from the schedule that StyleGAN3 has unless it is told
otherwise; the stored filters say whether that is theirs. What leaves no trace is taken as StyleGAN3 has it, and said.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from refine.checkpoints import registry
from refine.checkpoints.foreign.container import FileNetwork, Members, merged
from refine.checkpoints.foreign.flat import Flat, generators, shape_of
from refine.checkpoints.foreign.rosinality import MEAN_OF, estimate_w_avg
from refine.checkpoints.foreign.stylegan2_names import mapping_sizes
from refine.checkpoints.pickles.inert import Refused, shown
from refine.checkpoints.pickles.tensors import TensorRef

FAMILY = "a state dict of a StyleGAN3"
ANCHOR = "synthesis.input.freqs"
#: What changes images and is in no tensor, with the values that are taken.
ASSUMED: dict[str, Any] = {"conv_clamp": 256, "output_scale": 0.25, "mapping_kwargs.lr_multiplier": 0.01}
_LAYER = re.compile(r"synthesis\.(L(\d{1,3})_(\d{1,5})_(\d{1,5}))\.weight")
_MAX_SIZE = 8192
_FILTERS = (".up_filter", ".down_filter")
_UPSAMPLING = 2  # of the nonlinearity; the first layer's filter has as many times `filter_size` taps
_TOLERANCE = 5e-3  # between filters, in units of the largest tap: they may be stored in bfloat16
_OF_SCHEDULE = ("num_critical", "first_cutoff", "first_stopband", "last_stopband_rel", "margin_size")


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
        Refused: it is a StyleGAN-XL, or its layers are none that the arguments make.
    """
    given = given or {}
    if "mapping.embed.weight" in tensors and "mapping.embed.bias" not in tensors:
        raise Refused(
            "it is the state dict of a StyleGAN-XL, in which no tensor tells the layers' cutoffs; expected its pickle"
        )
    tensors = {name: ref for name, ref in tensors.items() if "." in name}  # without counters
    layers = _layers(tensors)
    kwargs, notes = merged(_sizes(tensors, layers, given), given), []
    for name, value in ASSUMED.items():
        part, _, key = name.rpartition(".")
        if key not in (given.get(part, {}) if part else given):
            notes.append(f"{key} is taken as {value}, which no state dict tells; --gan-kwargs can say otherwise")
            (kwargs[part] if part else kwargs).setdefault(key, value)
    if [name for name, *_ in _schedule(kwargs, layers)] != [name for name, *_ in layers]:
        raise Refused(_other_layers(layers))
    stored = any(name.endswith(_FILTERS) for name in tensors)
    if not stored:
        notes.append("no filters are stored: they are computed")
    computed = {name for name in ("mapping.w_avg", "synthesis.input.transform") if name not in tensors}
    if "mapping.w_avg" in computed:
        notes.append(f"no mean of w is stored, which truncation needs: it is estimated from {MEAN_OF:,} draws")

    def finish(network: Any) -> None:
        if stored:
            _compare_filters(network, kwargs, layers)
        if "mapping.w_avg" in computed:
            estimate_w_avg(network)

    return FileNetwork(
        "stylegan3.Generator",
        kwargs,
        tensors,
        computed=lambda name: name in computed or (not stored and name.endswith(_FILTERS)),
        finish=finish,
        notes=notes,
    )


_Layer = tuple[str, int, int]  # name, samples along an axis, channels


def _layers(tensors: Mapping[str, TensorRef]) -> list[_Layer]:
    found = sorted((match for name in tensors if (match := _LAYER.fullmatch(name))), key=lambda match: int(match[2]))
    if [int(match[2]) for match in found] != list(range(len(found))) or len(found) < 2:
        raise Refused("its layers are not numbered from 0 on, as those of a StyleGAN3 are")
    layers = [(match[1], int(match[3]), int(match[4])) for match in found]
    if not all(0 < size <= _MAX_SIZE and channels for _, size, channels in layers):
        raise Refused(f"its layers have impossible sizes, such as {shown(layers[0][0])}")
    return layers


def _sizes(tensors: Mapping[str, TensorRef], layers: Sequence[_Layer], given: Mapping[str, Any]) -> dict[str, Any]:
    w_dim = shape_of(tensors, "synthesis.input.affine.weight", 2)[1]
    z_dim, c_dim, mapping = mapping_sizes(tensors, w_dim)
    _, resolution, img_channels = layers[-1]
    kernel = shape_of(tensors, f"synthesis.{layers[0][0]}.weight", 4)[2]
    down = [ref for name, ref in tensors.items() if name.endswith(".down_filter")]
    up = tensors.get(f"synthesis.{layers[0][0]}.up_filter")
    kwargs: dict[str, Any] = {"z_dim": z_dim, "c_dim": c_dim, "w_dim": w_dim, "img_resolution": resolution}
    kwargs |= {"img_channels": img_channels, "mapping_kwargs": mapping, "num_layers": len(layers) - 1}
    kwargs |= {"conv_kernel": kernel}
    kwargs["use_radial_filters"] = any(len(ref.shape) == 2 for ref in down) if down else kernel == 1
    if up is not None and len(up.shape) == 1:
        kwargs["filter_size"] = max(up.shape[0] // _UPSAMPLING, 1)
    return kwargs | _channels(layers, resolution, given)


def _channels(layers: Sequence[_Layer], resolution: int, given: Mapping[str, Any]) -> dict[str, float]:
    """channel_base and channel_max: the roundest base among those that give these numbers of channels."""
    most = max(channels for *_, channels in layers[:-1])
    made = _schedule({**given, "img_resolution": resolution}, layers)
    cutoffs = [signal.cutoff for _, signal, _ in made[:-1]]
    pairs = list(zip(cutoffs, (channels for *_, channels in layers[:-1]), strict=True))
    low = max(2 * cutoff * (channels - 0.5) for cutoff, channels in pairs)
    below = [2 * cutoff * (channels + 0.5) for cutoff, channels in pairs if channels < most]
    high = min(below, default=2 * low)
    if low > high:
        raise Refused(_other_layers(layers))
    step = 1 << 30
    while step > 1 and -(-low // step) * step > high:
        step //= 2
    return {"channel_base": int(-(-low // step) * step), "channel_max": most}


def _schedule(kwargs: Mapping[str, Any], layers: Sequence[_Layer]) -> list[Any]:
    """The layers that these arguments make."""
    from refine.networks import stylegan3

    known = inspect.signature(stylegan3.schedule).parameters
    usual = {"img_channels": layers[-1][2], "num_layers": len(layers) - 1}
    try:
        return stylegan3.schedule(**{**usual, **{name: kwargs[name] for name in known if name in kwargs}})
    except (TypeError, ValueError, ArithmeticError) as error:
        raise Refused(f"no StyleGAN3 has its {len(layers)} layers: {error}"[:200]) from None


def _compare_filters(network: Any, kwargs: dict[str, Any], layers: Sequence[_Layer]) -> None:
    """Raises Refused unless the file's filters are those that the arguments make."""
    made = registry.build_empty("stylegan3.Generator", kwargs).state_dict()
    for name, value in network.state_dict().items():
        if name.endswith(_FILTERS):
            error = float((value - made[name]).abs().max() / torch.clamp(made[name].abs().max(), min=1e-12))
            if not error < _TOLERANCE:
                raise Refused(_other_layers(layers))


def _other_layers(layers: Sequence[_Layer]) -> str:
    from refine.networks import stylegan3

    usual = inspect.signature(stylegan3.schedule).parameters
    listed = ", ".join(f"{name} {usual[name].default:.4g}" for name in _OF_SCHEDULE)
    return (
        f"its layers, such as {layers[-2][0]}, are not those of {listed}; say with --gan-kwargs what it was made with"
    )
