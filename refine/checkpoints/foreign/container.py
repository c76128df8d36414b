"""Checkpoints of other programs, opened: which networks are in them, and the way in and out of each.

`opening.open_container` recognises the format; the readers (`nvidia`, `tensorflow`, `rosinality`, `adm`, `state_dicts`)
say which of the file's tensors is which of ours. A `FileNetwork` is such a table; the numbers stay in the file until
the network is built, or are replaced there when a refined one is given back.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import torch

from refine import dnnlib
from refine.checkpoints import registry
from refine.checkpoints.foreign.alike import difference
from refine.checkpoints.pickles.inert import Refused
from refine.checkpoints.pickles.tensors import TensorRef, read_all, total_bytes

Members: TypeAlias = "dict[str, tuple[str, Callable[[], FileNetwork]]]"  # name → kind, and how to describe the network
MAX_VALUES = 4000  # numbers, texts and tables in the arguments of one network
_SPARE_BYTES = 1 << 20  # tensors of a network may take so much more memory than the file is long


@dataclass
class FileNetwork:
    """One network of a file, described but not read.

    Attributes:
        class_name: Key of `registry.NETWORK_CLASSES`.
        init_kwargs: Constructor arguments, plain values.
        tensors: Name in the state_dict → where its numbers are.
        computed: Names that the file does not hold: the constructor computes them (filters), or they are drawn (noise).
        finish: What is left to do once the network is built; None = nothing.
        attributes: Numbers to set on the network once it is built.
        notes: What a person should know about this reading.
    """

    class_name: str
    init_kwargs: dict[str, Any]
    tensors: dict[str, TensorRef]
    computed: Callable[[str], bool] = lambda name: False
    finish: Callable[[torch.nn.Module], None] | None = None
    attributes: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def build(self, limit: int) -> torch.nn.Module:
        """The network: CPU, every tensor of its own read from the file, strictly by name and shape, as float32; or as
        the file's float16, where the network `keeps_halves`.

        Args:
            limit: Bytes that its tensors may take.

        Raises:
            Refused: names, shapes or dtypes are not those of the class, or too much memory is asked for.
            ValueError: the class cannot be built from these arguments.
        """
        network, expected = self._outlined(limit)
        rng = torch.Generator().manual_seed(0)
        state = dict(zip(self.tensors, read_all(list(self.tensors.values()), network.keeps_halves), strict=True))
        for name, made in expected.items():
            if name.endswith("noise_const") and name not in state:  # that a file lacks: the same at every loading
                state[name] = torch.randn(made.shape, generator=rng)
        registry.fill(network, state)
        for name, value in self.attributes.items():
            setattr(network, name, value)
        network.notes = tuple(self.notes)
        if self.finish is not None:
            self.finish(network)
        network.notes = tuple(self.notes)
        return network

    def outline(self, limit: int) -> torch.nn.Module:
        """The network without its numbers, of which none is read; the same checks and faults as those of `build`."""
        return self._outlined(limit)[0]

    def _outlined(self, limit: int) -> tuple[Any, dict[str, torch.Tensor]]:
        """The network without its numbers, and its state_dict."""
        held = len(self.tensors), sum(ref.numel for ref in self.tensors.values())
        network = registry.build_empty(self.class_name, self.init_kwargs, held)
        expected = network.state_dict(keep_vars=True)
        self._check(expected, limit)
        return network, expected

    def _check(self, expected: Mapping[str, torch.Tensor], limit: int) -> None:
        missing = [name for name in expected if name not in self.tensors and not self.computed(name)]
        extra = [name for name in self.tensors if name not in expected]
        if missing:
            count = f"{len(missing)} of {len(expected)}"
            raise Refused(f"it lacks {count} tensors of a {self._class()}, such as {missing[0]}")
        if extra:
            raise Refused(f"it has {len(extra)} tensors that a {self._class()} does not have, such as {extra[0][:80]}")
        for name, ref in self.tensors.items():
            if ref.shape != tuple(expected[name].shape):
                shape = list(expected[name].shape)
                raise Refused(f"{name} has shape {list(ref.shape)}; expected {shape} in this {self._class()}")
            if not ref.storage.dtype.is_floating_point:
                raise Refused(f"{name} has dtype {ref.storage.dtype}; expected floating point numbers")
        if total_bytes(self.tensors.values()) > limit:
            raise Refused(f"its {self._class()} asks for more memory than the file is long")

    def _class(self) -> str:
        return self.class_name.rpartition(".")[2]


class Container:
    """A file of another program.

    Attributes:
        path: The file.
        stream: It, open.
        family: What it is, with an article: 'a StyleGAN2 pickle'.
        members: Name → kind ('generator', 'discriminator', 'teacher') of the networks that can be asked for.
        resizable: Whether bytes written as text (protocol 2) can change their length.
        writable: Whether networks can be put back into the file's own structure.
        takes_kwargs: Whether it leaves open how its networks are built, so that `open_container` may be told.
        nbytes: Size of its contents, where they are compressed.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        stream: BinaryIO,
        family: str,
        members: Mapping[str, tuple[str, Callable[[], FileNetwork]]],
        resizable: bool = False,
        writable: bool = False,
        nbytes: int = 0,
        takes_kwargs: bool = False,
    ):
        self.path, self.stream, self.family = Path(path), stream, family
        self.members = {name: kind for name, (kind, _) in members.items()}
        self.resizable, self.writable, self.takes_kwargs = resizable, writable, takes_kwargs
        self._describe = {name: describe for name, (_, describe) in members.items()}
        self._networks: dict[str, FileNetwork] = {}
        self.size = os.fstat(stream.fileno()).st_size
        self._limit = max(self.size, nbytes) + _SPARE_BYTES

    def network(self, name: str) -> FileNetwork:
        """The description of one network.

        Raises:
            ValueError: it is not in the file, or is none that can be built.
        """
        if name not in self.members:
            raise ValueError(f"{self.path} holds {', '.join(self.members)}, but no network {name!r}")
        if name not in self._networks:
            with saying(f"{self.path}: {name}"):
                self._networks[name] = self._describe[name]()
        return self._networks[name]

    def load(self, name: str) -> torch.nn.Module:
        """One network, on the CPU; its dtype as `FileNetwork.build`.

        Raises:
            ValueError: as `network`, or its tensors are not those of its class.
        """
        network = self.network(name)
        with saying(f"{self.path}: {name}"):
            return network.build(self._limit)

    def outline(self, name: str) -> torch.nn.Module:
        """One network without its numbers, see `FileNetwork.outline`; faults as those of `load`."""
        network = self.network(name)
        with saying(f"{self.path}: {name}"):
            return network.outline(self._limit)


