"""`.pt` files of guided-diffusion ("ADM") and consistency_models: bare state dicts, whose names and shapes tell most.

What they do not tell (size of the images, attention heads, layout of qkv, noise schedule) is known of the published
networks by their widths and depth, and otherwise said by the user, under the names of the options of those programs:
in the call (`--teacher-kwargs`), or in NAME.json beside NAME.pt.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from refine.checkpoints.foreign.container import FileNetwork
from refine.checkpoints.foreign.flat import flattened, generators
from refine.checkpoints.pickles.inert import Refused, shown
from refine.checkpoints.pickles.tensors import TensorRef

FAMILY = "a guided-diffusion .pt"
CM_FAMILY = "a consistency_models .pt"
_MAX_JSON_BYTES = 1 << 20
_MAX_STAGES = 200  # entries of a ladder; the largest published one has 21

# What tells the U-Net from other networks with some of its names.
_ANCHOR = "input_blocks.0.0.weight"
_SIGNS = (
    *("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.1.qkv.weight"),
    *("output_blocks.0.0.in_layers.0.weight", "out.2.weight"),
)

# Of the published networks: (model_channels, widths in multiples of it, blocks per level) → what shapes do not tell.
_HEADS_64 = {"num_head_channels": 64}
_LEGACY = {"use_new_attention_order": False, "noise_schedule": "linear"}
_KNOWN: dict[tuple, dict[str, Any]] = {
    (192, (1, 2, 3, 4), 3): {
        **_HEADS_64,
        "image_size": 64,
        "use_new_attention_order": True,
        "noise_schedule": "cosine",
        "dropout": 0.1,
    },
    (256, (1, 1, 2, 3, 4), 2): {"image_size": 128, "num_heads": 4, **_LEGACY, "dropout": 0.0},
    (256, (1, 1, 2, 2, 4, 4), 2): {"image_size": 256, **_HEADS_64, **_LEGACY, "dropout": 0.0},
    (256, (0.5, 1, 1, 2, 2, 4, 4), 2): {"image_size": 512, **_HEADS_64, **_LEGACY, "dropout": 0.0},
}
_CM_DROPOUT = 0.1  # of all three published ones
_LSUN_DROPOUT = {"lsun_bedroom": 0.1, "lsun_cat": 0.1, "lsun_horse": 0.1}  # told from the 256×256 net by name alone

# Options that a user may give, beside those that the shapes tell and that must then agree with them.
_HIDDEN: dict[str, type | tuple[type, ...]] = {
    "image_size": int,
    "num_heads": int,
    "num_heads_upsample": int,
    "num_head_channels": int,
    "use_new_attention_order": bool,
    "noise_schedule": str,
    "diffusion_steps": int,
    "rescale_timesteps": bool,
    "dropout": (int, float),
}
_WITHOUT_EFFECT = (
    *("use_fp16", "use_checkpoint", "channel_mult", "attention_resolutions", "use_kl", "rescale_learned_sigmas"),
    *("weight_schedule", "timestep_respacing", "predict_xstart"),
)
_ADM_ONLY = ("use_new_attention_order", "noise_schedule")  # consistency_models has one order, and any noise level


def members(
    value: Any, path: Path, given: Mapping[str, Any] | None = None
) -> tuple[str, dict[str, tuple[str, Callable[[], FileNetwork]]]] | None:
    """What a file's table holds: (family, name → (kind, how to describe the network)); None = no such network.

    Args:
        value: What the file holds.
        path: The file, whose name may tell, and beside which options may lie.
        given: Options of the call; None = those beside the file.
    """
    refs = _refs(value)
    if refs is None or not is_denoiser(refs, path):
        return None
    describe = functools.partial(describe_teacher, refs, path, given)
    return CM_FAMILY if _axes(refs) == 2 else FAMILY, {"ema": ("teacher", describe)}


def is_denoiser(refs: Mapping[str, TensorRef], path: Path) -> bool:
    return all(name in refs for name in _SIGNS) and _other(refs, path) is None


def family(value: Any, path: Path) -> str | None:
    """What a file of these programs is that is no teacher, with an article; None = not theirs."""
    refs = _refs(value)
    if refs is None or not {"time_embed.0.weight", "input_blocks.0.0.weight"} <= refs.keys():
        return None
    return _other(refs, path) or "a U-Net like that of guided-diffusion, with other layers"


def _other(refs: Mapping[str, TensorRef], path: Path) -> str | None:
    """Why a network with the names of guided-diffusion is no teacher; None = it may be one."""
    channels = (*refs["input_blocks.0.0.weight"].shape, 0, 0)[1]
    if not any(name.startswith("output_blocks.") for name in refs):
        return "a classifier of guided-diffusion"
    if any(".transformer_blocks." in name for name in refs):
        return "a U-Net that is guided by text, of latent diffusion"
    if channels == 6:
        return "an upsampler of guided-diffusion, which takes a smaller image beside the noisy one"
    if channels not in (1, 3):
        return f"a U-Net for {channels} channels, of latents, not of images"
    if re.match(r"(cd|ct)_", path.name) and _axes(refs) == 2:
        return "a consistency model (by its name), a generator of few steps and not a denoiser"
    return None


def describe_teacher(refs: Mapping[str, TensorRef], path: Path, given: Mapping[str, Any] | None) -> FileNetwork:
    """Arguments and tensors of a denoiser.

    Raises:
        Refused: its names and shapes contradict each other, or what they do not tell is not said.
    """
    told = _structure(refs)
    is_cm = told["qkv_axes"] == 2
    options = _checked_options(_options(path, given), told, is_cm)
    widths = tuple(width / told["model_channels"] for width in told["widths"])
    known = dict(_KNOWN.get((told["model_channels"], widths, told["num_blocks"]), {}))
    notes = []
    if known:
        known["dropout"] = _CM_DROPOUT if is_cm else _LSUN_DROPOUT.get(path.stem, known["dropout"])
        if not (is_cm or told["scale_shift"]):
            known = {}  # not one of the published ones after all
    if is_cm and known:
        known |= _HEADS_64
        known.pop("num_heads", None)
    if {"num_heads", "num_head_channels"} & options.keys():
        known = {name: value for name, value in known.items() if name not in ("num_heads", "num_head_channels")}
    hidden = {"diffusion_steps": 1000, "rescale_timesteps": False, "dropout": 0.0, **known, **options}
    if is_cm:
        hidden = {name: value for name, value in hidden.items() if name not in _ADM_ONLY}
        del hidden["diffusion_steps"], hidden["rescale_timesteps"]
        notes.append("taken for a diffusion model; the consistency models made of it have the same names and shapes")
    _check_said(hidden, is_cm, path)
    assumed = [f"{name} {hidden[name]}" for name in hidden if name not in options]
    if assumed:
        whence = "as in the published networks of these widths" if known else "as is usual"
        notes.append(f"assumed, {whence}: {', '.join(assumed)}")
    kwargs = {**told, "img_resolution": hidden["image_size"], "dropout": float(hidden["dropout"])}
    kwargs["num_head_channels"] = None  # which has a default
    names = ("num_heads", "num_heads_upsample", "num_head_channels")
    kwargs |= {name: hidden[name] for name in names if name in hidden}
    if is_cm:
        kwargs["qkv_order"] = "thirds"
    else:
        kwargs["qkv_order"] = "thirds" if hidden["use_new_attention_order"] else "heads"
        kwargs |= {"noise_schedule": hidden["noise_schedule"], "num_steps": hidden["diffusion_steps"]}
        kwargs["rescale_timesteps"] = hidden["rescale_timesteps"]
    tensors = {f"model.{name}": ref for name, ref in refs.items()}
    return FileNetwork("adm.CMPrecond" if is_cm else "adm.ADMPrecond", kwargs, tensors, notes=notes)


# Names and shapes.


def _refs(value: Any) -> dict[str, TensorRef] | None:
    """The state dict with these names, wherever it is in the file; of several the average. None = there is none."""
    flat = flattened(value)
    found = generators(flat, _ANCHOR)
    at = found.get("G_ema", found.get("G"))
    return None if at is None else flat.under(at)


def _shape(refs: Mapping[str, TensorRef], name: str, axes: int) -> tuple[int, ...]:
    if name not in refs:
        raise Refused(f"it lacks the tensor {name}")
    shape = refs[name].shape
    if len(shape) != axes or 0 in shape:
        raise Refused(f"its {name} has shape {list(shape)}; expected {axes} axes")
    return shape


def _axes(refs: Mapping[str, TensorRef]) -> int:
    """Axes of size 1 of the attention's weights: 1 in guided-diffusion, 2 in consistency_models."""
    ref = refs.get("middle_block.1.qkv.weight")
    return 0 if ref is None else len(ref.shape) - 2


