"""The compiled ops: probe → build → load, once per process, at first use, never at import.

    load("cpu") is the C library with all ops of the CPU, or None, and then plain torch does the work.
    load("cuda") is the driver, which starts the kernels of `device_code`, or None.

What is in the cache already needs neither compiler nor ninja nor a folder to write to. What fails is tried once and
reported in one line.

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

from refine.torch_utils.build import device_code, driver, op_builder, op_cache, toolchain
from refine.torch_utils.build.progress import line

MODES = ("auto", "native", "ref")
OPS = {
    "cpu": ("upfirdn2d", "bias_act", "filtered_lrelu", "group_norm_silu", "conv3x3"),
    "cuda": ("upfirdn2d", "bias_act", "filtered_lrelu"),
}
SOURCES = Path(__file__).parents[1] / "ops"

_mode: str | None = None  # None = as the environment says
_ready: dict[str, ctypes.CDLL | None] = {}  # what load() answers at once
_outcomes: dict[tuple[str, bool], "Library | NativeUnavailable"] = {}  # of the one attempt, whatever the mode
_mutex = threading.RLock()


class NativeUnavailable(RuntimeError):
    """The compiled ops of a device are not available; one line that says why."""


FAILURES = (
    toolchain.Missing, op_builder.BuildFailed, op_cache.CacheError, driver.Failed, OSError, NativeUnavailable
)  # fmt: skip


@dataclass(frozen=True)
class Library:
    """A loaded library and where it lies; for CUDA the driver, and where the kernels lie."""

    cdll: ctypes.CDLL
    path: Path
    built: bool  # by this process


def load(device_type: str = "cpu") -> ctypes.CDLL | None:
    """The library of a device; built where the cache lacks it. That of the CPU has a function `refine_<op>` for each of
    its `OPS`; the kernels of a GPU are compiled one by one, of which this tries one.

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
                line.end(device_type, f"plain torch is used, as there are no compiled ops: {outcome}", once=True)
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
            line.break_off()
            raise NativeUnavailable(str(outcome))
        return outcome


def _outcome(device_type: str, portable: bool) -> "Library | NativeUnavailable":
    key = (device_type, portable)
    if key not in _outcomes:
        try:
            _outcomes[key] = _attempt(device_type, portable)
        except FAILURES as error:
            _outcomes[key] = NativeUnavailable(" ".join(str(error).split()))
    return _outcomes[key]


# ----------------------------------------------------------------------------------------------------------------------
# What is wanted.


@dataclass(frozen=True)
class Wanted:
    """The ops for this machine's CPU, without a compiler: what a library must have been made from."""

    sources: dict[str, bytes]  # file name → text
    key: str
    targets: tuple[str, ...]  # best first

    @property
    def folder(self) -> str:
        return f"ops-cpu-{self.key}"

    def find(self) -> tuple[list[Path], dict[Path, str]]:
        """The libraries in the cache that fit, best first; and what was passed over, and why."""
        passed_over: dict[Path, str] = {}
        found = op_cache.find(self.folder, "*.*.so", self.targets.__contains__, passed_over)
        return sorted(found, key=lambda path: self.targets.index(op_cache.target_of(path))), passed_over


def describe_wanted(portable: bool = False) -> Wanted:
    """Reads the sources and asks torch. The key is of the sources, flags, torch, Python and the C library; the targets
    tell processors apart: nodes that share a home folder do not share what would crash there.

    Raises:
        NativeUnavailable: This installation is not complete.
    """
    import torch

    facts: list[object] = [torch.__version__, sys.implementation.cache_tag, sys.platform, platform.machine(), _libc()]
    facts += [op_builder.CXX_FLAGS, op_builder.OPTIONAL_CXX_FLAGS]
    sources = _read_sources()
    key = hashlib.sha256(repr((facts, sorted(sources.items()))).encode()).hexdigest()[:16]
    return Wanted(sources, key, tuple(toolchain.cpu_targets()[-1 if portable else 0 :]))


