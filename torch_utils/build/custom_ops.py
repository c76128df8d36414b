"""The compiled ops: probe → build → load, once per process, at first use, never at import.

    load("bias_act") is the C library of torch_utils/ops/bias_act.cpp, or None, and then plain torch does the work.

A library that is in the cache already needs neither compiler nor ninja nor a folder to write to. What fails is tried
once and told in one line.

Environment: REFINE_OPS (auto, native, ref), REFINE_OPS_CACHE (else $REFINE_CACHE/ops, else the user's cache folder),
REFINE_OPS_TIMEOUT (seconds for a build or for waiting for one; 300), CXX, NVCC_CCBIN, CUDA_HOME, TORCH_CUDA_ARCH_LIST.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import secrets
import shutil
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from refine.torch_utils.build import op_builder, op_cache, toolchain
from refine.torch_utils.build.op_cache import Candidate
from refine.torch_utils.build.toolchain import Compiler, CudaToolkit

MODES = ("auto", "native", "ref")
OPS = {"cpu": ("upfirdn2d", "bias_act", "group_norm_silu", "conv3x3"), "cuda": ("upfirdn2d", "bias_act")}
SOURCES = Path(__file__).parents[1] / "ops"

_mode: str | None = None  # None = as the environment says
_ready: dict[tuple[str, str], ctypes.CDLL | None] = {}  # what load() answers at once
_outcomes: dict[tuple[str, str, bool], "Library | NativeUnavailable"] = {}  # of the one attempt, whatever the mode
_mutex = threading.RLock()


class NativeUnavailable(RuntimeError):
    """A compiled op cannot be had; one line that says why."""


@dataclass(frozen=True)
class Library:
    """A loaded library and where it lies."""

    cdll: ctypes.CDLL
    path: Path
    built: bool  # by this process


def load(op: str, device_type: str = "cpu") -> ctypes.CDLL | None:
    """The compiled library of an op; built at the first call where it is not in the cache.

    Args:
        op: One of `OPS`.
        device_type: 'cpu' or 'cuda'; for others there is no library.

    Returns:
        The library, or None in mode 'ref' and, in mode 'auto', where it cannot be had. The first such call prints a
        line that says why; there is one attempt per process.

    Raises:
        NativeUnavailable: It cannot be had, in mode 'native'.
        ValueError: REFINE_OPS is none of the modes.
    """
    try:
        return _ready[op, device_type]  # what every call but the first costs
    except KeyError:
        return _load_first(op, device_type)


def set_mode(mode: str) -> None:
    """'auto' = compiled where it can be had, 'native' = compiled or an error, 'ref' = plain torch.

    Raises:
        ValueError: Another word.
    """
    global _mode
    if mode not in MODES:
        raise ValueError(f"--ops is {mode!r}; expected one of {', '.join(MODES)}")
    with _mutex:
        _mode = mode
        _ready.clear()


def get_mode() -> str:
    """The mode in force; without `set_mode` that of REFINE_OPS. Raises ValueError if that is none of the modes."""
    mode = _mode or os.environ.get("REFINE_OPS") or "auto"
    if mode not in MODES:
        raise ValueError(f"REFINE_OPS is {mode!r}; expected one of {', '.join(MODES)}")
    return mode


def _load_first(op: str, device_type: str) -> ctypes.CDLL | None:
    with _mutex:
        mode = get_mode()
        if mode == "ref":
            return _ready.setdefault((op, device_type), None)
        try:
            library = _obtain_once(op, device_type)
        except NativeUnavailable as error:
            if mode == "native":
                _line.break_off()
                raise
            if device_type in ("cpu", "cuda"):  # elsewhere there is nothing to be missed
                _line.end(f"{op} ({device_type})", f"plain torch is used, for there is no compiled op: {error}", error)
            return _ready.setdefault((op, device_type), None)
        return _ready.setdefault((op, device_type), library.cdll)


def obtain(op: str, device_type: str = "cpu", portable: bool = False) -> Library:
    """The library whatever the mode; from the cache or built, at most one attempt per process.

    Args:
        op, device_type: As in `load`.
        portable: For a CPU, one that other machines of this architecture load as well, see `toolchain.cpu_targets`.

    Raises:
        NativeUnavailable: The reason, remembered.
    """
    with _mutex:
        try:
            return _obtain_once(op, device_type, portable)
        except NativeUnavailable:
            _line.break_off()
            raise


def _obtain_once(op: str, device_type: str, portable: bool = False) -> Library:
    key = (op, device_type, portable)
    if key not in _outcomes:
        try:
            _outcomes[key] = _attempt(op, device_type, portable)
        except NativeUnavailable as error:
            _outcomes[key] = error
        except _FAILURES as error:
            _outcomes[key] = NativeUnavailable(" ".join(str(error).split()))
    outcome = _outcomes[key]
    if isinstance(outcome, NativeUnavailable):
        raise NativeUnavailable(str(outcome))
    return outcome


_FAILURES = (toolchain.Missing, op_builder.BuildFailed, op_cache.CacheError, OSError, NativeUnavailable)


class _Line:
    """One line on stderr per build: begun when it begins, ended by how it ended. Of the processes of a node the first
    alone writes, and the same reason once."""

    def __init__(self):
        self._told, self._is_open = set(), False

    def begin(self, what: str, text: str) -> None:
        self._write(f"{text} … " if self._is_open else f"{what}: {text} … ")
        self._is_open = True

    def end(self, what: str, text: str, reason: object = None) -> None:
        if self._is_open or reason is None or str(reason) not in self._told:
            self._write(f"{text}\n" if self._is_open else f"{what}: {text}\n")
        self._told.add(str(reason))
        self._is_open = False

    def break_off(self) -> None:
        """For an error that will be printed on a line of its own."""
        if self._is_open:
            self.end("", "stopped")

    @staticmethod
    def _write(text: str) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(text, end="", file=sys.stderr, flush=True)


_line = _Line()


# ----------------------------------------------------------------------------------------------------------------------
# What is wanted.


@dataclass(frozen=True)
class Wanted:
    """An op for a device of this machine, without a compiler: what a library must have been made from."""

    op: str
    device_type: str
    sources: dict[str, bytes]  # file name → text
    key: str
    capabilities: tuple[tuple[int, int], ...]  # of the GPUs here
    targets: tuple[str, ...]  # of TORCH_CUDA_ARCH_LIST, empty = not set; or of this CPU, best first

    def __str__(self) -> str:
        return f"{self.op} ({self.device_type})"

    @property
    def folder(self) -> str:
        return f"{self.op}-{self.device_type}-{self.key}"

    def accepts(self, targets: str) -> bool:
        """Whether a library for these targets runs here and is what was asked for."""
        if self.device_type == "cpu":
            return targets in self.targets
        have = targets.split("+")
        asked = not self.targets or set(have) == set(self.targets)
        return asked and all(toolchain.serves(have, gpu) for gpu in self.capabilities)


def describe_wanted(op: str, device_type: str, portable: bool = False) -> Wanted:
    """Reads the sources and asks torch. The key is of the sources, flags, torch, CUDA, Python and the C library; the
    targets tell processors apart: nodes that share a home folder do not share what would crash there.

    Raises:
        NativeUnavailable: There is no compiled op for this device, system or torch.
        toolchain.Missing: TORCH_CUDA_ARCH_LIST cannot be read.
    """
    if device_type not in ("cpu", "cuda"):
        raise NativeUnavailable(f"there are no compiled ops for the device {device_type}")
    if os.name == "nt":
        raise NativeUnavailable("compiled ops are built on Linux and macOS only")
    import torch

    if device_type == "cuda" and getattr(torch.version, "hip", None):
        raise NativeUnavailable("this torch is built for ROCm; the compiled ops are for CUDA")
    if op in OPS["cpu"] and op not in OPS[device_type]:
        raise NativeUnavailable(f"{op} is compiled for CPUs only")
    main = SOURCES / f"{op}.{'cu' if device_type == 'cuda' else 'cpp'}"
    if not main.is_file():
        raise NativeUnavailable(f"{main} is missing; this installation is not complete")
    sources = {path.name: path.read_bytes() for path in (main, *sorted(SOURCES.glob("*.h")))}
    facts = [torch.__version__, sys.implementation.cache_tag, sys.platform, platform.machine(), _libc(), op]
    capabilities, targets = (), ()
    if device_type == "cuda":
        facts += [torch.version.cuda, op_builder.NVCC_FLAGS]
        text = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
        targets = tuple(toolchain.parse_arch_list(text)) if text else ()
        if torch.cuda.is_available():
            capabilities = tuple(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))
    else:
        facts += [op_builder.CXX_FLAGS, op_builder.OPTIONAL_CXX_FLAGS]
        targets = tuple(toolchain.cpu_targets()[-1 if portable else 0 :])
    digest = hashlib.sha256(repr(facts).encode())
    for name, source in sources.items():
        digest.update(f"\0{name}\0{len(source)}\0".encode() + source)
    return Wanted(op, device_type, sources, digest.hexdigest()[:16], capabilities, targets)


def _libc() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError, OSError):  # no glibc
        return ""


def find_compiler(device_type: str) -> Compiler | None:
    """What would compile for this device, found without running anything; None = nothing."""
    if device_type == "cpu":
        return toolchain.find_cxx()
    import torch

    return toolchain.find_nvcc(torch.version.cuda)


def _no_compiler(device_type: str) -> str:
    if device_type == "cuda":
        tried = ", ".join(toolchain.nvcc_candidates())
        return f"no CUDA toolkit was found (looked for {tried}); install one or set CUDA_HOME"
    if os.environ.get("CXX"):
        return f"CXX is {os.environ['CXX']}, which is not there"
    return f"no C++ compiler was found (looked for {', '.join(toolchain.CXX_NAMES)}); install g++ or set CXX"


# ----------------------------------------------------------------------------------------------------------------------
# The one attempt.


def _attempt(op: str, device_type: str, portable: bool) -> Library:
    wanted = describe_wanted(op, device_type, portable)
    compiler = find_compiler(device_type)
    candidates = op_cache.find_candidates(wanted.folder, wanted.accepts)
    if device_type == "cpu":
        candidates.sort(key=lambda candidate: wanted.targets.index(candidate.targets))
    good = [c for c in candidates if compiler is None or c.compiler == compiler.identity]
    refused: list[Candidate] = []
    for candidate in good:
        library, problem = _open(candidate.path, op)
        if library:
            return Library(library, candidate.path, built=False)
        refused.append(candidate)
    try:
        if compiler is None:
            raise NativeUnavailable(f"{problem}; {_no_compiler(device_type)}" if good else _no_compiler(device_type))
        candidate, built = _build(wanted, compiler, refused)
        library, problem = _open(candidate.path, op)
        if library is None:
            raise NativeUnavailable(problem)
        return Library(library, candidate.path, built)
    except _FAILURES as error:
        for candidate in candidates:  # another compiler's library is better than none
            library = None if candidate in good else _open(candidate.path, op)[0]
            if library:
                _line.end(str(wanted), f"the library of another compiler is used, for {error}")
                return Library(library, candidate.path, built=False)
        raise


def _open(path: Path, op: str) -> tuple[ctypes.CDLL | None, str]:
    """(library, '') or (None, why it cannot be loaded or is no such op)."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"the library cannot be loaded: {error}"
    if not hasattr(library, f"refine_{op}"):
        return None, f"{path} has no function refine_{op}"
    return library, ""