def _structure(refs: Mapping[str, TensorRef]) -> dict[str, Any]:
    """The arguments of the U-Net that names and shapes tell.

    Levels show in the decoder only, by its upsamplers: in the encoder, a residual block that halves the resolution has
    the names and shapes of any other.
    """
    model_channels = _shape(refs, "time_embed.0.weight", 2)[1]
    channels, out = _shape(refs, "input_blocks.0.0.weight", 4)[1], _shape(refs, "out.2.weight", 4)[0]
    if out not in (channels, 2 * channels):
        raise Refused(f"it gives {out} channels for images of {channels}; expected {channels}, or {2 * channels}")
    axes = _axes(refs)
    if axes not in (1, 2):
        raise Refused(f"its middle_block.1.qkv.weight has {axes + 2} axes; expected 3 or 4")
    stages = _stages(refs)
    ends = [index for index, layers in enumerate(stages) if layers[-1] in ("up", "block") and len(layers) > 1]
    levels = len(ends) + 1
    per_level, rest = divmod(len(stages), levels)
    if rest or ends != [per_level * (level + 1) - 1 for level in range(levels - 1)]:
        raise Refused("the levels of its decoder do not have equally many blocks")
    firsts = [(levels - 1 - level) * per_level for level in range(levels)]  # of each level, in the decoder
    widths = [_shape(refs, f"output_blocks.{first}.0.out_layers.0.weight", 1)[0] for first in firsts]
    embedding = _shape(refs, f"output_blocks.{firsts[0]}.0.emb_layers.1.weight", 2)[0]
    if embedding not in (widths[0], 2 * widths[0]):
        raise Refused(f"its embedding has {embedding} outputs; expected {widths[0]} or {2 * widths[0]}")
    return {
        "img_channels": channels,
        "label_dim": _shape(refs, "label_emb.weight", 2)[0] if "label_emb.weight" in refs else 0,
        "model_channels": model_channels,
        "widths": widths,
        "num_blocks": per_level - 1,
        "attention_levels": [level for level, first in enumerate(firsts) if "attention" in stages[first]],
        "learn_sigma": out == 2 * channels,
        "qkv_axes": axes,
        "scale_shift": embedding == 2 * widths[0],
        "residual_resampling": not any(name.endswith(".op.weight") for name in refs),
    }


