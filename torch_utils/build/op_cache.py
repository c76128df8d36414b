"""Where compiled libraries lie, how they are found, and that one process at a time builds them.

    <cache folder>/ops-<device>-<key>/<targets>.<checksum>.so

The key stands for everything that a library is made from, see `custom_ops.describe_wanted`; the checksum tells half a
file from a whole one. Files appear whole, by renaming.
"""

import contextlib
import hashlib
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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


def find(folder: str, accepts: Callable[[str], bool]) -> list[Path]:
    """Whole libraries whose targets are accepted, folder by folder of the cache, newest first."""
    found: list[Path] = []
    for entry in (base / folder for base in cache_folders() if _is_safe(base)):
        with contextlib.suppress(OSError):
            here = [path for path in entry.glob("*.*.so") if accepts(targets_of(path)) and _is_whole(path)]
            found += sorted(here, key=lambda path: -path.stat().st_mtime_ns)
    return found


def targets_of(path: Path) -> str:
    """What a library was compiled for: see `toolchain.cpu_targets`; GPU targets joined by +."""
    return path.name.split(".")[0]


def _is_whole(path: Path) -> bool:
    return checksum(path) == path.name.split(".")[1]


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def keep(library: Path, entry: Path, targets: list[str]) -> Path:
    """Gives a finished library its name in the cache; older ones for these targets go.

    Raises:
        OSError: It cannot be written.
    """
    with open(library, "rb") as file:
        os.fsync(file.fileno())
    stem = "+".join(targets)
    target = entry / f"{stem}.{checksum(library)}.so"
    os.replace(library, target)
    for old in entry.glob(f"{stem}.*.so"):
        if old != target:
            old.unlink(missing_ok=True)
    return target


def entries() -> list[Path]:
    """The folders of libraries in all caches, those of other versions and machines included."""
    found = (base.glob(f"ops-{device}-{'?' * 16}") for base in cache_folders() for device in ("cpu", "cuda"))
    return [path for paths in found for path in sorted(paths) if path.is_dir()]


def writable_folder(name: str = "") -> Path:
    """The folder of that name in the first cache that can be written; made where it is missing.

    Raises:
        CacheError: There is none; names all and why.
    """
    reasons = []
    for base in cache_folders():
        try:
            if not _is_safe(base):
                raise PermissionError(1, "belongs to somebody else")
            base.mkdir(parents=True, exist_ok=True, mode=0o700 if base == _temporary_folder() else 0o777)
            (base / name).mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=base / name):
                return base / name
        except OSError as error:  # noqa: PERF203 - a handful of folders
            reasons.append(f"{base}: {error.strerror}")
    raise CacheError(f"no folder to keep them in ({'; '.join(reasons)}); set REFINE_OPS_CACHE")


@contextlib.contextmanager
def build_folder(entry: Path) -> Iterator[Path]:
    """An empty folder to build in, under the lock. What builders that were killed left is removed first."""
    for leftover in entry.glob(".build-*"):  # nobody's: the lock is ours
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=entry, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextlib.contextmanager
def locked(entry: Path, limit: float, on_wait: Callable[[str], None]) -> Iterator[None]:
    """One builder at a time. The lock is the operating system's: released when its process ends, however it ends.

    An error inside is kept for the processes that wait: they need not fail in the same way one after the other.

    Args:
        entry: Folder of the library.
        limit: Seconds to wait at most.
        on_wait: Called once with the name of the process that is waited for.

    Raises:
        CacheError: The limit was reached, or the process that was waited for failed.
    """
    from filelock import FileLock, Timeout

    lock, owner, failure = FileLock(entry / ".lock"), entry / ".builder", entry / ".failed"
    start = time.time()
    waited = False
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waited = True
        on_wait(_owner(owner))
        try:
            lock.acquire(timeout=limit, poll_interval=0.05)
        except Timeout:
            raise CacheError(f"{_owner(owner)} has been compiling them for {limit:g} s or more") from None
    except (NotImplementedError, OSError):  # a file system without locks: two may build, either's file is right
        yield
        return
    try:
        if waited and failure.exists() and failure.stat().st_mtime >= start - 1:
            raise CacheError(failure.read_text(encoding="utf-8"))
        failure.unlink(missing_ok=True)
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        try:
            yield
        except Exception as error:
            with contextlib.suppress(OSError):
                failure.write_text(str(error), encoding="utf-8")
            raise
    finally:
        lock.release()


def _owner(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") or "another process"
    except OSError:
        return "another process"
