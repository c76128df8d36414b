"""Whether two networks compute the same with the same tensors, however their constructor arguments were written."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

# How numbers are formatted, and what only training looks at.
_OF_NO_CONSEQUENCE = {"training", "use_fp16", "use_bf16", "w_avg_beta", "dropout", "label_dropout", "notes"}
_OF_NO_CONSEQUENCE |= {"magnitude_ema_beta"}


def difference(ours: nn.Module, theirs: nn.Module) -> tuple[str, Any, Any] | None:
    """The first attribute in which two networks differ: its name, ours, theirs; None = there is none.

    Defaults that one of them had written out make no difference, nor do number formats and options of training.
    Tensors are not looked at.
    """
    first, second = dict(ours.named_modules()), dict(theirs.named_modules())
    for path in [*first, *(path for path in second if path not in first)]:
        if path not in first or path not in second:
            return path, "there" if path in first else "missing", "there" if path in second else "missing"
        one, two = _attributes(first[path]), _attributes(second[path])
        for name in [*one, *(name for name in two if name not in one)]:
            a, b = one.get(name), two.get(name)
            if not _same(a, b):
                return f"{path}.{name}".removeprefix("."), a, b
    return None


def _attributes(module: nn.Module) -> dict[str, Any]:
    plain = (bool, int, float, str, type(None), list, tuple)
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in _OF_NO_CONSEQUENCE and isinstance(value, plain)
    }


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-12)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return (type(a) is type(b) and a == b) or (isinstance(a, int | float) and isinstance(b, int | float) and a == b)
