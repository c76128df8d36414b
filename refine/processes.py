"""Commands under torchrun: all processes work together, and one of them speaks."""

import contextlib
import os
from collections.abc import Iterator

import click


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Of several processes that were given the same wrong options, the first one complains."""
    try:
        yield
    except (ValueError, OSError):
        if os.environ.get("RANK", "0") != "0":
            raise click.exceptions.Exit(2) from None
        raise


@contextlib.contextmanager
def together(cuda: bool) -> Iterator[None]:
    """`torch_utils.distributed.session`, in which a failure ends all processes, and is told once.

    Args:
        cuda: Whether gradients are exchanged between GPUs; without gradients, it does not matter.

    Raises:
        ConnectionError, LostProcess: Another process did not come, or was lost.
    """
    from refine.torch_utils import distributed  # torch

    try:
        with distributed.session(cuda):
            yield
    except distributed.LostProcess as error:
        if error.told and not distributed.is_main():
            raise click.exceptions.Exit(1) from None
        raise
