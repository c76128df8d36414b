"""Numbers that the original implementations gave, and how to read them.

`read_json(name)` and `read_arrays(name)` give a golden case; `python -m tests.golden` prints how many there are of each
family and the largest errors. Nothing in this folder is code of the originals.
"""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent
COMPARED: list[tuple[str, float]] = []  # test and error of every comparison with the functions below


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
    return noted(difference / max(expected.double().abs().max().item(), 1.0))


def array_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference in units of the largest expected magnitude, however small that is."""
    return noted(unlikeness(actual[None], expected[None]))


def sample_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The same for each sample (along the first axis) by itself; the largest of them."""
    return noted(unlikeness(actual, expected))


def unlikeness(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """`sample_error` where it is to be large: not noted."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}; expected {tuple(expected.shape)}"
    difference = (actual.detach().double() - expected.double()).abs().reshape(len(expected), -1).amax(1)
    return (difference / expected.double().abs().reshape(len(expected), -1).amax(1)).max().item()


def noted(error: float) -> float:
    COMPARED.append((os.environ.get("PYTEST_CURRENT_TEST", ""), error))
    return error