@contextmanager
def saying(what: str) -> Iterator[None]:
    """Puts the file before what is wrong with it; names from the file cannot break the line or the terminal."""
    try:
        yield
    except ValueError as error:
        text = "".join(char if char.isprintable() else "?" for char in str(error))
        raise ValueError(text if text.startswith(what) else f"{what}: {text}") from None
    except (MemoryError, RecursionError) as error:
        raise ValueError(f"{what} asks for more memory than there is ({type(error).__name__})") from None
    except RuntimeError as error:  # torch's MemoryError
        if "can't allocate memory" not in str(error):
            raise
        raise ValueError(f"{what} asks for more memory than there is") from None


def plain(value: Any, what: str = "init kwargs") -> Any:
    """Arguments from a file as JSON-able values: numbers of numpy become Python's, tuples become lists.

    Raises:
        Refused: something else is among them, or too much, or too deep.
    """
    budget = [MAX_VALUES]

    def convert(item: Any, depth: int) -> Any:
        budget[0] -= 1
        if depth > 6 or budget[0] < 0:
            raise Refused(f"{what} hold too many values, or too deeply nested ones")
        if item is None or isinstance(item, bool):
            return item
        if isinstance(item, int | float):
            if isinstance(item, float) and math.isnan(item):
                raise Refused(f"{what} hold a NaN")
            return item
        if isinstance(item, str):
            return str(item)
        if isinstance(item, TensorRef):
            return convert(item.item(), depth)
        if isinstance(item, list | tuple):
            return [convert(part, depth + 1) for part in item]
        if isinstance(item, dict) and all(isinstance(key, str) for key in item):
            return {str(key): convert(part, depth + 1) for key, part in item.items()}
        raise Refused(f"{what} hold a {type(item).__name__}")

    return convert(value, 0)


