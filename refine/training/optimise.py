"""An optimiser step as every network takes it: gradients of all processes, loss scale, and no broken steps."""

from collections.abc import Iterable

import torch
from torch import nn

from refine.torch_utils import distributed
from refine.torch_utils.misc import gradient_norm
from refine.training.precision import LossScale

SIGNAL_EVERY = 16  # steps between two measurements of the gradient's signal, which keeps one gradient for one step


class GuardedAdam:
    """Adam that leaves out steps with NaN or infinite gradients.

    Args:
        parameters: What it updates.
        betas: Adam's.
        clip: Largest norm of all gradients together; larger ones are scaled down to it. None = no limit.
        precision: What the networks compute in; fp16 needs a loss scale.
        device: Where the parameters are.

    Attributes:
        adam: The optimiser itself.
        scale: What losses are multiplied with before backward.
        skips: Counts of the steps that were left out.
        steps: How many there were; they decide which are measured, in a resumed run, too.
        signal: After every `SIGNAL_EVERY`-th step, the share of the gradient that is no noise, else None.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        betas: tuple[float, float],
        clip: float | None,
        precision: str,
        device: torch.device,
    ):
        self.clip = clip
        self.parameters = list(parameters)
        on_device = device.type != "cpu"
        # eps as published; the rate is set before every step. Fused, Adam reads and writes its tensors once: 2.5 to 6
        # times as fast on a CPU. And it can skip a step without the host knowing.
        self.adam = torch.optim.Adam(self.parameters, betas=betas, eps=1e-8, fused=True)
        self._of_group = {"capturable": on_device}  # a CUDA graph may hold a step; what a state says does not count
        # A tensor where a graph is to see each step's own.
        self._rate: torch.Tensor | float = torch.zeros([], device=device) if on_device else 0.0
        self._filled = 0.0  # what it holds
        self.scale = LossScale(precision, device)
        self.skips = SkippedSteps(device)
        self.signal: torch.Tensor | None = None
        self._kept: list[torch.Tensor] = []  # norm and gradients of a step, now and then
        self._kept_in: int | None = None  # which step that was
        self._stays = on_device  # where gradients are kept: in the same place, for a graph's sake
        self.steps = 0

    def zero_grad(self) -> None:
        for parameter in self.parameters:  # as Adam does it, without asking torch's profiler
            parameter.grad = None

    def step(self, lr: float) -> torch.Tensor:
        """A step with the gradients summed over the processes, unless they are broken.

        Returns:
            Their norm before clipping.
        """
        self.begin(lr)
        norm = self.apply()
        self.end()
        return norm

    # A step in three: only what is between `begin` and `end` may be part of a CUDA graph.

    @property
    def phase(self) -> str:
        """'keep' in a step whose gradient is kept, 'compare' in one that is compared with it, else ''."""
        place = (self.steps + 2) % SIGNAL_EVERY  # the critic's steps 0, 4, … are penalised, and others look away
        if place == 1 and self._kept_in == self.steps - 1:
            return "compare"
        return "keep" if place == 0 else ""

    def begin(self, lr: float) -> None:
        if not isinstance(self._rate, torch.Tensor):
            self._rate = lr
        elif lr != self._filled:
            self._rate.fill_(lr)
            self._filled = lr

    def apply(self) -> torch.Tensor:
        """The step itself; returns the norm of the gradients before clipping."""
        distributed.sum_gradients(self.parameters)
        self.scale.unscale(self.parameters)
        norm = gradient_norm(self.parameters)
        self._compare(norm)
        self.scale.update(norm)
        if self.clip is not None:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            torch._foreach_mul_(gradients, (self.clip / norm).clamp(max=1))  # on the device: no waiting
        for group in self.adam.param_groups:
            group.update(self._of_group, lr=self._rate)
        self.skips.step(self.adam, norm)
        return norm

    def end(self) -> None:
        if self.phase == "keep":
            self._kept_in = self.steps
        elif not self._stays:
            self._kept = []
        self.steps += 1

    def forget(self) -> None:
        """Another state has been loaded."""
        self._kept, self._kept_in = [], None

    @torch.no_grad()
    def _compare(self, norm: torch.Tensor) -> None:
        """Sets `signal`: ⟨g, g'⟩ / ‖g‖ ‖g'‖ of two steps in a row, whose batches have nothing in common.

        Noise of the two batches cancels in the product, so that its mean is the squared norm of the true gradient over
        that of the measured one, SNR / (1 + SNR), as long as one step changes the true gradient little.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        self.signal, phase, before = None, self.phase, self._kept
        if phase == "keep":
            if len(before) != len(gradients) + 1:
                self._kept = [torch.empty_like(x) for x in (norm, *gradients)]
            torch._foreach_copy_(self._kept, [norm, *gradients])
        elif phase == "compare" and len(before) == len(gradients) + 1:
            products = [torch.sum(a * b) for a, b in zip(before[1:], gradients, strict=True)]
            self.signal = torch.stack(products).sum() / (before[0] * norm).clamp_min(1e-30)


class SkippedSteps:
    """Steps of an optimiser with NaN or infinite gradients are left out, and counted.

    One such gradient would end in Adam's moments and stay there. The counts live on the device.
    """

    def __init__(self, device: torch.device):
        self.counts = torch.zeros(2, dtype=torch.float64, device=device)  # in all, in a row until now

    def step(self, optimizer: torch.optim.Optimizer, norm: torch.Tensor) -> None:
        """A step of a fused optimiser if `norm`, that of all gradients, is finite."""
        broken = (norm - norm).ne_(0)  # 1 where it is NaN or infinite, else 0
        self.counts += broken
        self.counts[1].mul_(broken)
        # Decided on the device, without waiting for it: torch's fused optimisers look for these two.
        optimizer.grad_scale, optimizer.found_inf = None, broken  # type: ignore[attr-defined]
        optimizer.step()

    def read(self) -> tuple[int, int]:
        """(in all, in a row until now); a CPU–GPU synchronisation."""
        total, row = self.counts.tolist()
        return int(total), int(row)
