"""R3GAN's files: snapshots, which hold plain modules of two trees of class names, and state dicts.

Sizes follow from names and shapes. Which stages compute in bfloat16 is an attribute of pickled modules; no state dict
tells. Facts of the format: the modules' own attributes, and their state_dict.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from refine.checkpoints.foreign.container import FileNetwork, Members, merged
from refine.checkpoints.foreign.flat import Flat, generators, shape_of
from refine.checkpoints.pickles.inert import Refused, Stub, shown
from refine.checkpoints.pickles.tensors import TensorRef

FAMILY = "an R3GAN file"
ANCHOR = "MainLayers.0.Layers.0.Basis"
_MAX_STAGES, _MAX_BLOCKS = 11, 64


def members(flat: Flat, given: Mapping[str, Any] | None) -> Members | None:
    """The generators of a file's tensors; None = there are none of these names."""
    found: Members = {}
    for name, at in generators(flat, ANCHOR).items():
        describe = functools.partial(describe_generator, flat.under(at), _bf16_stages(flat, at), given)
        found[name] = ("generator", describe)
    return found or None


def _bf16_stages(flat: Flat, prefix: str) -> list[int] | None:
    """The stages that a file's modules have in bfloat16; None = the file has no modules."""
    stages: list[int] = []
    known = False
    for index in range(_MAX_STAGES):
        dtype = flat.modules.get(f"{prefix}MainLayers.{index}", {}).get("DataType")
        known |= isinstance(dtype, Stub)
        if isinstance(dtype, Stub) and dtype.name == "torch.bfloat16":
            stages.append(index)
    return stages if known else None


def describe_generator(
    tensors: Mapping[str, TensorRef], bf16_stages: list[int] | None = None, given: Mapping[str, Any] | None = None
) -> FileNetwork:
    """Arguments, inferred from names and shapes, and tensors of a generator.

    Args:
        tensors: By their names in the generator.
        bf16_stages: What the file says of them; None = nothing.
        given: Arguments that are laid over the inferred ones.
    """
    found = [re.match(r"MainLayers\.(\d{1,2})\.Layers\.(\d{1,2})\.", name) for name in tensors]
    layers = {(int(match[1]), int(match[2])) for match in found if match}
    count = 1 + max(stage for stage, _ in layers)
    blocks = [max((layer for at, layer in layers if at == stage), default=-1) for stage in range(count)]
    if count > _MAX_STAGES or min(blocks) < 0 or max(blocks) > _MAX_BLOCKS:
        raise Refused(f"it has {count} stages with {shown(str(blocks))} blocks, which is no generator of R3GAN")
    widths: list[int] = []
    cardinalities: list[int] = []
    kernel, expansion = 3, 2
    for stage in range(count):
        widths.append(_width(tensors, stage, widths))
        cardinalities.append(1)
        if blocks[stage]:
            block = f"MainLayers.{stage}.Layers.1"
            grouped = shape_of(tensors, f"{block}.LinearLayer2.Layer.weight", 4)
            if 0 in grouped or not widths[-1] or grouped[0] % widths[-1]:
                raise Refused(f"{block}.LinearLayer2.Layer.weight has shape {list(grouped)}, of no whole expansion")
            cardinalities[-1], kernel, expansion = grouped[0] // grouped[1], grouped[2], grouped[0] // widths[-1]
    embed, c_dim = shape_of(tensors, "EmbeddingLayer.weight", 2) if "EmbeddingLayer.weight" in tensors else (0, 0)
    kwargs = {
        "z_dim": shape_of(tensors, "MainLayers.0.Layers.0.LinearLayer.weight", 2)[1] - embed,
        "c_dim": c_dim,
        "img_resolution": 2 << count,
        "img_channels": shape_of(tensors, "AggregationLayer.Layer.weight", 4)[0],
        "widths": widths,
        "cardinalities": cardinalities,
        "blocks": blocks,
        "expansion": expansion,
        "embed_features": embed,
        "kernel_size": kernel,
        "resample_filter": _base_filter(tensors),
        "bf16_stages": bf16_stages or [],
    }
    notes = []
    if bf16_stages is None and "bf16_stages" not in (given or {}):
        notes.append("every stage computes in float32: bf16_stages is in no state dict; --gan-kwargs can name them")
    stored = any(name.endswith(".Kernel") for name in tensors)
    if not stored and count > 1:
        notes.append("no filter is stored: it is taken as [1, 2, 1]")
    return FileNetwork(
        "r3gan.Generator",
        merged(kwargs, given or {}),
        dict(tensors),
        computed=lambda name: name.endswith(".Kernel") and not stored,
        notes=notes,
    )


def _width(tensors: Mapping[str, TensorRef], stage: int, before: list[int]) -> int:
    if stage == 0:
        return shape_of(tensors, ANCHOR, 3)[0]
    name = f"MainLayers.{stage}.Layers.0.LinearLayer.Layer.weight"
    return shape_of(tensors, name, 4)[0] if name in tensors else before[-1]


def _base_filter(tensors: Mapping[str, TensorRef]) -> list[int]:
    """A base filter of the right length; what it makes is replaced by the file's kernel."""
    kernel = tensors.get("MainLayers.1.Layers.0.Resampler.Kernel")
    taps = kernel.shape[0] - 1 if kernel is not None and len(kernel.shape) == 2 else 3
    return [1, 2, 1] if taps == 3 or not 1 <= taps <= 11 else [1] * taps
