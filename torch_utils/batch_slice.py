"""Random numbers of a batch that do not depend on how the batch is cut into micro-batches and processes."""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class Draws:
    """What was drawn for a whole batch, in order; made by the first part of the batch, and handed to the others."""

    def __init__(self) -> None:
        self._made: list[torch.Tensor] = []
        self._next = 0
        self._complete = False

    def next_part(self) -> None:
        """The following draws are for another part of the same batch."""
        self._complete, self._next = self._complete or bool(self._made), 0

    def __call__(self, draw: Callable[[], torch.Tensor]) -> torch.Tensor:
        if not self._complete:
            self._made.append(draw())
        self._next += 1
        if self._next > len(self._made):
            raise RuntimeError("a part of the batch draws more random numbers than the first one did")
        return self._made[self._next - 1]


class RowsOfBatch(TorchFunctionMode):
    """Inside, draws for rows start … stop−1 are made for the whole batch of `total` rows, and these rows are kept.

    A tensor drawn with stop − start rows is taken to be one number (or vector, …) per image. So every process and
    every micro-batch draws the same numbers in the same order, and image i meets the same ones however the batch is
    cut. The price is drawing what others use: a few nanoseconds a number, against the networks' microseconds a pixel.
    Covers torch.rand, randn, randint, multinomial with replacement, rand_like, randn_like and dropout; what a compiled
    graph draws inside itself is not seen. The rows are copied, so that those of others are not kept in memory.

    Args:
        start, stop, total: The rows.
        draws: Where draws are kept for the other parts of the batch; None = every part draws anew.
    """

    def __init__(self, start: int, stop: int, total: int, draws: Draws | None = None):
        super().__init__()
        self.start, self.stop, self.total = start, stop, total
        self._draws = draws

    def __enter__(self):
        if self._draws is not None:
            self._draws.next_part()
        return super().__enter__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.randn, torch.rand):
            shape = args[0] if len(args) == 1 and not isinstance(args[0], int) else args
            if self._are_rows(shape):
                return self._rows(lambda: func([self.total, *shape[1:]], **kwargs))
        elif func is torch.randint:
            *bounds, shape = args
            if self._are_rows(shape):
                return self._rows(lambda: func(*bounds, [self.total, *shape[1:]], **kwargs))
        elif func is torch.multinomial and args[1] == self.stop - self.start:
            return self._rows(lambda: func(args[0], self.total, *args[2:], **kwargs))
        elif func in (torch.randn_like, torch.rand_like) and self._are_rows(args[0].shape):
            return self._rows(lambda: func(self._whole(args[0]), **kwargs))
        elif func is F.dropout and self._are_rows(args[0].shape):
            x, (p, training) = args[0], _dropout_arguments(*args[1:], **kwargs)
            return x * self._rows(lambda: F.dropout(torch.ones_like(self._whole(x)), p, training))
        if self._draws is not None and func in _RANDOM:  # of no batch, and the same in all parts
            return self._draws(lambda: func(*args, **kwargs)).clone()
        return func(*args, **kwargs)

    def _are_rows(self, shape: torch.Size | tuple[int, ...]) -> bool:
        return len(shape) > 0 and shape[0] == self.stop - self.start

    def _whole(self, x: torch.Tensor) -> torch.Tensor:
        """Without values; its memory format is x's, because numbers are drawn in the order of memory."""
        last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        layout = torch.channels_last if last else torch.contiguous_format
        return torch.empty([self.total, *x.shape[1:]], dtype=x.dtype, device=x.device, memory_format=layout)

    def _rows(self, draw: Callable[[], torch.Tensor]) -> torch.Tensor:
        whole = draw() if self._draws is None else self._draws(draw)
        return whole[self.start : self.stop].clone()


_RANDOM = (torch.randn, torch.rand, torch.randint, torch.multinomial, torch.randn_like, torch.rand_like, F.dropout)


def _dropout_arguments(p: float = 0.5, training: bool = True, inplace: bool = False) -> tuple[float, bool]:
    return p, training


def micro_batches(
    total: int, size: int, rank: int, world_size: int, device: torch.device, once: bool = False
) -> Iterator[tuple[slice, contextlib.AbstractContextManager]]:
    """The rows of each micro-batch of this process, and the context in which they draw their random numbers.

    Every micro-batch draws the same numbers for the whole batch, and so all end at the same state of the default
    generator: that of one process with one large batch.

    Args:
        total: Images in the whole batch, a multiple of world_size.
        size: Images in a micro-batch, at most.
        rank, world_size: Which of how many processes this is.
        device: Whose default generator is drawn from.
        once: The first micro-batch draws for all, and the numbers are kept meanwhile. False = every micro-batch draws
            them again, for which the generator is put back: that cannot be part of a CUDA graph.
    """
    share = total // world_size
    if share == total <= size:  # the whole batch at once: nothing to arrange
        yield slice(0, total), contextlib.nullcontext()
        return
    again = not once and size < share
    generator, draws = _generator(device), Draws() if once else None
    before = generator.get_state() if again else None
    for start in range(rank * share, (rank + 1) * share, size):
        stop = min(start + size, (rank + 1) * share)
        if before is not None:
            generator.set_state(before)
        yield slice(start, stop), RowsOfBatch(start, stop, total, draws)


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index if device.index is not None else torch.cuda.current_device()]
    return torch.default_generator
