"""Small torch helpers."""

import contextlib
import resource
import sys
from collections.abc import Iterator

import torch

from refine.torch_utils.distributed import is_main, sum_tensor


class RunningMeans:
    """Means of named quantities, gathered on the device and read with one synchronisation.

    Adding never waits for the device; `drain` does, once for all names. Sums stay in the tensors that they were first
    made in, so that a CUDA graph can add to them.
    """

    def __init__(self, device: torch.device | str):
        self._device = device
        self._sums: dict[tuple[str, ...], torch.Tensor] = {}  # names → float32 (names, 2): sum, count
        self._loaded: dict[str, torch.Tensor] = {}  # name → (2,), until the name is added to

    def add(self, name: str, values: torch.Tensor | float) -> None:
        """Count every finite element of `values` (any shape)."""
        if not isinstance(values, torch.Tensor):
            values = torch.full([], values, device=self._device)  # a tensor of the host would be copied
        values = values.detach().float()
        finite = values.isfinite()
        pair = torch.stack([values.where(finite, 0.0).sum(), finite.sum(dtype=torch.float32)])
        self._add((name,), pair[None])

    def add_binned(self, names: list[str], bins: torch.Tensor, values: torch.Tensor) -> None:
        """Count finite `values` (N,) under `names[bins]`; bins are int64 (N,)."""
        values, finite = values.detach().float(), values.isfinite()
        pairs = torch.stack([values.where(finite, 0.0), finite.float()], dim=1)
        self._add(tuple(names), torch.zeros(len(names), 2, device=self._device).index_add_(0, bins, pairs))

    def _add(self, names: tuple[str, ...], pairs: torch.Tensor) -> None:
        if names in self._sums:
            self._sums[names] += pairs
            return
        if self._loaded:
            before = [self._loaded.pop(name, None) for name in names]
            pairs = torch.stack([torch.zeros_like(pairs[0]) if pair is None else pair for pair in before]) + pairs
        self._sums[names] = pairs

    def _pairs(self) -> dict[str, torch.Tensor]:
        """name → (2,); every process must come here."""
        rows = [(name, pair) for names, pairs in self._sums.items() for name, pair in zip(names, pairs, strict=True)]
        rows += self._loaded.items()
        if not rows:
            return {}
        total = sum_tensor(torch.stack([pair for _, pair in rows]))
        return dict(zip((name for name, _ in rows), total, strict=True))

    def drain(self) -> dict[str, float]:
        """All means since the last call over all processes, names without a value left out, and begin anew."""
        pairs = self._pairs()
        if not pairs:
            return {}
        numbers = torch.stack(list(pairs.values())).tolist()  # the one synchronisation
        for sums in self._sums.values():
            sums.zero_()
        self._loaded = {}
        return {name: total / count for name, (total, count) in zip(pairs, numbers, strict=True) if count > 0}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The sums of all processes so far; every process must come here."""
        return {name: pair.clone() for name, pair in self._pairs().items()}

    def load_state_dict(self, sums: dict[str, torch.Tensor]) -> None:
        """Go on from there: the first process holds what was gathered, the others begin at nothing."""
        self._sums = {}
        self._loaded = {name: pair.to(self._device) * float(is_main()) for name, pair in sums.items()}


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