def _build(wanted: Wanted, compiler: Compiler, refused: list[Candidate]) -> tuple[Candidate, bool]:
    """A library by this compiler, and whether this process built it, not another one that was waited for."""
    toolkit, targets = None, list(wanted.targets[:1])
    if wanted.device_type == "cuda":
        toolkit = CudaToolkit.probe(compiler)
        op_builder.check_driver(toolkit)
        targets = list(wanted.targets) or toolchain.choose_targets(toolkit.targets, list(wanted.capabilities))
    stem, limit = f"{compiler.identity}.{'+'.join(targets)}", _limit()
    entry = op_cache.writable_folder(wanted.folder)

    def on_wait(who: str) -> None:
        _line.begin(str(wanted), f"waiting for {who}, which compiles it")

    with op_cache.locked(entry, stem, limit, on_wait):
        for candidate in op_cache.find_candidates(wanted.folder, wanted.accepts):
            if candidate.compiler == compiler.identity and candidate not in refused:
                _line.end(str(wanted), "done")
                return candidate, False
        _line.begin(str(wanted), "compiling, once")
        start = time.monotonic()
        try:
            candidate, with_ninja = _compile(wanted, compiler, toolkit, targets, entry, stem)
        except _FAILURES as error:
            op_cache.record_failure(entry, stem, str(error))
            raise
        except BaseException:  # Ctrl-C
            _line.break_off()
            raise
        how = "" if with_ninja else " without ninja, which was not found"
        _line.end(str(wanted), f"done in {time.monotonic() - start:.1f} s{how}; kept in {entry}")
        return candidate, True


