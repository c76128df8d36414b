"""The compiled ops: probe → build → load, once per process, at first use, never at import.

    load("cpu") is the C library with all ops of a device, or None, and then plain torch does the work.

A library that is in the cache already needs neither compiler nor ninja nor a folder to write to. What fails is tried
once and reported in one line.

Environment: REFINE_OPS (auto, native, ref), REFINE_OPS_CACHE (else $REFINE_CACHE/ops, else the user's cache folder),
REFINE_OPS_TIMEOUT (seconds for a build or for waiting for one; 300), CXX, NVCC_CCBIN, CUDA_HOME, TORCH_CUDA_ARCH_LIST.
"""

import ctypes
import hashlib
import os
import platform
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from refine.torch_utils.build import op_builder, op_cache, toolchain

MODES = ("auto", "native", "ref")
OPS = {
    "cpu": ("upfirdn2d", "bias_act", "filtered_lrelu", "group_norm_silu", "conv3x3"),
    "cuda": ("upfirdn2d", "bias_act"),
}
SOURCES = Path(__file__).parents[1] / "ops"

_mode: str | None = None  # None = as the environment says
_ready: dict[str, ctypes.CDLL | None] = {}  # what load() answers at once
_outcomes: dict[tuple[str, bool], "Library | NativeUnavailable"] = {}  # of the one attempt, whatever the mode
_mutex = threading.RLock()


class NativeUnavailable(RuntimeError):
    """The compiled ops of a device are not available; one line that says why."""


_FAILURES = (toolchain.Missing, op_builder.BuildFailed, op_cache.CacheError, OSError, NativeUnavailable)


@dataclass(frozen=True)
class Library:
    """A loaded library and where it lies."""

    cdll: ctypes.CDLL
    path: Path
    built: bool  # by this process


def load(device_type: str = "cpu") -> ctypes.CDLL | None:
    """The library of a device, with a function `refine_<op>` for each of its `OPS`; built where the cache lacks it.

    Args:
        device_type: 'cpu' or 'cuda'; for others there is no library.

    Returns:
        The library, or None in mode 'ref' and, in mode 'auto', where it is not available. The first such call prints a
        line that says why; there is one attempt per process.

    Raises:
        NativeUnavailable: It is not available, in mode 'native'.
        ValueError: REFINE_OPS is none of the modes.
    """
    try:
        return _ready[device_type]  # what every call but the first costs
    except KeyError:
        pass
    with _mutex:
        mode, found = get_mode(), None
        if mode == "native":
            found = obtain(device_type).cdll
        elif mode == "auto":
            outcome = _outcome(device_type, portable=False)
            if isinstance(outcome, Library):
                found = outcome.cdll
            elif device_type in OPS:  # elsewhere there is nothing to be missed
                _line.end(device_type, f"plain torch is used, as there are no compiled ops: {outcome}", once=True)
        return _ready.setdefault(device_type, found)


