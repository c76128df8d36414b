"""Where compiled libraries lie, how they are found, and that one process at a time builds them.

    <cache folder>/<op>-<device>-<key>/<compiler>.<targets>.<checksum>.so

The key stands for everything on this machine that the library depends on, see `custom_ops.describe_wanted`. The
compiler is in the file's name instead, so that a library is found where there is no compiler; the checksum tells half a
file from a whole one. Files appear whole, by renaming.
"""

import contextlib
import hashlib
import os
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


class CacheError(RuntimeError):
    """No folder, or no turn within the limit; one line for people."""


def cache_folders() -> list[Path]:
    """Where libraries are looked for, and built in the first that can be written: the one that the environment names,
    the user's cache folder, a private folder below the temporary one."""
    folders = []
    if os.environ.get("REFINE_OPS_CACHE"):
        folders.append(Path(os.environ["REFINE_OPS_CACHE"]).expanduser())
    if os.environ.get("REFINE_CACHE"):
        folders.append(Path(os.environ["REFINE_CACHE"]).expanduser() / "ops")
    home = "~/Library/Caches" if sys.platform == "darwin" else os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    with contextlib.suppress(RuntimeError):  # a user without a home folder
        folders.append(Path(home).expanduser() / "gan-refine" / "ops")
    if hasattr(os, "getuid"):  # Windows cannot tell whose a folder is
        folders.append(_temporary_folder())
    return list(dict.fromkeys(map(Path.absolute, folders)))


def _temporary_folder() -> Path:
    return Path(tempfile.gettempdir()).absolute() / f"gan-refine-ops-{getattr(os, 'getuid', str)()}"


def _is_safe(base: Path) -> bool:
    """Whether code from this folder may be run: nobody else can have put it into the one below /tmp."""
    if base != _temporary_folder() or not os.path.lexists(base):
        return True
    stat = base.lstat()
    return not base.is_symlink() and stat.st_uid == os.getuid() and not stat.st_mode & 0o022


@dataclass(frozen=True)
class Candidate:
    """A library in the cache, whole by its checksum."""

    path: Path
    compiler: str  # see toolchain.Compiler.identity
    targets: str  # of a CPU, see toolchain.cpu_targets; GPU targets joined by +


def find_candidates(folder: str, accepts: Callable[[str], bool]) -> list[Candidate]:
    """Whole libraries whose targets are accepted, folder by folder of the cache, newest first."""
    found = []
    for entry in (base / folder for base in cache_folders() if _is_safe(base)):
        try:
            names = os.listdir(entry)
        except OSError:
            continue
        here = [c for c in (_candidate(entry / name) for name in names) if c and accepts(c[0].targets)]
        found += [candidate for candidate, _ in sorted(here, key=lambda item: -item[1])]
    return found


def _candidate(path: Path) -> tuple[Candidate, int] | None:
    """(library, date), if the file is one and nothing is missing from it."""
    parts = path.name.split(".")
    if len(parts) != 4 or parts[3] != "so":
        return None
    try:
        if checksum(path) != parts[2]:
            return None
        return Candidate(path, parts[0], parts[1]), path.stat().st_mtime_ns
    except OSError:
        return None


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def keep(library: Path, entry: Path, stem: str) -> Candidate:
    """Gives a finished library its name in the cache; older ones of this compiler and targets go.

    Raises:
        OSError: No such file, or it cannot be written.
    """
    with open(library, "rb") as file:
        os.fsync(file.fileno())
    target = entry / f"{stem}.{checksum(library)}.so"
    os.replace(library, target)
    for old in entry.glob(f"{stem}.*.so"):
        if old != target:
            old.unlink(missing_ok=True)
    return Candidate(target, *stem.split("."))


def writable_folder(name: str = "") -> Path:
    """The folder of that name in the first cache that can be written; made where it is missing.

    Raises:
        CacheError: There is none; names all and why.
    """
    reasons = []
    for base in cache_folders():
        folder = base / name
        probe = folder / f".probe-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            if not _is_safe(base):
                raise PermissionError(1, "belongs to somebody else")
            base.mkdir(parents=True, exist_ok=True, mode=0o700 if base == _temporary_folder() else 0o777)
            folder.mkdir(exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            reasons.append(f"{base}: {error.strerror}")
            continue
        return folder
    raise CacheError(f"no folder to keep it in ({'; '.join(reasons)}); set REFINE_OPS_CACHE")


@contextlib.contextmanager
def locked(entry: Path, stem: str, limit: float, on_wait: Callable[[str], None]) -> Iterator[None]:
    """One builder at a time. The lock is the operating system's: released when its process ends, however it ends.

    Args:
        entry: Folder of the op.
        stem: What is going to be built, for `record_failure`.
        limit: Seconds to wait at most.
        on_wait: Called once with the name of the process that is waited for.

    Raises:
        CacheError: The limit was reached, or the process that was waited for failed to build the same.
    """
    from filelock import FileLock, Timeout

    lock, owner = FileLock(entry / ".lock"), entry / ".builder"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        start = time.time()
        on_wait(_owner(owner))
        try:
            lock.acquire(timeout=limit, poll_interval=0.05)
        except Timeout:
            raise CacheError(f"{_owner(owner)} has been compiling it for {limit:g} s or more") from None
    except (NotImplementedError, OSError):  # a file system without locks: two may build, either's file is right
        yield
        return
    else:
        start = None
    try:
        failure = _failure_file(entry, stem)
        if start is not None and failure.exists() and failure.stat().st_mtime >= start - 1:
            raise CacheError(failure.read_text(encoding="utf-8"))
        failure.unlink(missing_ok=True)
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        lock.release()


def record_failure(entry: Path, stem: str, reason: str) -> None:
    """For the processes that wait: they need not fail in the same way one after the other."""
    with contextlib.suppress(OSError):
        _failure_file(entry, stem).write_text(reason, encoding="utf-8")


def _failure_file(entry: Path, stem: str) -> Path:
    return entry / f"{stem}.failed"


def _owner(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") or "another process"
    except OSError:
        return "another process"