def _compile(wanted, compiler, toolkit, targets: list[str], entry: Path, stem: str) -> tuple[Candidate, bool]:
    """(the library in the cache, whether ninja was used). What builders that were killed left is removed first."""
    for leftover in entry.glob(".build-*"):  # nobody's: the lock is ours
        shutil.rmtree(leftover, ignore_errors=True)
    folder = entry / f".build-{os.getpid()}-{secrets.token_hex(4)}"
    folder.mkdir()
    ninja, log = toolchain.find_ninja(), entry / f"{stem}.log"
    try:
        for name, source in wanted.sources.items():
            (folder / name).write_bytes(source)
        if toolkit:
            commands = op_builder.cuda_commands(wanted.op, toolkit, targets)
        else:
            commands = op_builder.cpu_commands(wanted.op, compiler, targets[0], folder)
        op_builder.run(commands, folder, log, _limit(), ninja)
        library = folder / f"{wanted.op}.so"
        if not library.is_file():
            raise op_builder.BuildFailed(f"the compiler left no library; log: {log}")
        loaded, problem = _open(library, wanted.op)
        if loaded is None:  # what does not load here does not get into the cache
            raise op_builder.BuildFailed(f"{problem}; log: {log}")
        return op_cache.keep(library, entry, stem), ninja is not None
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)


def _limit() -> float:
    text = os.environ.get("REFINE_OPS_TIMEOUT", "300")
    try:
        return float(text)
    except ValueError:
        raise NativeUnavailable(f"REFINE_OPS_TIMEOUT is {text!r}; expected seconds") from None
