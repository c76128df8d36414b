"""Weights of DINOv2 in the forms people have, brought to the names of the published `.pth` files.

The published file is a bare state dict of torch.save. Hugging Face's `model.safetensors` has names of its own, and
query, key and value apart. What the architecture is follows from names and shapes, which are checked before a single
weight is taken into memory. Both are read as tables of places in the file; nothing in them is run.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from refine.checkpoints.pickles.inert import Refused, shown
from refine.checkpoints.pickles.tensors import TensorRef, total_bytes
from refine.dnnlib import read_text
from refine.metrics.dinov2 import HEAD, PATCH, Architecture, VisionTransformer

#: What Hugging Face calls the weights in the folder of a model.
HF_WEIGHTS = "model.safetensors"
_HF_MODELS = ("dinov2", "dinov2_with_registers")
_HF_CONFIG = {"layer_norm_eps": 1e-6, "hidden_act": "gelu", "patch_size": PATCH, "num_channels": 3}
_MAX_JSON_BYTES = 1 << 20
_MAX_DEPTH, _MAX_WIDTH, _MAX_ROWS = 64, 4096, 1 << 16  # the largest published network has 40, 1536 and 1370
_SPARE_BYTES = 1 << 20

_PARTS = {  # of Hugging Face's names → of the published ones
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "norm1": "norm1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.weights_in": "mlp.w12",
    "mlp.weights_out": "mlp.w3",
    "attention.attention.query": "attn.qkv",
    "attention.attention.key": "attn.qkv",
    "attention.attention.value": "attn.qkv",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}
_LAYER = re.compile(r"encoder\.layer\.(\d{1,4})\.(.+)")

#: A tensor of the network as pieces in the file, one below the other.
Pieces = list[TensorRef]


def is_dinov2(names: Mapping[str, Any]) -> bool:
    """Whether the tensors of these names are those of a vision transformer, in either naming."""
    ends = ("patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight")
    return any(isinstance(name, str) and name.endswith(ends) for name in names)


def refuse_head(tensors: Mapping[str, TensorRef]) -> None:
    """Raises Refused for a linear classifier without its network, such as those beside DINOv2's published weights."""
    if set(tensors) == {"weight", "bias"} and len(tensors["weight"].shape) == 2:
        raise Refused(
            "it is one linear layer, such as DINOv2's *_linear_head.pth; expected the network, dinov2_*_pretrain.pth"
        )


def load_dinov2(tensors: Mapping[str, TensorRef], nbytes: int, heads: int | None = None) -> VisionTransformer:
    """The network of a file.

    Args:
        tensors: Name → where its numbers are, of the whole file.
        nbytes: Size of the file.
        heads: Of attention; None = one for 64 channels, as in all published networks.

    Raises:
        Refused: They are not those of a DINOv2, are not float32, not finite, or take more memory than the file is long.
    """
    named = _published_names(tensors)
    architecture = _architecture({name: _shape(pieces) for name, pieces in named.items()}, heads)
    expected = architecture.shapes()
    named.pop("mask_token", None)  # needed in training only
    _check(named, expected, architecture)
    if total_bytes(piece for pieces in named.values() for piece in pieces) > nbytes + _SPARE_BYTES:
        raise Refused("its tensors take more memory than the file is long")
    weights = {}
    for name, pieces in named.items():
        weights[name] = pieces[0].read() if len(pieces) == 1 else torch.cat([piece.read() for piece in pieces])
        if not weights[name].isfinite().all():
            raise Refused(f"its {name} holds NaN or infinity")
    return VisionTransformer(architecture, weights)


def _published_names(tensors: Mapping[str, TensorRef]) -> dict[str, Pieces]:
    """The tensors under the names of the published files; where a model of Hugging Face has `dinov2.` before its names,
    what is beside that, such as a classifier, is left out."""
    if "patch_embed.proj.weight" in tensors:
        return {name: [tensor] for name, tensor in tensors.items()}
    prefix = next((prefix for prefix in ("", "dinov2.") if f"{prefix}embeddings.cls_token" in tensors), None)
    if prefix is None:
        found = next(iter(tensors), "no tensors")
        raise Refused(f"it holds {shown(found)}; expected cls_token, pos_embed, … as in a published DINOv2, bare")
    named: dict[str, Pieces] = {}
    for name in sorted(tensors, key=_thirds):
        if name.startswith(prefix):
            named.setdefault(_published_name(name.removeprefix(prefix)), []).append(tensors[name])
    return named


def _thirds(name: str) -> int:
    """Sorts query, key and value as they lie in the published files."""
    return next((i for i, part in enumerate(("query", "key", "value")) if f"attention.{part}." in name), 0)


def _published_name(name: str) -> str:
    layer = _LAYER.fullmatch(name)
    part, leaf = (layer[2] if layer else name), ""
    if part not in _PARTS:
        part, _, leaf = part.rpartition(".")
    if part not in _PARTS or (leaf and leaf not in ("weight", "bias")):
        return name  # which is then told
    return ".".join(filter(None, [f"blocks.{layer[1]}" if layer else "", _PARTS[part], leaf]))


