"""What a user can put right is a ValueError or OSError whose message begins with the option to change."""

import contextlib
import os
import sys
from collections.abc import Iterator


def describe_os_error(error: OSError) -> str:
    """`path: reason`, without error numbers and Python's quoting."""
    reason = error.strerror or str(error) or type(error).__name__
    name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
    return reason if name is None else f"{name}: {reason}"


def describe_missing_package(error: ImportError) -> str:
    """Which package this Python lacks, and where it is: mostly, the environment is not active."""
    name = (error.name or str(error)).partition(".")[0]
    return (
        f"{sys.executable} has no package {name}; activate the environment that has the toolkit (the one of "
        f"`make setup`: . .venv/bin/activate), or install the toolkit in this one (python -m pip install .)"
    )


@contextlib.contextmanager
def option(name: str) -> Iterator[None]:
    """Puts the option's name before the message of a ValueError or OSError raised inside: `--gan: x.pkl is a text
    file`.

    A message that already begins with an option's name is left alone.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        message = describe_os_error(error) if isinstance(error, OSError) else str(error)
        raise ValueError(message if message.startswith("--") else f"{name}: {message}") from error
