"""Folders of diffusers with a `UNet2DModel`: config.json, the weights in safetensors, the scheduler's configuration.

    FOLDER/config.json, diffusion_pytorch_model.safetensors, scheduler_config.json          the oldest pipelines, or
    FOLDER/unet/{config.json, diffusion_pytorch_model.safetensors}, FOLDER/scheduler/scheduler_config.json

The path of such a folder stands for its weights, a file like any other: checked, hashed, opened. Weights in `.bin`,
which are pickles, are never loaded. Nothing here imports diffusers.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refine.dnnlib import read_text

WEIGHTS = "diffusion_pytorch_model"
CLASS = "UNet2DModel"
_MAX_JSON_BYTES = 1 << 20
_PREDICTIONS = ("epsilon", "v_prediction", "sample")
_LATENT = ("vae", "vqvae", "text_encoder", "bert", "movq")  # parts of pipelines whose U-Net sees no images


def find_weights(folder: str | os.PathLike) -> Path:
    """The weights file that a folder of diffusers stands for.

    Raises:
        ValueError: it is not such a folder, or its weights are not in one safetensors file.
    """
    folder = Path(folder)
    place = folder / "unet" if (folder / "unet" / "config.json").is_file() else folder
    if not (place / "config.json").is_file():
        raise ValueError(f"{folder} is a folder; expected a file, or a folder of diffusers (with config.json)")
    found = sorted(place.glob(f"{WEIGHTS}*.safetensors"))
    whole = [path for path in found if not re.search(r"-\d{5}-of-\d{5}\.", path.name)]
    if whole:
        return min(whole, key=lambda path: len(path.name))  # the plain one before its variants (.fp16, .non_ema)
    if found:
        raise ValueError(f"{place} has its weights in {len(found)} parts; expected them in {WEIGHTS}.safetensors")
    others = [path.name for path in (*place.glob(f"{WEIGHTS}*.bin"), *place.glob(f"{WEIGHTS}*.msgpack"))]
    held = f"has its weights in {others[0]}, which is never loaded" if others else "has no weights"
    raise ValueError(f"{place} {held}; expected {WEIGHTS}.safetensors")


def describe(weights: Path) -> dict[str, Any] | None:
    """Constructor arguments of a `ddpm.DDPMPrecond` for a weights file; None = it is in no folder of diffusers.

    Raises:
        ValueError: the folder holds another model or scheduler; says which, without the path.
    """
    if not (weights.parent / "config.json").is_file() or not weights.name.startswith(WEIGHTS):
        return None
    config = _read(weights.parent / "config.json")
    if config.get("_class_name") != CLASS:
        found = str(config.get("_class_name"))[:60]
        raise ValueError(f"it is a {found} of diffusers; expected a {CLASS} for images")
    _check_pipeline(weights.parent)
    unet = {name: value for name, value in config.items() if not name.startswith("_")}
    size, channels = unet.pop("sample_size", None), unet.pop("in_channels", 3)
    size = size[0] if isinstance(size, list) and len(size) == 2 and size[0] == size[1] else size
    if type(size) is not int:
        raise ValueError(f"its config.json has the sample_size {str(size)[:40]}; expected the side of square images")
    classes = unet.pop("num_class_embeds", None) or 0
    if unet.get("class_embed_type") is not None:
        raise ValueError(f"its class_embed_type is {str(unet['class_embed_type'])[:40]}; expected none")
    if unet.get("time_embedding_type", "positional") != "positional":
        kind = str(unet["time_embedding_type"])[:40]
        raise ValueError(f"its time_embedding_type is {kind}; expected positional, that of discrete time steps")
    schedule = _schedule(weights.parent)
    if importlib.util.find_spec("diffusers") is None:
        raise ValueError("it needs the package diffusers, which is missing: pip install 'gan-refine[diffusers]'")
    return {"img_resolution": size, "img_channels": channels, "label_dim": classes, **schedule, **unet}


def our_name(name: str) -> str:
    """The name in a `ddpm.DDPMPrecond` of a tensor of the weights file, also of one from before diffusers 0.15."""
    if ".attentions." in name:
        name = re.sub(r"\.(query|key|value)\.", lambda m: f".to_{m[1][0]}.", name).replace(".proj_attn.", ".to_out.0.")
    return f"unet.{name}"


def _check_pipeline(place: Path) -> None:
    for folder in (place, place.parent if place.name == "unet" else place):
        if (folder / "model_index.json").is_file():
            parts = _read(folder / "model_index.json")
            latent = [name for name in _LATENT if isinstance(parts.get(name), list) and parts[name][0] is not None]
            if latent:
                raise ValueError(f"it is part of a pipeline of latents (with a {latent[0]}); expected one of images")


def _schedule(place: Path) -> dict[str, Any]:
    """The arguments that say which noise levels there are, and what is predicted."""
    name = "scheduler_config.json"
    places = [place / name, place / "scheduler" / name, place.parent / "scheduler" / name]
    path = next((path for path in places if path.is_file()), None)
    if path is None:
        raise ValueError(f"it has no {name} beside it, which tells its noise levels")
    config = _read(path)
    kind = str(config.get("_class_name", "scheduler"))[:60]
    if "beta_schedule" not in config or config.get("use_flow_sigmas"):
        raise ValueError(f"its scheduler is a {kind}; expected one with a beta_schedule, such as DDPMScheduler")
    if config.get("rescale_betas_zero_snr"):
        raise ValueError("its scheduler has rescale_betas_zero_snr, an infinite noise level; expected finite ones")
    prediction = config.get("prediction_type") or "epsilon"
    if prediction not in _PREDICTIONS:
        raise ValueError(f"it predicts {str(prediction)[:40]!r}; expected one of {', '.join(_PREDICTIONS)}")
    names = {"beta_schedule": "beta_schedule", "beta_start": "beta_start", "beta_end": "beta_end"}
    names |= {"num_train_timesteps": "num_steps", "trained_betas": "trained_betas"}
    given = {ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None}
    for ours in ("beta_start", "beta_end", "num_steps"):
        if ours in given and (isinstance(given[ours], bool) or not isinstance(given[ours], int | float)):
            raise ValueError(f"its scheduler has {ours} {str(given[ours])[:40]!r}; expected a number")
    return {"prediction_type": prediction, **given}


def _read(path: Path) -> Mapping[str, Any]:
    try:
        table = json.loads(read_text(path, _MAX_JSON_BYTES))
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        raise ValueError(f"its {path.name} is not a JSON object of a configuration")
    return table