def _stages(refs: Mapping[str, TensorRef]) -> list[list[str]]:
    """What each entry of the decoder consists of: 'block', 'attention', 'up'."""
    kinds = {"in_layers.0.weight": "block", "qkv.weight": "attention", "conv.weight": "up"}
    found: dict[tuple[int, int], str] = {}
    for name in refs:
        match = re.fullmatch(r"output_blocks\.(\d{1,4})\.(\d)\.(.+)", name)
        if match and match[3] in kinds:
            found[int(match[1]), int(match[2])] = kinds[match[3]]
    count = 1 + max(index for index, _ in found)
    if count > _MAX_STAGES:
        raise Refused(f"its decoder has {count} entries; expected at most {_MAX_STAGES}")
    stages = [[found[index, place] for place in range(3) if (index, place) in found] for index in range(count)]
    if not all(layers and layers[0] == "block" for layers in stages):
        raise Refused("an entry of its decoder does not begin with a residual block")
    return stages


# What they do not tell.


def _options(path: Path, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of the call, or those of NAME.json beside NAME.pt."""
    beside = path.with_suffix(".json")
    if given is not None or not beside.is_file():
        return dict(given or {})
    if beside.stat().st_size > _MAX_JSON_BYTES:
        raise Refused(f"{beside.name} beside it is too long")
    try:
        table = json.loads(beside.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        raise Refused(f"{beside.name} beside it is not a JSON object")
    return table


def _checked_options(options: Mapping[str, Any], told: Mapping[str, Any], is_cm: bool) -> dict[str, Any]:
    """Those options that the shapes do not tell.

    Raises:
        Refused: an unknown one, one of the wrong kind, or one that the file contradicts.
    """
    found = {
        "num_channels": told["model_channels"],
        "num_res_blocks": told["num_blocks"],
        "class_cond": told["label_dim"] > 0,
        "learn_sigma": told["learn_sigma"],
        "resblock_updown": told["residual_resampling"],
        "use_scale_shift_norm": told["scale_shift"],
    }
    hidden: dict[str, Any] = {}
    for name, value in options.items():
        if name in _HIDDEN:
            kind = _HIDDEN[name]
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise Refused(f"--teacher-kwargs: {name} is {shown(str(value)[:40])}; expected {_in_words(kind)}")
            hidden[name] = value
        elif name == "predict_xstart" and value is not False:
            raise Refused("--teacher-kwargs: predict_xstart is true; expected a network that predicts the noise")
        elif name in found and value != found[name]:
            raise Refused(f"--teacher-kwargs: {name} is {shown(str(value)[:40])}, but the file has {found[name]}")
        elif name not in found and name not in _WITHOUT_EFFECT:
            known = ", ".join(_HIDDEN)
            raise Refused(f"--teacher-kwargs: unknown {shown(str(name)[:40])}; expected some of {known}")
    for name in ("num_heads", "num_heads_upsample", "num_head_channels"):
        if hidden.get(name, 1) == -1:  # their way to say that it is not given
            del hidden[name]
        elif hidden.get(name, 1) < 1:
            raise Refused(f"--teacher-kwargs: {name} is {hidden[name]}; expected at least 1")
    if not 0 <= hidden.get("dropout", 0) < 1:
        raise Refused(f"--teacher-kwargs: dropout is {hidden['dropout']}; expected a rate in [0, 1)")
    for name in ("image_size", "diffusion_steps"):
        if hidden.get(name, 2) < 2:
            raise Refused(f"--teacher-kwargs: {name} is {hidden[name]}; expected at least 2")
    if not is_cm and hidden.get("noise_schedule", "linear") not in ("linear", "cosine"):
        found_one = shown(hidden["noise_schedule"][:40])
        raise Refused(f"--teacher-kwargs: noise_schedule is {found_one}; expected linear or cosine")
    return hidden


def _in_words(kind: Any) -> str:
    return {int: "a whole number", bool: "true or false", str: "a word"}.get(kind, "a number")


def _check_said(hidden: Mapping[str, Any], is_cm: bool, path: Path) -> None:
    """Raises Refused if something is still not known; says all of it."""
    missing = [name for name in ("image_size", *(() if is_cm else _ADM_ONLY)) if name not in hidden]
    if not {"num_heads", "num_head_channels"} & hidden.keys():
        missing.insert(1 if "image_size" in missing else 0, "num_head_channels")
    if not missing:
        return
    examples = {"image_size": 256, "num_head_channels": 64, **_LEGACY}
    example = json.dumps({name: examples[name] for name in missing})
    words = [f"{name} (or num_heads)" if name == "num_head_channels" else name for name in missing]
    raise Refused(
        f"its shapes do not tell {', '.join(words)}; say what it was trained with, as in --teacher-kwargs='{example}', "
        f"or in {path.stem}.json beside it"
    )
