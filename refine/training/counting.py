"""Counts what an iteration computes and keeps, without computing it: the networks are on PyTorch's meta device, where
tensors have shapes but no numbers. Nothing of this depends on the machine that it is counted on.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from refine.config import RefineConfig
from refine.networks.bases import Denoiser, Generator
from refine.training.adversary import Others
from refine.training.trainer import Trainer

# Peak of an H100 SXM in 10¹² operations a second, as its maker states it, without sparsity.
H100_PEAK = {"fp32": 67.0, "tf32": 495.0, "bf16": 989.0, "fp16": 989.0}
H100_SHARE = 0.4  # of it, which a run is assumed to sustain
_BATCH = 2


@dataclass(frozen=True)
class Counted:
    """What an iteration takes.

    Attributes:
        flops_per_image: Multiplications and additions of convolutions, matrix products and attention in an iteration,
            backward passes included, for each image of the batch; without the penalty of every fourth step of a critic.
        warm_up_flops_per_image: The same of a warm-up step.
        fixed_bytes: Weights, gradients, averages and Adam's moments, in float32.
        bytes_per_image: What the larger of the backward passes needs of each image that is computed at once.
    """

    flops_per_image: float
    warm_up_flops_per_image: float
    fixed_bytes: int
    bytes_per_image: float

    def flops(self, config: RefineConfig) -> float:
        """Of a whole run."""
        warm_up = config.warmup_steps * config.batch * self.warm_up_flops_per_image
        return warm_up + config.num_steps * config.batch * self.flops_per_image

    def memory(self, config: RefineConfig) -> float:
        """Bytes that a GPU needs at least, with --batch-gpu images at once; convolutions take more."""
        return self.fixed_bytes + (config.batch_gpu or config.batch) * self.bytes_per_image

    def h100_hours(self, config: RefineConfig, share: float = H100_SHARE) -> float:
        """Hours of a whole run on an H100 that sustains this share of its peak at --precision; an assumption."""
        return self.flops(config) / (share * H100_PEAK[h100_precision(config)] * 1e12) / 3600


def h100_precision(config: RefineConfig) -> str:
    """What --precision is on an H100."""
    return "bf16" if config.precision == "auto" else config.precision


def weightless(network: Any) -> Any:
    """A copy of a module on the meta device; its weights are not copied."""
    memo: dict[int, Any] = {}
    for parameter in network.parameters():
        memo[id(parameter)] = torch.nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    for buffer in network.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(network, memo)


def meta_trainer(
    config: RefineConfig,
    student: Generator,
    teacher: Denoiser,
    guide: Denoiser | None = None,
    others: Others | None = None,
) -> Trainer:
    """The trainer of a run as an H100 has it, on the meta device, with a batch of a few images."""
    options = {**config.as_dict(), "batch": _BATCH, "batch_gpu": None, "precision": h100_precision(config)}
    return Trainer(RefineConfig.from_dict(options), student, teacher, "meta", others, guide)


def count(trainer: Trainer) -> Counted:
    """Makes a warm-up step and an iteration of a trainer on the meta device."""
    for optimizer in trainer.optimizers.values():  # Adam has no matrix products; fused, it takes no meta tensors
        optimizer.apply = lambda: torch.zeros([], device="meta")  # type: ignore[method-assign]
    critic = trainer.adversary.critic if trainer.adversary else torch.nn.Module()
    networks = (trainer.G, trainer.aux, trainer.teacher, critic)
    kept = _Kept({p.untyped_storage()._cdata for network in networks for p in network.parameters()})
    for name in ("aux_step", "critic_step", "student_step"):
        setattr(trainer, name, kept.watched(getattr(trainer, name)))
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        with _Operations() as warm_up:
            trainer.warm_up_step()
        with _Operations() as iteration:
            trainer.step()
    student, aux, asked, judging = (sum(p.numel() for p in network.parameters()) for network in networks)
    averages = max(len(trainer.averages.networks), 1)
    batch = trainer.config.batch
    return Counted(
        flops_per_image=iteration.total / batch,
        warm_up_flops_per_image=warm_up.total / batch,
        fixed_bytes=4 * (student * (4 + averages) + 4 * (aux + judging) + asked),  # weight, gradient, Adam's two
        bytes_per_image=kept.peak / batch,
    )


class _Operations(TorchDispatchMode):
    """Adds up what PyTorch's own formulas say of each operation. Its `FlopCounterMode` also notes the module of each,
    with hooks that do not go with gradients of gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func.overloadpacket)
        if formula is None:
            with self:  # of the operations that it consists of
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result


class _Kept:
    """Adds up what backward passes need: each storage once, the most that one step keeps.

    Args:
        known: Storages that are there anyway.
    """

    def __init__(self, known: set[int]):
        self.bytes = self.peak = 0
        self._known, self._seen = known, dict[int, torch.Tensor]()

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known and storage._cdata not in self._seen:
            self._seen[storage._cdata] = tensor  # alive, so that no other storage takes its place
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
        return tensor

    def watched(self, step: Any) -> Any:
        """A step that begins with nothing kept."""

        def begun(*args: Any, **options: Any) -> Any:
            self.bytes, self._seen = 0, {}
            return step(*args, **options)

        return begun
