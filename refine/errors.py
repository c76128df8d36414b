"""What a user can put right is a ValueError or OSError whose message begins with the option to change."""

import contextlib
from collections.abc import Iterator


def describe_os_error(error: OSError) -> str:
    """`path: reason`, without error numbers and Python's quoting."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename is not None else reason


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
