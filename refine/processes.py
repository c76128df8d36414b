"""Programs under torchrun: all processes work together, and one of them speaks."""

import contextlib
import os
from collections.abc import Iterator


def is_first() -> bool:
    """Whether this process is the one that speaks; known without torch."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """For what is checked before processes join: the first one that fails complains, the others that fail exit with 2.

    Those that found nothing wrong learn the reason when they join.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        from refine.torch_utils import distributed  # torch

        if distributed.is_launched() and not distributed.speaks_for_all(str(error)):
            raise SystemExit(2) from None
        raise


@contextlib.contextmanager
def together(cuda: bool) -> Iterator[None]:
    """`torch_utils.distributed.session`, in which a failure ends all processes, and is reported once.

    Args:
        cuda: Whether gradients are exchanged between GPUs; without gradients, it does not matter.

    Raises:
        ConnectionError, LostProcess: Another process did not come, or was lost.
        SystemExit: The same, where another process says so.
    """
    from refine.torch_utils import distributed  # torch

    try:
        with distributed.session(cuda):
            yield
    except distributed.LostProcess as error:
        if error.told and not distributed.is_main():
            raise SystemExit(1) from None
        raise
