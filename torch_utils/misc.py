"""Small torch helpers."""

import contextlib
import math
import resource
import sys
from collections.abc import Iterator

import torch

from refine.torch_utils.distributed import is_main, sum_tensor

MOST_NAMES = 512  # of running means


class RunningMeans:
    """Means of named quantities, gathered on the device and read with one synchronisation.

    Adding never waits for the device; `drain` does, once for all names. All sums are rows of one tensor that stays
    where it is, so that a CUDA graph can add to them.
    """

    def __init__(self, device: torch.device | str):
        self._device = device
        self._rows: dict[str, int] = {}
        self._sums = torch.zeros(MOST_NAMES, 2, device=device)  # sum, count
        self._numbers: dict[str, list[float]] = {}  # what the host knows: sum, count
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []  # values, the rows that they go to
        self._together = False
        self._places: dict[tuple[str, ...], torch.Tensor] = {}  # names → their rows, on the device

    def add(self, name: str, values: torch.Tensor | float) -> None:
        """Count every finite element of `values` (any shape)."""
        if not isinstance(values, torch.Tensor):
            self._row(name)
            number = self._numbers.setdefault(name, [0.0, 0.0])
            if math.isfinite(values):
                number[0], number[1] = number[0] + values, number[1] + 1
            return
        self._add(values.flatten(), self._place([name]).expand(values.numel()))

    def add_binned(self, names: list[str], bins: torch.Tensor, values: torch.Tensor) -> None:
        """Count finite `values` (N,) under `names[bins]`; bins are int64 (N,)."""
        self._add(values, self._place(names)[bins])

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is added inside is counted at the end, in a few operators for all of it."""
        self._together, self._waiting = True, []
        try:
            yield
        finally:
            self._together = False
        self._count()

    def _row(self, name: str) -> int:
        row = self._rows.setdefault(name, len(self._rows))
        assert row < MOST_NAMES
        return row

    def _place(self, names: list[str]) -> torch.Tensor:
        key = tuple(names)
        if key not in self._places:  # filled there: a copy would wait for a GPU
            rows = [torch.full([1], self._row(name), device=self._device) for name in names]
            self._places[key] = torch.cat(rows)
        return self._places[key]

    def _add(self, values: torch.Tensor, rows: torch.Tensor) -> None:
        self._waiting.append((values.detach().float(), rows))
        if not self._together:
            self._count()

    def _count(self) -> None:
        if not self._waiting:
            return
        values, rows = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting.clear()
        finite = (values - values).eq_(0)  # in float32
        self._sums.index_add_(0, rows, torch.stack([values.nan_to_num_(0.0, 0.0, 0.0), finite], dim=1))

    def _pairs(self) -> dict[str, torch.Tensor]:
        """name → (2,); every process must come here."""
        if not self._rows:
            return {}
        numbers = torch.zeros(len(self._rows), 2)
        for name, pair in self._numbers.items():
            numbers[self._rows[name]] = torch.tensor(pair)
        total = sum_tensor(self._sums[: len(self._rows)] + numbers.to(self._device))
        return dict(zip(self._rows, total, strict=True))

    def drain(self) -> dict[str, float]:
        """All means since the last call over all processes, names without a value left out, and begin anew."""
        pairs = self._pairs()
        if not pairs:
            return {}
        numbers = torch.stack(list(pairs.values())).tolist()  # the one synchronisation
        self._sums.zero_()
        self._numbers = {}
        return {name: total / count for name, (total, count) in zip(pairs, numbers, strict=True) if count > 0}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The sums of all processes so far; every process must come here."""
        return {name: pair.clone() for name, pair in self._pairs().items()}

    def load_state_dict(self, sums: dict[str, torch.Tensor]) -> None:
        """Go on from there: the first process holds what was gathered, the others begin at nothing."""
        self._sums.zero_()
        self._numbers = {}
        for name, pair in sums.items():
            self._sums[self._row(name)] = pair.to(self._device) * float(is_main())


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """For as long as the block lasts, products of float32 on a GPU are not rounded to TF32, whatever a run computes in:
    what is measured does not depend on the program that measures it."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def gradient_norm(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """2-norm of all gradients together, a scalar on their device; 0 without any."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros([])
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak use in GiB so far: of the process ('cpumem') and, on CUDA, of the device ('gpumem', 'reserved')."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    result = {"cpumem": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    if device.type == "cuda":
        result["gpumem"] = torch.cuda.max_memory_allocated(device) / 2**30
        result["reserved"] = torch.cuda.max_memory_reserved(device) / 2**30
    return result
