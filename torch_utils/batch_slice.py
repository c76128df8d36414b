"""Random numbers of a batch that do not depend on how the batch is cut into micro-batches and processes."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class RowsOfBatch(TorchFunctionMode):
    """Inside, draws for rows start … stop−1 are made for the whole batch of `total` rows, and these rows are kept.

    A tensor drawn with stop − start rows is taken to be one number (or vector, …) per image. So every process and
    every micro-batch draws the same numbers in the same order, and image i meets the same ones however the batch is
    cut. The price is drawing what others use: a few nanoseconds a number, against the networks' microseconds a pixel.
    Covers torch.rand, randn, randint, multinomial with replacement, rand_like, randn_like and dropout; what a compiled
    graph draws inside itself is not seen. The rows are copied, so that those of others are not kept in memory.
    """

    def __init__(self, start: int, stop: int, total: int):
        super().__init__()
        self.start, self.stop, self.total = start, stop, total

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.randn, torch.rand):
            shape = args[0] if len(args) == 1 and not isinstance(args[0], int) else args
            if len(shape) > 0 and shape[0] == self.stop - self.start:
                return self._keep(func([self.total, *shape[1:]], **kwargs))
        elif func is torch.randint:
            *bounds, shape = args
            if len(shape) > 0 and shape[0] == self.stop - self.start:
                return self._keep(func(*bounds, [self.total, *shape[1:]], **kwargs))
        elif func is torch.multinomial and args[1] == self.stop - self.start:
            return self._keep(func(args[0], self.total, *args[2:], **kwargs))
        elif func in (torch.randn_like, torch.rand_like) and self._is_batch(args[0]):
            return self._keep(func(self._whole(args[0]), **kwargs))
        elif func is F.dropout and self._is_batch(args[0]):
            x, (p, training) = args[0], _dropout_arguments(*args[1:], **kwargs)
            return x * self._keep(F.dropout(torch.ones_like(self._whole(x)), p, training))
        return func(*args, **kwargs)

    def _is_batch(self, x: torch.Tensor) -> bool:
        return x.ndim > 0 and len(x) == self.stop - self.start

    def _whole(self, x: torch.Tensor) -> torch.Tensor:
        """Without values; its memory format is x's, because numbers are drawn in the order of memory."""
        last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        layout = torch.channels_last if last else torch.contiguous_format
        return torch.empty([self.total, *x.shape[1:]], dtype=x.dtype, device=x.device, memory_format=layout)

    def _keep(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.start : self.stop].clone()


def _dropout_arguments(p: float = 0.5, training: bool = True, inplace: bool = False) -> tuple[float, bool]:
    return p, training


def micro_batches(
    total: int, size: int, rank: int, world_size: int, device: torch.device
) -> Iterator[tuple[slice, contextlib.AbstractContextManager]]:
    """The rows of each micro-batch of this process, and the context in which they draw their random numbers.

    Every micro-batch begins at the same state of the default generator, and so all end at the same one: that of one
    process with one large batch.

    Args:
        total: Images in the whole batch, a multiple of world_size.
        size: Images in a micro-batch, at most.
        rank, world_size: Which of how many processes this is.
        device: Whose default generator is drawn from.
    """
    share = total // world_size
    if share == total <= size:  # the whole batch at once: nothing to arrange
        yield slice(0, total), contextlib.nullcontext()
        return
    generator = _generator(device)
    before = generator.get_state()
    for start in range(rank * share, (rank + 1) * share, size):
        stop = min(start + size, (rank + 1) * share)
        generator.set_state(before)
        yield slice(start, stop), RowsOfBatch(start, stop, total)


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index if device.index is not None else torch.cuda.current_device()]
    return torch.default_generator
