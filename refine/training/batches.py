"""What a training step begins with: latents and labels, drawn alike in every process, and cut into micro-batches."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from refine.pair import draw_labels
from refine.torch_utils import distributed
from refine.torch_utils.batch_slice import micro_batches


@dataclass(frozen=True)
class MicroBatch:
    """Latents (N, z_dim), labels (N, c_dim) or None, and the context in which the rest of its numbers is drawn."""

    z: torch.Tensor
    c: torch.Tensor | None
    drawing: AbstractContextManager


@dataclass(frozen=True)
class Fakes:
    """Images of the student as the teacher takes them, and the latents and labels that they came from."""

    x: torch.Tensor
    z: torch.Tensor
    c: torch.Tensor | None


@dataclass(frozen=True)
class Batches:
    """Makes the batches of a run.

    Attributes:
        G: The student, whose latents and labels are drawn.
        batch: Images per step, over all processes.
        size: Images at once, at most.
        label_prior: How often each class is drawn, (classes,); None = uniformly.
        teacher_classes: Number of the teacher's classes.
        null_label: Whether the teacher knows a missing label.
        device: Where numbers are drawn.
        once: Whether the first micro-batch draws for all, see `torch_utils.batch_slice`.
    """

    G: Any  # a module with z_dim and c_dim
    batch: int
    size: int
    label_prior: torch.Tensor | None
    teacher_classes: int
    null_label: bool
    device: torch.device
    once: bool = False

    def micro_batches(self) -> Iterator[MicroBatch]:
        """The micro-batches that make up this process's share of one batch.

        The numbers drawn do not depend on how the batch is cut; gradients differ by the order of additions only.
        The student's running mean of w, which every forward moves, becomes that of the whole batch, too.
        """
        z, c = self.latents()
        cut = distributed.world_size() > 1 or self.size < self.batch
        buffers = [buffer for buffer in self.G.buffers() if cut and buffer.is_floating_point()]
        before = [buffer.clone() for buffer in buffers]
        moves = [torch.zeros_like(buffer) for buffer in buffers]
        ways = micro_batches(
            self.batch, self.size, distributed.rank(), distributed.world_size(), self.device, self.once
        )
        for rows, drawing in ways:
            yield MicroBatch(z[rows], None if c is None else c[rows], drawing)
            share = (rows.stop - rows.start) / self.batch
            for move, buffer, old in zip(moves, buffers, before, strict=True):
                move.add_(buffer - old, alpha=share)
                buffer.copy_(old)
        distributed.sum_tensors(moves)
        for move, buffer in zip(moves, buffers, strict=True):
            buffer.add_(move)

    def latents(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Latents and labels of one whole batch, the same in every process."""
        c_dim = self.G.c_dim
        z = torch.randn(self.batch, self.G.z_dim, device=self.device)
        return z, draw_labels(self.batch, c_dim, self.label_prior, self.device) if c_dim else None

    def teacher_labels(self, c: torch.Tensor | None, n: int) -> torch.Tensor | None:
        """What teacher and aux are told of n images with the student's labels c, by the rules of `refine.pair`."""
        if self.teacher_classes and c is None and not self.null_label:
            return draw_labels(n, self.teacher_classes, self.label_prior, self.device)
        return c if self.teacher_classes else None