def _shape(pieces: Pieces) -> tuple[int, ...]:
    first = pieces[0].shape
    if len(pieces) == 1:
        return first
    return (sum(piece.shape[0] for piece in pieces), *first[1:]) if {p.shape for p in pieces} == {first} else ()


def _architecture(shapes: Mapping[str, tuple[int, ...]], heads: int | None) -> Architecture:
    """What follows from the shapes; whether all of them fit is checked later."""

    def last(name: str, rank: int) -> int:
        shape = shapes.get(name, ())
        if len(shape) != rank or 0 in shape:
            raise Refused(f"its {name} has shape {list(shape)}, not that of a DINOv2" if shape else f"it has no {name}")
        return shape[-1]

    width = last("cls_token", 3)
    last("pos_embed", 3)
    rows = shapes["pos_embed"][1]
    blocks = {int(m[1]) for m in map(re.compile(r"blocks\.(\d{1,4})\.\D.*").fullmatch, shapes) if m}
    if any(re.match(r"blocks\.\d+\.\d+\.", name) for name in shapes):
        raise Refused("its blocks are in chunks, as in training checkpoints; expected a published file")
    if width % HEAD and heads is None:
        raise Refused(f"it is {width} channels wide, which is not a multiple of {HEAD}, the width of an attention head")
    if not 0 < width <= _MAX_WIDTH or not 0 < len(blocks) <= _MAX_DEPTH or blocks != set(range(len(blocks))):
        raise Refused(f"it has {len(blocks)} blocks of {width} channels, which no DINOv2 has")
    grid = math.isqrt(rows - 1)
    if grid < 1 or grid**2 != rows - 1 or rows > _MAX_ROWS:
        raise Refused(f"its pos_embed is for {rows - 1} patches, which is no square")
    if "register_tokens" in shapes:
        last("register_tokens", 3)
    registers = shapes["register_tokens"][1] if "register_tokens" in shapes else 0
    gated = "blocks.0.mlp.w12.weight" in shapes
    return Architecture(width, len(blocks), heads or width // HEAD, grid, registers, gated)


def _check(named: Mapping[str, Pieces], expected: Mapping[str, tuple[int, ...]], architecture: Architecture) -> None:
    what = f"a DINOv2 ({architecture.name})"
    missing = [name for name in expected if name not in named and name != "mask_token"]
    extra = [name for name in named if name not in expected]
    if missing:
        raise Refused(f"it lacks {len(missing)} of {len(expected)} tensors of {what}, such as {missing[0]}")
    if extra:
        raise Refused(f"it has {len(extra)} tensors that {what} does not have, such as {shown(extra[0])}")
    for name, pieces in named.items():
        if len(pieces) != (3 if len(pieces) > 1 else 1) or _shape(pieces) != expected[name]:
            found = " and ".join(str(list(piece.shape)) for piece in pieces)
            raise Refused(f"its {name} has shape {found}; expected {list(expected[name])} in {what}")
        for piece in pieces:
            if piece.storage.dtype != torch.float32:
                found = str(piece.storage.dtype).removeprefix("torch.")
                raise Refused(f"its {name} has dtype {found}; expected float32, as in the published files")


# Folders of Hugging Face.


def find_weights(folder: Path) -> Path | None:
    """The weights of a folder that Hugging Face's tools made of a DINOv2; None = it is another folder.

    Raises:
        ValueError: They are not in one safetensors file.
    """
    config = _config(folder)
    if config is None or config.get("model_type") not in _HF_MODELS:
        return None
    if (folder / HF_WEIGHTS).is_file():
        return folder / HF_WEIGHTS
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".safetensors", ".h5"))
    held = f"has its weights in {shown(others[0])}" if others else "has no weights"
    raise ValueError(f"{folder} {held}; expected {HF_WEIGHTS}")


def check_config(weights: Path, heads: int) -> None:
    """Whether the config.json beside Hugging Face's weights, where there is one, is of the network that is computed.

    Raises:
        Refused: It is not.
    """
    config = _config(weights.parent) if weights.name == HF_WEIGHTS else None
    for key, expected in {**_HF_CONFIG, "num_attention_heads": heads}.items():
        found = (config or {}).get(key, expected)
        if found != expected:
            raise Refused(f"its config.json has the {key} {shown(str(found))}; expected {expected}")


def _config(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.json"
    try:
        table = json.loads(read_text(path, _MAX_JSON_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return table if isinstance(table, dict) else None


def title(weights: Path) -> str:
    """What a file of weights is called: by its own name, or, where that is Hugging Face's for all of them, by the model
    that the folders above are of."""
    if weights.name != HF_WEIGHTS:
        return weights.stem
    for part in reversed(weights.absolute().parent.parts[1:]):
        if part not in ("resolve", "main", "snapshots") and not re.fullmatch(r"[0-9a-f]{40}", part):
            return part.rpartition("--")[2]  # the cache calls it models--OWNER--NAME
    return weights.stem
