"""The compiled ops: probe → build → load, once per process, at first use, never at import.

    load("bias_act") is the C library of torch_utils/ops/bias_act.cpp, or None, and then plain torch does the work.

A library lies in the cache as

    <cache folder>/<op>-<device>-<key>/<compiler>.<targets>.<checksum>.so

The key stands for everything on this machine that the library depends on: sources, flags, torch, CUDA, Python, C library
and, as -march=native is used, the processor's features: nodes that share a home folder do not share what would crash
there. The compiler is in the file's name instead, so a library is found where there is no compiler; the checksum tells
half a file from a whole one. Files appear whole, by renaming; the lock is the operating system's and dies with its process.

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
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch_utils import op_builder, toolchain
from torch_utils.toolchain import Compiler, CudaToolkit

MODES = ("auto", "native", "ref")
OPS = ("upfirdn2d", "bias_act")
SOURCES = Path(__file__).parent / "ops"

_mode: str | None = None  # None = as the environment says
_ready: dict[tuple[str, str], ctypes.CDLL | None] = {}  # what load() answers at once
_outcomes: dict[tuple[str, str], "Library | NativeUnavailable"] = {}  # of the one attempt, whatever the mode
_told: set[str] = set()  # reasons that were printed
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
        op: 'upfirdn2d' or 'bias_act'.
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
            library = obtain(op, device_type)
        except NativeUnavailable as error:
            if mode == "native":
                raise
            if device_type in ("cpu", "cuda"):  # elsewhere there is nothing to be missed
                _tell(
                    f"{op} ({device_type}): plain torch is used, the compiled op is not to be had: {error}", str(error)
                )
            return _ready.setdefault((op, device_type), None)
        return _ready.setdefault((op, device_type), library.cdll)


def obtain(op: str, device_type: str = "cpu") -> Library:
    """The library whatever the mode; from the cache or built, at most one attempt per process.

    Raises:
        NativeUnavailable: The reason, remembered.
    """
    with _mutex:
        if (op, device_type) not in _outcomes:
            try:
                _outcomes[op, device_type] = _attempt(op, device_type)
            except NativeUnavailable as error:
                _outcomes[op, device_type] = error
            except (toolchain.Missing, op_builder.BuildFailed, OSError) as error:
                _outcomes[op, device_type] = NativeUnavailable(" ".join(str(error).split()))
        outcome = _outcomes[op, device_type]
    if isinstance(outcome, NativeUnavailable):
        raise NativeUnavailable(str(outcome))
    return outcome


def _tell(line: str, reason: str) -> None:
    """One line on stderr per reason; of the processes of one node, from the first alone."""
    if reason not in _told and os.environ.get("LOCAL_RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
    _told.add(reason)


# ----------------------------------------------------------------------------------------------------------------------
# What is wanted, and what the cache has.


@dataclass(frozen=True)
class Wanted:
    """An op for a device of this machine, without a compiler: what a library must have been made from."""

    op: str
    device_type: str
    sources: dict[str, bytes]  # file name → text
    key: str
    capabilities: tuple[tuple[int, int], ...]  # of the GPUs here
    targets: tuple[str, ...]  # of TORCH_CUDA_ARCH_LIST; empty = not set

    @property
    def folder(self) -> str:
        return f"{self.op}-{self.device_type}-{self.key}"

    def accepts(self, targets: str) -> bool:
        """Whether a library for these targets runs here and is what was asked for."""
        if self.device_type == "cpu":
            return True
        have = targets.split("+")
        asked = not self.targets or set(have) == set(self.targets)
        return asked and all(toolchain.serves(have, gpu) for gpu in self.capabilities)


def describe_wanted(op: str, device_type: str) -> Wanted:
    """Reads the sources and asks torch.

    Raises:
        NativeUnavailable: There is no compiled op for this device, system or torch.
    """
    if device_type not in ("cpu", "cuda"):
        raise NativeUnavailable(f"there are no compiled ops for the device {device_type}")
    if os.name == "nt":
        raise NativeUnavailable("compiled ops are built on Linux and macOS only")
    import torch

    if device_type == "cuda" and getattr(torch.version, "hip", None):
        raise NativeUnavailable("this torch is built for ROCm; the compiled ops are for CUDA")
    main = SOURCES / f"{op}.{'cu' if device_type == 'cuda' else 'cpp'}"
    if not main.is_file():
        raise NativeUnavailable(f"{main} is missing; this installation is not complete")
    sources = {path.name: path.read_bytes() for path in (main, *sorted(SOURCES.glob("*.h")))}
    facts = [torch.__version__, sys.implementation.cache_tag, sys.platform, platform.machine(), _libc(), op]
    capabilities, targets = (), ()
    if device_type == "cuda":
        facts += [torch.version.cuda, op_builder.NVCC_FLAGS]
        targets = tuple(toolchain.parse_arch_list(os.environ.get("TORCH_CUDA_ARCH_LIST", "") or ""))
        if torch.cuda.is_available():
            capabilities = tuple(map(torch.cuda.get_device_capability, range(torch.cuda.device_count())))
    else:
        facts += [op_builder.CXX_FLAGS, op_builder.OPTIONAL_CXX_FLAGS, toolchain.cpu_features()]
    digest = hashlib.sha256(repr(facts).encode())
    for name, text in sources.items():
        digest.update(f"\0{name}\0{len(text)}\0".encode() + text)
    return Wanted(op, device_type, sources, digest.hexdigest()[:16], capabilities, targets)


def _libc() -> str:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, ValueError, OSError):  # no glibc
        return ""


def cache_folders() -> list[Path]:
    """Where libraries are looked for, and built in the first that can be written: the one that the environment names,
    the user's cache folder, a private folder below the temporary one."""
    folders = []
    if os.environ.get("REFINE_OPS_CACHE"):
        folders.append(Path(os.environ["REFINE_OPS_CACHE"]).expanduser())
    if os.environ.get("REFINE_CACHE"):
        folders.append(Path(os.environ["REFINE_CACHE"]).expanduser() / "ops")
    if sys.platform == "darwin":
        folders.append(Path("~/Library/Caches").expanduser() / "gan-refine" / "ops")
    else:
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        folders.append(Path(home).expanduser() / "gan-refine" / "ops")
    user = os.getuid() if hasattr(os, "getuid") else ""
    shared = Path(tempfile.gettempdir()) / f"gan-refine-ops-{user}"
    if not shared.exists() or _is_private(shared):
        folders.append(shared)
    return list(dict.fromkeys(map(Path.absolute, folders)))


