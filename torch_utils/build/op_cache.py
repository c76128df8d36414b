"""Where compiled code lies, how it is found, and that one process at a time builds it.

    <cache folder>/ops-cpu-<key>/<target>.<checksum>.so
    <cache folder>/ops-cuda-<key>/<kernel>.<target>.<checksum>.image

The key stands for everything that a file is made from, see `custom_ops.describe_wanted` and `device_code.read`; the
checksum tells half a file from a whole one. Files appear whole, by renaming.
"""

import contextlib
import hashlib
import os
import shutil
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from refine.dnnlib import distrust, keep_from_others, make_folder, named_folder, user_cache


class CacheError(RuntimeError):
    """No folder, or no turn within the limit; one line for people."""


def cache_folders() -> list[Path]:
    """Where libraries are looked for, and built in the first that can be written: the one that the environment names,
    the user's cache folder, a private folder below the temporary one."""
    folders = []
    if (ours := named_folder("REFINE_OPS_CACHE")) is not None:
        folders.append(ours)
    if (common := named_folder("REFINE_CACHE")) is not None:
        folders.append(common / "ops")
    with contextlib.suppress(RuntimeError):  # a user without a home folder
        folders.append(user_cache() / "ops")
    if hasattr(os, "getuid"):  # Windows cannot tell whose a folder is
        folders.append(_temporary_folder())
    return list(dict.fromkeys(map(Path.absolute, folders)))


def _temporary_folder() -> Path:
    return Path(tempfile.gettempdir()).absolute() / f"gan-refine-ops-{getattr(os, 'getuid', str)()}"


def find(folder: str, pattern: str, accepts: Callable[[str], bool], passed_over: dict[Path, str]) -> list[Path]:
    """Whole files whose target is accepted, folder by folder of the cache, newest first.

    Args:
        folder: Of the files, below each cache folder.
        pattern: Of their names.
        accepts: Of a file's target.
        passed_over: What was not looked into, and why, is noted here: code is run only from where nobody else can
            have put it.
    """
    found: list[Path] = []
    for base in cache_folders():
        try:
            entries = sorted((base / folder).glob(pattern), key=_age)
        except OSError as error:
            passed_over[base / folder] = f"{base / folder}: {error.strerror}"
            continue
        for path in (entry for entry in entries if accepts(target_of(entry))):
            if reason := distrust(path, base) or _damage(path):
                passed_over[path] = reason
            else:
                found.append(path)
    return found


def _age(path: Path) -> int:
    return -path.lstat().st_mtime_ns


def target_of(path: Path) -> str:
    """What a file was compiled for: one of `toolchain.cpu_targets`; sm_90, ptx_90."""
    return path.name.split(".")[-3]


def _damage(path: Path) -> str | None:
    """What is wrong with a file: the system's loader would crash on a library that is cut off."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return f"{path}: {error.strerror}"
    if hashlib.sha256(data).hexdigest()[:16] != path.name.split(".")[-2]:
        return f"{path} does not have its checksum"
    if data[:4] == b"\x7fELF" and not _is_whole_elf(data):
        return f"{path} is cut off"
    return None


def _is_whole_elf(data: bytes) -> bool:
    """Whether all segments and sections that a 64-bit ELF file names lie within it."""
    if len(data) < 64 or data[4:6] not in (b"\x02\x01", b"\x02\x02"):
        return False
    order = "<" if data[5] == 1 else ">"
    segments, sections = struct.unpack(f"{order}2Q", data[32:48])
    segment_size, segment_count, section_size, section_count = struct.unpack(f"{order}4H", data[54:62])
    if segment_size != 56 or segments + 56 * segment_count > len(data):
        return False
    if sections + section_size * section_count > len(data):
        return False
    places = (struct.unpack_from(f"{order}8xQ16xQ", data, segments + 56 * index) for index in range(segment_count))
    return all(start + length <= len(data) for start, length in places)


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def keep(made: Path, entry: Path, stem: str) -> Path:
    """Gives a finished file its name in the cache, `stem`, checksum, suffix; older ones of this stem go.

    Raises:
        OSError: It cannot be written.
    """
    with open(made, "rb") as file:
        os.fsync(file.fileno())
    target = entry / f"{stem}.{checksum(made)}{made.suffix}"
    keep_from_others(made)
    os.replace(made, target)
    for old in entry.glob(f"{stem}.*{made.suffix}"):
        if old != target:
            old.unlink(missing_ok=True)
    return target


def entries() -> list[Path]:
    """The folders of compiled code in all caches, those of other versions and machines included."""
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
            make_folder(base / name)
            if reason := distrust(base / name, base):
                reasons.append(f"{reason}, so code from there is not run")
                continue
            with tempfile.TemporaryFile(dir=base / name):
                return base / name
        except OSError as error:
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
