"""Classes of images from a dataset.json, `{"labels": [["00000/img00000000.png", 6], …]}`, and its relatives."""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from refine.checkpoints.pickles.inert import shown

MAX_CLASSES = 1 << 20
MAX_BYTES, BYTES_PER_IMAGE = 16 << 20, 32  # of a dataset.json
_MAX_LISTS, _LISTS_PER_IMAGE = 1000, 4  # each takes a hundred bytes of memory
_TEXTS_PER_IMAGE = 4  # in a list of pairs, or a table, two or fewer
_MAX_VALUES, _VALUES_PER_IMAGE = 6_000_000, 5  # of any kind; a pair has four, and each takes a tenth of a microsecond


class Unusable(ValueError):
    """Labels that say no class of each image; the message is ready to follow the name of their file."""


def read_classes(text: bytes, names: list[str], most: float) -> tuple[torch.Tensor | None, list[str]]:
    """Classes of the images of these names.

    A class is a whole number, a name (classes are then numbered in the order of their names), or a vector of a one and
    zeros. The labels are a list of pairs or a table.

    Args:
        text: JSON.
        names: Of the images.
        most: There may be as many of them where the labels are not in their order; each takes 2.4 µs.

    Returns:
        int64 [N], from 0, or None where the file is of no labels; and the names of the classes, where they have any.

    Raises:
        Unusable: The labels are something else, or are not there for each image.
    """
    if (numbers := _in_order(text, names)) is not None:
        return _of_numbers(numbers, names), []
    if len(names) > most and len(text) > len(names):
        raise Unusable(
            f"is of {len(names)} images, and not one list of [name, number] in their order; expected that, at most "
            f"{most} in a zip file of that size, or a folder"
        )
    if text.count(b"[") + text.count(b"{") > _MAX_LISTS + _LISTS_PER_IMAGE * len(names):
        raise Unusable("holds many more lists than there are images")
    if text.count(b'"') > 2 * (_MAX_LISTS + _TEXTS_PER_IMAGE * len(names)):
        raise Unusable("holds many more names than there are images")
    values = text.count(b",") + text.count(b"[") + text.count(b'"') // 2
    if values > max(_MAX_VALUES, _VALUES_PER_IMAGE * len(names)):
        raise Unusable("holds many more values than there are images")
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


def _in_order(text: bytes, names: list[str]) -> np.ndarray | None:
    """Numbers as data set tools write them, `{"labels": [["a.png", 6], ["b.png", 3]]}`, in the order of the images.

    They take a fifth of the time of any other JSON; None if the text is not just that.
    """
    if text.count(b'"') != 2 * len(names) + 2 or b"\\" in text:
        return None
    parts = text.strip().split(b'"')
    if parts[:2] != [b"{", b"labels"]:
        return None
    if b'"'.join(parts[3::2]) != '"'.join(names).encode("utf-8", "surrogateescape"):
        return None
    between = b'"'.join(parts[2::2])
    for begin, comma in ((b': [["', b", "), (b':[["', b",")):
        numbers = between.removeprefix(begin + comma).replace(b"]" + comma + b'["' + comma, b";")
        if numbers.translate(None, b"0123456789") == b";" * (len(names) - 1) + b"]]}":
            with contextlib.suppress(ValueError):  # of two semicolons in a row
                return np.array(list(map(float, numbers.removesuffix(b"]]}").split(b";"))))
    return None


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