def merged(inferred: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with others laid over them, tables inside them entry by entry.

    Raises:
        Refused: something else is given where a table is expected.
    """
    result = dict(inferred)
    for name, value in given.items():
        table = isinstance(result.get(name), Mapping)
        if table and not isinstance(value, Mapping):
            raise Refused(f"the argument {name} that is given for it is not a table")
        result[name] = merged(result[name], value) if table else value
    return result


@dataclass(frozen=True)
class _Patch:
    offset: int
    length: int
    data: bytes


def write_back(container: Container, out: str | os.PathLike, networks: Mapping[str, torch.nn.Module]) -> list[str]:
    """Writes the container again, with the weights of `networks` in place of its own; every other byte stays.

    Globals, protocol, layout, embedded source text and all that is not one of these networks are those of the file.

    Returns:
        What a person should know about the result.

    Raises:
        ValueError: the file cannot take them; says why.
        OSError: the file cannot be written.
    """
    if not container.writable:
        raise ValueError(f"{container.path} is {container.family}, into which networks cannot be put back")
    patches: dict[int, _Patch] = {}
    notes: list[str] = []
    for name, network in networks.items():
        described = container.network(name)
        with saying(f"{container.path}: {name}"):
            for patch in _patches(described, network, container.resizable, notes):
                if patches.setdefault(patch.offset, patch) != patch:
                    raise Refused("two networks of the file share their numbers, so only equal ones can be written")
    ordered = sorted(patches.values(), key=lambda patch: patch.offset)
    for one, two in itertools.pairwise(ordered):
        if one.offset + one.length > two.offset:
            raise ValueError(f"{container.path}: tensors of the file share their numbers, so they cannot be replaced")
    with dnnlib.replaced_atomically(out) as temporary, open(temporary, "wb") as target:
        position = 0
        for patch in ordered:
            _copy(container.stream, target, position, patch.offset)
            target.write(patch.data)
            position = patch.offset + patch.length
        _copy(container.stream, target, position, container.size)
    return list(dict.fromkeys(notes))


def _patches(described: FileNetwork, network: Any, resizable: bool, notes: list[str]) -> Iterator[_Patch]:
    if registry.registry_name(network) != described.class_name:
        raise Refused(f"it is a {described.class_name}; got a {registry.registry_name(network)}")
    fresh: Any = registry.build_empty(described.class_name, described.init_kwargs)
    for name, value in described.attributes.items():
        setattr(fresh, name, value)
    _check_alike(fresh, network, notes)
    state = network.state_dict()
    described._check(state, limit=1 << 62)
    for name, value in fresh.state_dict().items():
        if name in described.tensors:
            continue
        if name.endswith(("w_avg", "noise_const")):
            notes.append(f"{name.rpartition('.')[2]} has no place in the file and is not written")
        elif not torch.equal(value, state[name].detach().cpu()):
            raise Refused(f"{name} is another than the constructor makes, and has no place in the file")
    for name, ref in described.tensors.items():
        (blob, start), data = ref.place(), ref.encoded(state[name])
        if blob.text_length is None:
            yield _Patch(blob.offset + start, len(data), data)
        elif data != blob.read(start, len(data)):
            yield _text_patch(blob, start, data, resizable)


def _check_alike(fresh: torch.nn.Module, network: torch.nn.Module, notes: list[str]) -> None:
    """Raises Refused unless the file's network computes the same as the one to be written; a clamp is only noted."""
    clamps: list[tuple[torch.nn.Module, Any]] = []
    try:
        while (found := difference(fresh, network)) is not None:
            name, theirs, ours = found
            path, _, leaf = name.rpartition(".")
            if leaf != "conv_clamp":
                text = f"its {name} is {theirs}, that of the network to be written {ours}"
                raise Refused(f"the arguments are not those of the network to be written: {text}"[:300])
            module = fresh.get_submodule(path)
            clamps.append((module, theirs))
            module.conv_clamp = ours
    finally:
        for module, value in clamps:
            module.conv_clamp = value
    if clamps:
        notes.append("it clamps activations at another value than the network: the same unless that is reached")


def _text_patch(blob: Any, start: int, data: bytes, resizable: bool) -> _Patch:
    """Bytes as protocol 2 writes them: opcode, number of bytes, text."""
    head, tail = blob.read(0, start), blob.read(start + len(data), blob.length - start - len(data))
    blob.stream.seek(blob.offset - 5)
    opcode = blob.stream.read(5)
    if not resizable or opcode[:1] != b"X" or int.from_bytes(opcode[1:], "little") != blob.text_length:
        raise Refused("its bytes are written as text in an unusual way and cannot be replaced")
    text = (head + data + tail).decode("latin-1").encode("utf-8")
    replacement = b"X" + len(text).to_bytes(4, "little") + text
    return _Patch(blob.offset - 5, blob.text_length + 5, replacement)


def _copy(source: BinaryIO, target: BinaryIO, start: int, end: int) -> None:
    source.seek(start)
    while start < end:
        chunk = source.read(min(end - start, 1 << 20))
        if not chunk:
            raise OSError("the original file became shorter while it was read")
        target.write(chunk)
        start += len(chunk)
