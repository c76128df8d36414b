"""Everything that is written to disk goes through here: whole files and lines behind the last one.

A name may be a link that somebody put there, or a device. So a link is followed only to a file beside it, nothing is
written to what is no regular file, and nothing but a regular file is replaced.
"""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

# What a full or failing disk says; writing and flushing do not add the name of the file.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
_UMASK = os.umask(0o022)  # can only be read by setting it; once, before there are threads
os.umask(_UMASK)


@contextlib.contextmanager
def replaced_atomically(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`; moves it there when the block ends well and removes it otherwise.

    A reader of `path` sees the old file or the whole new one, also after a crash. Errors of the disk name `path`.

    Raises:
        OSError: the folder does not exist or cannot be written, the disk is full, or `path` is a link to another
            folder, or no regular file.
    """
    target = _target(path)
    temporary = target.with_name(f".{target.name[:200]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with naming(target, temporary):
            yield temporary
            temporary.chmod(0o666 & ~_UMASK)  # some writers make private files
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())  # otherwise a power cut can leave the new name with no contents
            os.replace(temporary, _target(path))
    finally:
        with contextlib.suppress(OSError):  # what went wrong before is said
            temporary.unlink(missing_ok=True)


def append_text(path: str | os.PathLike, text: str) -> None:
    """Adds text to the end of a file, which is made if it is missing; names of files in it are the bytes that they are.

    Raises:
        OSError: as `replaced_atomically`.
    """
    target, data = _target(path), text.encode("utf-8", errors="surrogateescape")
    if target.exists() and target.stat().st_nlink > 1:  # another name of the file may lie anywhere: only this one grows
        with replaced_atomically(target) as temporary:
            temporary.write_bytes(target.read_bytes() + data)
        return
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with naming(target), open(os.open(target, flags, 0o666), "ab") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(f"{path} is no regular file; nothing was written to it")
        file.write(data)


@contextlib.contextmanager
def naming(target: Path, temporary: Path | None = None) -> Iterator[None]:
    """Errors of the disk that name no file, or the temporary one, name the target.

    Args:
        target: What is written; a folder for a writer of another library.
        temporary: What is written first.
    """
    try:
        yield
    except OSError as error:
        unnamed = error.filename is None and error.errno in _DISK
        if unnamed or (temporary is not None and str(temporary) in (str(error.filename), str(error.filename2))):
            error.filename = str(target)
            del error.filename2  # where the temporary file was copied from, or was to go
        raise


def _target(path: str | os.PathLike) -> Path:
    """Where `path` is written: its folder may be reached by links, its name may be one to a file of the same folder."""
    path = Path(path)
    folder = Path(os.path.realpath(path.parent))
    target = Path(os.path.realpath(folder / path.name))
    if target.parent != folder:
        raise OSError(f"{path} is a link to another folder; nothing was written through it")
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(target.lstat().st_mode):
            raise OSError(f"{path} is no regular file; nothing was written to it")
    return target
