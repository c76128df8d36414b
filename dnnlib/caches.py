"""Folders of caches: where they are, and whether what lies there can be anybody else's."""

import os
import stat
import sys
from pathlib import Path


def user_cache() -> Path:
    """The user's cache folder of this toolkit. A relative `$XDG_CACHE_HOME` is ignored, as its specification says.

    Raises:
        RuntimeError: the user has no home folder.
    """
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "gan-refine" / "Cache"
    named = os.environ.get("XDG_CACHE_HOME", "")
    if sys.platform != "darwin" and os.path.isabs(named):
        return Path(named) / "gan-refine"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "gan-refine"


def named_folder(variable: str) -> Path | None:
    """The absolute folder that an environment variable names, `~` being a home; None where it is not set, or empty.

    Raises:
        ValueError: It begins with the home of a user whom the system does not know.
    """
    named = os.environ.get(variable)
    try:
        return Path(named).expanduser().absolute() if named else None
    except RuntimeError:
        raise ValueError(f"{variable} is {named}, in the home of nobody known here; expected a folder") from None


def distrust(path: Path, base: Path) -> str | None:
    """Why what lies at `path`, in the cache `base`, may be somebody else's; None if it is the user's own.

    The base, the folders below it and the file itself must be the user's or root's, no links, and not writable by
    others; what is missing is nobody's. Windows does not tell whose a file is.
    """
    if not hasattr(os, "getuid"):
        return None
    steps = [base, *(parent for parent in reversed(path.parents) if parent.is_relative_to(base) and parent != base)]
    for step in [*steps, path] if path != base else steps:
        try:
            status = os.stat(step) if step == base else os.lstat(step)  # the user may have put a link to the cache
        except FileNotFoundError:
            return None
        except OSError as error:
            return f"{step} cannot be looked at ({error.strerror})"
        if status.st_uid not in (os.getuid(), 0):
            return f"{step} belongs to somebody else"
        if stat.S_ISLNK(status.st_mode):
            return f"{step} is a link"
        if status.st_mode & 0o002 or (status.st_mode & 0o020 and not _is_private(status.st_gid)):
            return f"{step} can be written to by others"
        if step == path and not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            return f"{step} is no regular file"
    return None


def make_folder(path: Path) -> None:
    """Makes a folder of a cache, and those above it, that nobody else can write to; what is there stays as it is.

    Raises:
        OSError: it cannot be made.
    """
    for step in (*reversed(path.parents), path):
        if not step.exists():
            step.mkdir(mode=0o755, exist_ok=True)


def keep_from_others(path: Path) -> None:
    """Takes a new file's write permission from everybody but the user, whatever the umask gave."""
    path.chmod(path.stat().st_mode & ~0o022)


def _is_private(gid: int) -> bool:
    """Whether a group has no member but this user, as many systems make one for each: their files may be 0664."""
    import grp
    import pwd

    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.getuid())
    except KeyError:  # whom the system does not know, as in containers, shares a group with nobody whom it knows
        return gid == os.getgid()
    return group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
