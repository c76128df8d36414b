"""Formatting for people, checksums, and folders that can be written to."""

import hashlib
import os
import stat
import tempfile
from pathlib import Path


def format_time(seconds: float) -> str:
    """Duration for people: `7s`, `3m 05s`, `2h 04m 09s`, `1d 03h 20m`; rounded to whole seconds.

    Raises:
        ValueError: the duration is not finite or is negative beyond rounding.
    """
    s = _whole(seconds, "a duration")
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m {s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h {s // 60 % 60:02d}m {s % 60:02d}s"
    return f"{s // 86400}d {s // 3600 % 24:02d}h {s // 60 % 60:02d}m"


def format_bytes(count: float) -> str:
    """Number of bytes in binary units: `512 B`, `1.50 KiB`, `12.3 MiB`, `226 MiB`; three significant digits.

    Raises:
        ValueError: the number is not finite or is negative beyond rounding.
    """
    scaled, unit = float(_whole(count, "a number of bytes")), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if float(_three_digits(scaled, unit)) < 1024:  # 1023.7 KiB would print as 1024 KiB: it is 1.00 MiB
            break
        scaled, unit = scaled / 1024, larger
    return f"{_three_digits(scaled, unit)} {unit}"


def read_text(path: str | os.PathLike, most: int) -> str:
    """Text of a small file that may come from anywhere: UTF-8, with a mark of byte order or without.

    Args:
        path: A pipe or a device, which would never end, is not waited for.
        most: Bytes that it may have.

    Raises:
        ValueError: It is no regular file, longer than that, or not UTF-8.
        OSError: It cannot be read.
    """
    if not stat.S_ISREG((status := os.stat(path)).st_mode) and not stat.S_ISDIR(status.st_mode):
        raise ValueError(f"{path} is not a regular file")
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path} is longer than {most} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text in UTF-8") from None


def _three_digits(value: float, unit: str) -> str:
    digits = 0 if unit == "B" or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f}"


def format_kimg(nimg: int) -> str:
    """Number of images in thousands, as run folders use it in file names: 123_456 → `000123`.

    Raises:
        ValueError: the number is negative.
    """
    if nimg < 0:
        raise ValueError(f"a number of images cannot be negative, got {nimg}")
    return f"{int(nimg) // 1000:06d}"


def _whole(value: float, what: str) -> int:
    if not -0.5 <= value < float("inf"):  # False for NaN as well
        raise ValueError(f"{what} must be finite and not negative, got {value}")
    return int(value + 0.5)


def sha256_of_file(path: str | os.PathLike) -> str:
    """SHA-256 of a file's contents as 64 lower-case hexadecimal digits.

    Raises:
        OSError: the file cannot be read, or is no regular file: a pipe would be waited for.
    """
    digest = hashlib.sha256()
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"{os.fspath(path)} is no regular file")
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_outdir(path: str | os.PathLike) -> Path:
    """The folder as a Path, if files can be written to it or it can be made; it is not made here.

    Raises:
        ValueError: Something else is there, or it cannot be written to.
    """
    folder = Path(path)
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise ValueError(f"{existing} is a file; expected a folder")
    for missing in (folder, *folder.absolute().parents):
        if missing.is_symlink() and not missing.exists():
            raise ValueError(f"{missing} is a link that leads nowhere; expected a folder")
    try:  # permissions alone do not tell, least of all root
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = f" ({error.strerror})" if error.strerror else ""
        raise ValueError(f"{existing} cannot be written to{reason}; expected a folder that can") from None
    return folder