def set_mode(mode: str) -> None:
    """'auto' = compiled where it is available, 'native' = compiled or an error, 'ref' = plain torch.

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


def obtain(device_type: str = "cpu", portable: bool = False) -> Library:
    """The library whatever the mode; from the cache or built, at most one attempt per process.

    Args:
        device_type: As in `load`.
        portable: For a CPU, one that other machines of this architecture load as well, see `toolchain.cpu_targets`.

    Raises:
        NativeUnavailable: The reason, remembered.
    """
    with _mutex:
        outcome = _outcome(device_type, portable)
        if isinstance(outcome, NativeUnavailable):
            _line.break_off()
            raise NativeUnavailable(str(outcome))
        return outcome


def _outcome(device_type: str, portable: bool) -> "Library | NativeUnavailable":
    key = (device_type, portable)
    if key not in _outcomes:
        try:
            _outcomes[key] = _attempt(device_type, portable)
        except _FAILURES as error:
            _outcomes[key] = NativeUnavailable(" ".join(str(error).split()))
    return _outcomes[key]


class _Line:
    """One line on stderr per build: begun when it begins, ended by how it ended. Of the processes of a node the first
    alone writes."""

    def __init__(self) -> None:
        self._is_open, self._told = False, set[str]()

    def begin(self, device_type: str, text: str) -> None:
        self._write(device_type, f"{text} … ")
        self._is_open = True

    def end(self, device_type: str, text: str, once: bool = False) -> None:
        if self._is_open or not once or device_type not in self._told:
            self._write(device_type, f"{text}\n")
        if once:
            self._told.add(device_type)
        self._is_open = False

    def break_off(self) -> None:
        """For an error that will be printed on a line of its own."""
        if self._is_open:
            self.end("", "stopped")

    def _write(self, device_type: str, text: str) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            start = "" if self._is_open else f"ops ({device_type}): "
            print(f"{start}{text}", end="", file=sys.stderr, flush=True)


_line = _Line()


# ----------------------------------------------------------------------------------------------------------------------
# What is wanted.


@dataclass(frozen=True)
class Wanted:
    """The ops for a device of this machine, without a compiler: what a library must have been made from."""

    device_type: str
    sources: dict[str, bytes]  # file name → text
    key: str
    capabilities: tuple[tuple[int, int], ...]  # of the GPUs here
    targets: tuple[str, ...]  # of TORCH_CUDA_ARCH_LIST, empty = not set; or of this CPU, best first

    @property
    def folder(self) -> str:
        return f"ops-{self.device_type}-{self.key}"

    def accepts(self, targets: str) -> bool:
        """Whether a library for these targets runs here and is what was asked for."""
        if self.device_type == "cpu":
            return targets in self.targets
        have = targets.split("+")
        asked = not self.targets or set(have) == set(self.targets)
        return asked and all(toolchain.serves(have, gpu) for gpu in self.capabilities)

    def find(self) -> tuple[list[Path], dict[Path, str]]:
        """The libraries in the cache that fit, best first; and what was passed over, and why."""
        passed_over: dict[Path, str] = {}
        found = op_cache.find(self.folder, self.accepts, passed_over)
        if self.device_type == "cpu":
            found.sort(key=lambda path: self.targets.index(op_cache.targets_of(path)))
        return found, passed_over


def describe_wanted(device_type: str, portable: bool = False) -> Wanted:
    """Reads the sources and asks torch. The key is of the sources, flags, torch, CUDA, Python and the C library; the
    targets tell processors apart: nodes that share a home folder do not share what would crash there.

    Raises:
        NativeUnavailable: There are no compiled ops for this device, system or torch.
        toolchain.Missing: TORCH_CUDA_ARCH_LIST cannot be read.
    """
    if device_type not in OPS:
        raise NativeUnavailable(f"there are no compiled ops for the device {device_type}")
    if os.name == "nt":
        raise NativeUnavailable("compiled ops are built on Linux and macOS only")
    import torch

    if device_type == "cuda" and torch.version.hip:
        raise NativeUnavailable("this torch is built for ROCm; the compiled ops are for CUDA")
    facts: list[object] = [torch.__version__, sys.implementation.cache_tag, sys.platform, platform.machine(), _libc()]
    capabilities: tuple[tuple[int, int], ...] = ()
    targets: tuple[str, ...] = ()
    if device_type == "cuda":
        facts += [torch.version.cuda, op_builder.NVCC_FLAGS]
        if text := os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip():
            targets = tuple(toolchain.parse_arch_list(text))
        if torch.cuda.is_available():
            capabilities = tuple(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))
    else:
        facts += [op_builder.CXX_FLAGS, op_builder.OPTIONAL_CXX_FLAGS]
        targets = tuple(toolchain.cpu_targets()[-1 if portable else 0 :])
    sources = _read_sources(device_type)
    key = hashlib.sha256(repr((facts, sorted(sources.items()))).encode()).hexdigest()[:16]
    return Wanted(device_type, sources, key, capabilities, targets)


def _libc() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError, OSError):  # no glibc
        return ""


def _read_sources(device_type: str) -> dict[str, bytes]:
    suffix = "cu" if device_type == "cuda" else "cpp"
    paths = [*(SOURCES / f"{op}.{suffix}" for op in OPS[device_type]), *sorted(SOURCES.glob("*.h"))]
    try:
        return {path.name: path.read_bytes() for path in paths}
    except FileNotFoundError as error:
        raise NativeUnavailable(f"{error.filename} is missing; this installation is not complete") from None


def find_compiler(device_type: str) -> toolchain.Compiler | None:
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


def _attempt(device_type: str, portable: bool) -> Library:
    wanted = describe_wanted(device_type, portable)
    found, refused = wanted.find()  # libraries that cannot be used, and why
    for path in found:
        try:
            return Library(_open(path, device_type), path, built=False)
        except NativeUnavailable as error:  # noqa: PERF203 - a handful of files
            refused[path] = str(error)
    compiler = find_compiler(device_type)
    if compiler is None:
        raise NativeUnavailable("; ".join([*refused.values(), _no_compiler(device_type)]))
    try:
        path, built = _build(wanted, compiler, refused)
        return Library(_open(path, device_type), path, built)
    except KeyboardInterrupt:
        _line.break_off()
        raise


def _open(path: Path, device_type: str) -> ctypes.CDLL:
    """Raises NativeUnavailable if the file cannot be loaded or lacks an op."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailable(f"the library cannot be loaded: {error}") from None
    lacking = [op for op in OPS[device_type] if not hasattr(library, f"refine_{op}")]
    if lacking:
        raise NativeUnavailable(f"{path} has no function refine_{lacking[0]}")
    return library