def _is_private(folder: Path) -> bool:
    """Whether nobody else can have put a library there: code from it will be run."""
    stat = folder.lstat()
    return folder.is_dir() and not folder.is_symlink() and stat.st_uid == os.getuid() and not stat.st_mode & 0o022


@dataclass(frozen=True)
class Candidate:
    """A library in the cache, whole by its checksum."""

    path: Path
    compiler: str
    targets: str
    date: int  # nanoseconds


def find_candidates(wanted: Wanted) -> list[Candidate]:
    """Usable libraries, newest first in each folder of the cache."""
    found = []
    for base in cache_folders():
        here = []
        try:
            names = os.listdir(base / wanted.folder)
        except OSError:
            continue
        for name in names:
            parts = name.split(".")
            if len(parts) != 4 or parts[3] != "so" or not wanted.accepts(parts[1]):
                continue
            path = base / wanted.folder / name
            with contextlib.suppress(OSError):
                if _checksum(path) == parts[2]:
                    here.append(Candidate(path, parts[0], parts[1], path.stat().st_mtime_ns))
        found += sorted(here, key=lambda candidate: -candidate.date)
    return found


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _open(candidate: Candidate, op: str) -> ctypes.CDLL:
    """Raises OSError if the library cannot be loaded here or is no such op."""
    library = ctypes.CDLL(str(candidate.path))
    if not hasattr(library, f"refine_{op}"):
        raise OSError(f"{candidate.path}: undefined symbol: refine_{op}")
    return library


# ----------------------------------------------------------------------------------------------------------------------
# The one attempt.


def _attempt(op: str, device_type: str) -> Library:
    wanted = describe_wanted(op, device_type)
    compiler = _find_compiler(device_type)
    identity = compiler.identity if compiler else None
    candidates = find_candidates(wanted)
    # without a compiler, or on a GPU where an image was built for it, whatever runs here will do
    good = [c for c in candidates if identity in (None, c.compiler)]
    others = [c for c in candidates if c not in good]
    refused: list[Candidate] = []
    failure: Exception | None = None
    for candidate in good:
        try:
            return Library(_open(candidate, op), candidate.path, built=False)
        except OSError as error:
            refused.append(candidate)
            failure = error
    try:
        if compiler is None:
            raise failure or NativeUnavailable(_no_compiler(device_type))
        candidate, built = _build(wanted, compiler, refused)
        return Library(_open(candidate, op), candidate.path, built)
    except (toolchain.Missing, op_builder.BuildFailed, NativeUnavailable, OSError):
        for candidate in others:  # another compiler's library is better than none
            with contextlib.suppress(OSError):
                return Library(_open(candidate, op), candidate.path, built=False)
        raise


def _find_compiler(device_type: str) -> Compiler | None:
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


