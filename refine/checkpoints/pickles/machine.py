"""Reads a pickle without running it: a machine of its own for the few opcodes and globals that checkpoints need.

A pickle is a program; Python's unpickler runs it. This one never does. Its globals are the `Stub`s of an allow-list,
which build nothing but the inert values below; whatever else a file names ends the reading, or, where the machine is
lenient and the name harmless (`names.py`), becomes a closed box. What is large (tensor bytes, embedded source text)
stays in the file: the machine notes where it lies and steps over it.

Values: None, bool, int, float, str, list, tuple, set, dict (with str or int keys), those of `inert.py`, and what the
stubs make, see `tensors.py` and the readers.

Limits (opcodes, text, memo, keys) bound time and memory by the file's size; nothing here recurses. A call may copy what
it is given, so each item given counts as an opcode. Numbers as keys are few: a file can choose thousands that land in
one place of a table, where each is compared with all. No torch.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from refine.checkpoints.pickles import old
from refine.checkpoints.pickles.inert import (
    Blob,
    Buildable,
    OrderedTable,
    PlacedText,
    Refused,
    Stub,
    Text,
    Unknown,
    latin1_chunks,
    shown,
    unknown_stub,
)
from refine.checkpoints.pickles.names import is_harmless

MAX_OPCODES = 300_000  # EDM of CIFAR-10 size has 41,000, three StyleGAN2 networks 17,000
MAX_TEXT = 200  # bytes; longer text stays in the file. The smallest storage written as text (protocol 2) is longer.
MAX_NUMBER_KEYS = 4096  # in tables and sets, together; optimisers number the parameters of one network
_MAX_NAME = 200
_CUT_OFF = "the pickle is cut off; expected a whole one (a download or copy that broke off?)"
_KEY_TYPES, _TEXT = (str, int), {str, PlacedText}
_COPIED = (list, tuple, set, dict)  # whose items a call may copy


class Machine:
    """Runs one pickle.

    Args:
        stream: Binary stream, seekable, at the first byte of the pickle.
        size: Number of bytes in the whole stream.
        rules: Allowed globals by 'module.name'.
        persistent_load: Takes what BINPERSID finds on the stack; None = persistent ids are refused.
        budget: Opcodes that may be run. None = `MAX_OPCODES`.
        lenient: Read past what is not needed: objects of other programs become `Unknown`, and what is kept under other
            keys than text and whole numbers is dropped.
        harmless: Which names, by module and name, those may have.

    Attributes:
        protocol: As declared by the file.
        framed: Whether the file is divided into frames (protocol 4), so that lengths cannot be changed.
        globals: Every global named so far, in order.
        copied: Items given to calls so far, and what the calls themselves count as.
        numbers: Numbers taken as keys so far.
    """

    def __init__(
        self,
        stream: BinaryIO,
        size: int,
        rules: Mapping[str, Stub],
        persistent_load: Callable[[Any], Any] | None = None,
        budget: int | None = None,
        lenient: bool = False,
        harmless: Callable[[str, str], bool] = is_harmless,
    ):
        self.stream, self.size, self.rules, self.persistent_load = stream, size, rules, persistent_load
        self.read, self.text_is_bytes = stream.read, "_codecs.encode" in rules
        self.lenient, self.harmless, self.unknown = lenient, harmless, dict[str, Stub]()
        self.budget = MAX_OPCODES if budget is None else budget
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.globals: dict[str, None] = {}
        self.protocol, self.framed = 1, False  # of files that declare none
        self.copied = self.numbers = 0

    def load(self) -> Any:
        """The value of the pickle; the stream is left behind it, where the next one may begin.

        Raises:
            Refused: the file is broken, or holds what is not allowed. Nothing of it has been run.
        """
        read, memo, operation_of = self.read, self.memo, _DISPATCH.get
        try:
            for _ in range(self.budget):
                code = read(1)
                if code == b"h":  # half of all opcodes are one of these two
                    self.stack.append(memo[read(1)[0]])
                elif code == b"\x94":
                    memo[len(memo)] = self.stack[-1]
                elif (operation := operation_of(code)) is not None:
                    operation(self)
                elif code == b".":
                    return self.stack.pop()
                else:
                    raise self._unknown(code)
        except Refused:
            raise
        except (IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError, struct.error):
            raise self._broken() from None
        raise Refused(f"the pickle has more than {self.budget:,} opcodes")

    def _broken(self) -> Refused:
        where = self.stream.tell()
        return Refused(f"the pickle is broken at byte {where}" if self.read(1) else _CUT_OFF)

    def _unknown(self, code: bytes) -> Refused:
        if not code:
            return Refused(_CUT_OFF)
        where = f"at byte {self.stream.tell() - 1}"
        return Refused(f"the pickle holds the opcode 0x{code.hex()} {where}, which no checkpoint needs, or is broken")

    # Reading. `read` may give less at the end of the file, where there is no opcode either.

    def take(self, length: int) -> bytes:
        data = self.read(length) if length <= self.size else b""
        if len(data) != length:
            raise Refused(_CUT_OFF)
        return data

    def skip(self, length: int) -> int:
        """Steps over `length` bytes; returns where they begin."""
        start = self.stream.tell()
        if length > self.size - start:
            raise Refused(_CUT_OFF)
        self.stream.seek(start + length)
        return start

    def push_text(self, length: int) -> None:
        if length > MAX_TEXT:
            self.stack.append(Text(self.stream, self.skip(length), length))
        elif self.protocol > 2 or not self.text_is_bytes:
            self.stack.append(self.take(length).decode())
        else:
            start = self.stream.tell()
            text = PlacedText(self.take(length).decode())
            text.place = (self.stream, start, length)
            self.stack.append(text)

    def push_blob(self, length: int) -> None:
        self.stack.append(Blob(self.stream, self.skip(length), length))

    # Building.

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def find(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise Refused("it names a global by something that is not text")
        full = f"{module}.{name}"
        self.globals[full] = None
        stub = self.rules.get(full) or self.unknown.get(full)
        if stub is None and self.protocol < 2:
            stub = old.RULES.get(full)
        if stub is None:
            if not (self.lenient and self.harmless(module, name)):
                raise Refused(f"it names {shown(full)}, which has no place in such a file; nothing of it was run")
            stub = self.unknown[full] = unknown_stub(full)
        self.stack.append(stub)

    def reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Stub) or function.call is None:
            raise Refused(f"it calls {_what(function)}, which no checkpoint does")
        if not isinstance(args, tuple):
            raise Refused(f"it calls {function.name} with something that is no tuple")
        self.copied += function.cost + len(args)
        for arg in args:
            if isinstance(arg, _COPIED):
                self.copied += len(arg)
        if self.copied > self.budget:
            raise Refused(f"its calls copy more than {self.budget:,} values")
        if function.call is make_set and args:
            if self.lenient and isinstance(args[0], list | tuple):
                args = ([item for item in args[0] if isinstance(item, _KEY_TYPES)],)
            self.check_keys(args[0], "a set")
        try:
            self.stack.append(function.call(*args))
        except TypeError:
            raise Refused(f"it calls {function.name} with {len(args)} arguments of other types than usual") from None

    def new(self) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        if not isinstance(cls, Stub) or cls.new is None or (not cls.unknown and args != ()):
            raise Refused(f"it makes an object of {_what(cls)}, which no checkpoint does")
        self.stack.append(cls.new())

    def new_with_names(self) -> None:
        _, args, cls = self.stack.pop(), self.stack.pop(), self.stack.pop()
        if not isinstance(cls, Stub) or not cls.unknown:
            raise Refused(f"it makes an object of {_what(cls)} in an unusual way")
        self.stack += [cls, args]
        self.new()

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, Buildable):
            raise Refused(f"it sets the state of {_what(target)}")
        target.build(state)

    def set_items(self, items: list[Any]) -> None:
        table = self.stack[-1].table if isinstance(self.stack[-1], Unknown) else self.stack[-1]
        if not isinstance(table, dict) or len(items) % 2:
            raise Refused(f"it sets items of {_what(table)}")
        pairs = list(zip(items[::2], items[1::2], strict=True))
        if not _TEXT.issuperset(map(type, items[::2])):
            if self.lenient:
                pairs = [(key, value) for key, value in pairs if isinstance(key, _KEY_TYPES)]
            self.check_keys([key for key, _ in pairs], "a dict")
        table.update(pairs)

    def append_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Unknown):
            return
        if type(target) is not list:
            raise Refused(f"it appends to {_what(target)}")
        target.extend(items)

    def add_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Unknown):
            return
        if type(target) is not set:
            raise Refused(f"it adds items to {_what(target)}")
        if self.lenient:
            items = [item for item in items if isinstance(item, _KEY_TYPES)]
        self.check_keys(items, "a set")
        target.update(items)

    def check_keys(self, keys: Any, where: str) -> None:
        """Raises Refused for what could be slow or dangerous to hash."""
        if not isinstance(keys, list | tuple):
            raise Refused(f"it makes {where} of {_what(keys)}")
        for key in keys:
            if isinstance(key, int):
                self.numbers += 1
            elif not isinstance(key, str):
                raise Refused(f"it has {where} with {_what(key)} as a key")
        if self.numbers > MAX_NUMBER_KEYS:
            raise Refused(f"it has more than {MAX_NUMBER_KEYS:,} numbers as keys")

    def persistent(self) -> None:
        if self.persistent_load is None:
            raise Refused("it refers to something outside of the file (a persistent id)")
        self.stack.append(self.persistent_load(self.stack.pop()))


def _what(value: Any) -> str:
    return shown(value.name) if isinstance(value, Stub | Unknown) else f"a {type(value).__name__}"


def encode_latin1(text: Any, encoding: Any) -> Blob:
    """`_codecs.encode(text, 'latin1')`, the way in which protocol 2 writes bytes."""
    if encoding != "latin1" or not isinstance(text, PlacedText | Text):
        raise Refused("it calls _codecs.encode on something that is not text that stands for bytes")
    if isinstance(text, PlacedText):
        stream, offset, length = text.place
        return Blob(stream, offset, len(str(text).encode("latin-1")), text_length=length)
    if text.blob is None:  # decoded once, to know the number of bytes; a file cannot make us do it again
        length = sum(len(chunk) for chunk in latin1_chunks(text.stream, text.offset, text.length))
        text.blob = Blob(text.stream, text.offset, length, text_length=text.length)
    return text.blob


def make_set(items: Any = ()) -> set:
    """`set(items)` as protocols 2 and 3 write it; the machine has looked at the items."""
    return set(items)


def make_ordered(*args: Any) -> OrderedTable:
    """`OrderedDict()`, filled afterwards."""
    if args:
        raise Refused("it calls OrderedDict with arguments")
    return OrderedTable()


def _rules(*stubs: Stub) -> dict[str, Stub]:
    return {stub.name: stub for stub in stubs}


COMMON_RULES = _rules(
    Stub("collections.OrderedDict", call=make_ordered, new=OrderedTable),
    Stub("builtins.set", call=make_set),
    Stub("__builtin__.set", call=make_set),
    Stub("_codecs.encode", call=encode_latin1),
)


# The opcodes: every one that the picklers of protocols 2 to 5 write for plain data, and no other but those of `old`.


def _proto(m: Machine) -> None:
    m.protocol = m.take(1)[0]
    if not 2 <= m.protocol <= 5:
        raise Refused(f"the pickle has protocol {m.protocol}; expected 2 to 5")


def _frame(m: Machine) -> None:
    if int.from_bytes(m.take(8), "little") > m.size - m.stream.tell():
        raise Refused(_CUT_OFF)
    m.framed = True


def _length(size: int, then: Callable[[Machine, int], None]) -> Callable[[Machine], None]:
    def operation(m: Machine) -> None:
        then(m, int.from_bytes(m.read(size), "little"))

    return operation


def _byte(m: Machine) -> None:
    m.stack.append(m.read(1)[0])


def _integer(size: int, signed: bool) -> Callable[[Machine], None]:
    def operation(m: Machine) -> None:
        m.stack.append(int.from_bytes(m.read(size), "little", signed=signed))

    return operation


def _long(m: Machine, length: int) -> None:
    if length > 64:
        raise Refused("it holds an integer of more than 64 bytes")
    m.stack.append(int.from_bytes(m.take(length), "little", signed=True))


def _constant(value: Any) -> Callable[[Machine], None]:
    def operation(m: Machine) -> None:
        m.stack.append(value)

    return operation


def _empty(kind: Callable[[], Any]) -> Callable[[Machine], None]:
    def operation(m: Machine) -> None:
        m.stack.append(kind())

    return operation


def _tuple(size: int) -> Callable[[Machine], None]:
    def operation(m: Machine) -> None:
        items = m.stack[-size:]
        if len(items) != size:
            raise IndexError
        m.stack[-size:] = [tuple(items)]

    return operation


def _marked(then: Callable[[Machine, list], None]) -> Callable[[Machine], None]:
    def operation(m: Machine) -> None:
        then(m, m.pop_mark())

    return operation


def _append(m: Machine) -> None:
    m.append_items([m.stack.pop()])


def _set_item(m: Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    m.set_items([key, value])


def _mark(m: Machine) -> None:
    m.marks.append(m.stack)
    m.stack = []


def _put(m: Machine) -> None:
    m.memo[m.read(1)[0]] = m.stack[-1]


def _get(m: Machine) -> None:
    m.stack.append(m.memo[m.read(1)[0]])


def _put_far(m: Machine, index: int) -> None:
    m.memo[index] = m.stack[-1]


def _get_far(m: Machine, index: int) -> None:
    m.stack.append(m.memo[index])


def _memoize(m: Machine) -> None:
    m.memo[len(m.memo)] = m.stack[-1]


def _float(m: Machine) -> None:
    m.stack.append(struct.unpack(">d", m.take(8))[0])


def _global(m: Machine) -> None:
    module, name = m.stream.readline(_MAX_NAME), m.stream.readline(_MAX_NAME)
    if not (module.endswith(b"\n") and name.endswith(b"\n")):
        raise Refused("it names a global that is cut off or too long")
    m.find(module[:-1].decode(), name[:-1].decode())


def _stack_global(m: Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    m.find(module, name)


def _push_marked_tuple(m: Machine, items: list) -> None:
    m.stack.append(tuple(items))


def _push_marked_list(m: Machine, items: list) -> None:
    m.stack.append(items)


def _push_marked_frozenset(m: Machine, items: list) -> None:
    if m.lenient:
        items = [item for item in items if isinstance(item, _KEY_TYPES)]
    m.check_keys(items, "a set")
    m.stack.append(make_set(items))


def _only_old(operation: Callable[[Machine], None]) -> Callable[[Machine], None]:
    def checked(m: Machine) -> None:
        if m.protocol > 1:
            raise Refused("the pickle holds an opcode of an older protocol, or is broken")
        operation(m)

    return checked


_DISPATCH: dict[bytes, Callable[[Machine], object]] = {
    b"\x80": _proto,
    b"\x95": _frame,
    b"N": _constant(None),
    b"\x88": _constant(True),
    b"\x89": _constant(False),
    b"J": _integer(4, signed=True),
    b"K": _byte,
    b"M": _integer(2, signed=False),
    b"\x8a": _length(1, _long),
    b"\x8b": _length(4, _long),
    b"G": _float,
    b"X": _length(4, Machine.push_text),
    b"\x8c": _length(1, Machine.push_text),
    b"\x8d": _length(8, Machine.push_text),
    b"C": _length(1, Machine.push_blob),
    b"B": _length(4, Machine.push_blob),
    b"\x8e": _length(8, Machine.push_blob),
    b"\x96": _length(8, Machine.push_blob),
    b"(": _mark,
    b"0": lambda m: (m.stack or m.marks).pop(),
    b"1": lambda m: m.pop_mark(),
    b"]": _empty(list),
    b"}": _empty(dict),
    b"\x8f": _empty(set),
    b")": _constant(()),
    b"\x85": _tuple(1),
    b"\x86": _tuple(2),
    b"\x87": _tuple(3),
    b"t": _marked(_push_marked_tuple),
    b"l": _marked(_push_marked_list),
    b"\x91": _marked(_push_marked_frozenset),
    b"a": _append,
    b"e": _marked(Machine.append_items),
    b"s": _set_item,
    b"u": _marked(Machine.set_items),
    b"\x90": _marked(Machine.add_items),
    b"q": _put,
    b"r": _length(4, _put_far),
    b"\x94": _memoize,
    b"h": _get,
    b"j": _length(4, _get_far),
    b"c": _global,
    b"\x93": _stack_global,
    b"R": Machine.reduce,
    b"\x81": Machine.new,
    b"\x92": Machine.new_with_names,
    b"b": Machine.build,
    b"Q": Machine.persistent,
    **{code: _only_old(operation) for code, operation in old.OPCODES.items()},
}