def _build(wanted: Wanted, compiler: toolchain.Compiler, refused: Mapping[Path, str]) -> tuple[Path, bool]:
    """A library, and whether this process built it, not another one that was waited for."""
    device, limit = wanted.device_type, _limit()
    if device == "cuda":
        toolkit = toolchain.CudaToolkit.probe(compiler)
        op_builder.check_driver(toolkit)
        targets = list(wanted.targets) or toolchain.choose_targets(toolkit.targets, list(wanted.capabilities))
    else:
        toolkit, targets = None, [wanted.targets[0]]
    entry = op_cache.writable_folder(wanted.folder)
    ninja, log = toolchain.find_ninja(), entry / f"{'+'.join(targets)}.log"
    with op_cache.locked(entry, limit, lambda who: _line.begin(device, f"waiting for {who}, which compiles them")):
        for path in wanted.find()[0]:
            if path not in refused:
                _line.end(device, "done")
                return path, False
        _line.begin(device, "compiling, once" + "".join(f" (not used: {reason})" for reason in refused.values()))
        start = time.monotonic()
        with op_cache.build_folder(entry) as folder:
            for name, source in wanted.sources.items():
                (folder / name).write_bytes(source)
            if toolkit:
                steps = op_builder.cuda_steps(OPS[device], toolkit, targets)
            else:
                steps = op_builder.cpu_steps(OPS[device], compiler, targets[0], folder)
            library = op_builder.run(steps, folder, log, limit, ninja)
            try:
                _open(library, device)  # what does not load here does not get into the cache
            except NativeUnavailable as error:
                raise op_builder.BuildFailed(f"{error}; log: {log}") from None
            path = op_cache.keep(library, entry, targets)
        how = "" if ninja else " without ninja, which was not found"
        _line.end(device, f"done in {time.monotonic() - start:.1f} s{how}; kept in {entry}")
        return path, True


def _limit() -> float:
    text = os.environ.get("REFINE_OPS_TIMEOUT", "300")
    try:
        return float(text)
    except ValueError:
        raise NativeUnavailable(f"REFINE_OPS_TIMEOUT is {text!r}; expected seconds") from None
