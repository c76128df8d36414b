"""State dicts of StyleGAN2 generators under NVIDIA's names, as `torch.save(G.state_dict())` and Lightning write them.

Sizes follow from names and shapes. What leaves no trace there is taken as StyleGAN2-ADA has it, and said.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from refine.checkpoints.foreign.container import FileNetwork, Members, merged
from refine.checkpoints.foreign.flat import (
    Flat,
    channel_kwargs,
    filter_taps,
    generators,
    shape_of,
    without_strangers,
)
from refine.checkpoints.foreign.rosinality import MEAN_OF, estimate_w_avg
from refine.checkpoints.pickles.inert import Refused
from refine.checkpoints.pickles.tensors import TensorRef

FAMILY = "a state dict of a StyleGAN2"
ANCHOR = "synthesis.b4.const"
_MAX_KERNEL = 15
#: What changes images and is in no tensor, with the values that are taken.
ASSUMED = {"synthesis_kwargs.conv_clamp": None, "mapping_kwargs.lr_multiplier": 0.01}


def members(flat: Flat, given: Mapping[str, Any] | None) -> Members | None:
    """The generators of a file's tensors; None = there are none of these names."""
    found = generators(flat, ANCHOR)
    describe = functools.partial(describe_generator, given=given)
    return {name: ("generator", functools.partial(describe, flat.under(at))) for name, at in found.items()} or None


def describe_generator(tensors: Mapping[str, TensorRef], given: Mapping[str, Any] | None = None) -> FileNetwork:
    """Arguments, inferred from names and shapes, and tensors of a generator.

    Args:
        tensors: By their names in the generator.
        given: Arguments that are laid over the inferred ones.
    """
    notes: list[str] = []
    tensors = without_strangers(tensors, notes)
    sizes = {int(match[1]) for name in tensors if (match := re.match(r"synthesis\.b(\d{1,5})\.", name))}
    if sizes != {4 << i for i in range(len(sizes))}:
        raise Refused(f"it has layers for images of {', '.join(map(str, sorted(sizes)))}; expected 4, 8, 16 and so on")
    inferred = {**_outer(tensors, max(sizes)), "synthesis_kwargs": _synthesis(tensors, sorted(sizes))}
    kwargs = merged(inferred, given or {})
    for name, value in ASSUMED.items():
        part, _, key = name.rpartition(".")
        if key not in (given or {}).get(part, {}):
            notes.append(f"{key} is taken as {value}, which no state dict tells; --gan-kwargs can say otherwise")
            kwargs[part].setdefault(key, value)
    synthesis = kwargs["synthesis_kwargs"]
    drawn, filters = ".noise_const", ".resample_filter"
    computed = {name for name in ("mapping.w_avg",) if name not in tensors and _tracks_mean(kwargs)}
    if computed:
        notes.append(f"no mean of w is stored, which truncation needs: it is estimated from {MEAN_OF:,} draws")
    if synthesis["use_noise"] and not any(name.endswith(drawn) for name in tensors):
        notes.append("no constant noise is stored: it is drawn with a fixed seed")
    if not any(name.endswith(filters) for name in tensors):
        notes.append("no filter is stored: it is taken as [1, 3, 3, 1]")
    return FileNetwork(
        "stylegan2.Generator",
        kwargs,
        tensors,
        computed=lambda name: name in computed or name.endswith((drawn, filters)),
        finish=estimate_w_avg if computed else None,
        notes=notes,
    )


def _tracks_mean(kwargs: Mapping[str, Any]) -> bool:
    return kwargs["mapping_kwargs"].get("w_avg_beta", 0.995) is not None


def _outer(tensors: Mapping[str, TensorRef], size: int) -> dict[str, Any]:
    """Sizes, and arguments of the mapping network."""
    w_dim = shape_of(tensors, "synthesis.b4.conv1.affine.weight", 2)[1]
    z_dim, c_dim, mapping = mapping_sizes(tensors, w_dim)
    channels = shape_of(tensors, f"synthesis.b{size}.torgb.weight", 4)[0]
    sizes = {"z_dim": z_dim, "c_dim": c_dim, "w_dim": w_dim, "img_resolution": size, "img_channels": channels}
    return {**sizes, "mapping_kwargs": mapping}


def mapping_sizes(tensors: Mapping[str, TensorRef], w_dim: int) -> tuple[int, int, dict[str, Any]]:
    """z_dim, c_dim, and arguments of the mapping network, which is StyleGAN3's, too."""
    layers = len({name for name in tensors if re.fullmatch(r"mapping\.fc\d{1,2}\.weight", name)})
    embed, c_dim = shape_of(tensors, "mapping.embed.weight", 2) if "mapping.embed.weight" in tensors else (0, 0)
    into = shape_of(tensors, "mapping.fc0.weight", 2) if layers else (w_dim, w_dim + embed)
    mapping: dict[str, Any] = {"num_layers": layers}
    if layers > 1 and into[0] != w_dim:
        mapping["layer_features"] = into[0]
    if c_dim and embed != w_dim:
        mapping["embed_features"] = embed
    return into[1] - embed, c_dim, mapping


def _synthesis(tensors: Mapping[str, TensorRef], sizes: list[int]) -> dict[str, Any]:
    """Arguments of the synthesis network."""
    convs = [shape_of(tensors, f"synthesis.b{size}.conv1.weight", 4) for size in sizes]
    skip = all(f"synthesis.b{size}.torgb.weight" in tensors for size in sizes)
    resnet = f"synthesis.b{sizes[-1]}.skip.weight" in tensors
    kwargs = {**channel_kwargs([conv[0] for conv in convs]), "architecture": "skip"}
    if not skip:
        kwargs["architecture"] = "resnet" if resnet else "orig"
    kwargs["use_noise"] = any(name.endswith(".noise_strength") for name in tensors)
    if convs[0][2] % 2 == 0 or convs[0][2] > _MAX_KERNEL:
        raise Refused(f"its kernels are {convs[0][2]} wide; expected an odd number up to {_MAX_KERNEL}")
    if convs[0][2] != 3:
        kwargs["kernel_size"] = convs[0][2]
    stored = tensors.get(f"synthesis.b{sizes[-1]}.resample_filter")
    if stored is not None:
        kwargs["resample_filter"] = filter_taps(stored.shape)
    return kwargs
