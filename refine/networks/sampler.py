"""Sampling from a denoiser with EDM's algorithms 1 and 2 (Karras et al. 2022), deterministic unless churned."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch

from refine.networks.bases import Denoiser


def karras_sigmas(
    num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80, rho: float = 7, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Noise levels from sigma_max down to sigma_min, evenly spaced in sigma^(1/rho) (EDM, eq. 5, without its final 0).

    Returns:
        float64, (num_steps,).

    Raises:
        ValueError: If num_steps < 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}, expected at least 1.")
    ramp = torch.arange(num_steps, dtype=torch.float64, device=device) / max(num_steps - 1, 1)
    start, end = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (start + ramp * (end - start)) ** rho


@torch.no_grad()
def heun_sampler(
    net: Denoiser,
    latents: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    *,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80,
    rho: float = 7,
    S_churn: float = 0,
    S_min: float = 0,
    S_max: float = math.inf,
    S_noise: float = 1,
    solver: str = "heun",
    randn_like: Callable[[torch.Tensor], torch.Tensor] = torch.randn_like,
) -> torch.Tensor:
    """Turn unit noise into images: Heun's method along the probability-flow ODE (EDM, algorithms 1 and 2).

    Costs 2 · num_steps − 1 evaluations of the network (num_steps with Euler). Guidance is not included.

    Args:
        net: Denoiser in eval mode. Its sigma range and rounding are kept to.
        latents: Unit noise, (N, C, R, R).
        class_labels: One-hot rows (N, label_dim) or None.
        num_steps: Number of noise levels.
        sigma_min, sigma_max, rho: The schedule, see `karras_sigmas`; clamped to the network's range.
        S_churn: Amount of fresh noise added along the way, 0 = deterministic.
        S_min, S_max: Noise levels between which noise is added.
        S_noise: Standard deviation of that noise.
        solver: 'heun' (second order) or 'euler' (first order).
        randn_like: Source of the noise; called once a step, only if S_churn > 0.

    Returns:
        Images, float64, the shape of latents; not clipped.

    Raises:
        ValueError: If solver is unknown or num_steps < 1.
    """
    if solver not in ("heun", "euler"):
        raise ValueError(f"solver is {solver!r}, expected heun or euler.")
    sigma_min, sigma_max = max(sigma_min, net.sigma_min), min(sigma_max, net.sigma_max)
    t_steps = net.round_sigma(karras_sigmas(num_steps, sigma_min, sigma_max, rho, latents.device))
    t_steps = torch.cat([t_steps, torch.zeros_like(t_steps[:1])])

    def slope(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:  # dx/dσ, EDM eq. 1 with s(t) = 1, σ(t) = t
        return (x - net(x, t, class_labels).to(torch.float64)) / t

    max_gamma = min(S_churn / num_steps, math.sqrt(2) - 1)
    x = latents.to(torch.float64) * t_steps[0]
    for i, (t, t_next) in enumerate(itertools.pairwise(t_steps)):
        if S_churn > 0:  # noise is drawn even where gamma is 0, so that S_min and S_max do not shift the random stream
            gamma = torch.where((t >= S_min) & (t <= S_max), max_gamma, 0.0)  # on the device: no waiting
            t_hat = net.round_sigma(t + gamma * t)
            x = x + (t_hat**2 - t**2).sqrt() * S_noise * randn_like(x)
            t = t_hat
        d = slope(x, t)
        x_next = x + (t_next - t) * d
        if solver == "heun" and i < num_steps - 1:  # not at the last step: there t_next is 0
            x_next = x + (t_next - t) * (d + slope(x_next, t_next)) / 2
        x = x_next
    return x
