"""State dicts, wherever they are in a file: bare, in tables, with prefixes, or as modules that were pickled whole.

All of them become one flat table, whose names say where a tensor was: 'state_dict.G_ema.synthesis.b4.const'. A family
is recognised by the name of one of its tensors, and what is before that name is the network's prefix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from refine.checkpoints.pickles.inert import Refused, Unknown, shown
from refine.checkpoints.pickles.tensors import Array, TensorRef

_MAX_TENSORS, _MAX_VISITED, _MAX_DEPTH = 20_000, 100_000, 16
_MAX_LIST = 8  # entries; longer lists hold numbers, not networks
_NOT_AVERAGED = {"g", "generator", "netg", "g_model", "model_g"}


@dataclass
class Flat:
    """What a file holds under names.

    Attributes:
        tensors: Every tensor, by the names of all tables and modules around it.
        modules: The attributes of modules that were pickled whole, by the same names; that of the root is ''.
    """

    tensors: dict[str, TensorRef] = field(default_factory=dict)
    modules: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def under(self, prefix: str) -> dict[str, TensorRef]:
        """The tensors behind a prefix, without it."""
        size = len(prefix)
        return {name[size:]: ref for name, ref in self.tensors.items() if name.startswith(prefix)}


def flattened(value: Any) -> Flat:
    """Every tensor of a file's value that has a name.

    Raises:
        Refused: there are too many values, or they are nested too deeply.
    """
    flat, visited = Flat(), 0

    def walk(item: Any, prefix: str, depth: int) -> None:
        nonlocal visited
        visited += 1
        if visited > _MAX_VISITED or len(flat.tensors) > _MAX_TENSORS:
            raise Refused("it holds too many values")
        item = item.ref if isinstance(item, Array) else item
        if isinstance(item, TensorRef):
            flat.tensors.setdefault(prefix.removesuffix("."), item)
        elif isinstance(item, Unknown) and item.state is not None:
            flat.modules[prefix.removesuffix(".")] = item.state
            for kind in ("_parameters", "_buffers", "_modules"):
                walk_table(item.state[kind], prefix, depth)
        else:
            walk_table(item.table if isinstance(item, Unknown) else item, prefix, depth)

    def walk_table(table: Any, prefix: str, depth: int) -> None:
        if isinstance(table, list | tuple) and len(table) <= _MAX_LIST:
            table = {str(index): part for index, part in enumerate(table)}
        if isinstance(table, dict) and depth < _MAX_DEPTH:
            for name, part in table.items():
                if isinstance(name, str):
                    walk(part, f"{prefix}{name}.", depth + 1)

    walk(value, "", 0)
    return flat


def generators(flat: Flat, anchor: str) -> dict[str, str]:
    """'G_ema' and 'G' → prefix, of the generators that have a tensor of the name `anchor`.

    Raises:
        Refused: there are several, and their names do not tell which is the average.
    """
    return by_role(name[: -len(anchor)] for name in flat.tensors if name == anchor or name.endswith(f".{anchor}"))


def by_role(prefixes: Iterable[str]) -> dict[str, str]:
    """'G_ema' and 'G' → where they are, of generators at these places, such as 'models.ema.'.

    Raises:
        Refused: there are several, and their names do not tell which is the average.
    """
    found: dict[str, list[str]] = {}
    for prefix in prefixes:
        words = {word.lower() for word in prefix.split(".")}
        averaged = any("ema" in word or word == "gs" for word in words)
        ours = "G" if words & _NOT_AVERAGED and not averaged else "G_ema" if averaged else ""
        found.setdefault(ours, []).append(prefix)
    unnamed = found.pop("", [])
    if len(unnamed) == 1 and "G_ema" not in found:
        found["G_ema"] = unnamed
    several = next((prefixes for prefixes in found.values() if len(prefixes) > 1), [])
    if several or (unnamed and not found):
        names = ", ".join(shown(prefix.removesuffix(".")) for prefix in (several or unnamed)[:4])
        raise Refused(f"it holds several generators ({names}); expected one of them under the name G_ema")
    return {name: prefixes[0] for name, prefixes in found.items()}


def without_strangers(tensors: Mapping[str, TensorRef], notes: list[str]) -> dict[str, TensorRef]:
    """The tensors that can be part of the images: without those that are in no module, such as counters.

    Args:
        tensors: Of one network, by their names in it.
        notes: Gets a line where there are some.
    """
    strangers = [name for name in tensors if "." not in name]
    if strangers:
        listed = ", ".join(shown(name) for name in strangers[:3])
        notes.append(f"left out, because a StyleGAN2 has nothing of this name: {listed}")
    return {name: ref for name, ref in tensors.items() if "." in name}


def channel_kwargs(widths: Sequence[int]) -> dict[str, Any]:
    """Arguments of `SynthesisNetwork` that make these numbers of channels, at 4×4, 8×8 and so on."""
    most = max(widths)
    below = [width * (4 << i) for i, width in enumerate(widths) if width < most]
    base = below[0] if below else max(32768, most * (2 << len(widths)))
    if all(min(base // (4 << i), most) == width for i, width in enumerate(widths)):
        return {"channel_base": base, "channel_max": most}
    return {"channels": list(widths)}


def filter_taps(shape: tuple[int, ...]) -> list[Any]:
    """A filter of the shape of a stored one, whose values will take its place."""
    if len(shape) == 2 and (shape[0] != shape[1] or shape[0] >= 8) and max(shape) <= 16:
        return [[1] * shape[1]] * shape[0]
    count = shape[0] if len(shape) in (1, 2) else 4
    return [math.comb(count - 1, i) for i in range(count)] if 1 <= count <= 16 else [1, 3, 3, 1]


def shape_of(tensors: Mapping[str, TensorRef], name: str, rank: int) -> tuple[int, ...]:
    """The shape of a tensor that must be there and have so many axes."""
    if name not in tensors:
        raise Refused(f"it lacks the tensor {name}")
    if len(tensors[name].shape) != rank:
        raise Refused(f"{name} has shape {list(tensors[name].shape)}; expected {rank} axes")
    return tensors[name].shape
