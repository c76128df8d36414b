"""What pickles of protocols 0 and 1 have that later ones do not: numbers and text as lines, and another way to make
objects. Each opcode is a function of the machine that runs it; in a file that declares a later protocol none of them
has a place.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from refine.checkpoints.pickles.inert import PlacedText, Refused, Stub, Text, unknown_stub

_MAX_LINE = 200  # bytes of a number, or of text that is no embedded source
_MAX_FILE = 256 << 20  # bytes of a file whose lines of text are kept in memory
_BASES = ("object", "dict")


def _line(m: Any, most: int = _MAX_LINE) -> bytes:
    line = m.stream.readline(most)
    if not line.endswith(b"\n"):
        raise Refused("the pickle is cut off, or holds a number that is too long")
    return line[:-1]


def _number(m: Any) -> None:
    line = _line(m)
    m.stack.append(line == b"01" if line in (b"00", b"01") else int(line))


def _long(m: Any) -> None:
    m.stack.append(int(_line(m).removesuffix(b"L")))


def _float(m: Any) -> None:
    m.stack.append(float(_line(m)))


def _text(m: Any) -> None:
    """Text, or bytes that were written as text: kept in memory, since the line spells them in a way of its own."""
    m.protocol = 0
    if m.size > _MAX_FILE:
        raise Refused(f"it is a pickle of protocol 0 of more than {_MAX_FILE >> 20} MiB")
    text = _line(m, m.size + 1).decode("raw-unicode-escape")
    data = text.encode("utf-8")
    if len(data) > _MAX_LINE:
        m.stack.append(Text(io.BytesIO(data), 0, len(data)))
        return
    placed = PlacedText(text)
    placed.place = (io.BytesIO(data), 0, len(data))
    m.stack.append(placed)


def _index(m: Any) -> int:
    index = int(_line(m))
    if not 0 <= index < 1 << 32:
        raise Refused("the pickle numbers a value in an impossible way")
    return index


def _put(m: Any) -> None:
    m.memo[_index(m)] = m.stack[-1]


def _get(m: Any) -> None:
    m.stack.append(m.memo[_index(m)])


def _dict(m: Any) -> None:
    items = m.pop_mark()
    m.stack.append({})
    m.set_items(items)


def reconstruct(cls: Any, base: Any, state: Any) -> Any:
    """`copyreg._reconstructor`: an object of a class, or of one that is derived from dict, with its items."""
    known = isinstance(cls, Stub) and cls.new is not None and isinstance(base, Stub)
    name = base.name.rpartition(".")[2] if known else None
    if name not in _BASES or (state is not None) != (name == "dict"):
        raise Refused("it makes an object in an unusual way")
    made = cls.new()
    if name == "dict":
        table = getattr(made, "table", made)
        if not isinstance(state, dict) or not isinstance(table, dict):
            raise Refused("it makes an object in an unusual way")
        table.update(state)
    return made


OPCODES: dict[bytes, Callable[[Any], None]] = {
    b"I": _number,
    b"L": _long,
    b"F": _float,
    b"V": _text,
    b"p": _put,
    b"g": _get,
    b"d": _dict,
}
_OLD_COPYREG = ("copyreg._reconstructor", "copy_reg._reconstructor")
_OLD_BASES = tuple(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in _BASES)
RULES = {name: Stub(name, call=reconstruct) for name in _OLD_COPYREG} | {
    name: unknown_stub(name) for name in _OLD_BASES
}
