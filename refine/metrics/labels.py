"""Classes of images from a dataset.json, `{"labels": [["00000/img00000000.png", 6], …]}`, and its relatives."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from refine.checkpoints.pickles.inert import shown

MAX_CLASSES = 1 << 20
MAX_BYTES, BYTES_PER_IMAGE = 16 << 20, 32  # of a dataset.json
MAX_IMAGES, BYTES_PER_FURTHER_IMAGE = 500_000, 1 << 14  # in a zip file; an image's label takes 2.4 µs
_MAX_LISTS, _LISTS_PER_IMAGE = 1000, 4  # each takes a hundred bytes of memory
_TEXTS_PER_IMAGE = 4  # in a list of pairs, or a table, two or fewer


class Unusable(ValueError):
    """Labels that say no class of each image; the message is ready to follow the name of their file."""


def read_classes(text: bytes, names: Sequence[str]) -> tuple[torch.Tensor | None, list[str]]:
    """Classes of the images of these names.

    A class is a whole number, a name (classes are then numbered in the order of their names), or a vector of a one and
    zeros. The labels are a list of pairs or a table.

    Returns:
        int64 [N], from 0, or None where the file is of no labels; and the names of the classes, where they have any.

    Raises:
        Unusable: The labels are something else, or are not there for each image.
    """
    if text.count(b"[") + text.count(b"{") > _MAX_LISTS + _LISTS_PER_IMAGE * len(names):
        raise Unusable("holds many more lists than there are images")
    if text.count(b'"') > 2 * (_MAX_LISTS + _TEXTS_PER_IMAGE * len(names)):
        raise Unusable("holds many more names than there are images")
    collects = gc.isenabled()
    gc.disable()  # which would look through the growing list again and again, two thirds of the time
    try:
        table = json.loads(text, parse_int=float)  # a number of a million digits takes no time
        labels = table.get("labels") if isinstance(table, dict) else None
    except (ValueError, RecursionError):
        raise Unusable("is broken; expected a table with 'labels'") from None
    finally:
        gc.enable() if collects else None
    if not labels:
        return None, []
    try:
        by_name = dict(labels)
    except (TypeError, ValueError):
        raise Unusable("has labels that are not a list of [name, class]") from None
    found: list[Any] = list(map(by_name.get, names))
    if None in found:
        raise Unusable(f"has no class for {shown(names[found.index(None)])}; expected one for every image")
    kinds = set(map(type, found))
    if kinds == {str}:
        return _of_text(found)
    if kinds == {list}:
        return _of_vectors(found), []
    if kinds != {float}:
        raise Unusable("has labels of several kinds; expected a number, or a name, for every image")
    return _of_numbers(np.array(found), names), []


def _of_numbers(values: np.ndarray, names: Sequence[str]) -> torch.Tensor:
    wrong = ~((values >= 0) & (values < MAX_CLASSES) & (np.floor(values) == values))
    if wrong.any():
        first = int(wrong.argmax())
        value = f"{values[first]:.10g}"
        raise Unusable(
            f"has no class for {shown(names[first])}, but {value}; expected a whole number from 0, below {MAX_CLASSES}"
        )
    return torch.from_numpy(values.astype(np.int64))


def _of_text(found: list[str]) -> tuple[torch.Tensor, list[str]]:
    classes = sorted(set(found))
    if len(classes) > MAX_CLASSES:
        raise Unusable(f"has {len(classes)} names of classes; expected at most {MAX_CLASSES}")
    numbers = {name: number for number, name in enumerate(classes)}
    return torch.tensor([numbers[name] for name in found], dtype=torch.int64), classes


def _of_vectors(found: list[list]) -> torch.Tensor:
    for vector in found:
        plain = all(type(value) is float and value in (0, 1) for value in vector)
        if len(vector) != len(found[0]) or not plain or vector.count(1) != 1:
            raise Unusable("has labels that are vectors, and not of a one and zeros; expected classes")
    return torch.tensor([vector.index(1) for vector in found], dtype=torch.int64)
