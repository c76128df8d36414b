"""Small torch helpers."""

import contextlib
import resource
import sys
from collections.abc import Iterator

import torch

from refine.torch_utils.distributed import is_main, sum_tensor


class RunningMeans:
    """Means of named quantities, gathered on the device and read with one synchronisation.

    Adding never waits for the device; `drain` does, once for all names.
    """

    def __init__(self, device: torch.device | str):
        self._device = device
        self._sums: dict[
            str, torch.Tensor
        ] = {}  # name → [sum, count], float64 on the CPU, float32 on devices without it

    def add(self, name: str, values: torch.Tensor | float) -> None:
        """Count every finite element of `values` (any shape)."""
        if not isinstance(values, torch.Tensor):
            values = torch.full([], values, device=self._device)  # a tensor of the host would be copied
        values = values.detach().flatten().float()
        finite = values.isfinite()
        self._add(name, values.where(finite, 0.0).sum(), finite.sum().float())

    def add_binned(self, names: list[str], bins: torch.Tensor, values: torch.Tensor) -> None:
        """Count finite `values` (N,) under `names[bins]`; bins are int64 (N,)."""
        values, finite = values.detach().float(), values.isfinite()
        sums = torch.zeros(len(names), device=self._device).index_add(0, bins, values.where(finite, 0.0))
        counts = torch.zeros(len(names), device=self._device).index_add(0, bins, finite.float())
        for name, total, count in zip(names, sums, counts, strict=True):
            self._add(name, total, count)

    def _add(self, name: str, total: torch.Tensor, count: torch.Tensor) -> None:
        pair = torch.stack([total, count])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def drain(self) -> dict[str, float]:
        """All means since the last call over all processes, names without a value left out, and begin anew."""
        if not self._sums:
            return {}
        pairs = sum_tensor(torch.stack(list(self._sums.values()))).tolist()  # the one synchronisation
        names = list(self._sums)
        self._sums = {}
        return {name: total / count for name, (total, count) in zip(names, pairs, strict=True) if count > 0}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The sums of all processes so far; every process must come here."""
        return {name: sum_tensor(pair.clone()) for name, pair in self._sums.items()}

    def load_state_dict(self, sums: dict[str, torch.Tensor]) -> None:
        """Go on from there: the first process holds what was gathered, the others begin at nothing."""
        self._sums = {name: pair.to(self._device) * float(is_main()) for name, pair in sums.items()}


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