def _libc() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError, OSError):  # no glibc
        return ""


def _read_sources() -> dict[str, bytes]:
    paths = [*(SOURCES / f"{op}.cpp" for op in OPS["cpu"]), *sorted(SOURCES.glob("*.h"))]
    try:
        return {path.name: path.read_bytes() for path in paths}
    except FileNotFoundError as error:
        raise NativeUnavailable(f"{error.filename} is missing; this installation is not complete") from None


def _no_compiler() -> str:
    if os.environ.get("CXX"):
        return f"CXX is {os.environ['CXX']}, which is not there"
    return f"no C++ compiler was found (looked for {', '.join(toolchain.CXX_NAMES)}); install g++ or set CXX"


# ----------------------------------------------------------------------------------------------------------------------
# The one attempt.


def _attempt(device_type: str, portable: bool) -> Library:
    if device_type not in OPS:
        raise NativeUnavailable(f"there are no compiled ops for the device {device_type}")
    if os.name == "nt":
        raise NativeUnavailable("compiled ops are built on Linux and macOS only")
    if device_type == "cuda":
        return _attempt_cuda()
    wanted = describe_wanted(portable)
    found, refused = wanted.find()  # libraries that cannot be used, and why
    for path in found:
        try:
            return Library(_open(path), path, built=False)
        except NativeUnavailable as error:  # noqa: PERF203 - a handful of files
            refused[path] = str(error)
    compiler = toolchain.find_cxx()
    if compiler is None:
        raise NativeUnavailable("; ".join([*refused.values(), _no_compiler()]))
    try:
        path, built = _build(wanted, compiler, refused)
        return Library(_open(path), path, built)
    except KeyboardInterrupt:
        line.break_off()
        raise


def _attempt_cuda() -> Library:
    import torch

    if torch.version.hip:
        raise NativeUnavailable("this torch is built for ROCm; the compiled ops are for CUDA")
    (path,), built = device_code.obtain(*device_code.PROBE, torch.cuda.get_device_capability())
    return Library(driver.library(), path.parent, built)


def _open(path: Path) -> ctypes.CDLL:
    """Raises NativeUnavailable if the file cannot be loaded or lacks an op."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailable(f"the library cannot be loaded: {error}") from None
    lacking = [op for op in OPS["cpu"] if not hasattr(library, f"refine_{op}")]
    if lacking:
        raise NativeUnavailable(f"{path} has no function refine_{lacking[0]}")
    return library


def _build(wanted: Wanted, compiler: toolchain.Compiler, refused: Mapping[Path, str]) -> tuple[Path, bool]:
    """A library, and whether this process built it, not another one that was waited for."""
    limit, target = toolchain.time_limit(), wanted.targets[0]
    entry = op_cache.writable_folder(wanted.folder)
    ninja, log = toolchain.find_ninja(), entry / f"{target}.log"
    with op_cache.locked(entry, limit, lambda who: line.begin("cpu", f"waiting for {who}, which compiles them")):
        for path in wanted.find()[0]:
            if path not in refused:
                line.finish()
                return path, False
        line.begin("cpu", "compiling, once" + "".join(f" (not used: {reason})" for reason in refused.values()))
        start = time.monotonic()
        with op_cache.build_folder(entry) as folder:
            for name, source in wanted.sources.items():
                (folder / name).write_bytes(source)
            steps = op_builder.cpu_steps(OPS["cpu"], compiler, target, folder)
            library = op_builder.run(steps, folder, log, limit, ninja)
            try:
                _open(library)  # what does not load here does not get into the cache
            except NativeUnavailable as error:
                raise op_builder.BuildFailed(f"{error}; log: {log}") from None
            path = op_cache.keep(library, entry, target)
        how = "" if ninja else " without ninja, which was not found"
        line.end("cpu", f"done in {time.monotonic() - start:.1f} s{how}; kept in {entry}")
        return path, True
