"""The values of a file's pickle: inert, whatever the file does with them.

    Text      long text, its place in the file; never decoded
    Blob      bytes, their place in the file
    Stub      an allowed global
    Unknown   an object of a class that is not known here, closed

What is large stays in the file; only its place is noted. No torch.
"""

from __future__ import annotations

import codecs
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from refine.checkpoints.reading import read_at

_FEW_READS = 8


class Refused(ValueError):
    """Something in the file that has no place in a checkpoint; the message is ready to follow 'path: '."""


class Text:
    """Long text, left in the file: embedded source, or bytes written as text (protocol 2)."""

    __slots__ = ("blob", "length", "offset", "stream")

    def __init__(self, stream: BinaryIO, offset: int, length: int):
        self.stream, self.offset, self.length = stream, offset, length
        self.blob: Blob | None = None  # made by `encode_latin1`, once


class PlacedText(str):
    """Short text of a protocol 2 file, with its place, because bytes are written as text there."""

    __slots__ = ("place",)
    place: tuple[BinaryIO, int, int]  # file, offset, bytes


class Blob:
    """Bytes of a file: `length` of them from `offset`, or, where `text_length` is set, hidden in that many bytes of
    UTF-8 from `offset`, one character each."""

    __slots__ = ("decoded", "length", "offset", "reads", "storage", "stream", "text_length")

    def __init__(self, stream: BinaryIO, offset: int, length: int, text_length: int | None = None):
        self.stream, self.offset, self.length, self.text_length = stream, offset, length, text_length
        self.storage: Any = None  # what has been found in these bytes, so that they are looked at once
        self.decoded: bytes | None = None  # of text that is read often: thousands of tensors may lie in one
        self.reads = 0

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start`.

        Raises:
            Refused: the file ends before them.
        """
        if start < 0 or length < 0 or start + length > self.length:
            raise Refused("data end before they should")
        data = bytearray(length)
        self.read_into(start, memoryview(data))
        return bytes(data)

    def read_into(self, start: int, view: memoryview) -> None:
        """Fills a writable view of bytes from `start`, without a copy in between where that is possible.

        Raises:
            Refused: the file ends before them.
        """
        if start < 0 or start + len(view) > self.length:
            raise Refused("data end before they should")
        if self.text_length is None:
            if read_at(self.stream, self.offset + start, view) != len(view):
                raise Refused("the file is cut off")
            return
        with _DECODING:
            self._decode_into(start, view, self.text_length)

    def _decode_into(self, start: int, view: memoryview, text_length: int) -> None:
        self.reads += 1
        if self.decoded is None and self.reads > _FEW_READS:
            self.decoded = b"".join(latin1_chunks(self.stream, self.offset, text_length))
        if self.decoded is not None:
            view[:] = self.decoded[start : start + len(view)]
            return
        position = 0  # of the chunk among the decoded bytes
        for chunk in latin1_chunks(self.stream, self.offset, text_length):
            low, high = max(start, position), min(start + len(view), position + len(chunk))
            if low < high:
                view[low - start : high - start] = chunk[low - position : high - position]
            position += len(chunk)
            if position >= start + len(view):
                return


_DECODING = threading.Lock()  # memory stays small, and no text is decoded twice


def latin1_chunks(stream: BinaryIO, offset: int, length: int) -> Iterator[bytes]:
    """Bytes that were written as text, one character each; a piece at a time, so that memory stays small."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, length, 1 << 20):
        data = bytearray(min(length - start, 1 << 20))
        if read_at(stream, offset + start, memoryview(data)) != len(data):
            raise Refused("the file is cut off")
        try:
            yield decoder.decode(data, final=start + len(data) == length).encode("latin-1")
        except UnicodeError:
            raise Refused("it holds text where there should be bytes") from None


@dataclass(frozen=True, slots=True, eq=False)
class Stub:
    """An allowed global. Inert: the file can use it in these two ways only, and can change nothing about it.

    Attributes:
        name: 'module.name', as the file spells it.
        call: What calling it (REDUCE) with a tuple of arguments gives.
        new: What `cls.__new__(cls)` (NEWOBJ, without arguments) gives.
        cost: Opcodes that a call counts as.
        unknown: Whether it stands for a name of another program: whatever is done with it gives an `Unknown`.
    """

    name: str
    call: Callable[..., Any] | None = None
    new: Callable[[], Any] | None = None
    cost: int = 1
    unknown: bool = False


class Buildable:
    """Base of values whose state a file may set once they exist (BUILD)."""

    __slots__ = ()

    def build(self, state: Any) -> None:
        raise Refused(f"it sets the state of a {type(self).__name__}")


class Unknown(Buildable):
    """An object of a class that is not known here. What the file puts into it is dropped, but for two forms that may
    hold a network.

    Attributes:
        name: 'module.name' of the class or function that would have made it.
        table: What it keeps under names, as subclasses of dict do.
        state: The attributes of a `torch.nn.Module`; None for other objects.
    """

    __slots__ = ("name", "state", "table")

    def __init__(self, name: str):
        self.name = name
        self.table: dict[Any, Any] = {}
        self.state: dict[str, Any] | None = None

    def build(self, state: Any) -> None:
        if isinstance(state, dict) and state.keys() >= {"_parameters", "_buffers", "_modules"}:
            self.state = state


def unknown_stub(name: str) -> Stub:
    """A global of another program: its objects are `Unknown`."""
    return Stub(name, call=lambda *args: Unknown(name), new=lambda: Unknown(name), unknown=True)


class OrderedTable(dict, Buildable):
    """A dict that a file may give attributes, which are dropped (`state_dict()._metadata`)."""

    __slots__ = ()

    def build(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise Refused("it sets the state of an OrderedDict")


def shown(text: str) -> str:
    """Text from a file, fit for a message: printable, short."""
    text = "".join(char if char.isprintable() else "?" for char in text[:100])
    return text if len(text) <= 80 else text[:77] + "…"