def _build(wanted: Wanted, compiler: Compiler, refused: list[Candidate]) -> tuple[Candidate, bool]:
    """A library by this compiler: built here, or by a process that was waited for."""
    if wanted.device_type == "cuda":
        toolkit = CudaToolkit.probe(compiler)
        op_builder.check_driver(toolkit)
        targets = list(wanted.targets) or toolchain.choose_targets(toolkit.targets, list(wanted.capabilities))
    else:
        toolkit, targets = None, ["native"]
    stem = f"{compiler.identity}.{'+'.join(targets)}"
    with _writable_entry(wanted) as entry, _locked(entry, wanted, stem):
        for candidate in find_candidates(wanted):
            if candidate.compiler == compiler.identity and candidate not in refused:
                return candidate, False
        for leftover in entry.glob(".build-*"):  # of builders that were killed: we hold the lock
            shutil.rmtree(leftover, ignore_errors=True)
        folder = entry / f".build-{os.getpid()}-{secrets.token_hex(4)}"
        folder.mkdir()
        failed = entry / f"{stem}.failed"
        start = time.monotonic()
        ninja = toolchain.find_ninja()
        try:
            for name, text in wanted.sources.items():
                (folder / name).write_bytes(text)
            if toolkit:
                commands = op_builder.cuda_commands(wanted.op, toolkit, targets)
            else:
                commands = op_builder.cpu_commands(wanted.op, compiler, folder)
            op_builder.run(commands, folder, entry / f"{stem}.log", _limit(), ninja)
            candidate = _keep(folder / f"{wanted.op}.so", entry, stem)
        except (toolchain.Missing, op_builder.BuildFailed, OSError) as error:
            with contextlib.suppress(OSError):  # for those who wait
                failed.write_text(str(error), encoding="utf-8")
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        failed.unlink(missing_ok=True)
        how = "" if ninja else " without ninja, which was not found"
        seconds = time.monotonic() - start
        line = f"{wanted.op} ({wanted.device_type}): compiled in {seconds:.1f} s{how}, kept in {entry}"
        _tell(line, line)
        return candidate, True


def _keep(library: Path, entry: Path, stem: str) -> Candidate:
    """Gives the finished library its name in the cache; broken ones of that name go."""
    if not library.is_file():
        raise op_builder.BuildFailed(f"the compiler left no library; log: {entry / f'{stem}.log'}")
    library.chmod(0o755 & ~_umask())
    with open(library, "rb") as file:
        os.fsync(file.fileno())
    checksum = _checksum(library)
    for old in entry.glob(f"{stem}.*.so"):
        old.unlink(missing_ok=True)
    target = entry / f"{stem}.{checksum}.so"
    os.replace(library, target)
    return Candidate(target, *stem.split("."), target.stat().st_mtime_ns)


def _umask() -> int:
    mask = os.umask(0o022)  # can only be read by setting it
    os.umask(mask)
    return mask


def _limit() -> float:
    text = os.environ.get("REFINE_OPS_TIMEOUT", "300")
    try:
        return float(text)
    except ValueError:
        raise NativeUnavailable(f"REFINE_OPS_TIMEOUT is {text!r}; expected seconds") from None


@contextlib.contextmanager
def _writable_entry(wanted: Wanted) -> Iterator[Path]:
    """The op's folder in the first cache that can be written."""
    reasons = []
    for base in cache_folders():
        entry = base / wanted.folder
        try:
            base.mkdir(parents=True, exist_ok=True, mode=0o700 if base.parent == Path(tempfile.gettempdir()) else 0o777)
            entry.mkdir(exist_ok=True)
            probe = entry / f".probe-{os.getpid()}-{secrets.token_hex(4)}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            reasons.append(f"{base}: {error.strerror}")
            continue
        yield entry
        return
    raise NativeUnavailable(f"no folder to keep it in ({'; '.join(reasons)}); set REFINE_OPS_CACHE")


@contextlib.contextmanager
def _locked(entry: Path, wanted: Wanted, stem: str) -> Iterator[None]:
    """One builder at a time. Its lock is released by the system when it ends, however it ends.

    Raises:
        NativeUnavailable: The limit was reached, or the process that was waited for failed to build it.
    """
    from filelock import FileLock, Timeout

    lock, owner = FileLock(entry / ".lock"), entry / ".builder"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        start, who = time.time(), _owner(owner)
        line = f"{wanted.op} ({wanted.device_type}): waiting for {who}, which compiles it"
        _tell(line, line)
        try:
            lock.acquire(timeout=_limit(), poll_interval=0.05)
        except Timeout:
            raise NativeUnavailable(f"{_owner(owner)} has been compiling it for {_limit():g} s") from None
        failed = entry / f"{stem}.failed"
        with contextlib.suppress(FileNotFoundError):
            if failed.stat().st_mtime >= start - 1:
                lock.release()
                raise NativeUnavailable(failed.read_text(encoding="utf-8")) from None
    except NotImplementedError:  # a file system without locks: two may build, the later one's file stays
        yield
        return
    try:
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        lock.release()


def _owner(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") or "another process"
    except OSError:
        return "another process"
