"""Exponential moving average of a network, counted in images."""

from collections.abc import Sequence

import torch
from torch import nn


def ema_beta(batch: int, nimg: int, halflife_kimg: float, rampup: float | None) -> float:
    """Decay of one update by `batch` images.

    Args:
        batch: Images of this step.
        nimg: Images trained on before it.
        halflife_kimg: Thousands of images after which a network's weight in the average has halved. 0 = no averaging.
        rampup: The half-life is at most this share of nimg, so that the start is soon forgotten. None = no limit.
    """
    halflife = halflife_kimg * 1000 if rampup is None else min(halflife_kimg * 1000, nimg * rampup)
    return 0.5 ** (batch / max(halflife, 1e-8))


@torch.no_grad()
def update_emas(betas: Sequence[tuple[nn.Module, float]], network: nn.Module) -> None:
    """ema ← beta · ema + (1 − beta) · network for parameters; buffers (such as truncation's w_avg) are copied."""
    current: list[torch.Tensor] = list(network.parameters())
    for ema, beta in betas:
        averaged: list[torch.Tensor] = list(ema.parameters())
        torch._foreach_lerp_(averaged, current, 1 - beta)
    kept: list[torch.Tensor] = [buffer for ema, _ in betas for buffer in ema.buffers()]
    if kept:
        torch._foreach_copy_(kept, list(network.buffers()) * len(betas))
