"""State dicts of EDM's denoisers, as one-step distillations (SiD, Diff-Instruct, DMD) and users save them.

The U-Net follows from names and shapes. The scalings around it leave no trace: they are taken as EDM's, and said.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from refine.checkpoints.foreign.container import FileNetwork, Members, merged
from refine.checkpoints.foreign.flat import Flat, generators, shape_of
from refine.checkpoints.pickles.inert import Refused
from refine.checkpoints.pickles.tensors import TensorRef

FAMILY = "a state dict of an EDM denoiser"
ANCHOR = "map_layer0.weight"
CLASSES = ("EDMPrecond", "VPPrecond", "VEPrecond")  # that a state dict does not tell apart


def members(flat: Flat, given: Mapping[str, Any] | None) -> Members | None:
    """The denoiser of a file's tensors, the average where there are two; None = there is none of these names."""
    found = generators(flat, ANCHOR)
    at = found.get("G_ema", found.get("G"))
    if at is None:
        return None
    return {"ema": ("teacher", functools.partial(describe_denoiser, flat.under(at), given))}


def describe_denoiser(tensors: Mapping[str, TensorRef], given: Mapping[str, Any] | None = None) -> FileNetwork:
    """Arguments, inferred from names and shapes, and tensors of a denoiser.

    Args:
        tensors: By their names in the U-Net.
        given: Arguments that are laid over the inferred ones; 'class' is that of the scalings, one of `CLASSES`.
    """
    given = dict(given or {})
    tensors = {name: ref for name, ref in tensors.items() if "." in name}
    adm = "out_conv.weight" in tensors
    levels: dict[int, set[int]] = {}
    for name in tensors:
        if match := re.match(r"enc\.(\d{1,4})x\1_block(\d{1,2})\.", name):
            levels.setdefault(int(match[1]), set()).add(int(match[2]))
    sizes = sorted(levels, reverse=True)
    if not sizes or sizes != [sizes[0] >> i for i in range(len(sizes))]:
        raise Refused(
            f"its encoder has blocks for {', '.join(map(str, sizes)) or 'no'} pixels; expected R, R/2 and so on"
        )
    first, img_channels, *_ = shape_of(tensors, f"enc.{sizes[0]}x{sizes[0]}_conv.weight", 4)
    widths = [shape_of(tensors, f"enc.{size}x{size}_block0.conv1.weight", 4)[0] for size in sizes]
    embedded = shape_of(tensors, ANCHOR, 2)
    channels = embedded[1] if adm else first  # ADM's first layer is as wide as its first level
    if not channels or any(width % channels for width in widths) or any(size % channels for size in embedded):
        raise Refused(f"its widths {widths} are not multiples of the first layer's {channels} channels")
    label_dim, augment_dim = (
        shape_of(tensors, f"{name}.weight", 2)[1] if f"{name}.weight" in tensors else 0
        for name in ("map_label", "map_augment")
    )
    kwargs: dict[str, Any] = {"img_resolution": sizes[0], "img_channels": img_channels, "label_dim": label_dim}
    kwargs |= {"model_type": "DhariwalUNet" if adm else "SongUNet", "model_channels": channels}
    kwargs |= {"channel_mult": [width // channels for width in widths], "num_blocks": len(levels[sizes[0]])}
    kwargs |= {"channel_mult_emb": embedded[0] // channels, "augment_dim": augment_dim}
    attended = [
        size for size in sizes if any(f"enc.{size}x{size}_block{i}.qkv.weight" in tensors for i in levels[size])
    ]
    kwargs["attn_resolutions"] = attended
    if not adm:
        kwargs |= _of_song(tensors, sizes, embedded[1] // channels)
    cls = given.pop("class", "EDMPrecond")
    if cls not in CLASSES:
        raise Refused(f"--teacher-kwargs name the class {str(cls)[:40]!r}; expected one of {', '.join(CLASSES)}")
    notes = [f"its scalings are taken as those of {cls}, which no state dict tells"]
    prefixed = {f"model.{name}": ref for name, ref in tensors.items()}
    return FileNetwork(
        f"edm.{cls}",
        merged(kwargs, given),
        prefixed,
        computed=lambda name: name.endswith(".resample_filter"),
        notes=notes,
    )


def _of_song(tensors: Mapping[str, TensorRef], sizes: list[int], channel_mult_noise: int) -> dict[str, Any]:
    """Arguments that only DDPM++ and NCSN++ have."""
    filters = [ref.shape[-1] for name, ref in tensors.items() if name.endswith(".resample_filter") and ref.shape]
    coarse = f"dec.{sizes[-1]}x{sizes[-1]}_aux_conv.weight"
    encoder = next(
        (kind for kind in ("residual", "skip") if any(f"_aux_{kind}." in name for name in tensors)), "standard"
    )
    return {
        "embedding_type": "fourier" if "map_noise.freqs" in tensors else "positional",
        "channel_mult_noise": channel_mult_noise,
        "encoder_type": encoder,
        "decoder_type": "skip" if len(sizes) > 1 and coarse in tensors else "standard",
        "resample_filter": [1, 3, 3, 1] if filters and max(filters) == 4 else [1, 1],
    }
