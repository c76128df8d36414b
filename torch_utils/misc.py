"""Small torch helpers."""

import resource
import sys

import torch


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
        """Count every element of `values` (any shape)."""
        values = torch.as_tensor(values, device=self._device).detach().flatten().float()
        count = torch.full([], float(values.numel()), device=self._device)
        self._add(name, values.sum(), count)

    def add_binned(self, names: list[str], bins: torch.Tensor, values: torch.Tensor) -> None:
        """Count `values` (N,) under `names[bins]`; bins are int64 (N,)."""
        sums = torch.zeros(len(names), device=self._device).index_add(0, bins, values.detach().float())
        counts = torch.zeros(len(names), device=self._device).index_add(0, bins, torch.ones_like(values))
        for name, total, count in zip(names, sums, counts, strict=True):
            self._add(name, total, count)

    def _add(self, name: str, total: torch.Tensor, count: torch.Tensor) -> None:
        pair = torch.stack([total, count])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def drain(self) -> dict[str, float]:
        """All means since the last call, names without a value left out, and begin anew."""
        if not self._sums:
            return {}
        pairs = torch.stack(list(self._sums.values())).tolist()  # the one synchronisation
        names = list(self._sums)
        self._sums = {}
        return {name: total / count for name, (total, count) in zip(names, pairs, strict=True) if count > 0}


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
