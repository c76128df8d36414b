"""Numbers that the original implementations gave, and how to read them.

`load(name)` returns (json, arrays) of a golden case. Nothing in this folder is code of the originals.
"""

import gzip
import json
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent


def read_json(name: str):
    """The JSON beside the arrays, `name` relative to this folder, without its suffix."""
    path = ROOT / f"{name}.json"
    return (
        json.loads(path.read_text())
        if path.is_file()
        else json.loads(gzip.decompress((ROOT / f"{name}.json.gz").read_bytes()))
    )


def read_arrays(name: str) -> dict[str, torch.Tensor]:
    """All arrays of a golden npz as tensors, in their stored dtypes."""
    with np.load(ROOT / f"{name}.npz", allow_pickle=False) as data:
        return {key: torch.from_numpy(np.ascontiguousarray(value)).reshape(value.shape) for key, value in data.items()}


def max_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference in units of the largest expected magnitude (at least 1)."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}; expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    difference = (actual.detach().double() - expected.double()).abs().max().item()
    return difference / max(expected.double().abs().max().item(), 1.0)
