"""Fréchet distance between Gaussians (Heusel et al. 2017, "GANs trained by a two time-scale update rule", eq. 6).

In the space of Inception-2015-12-05 it is the FID; in any other feature space it is not, and is named `fd_<space>`.
"""

from __future__ import annotations

import torch


def frechet_distance(mu1: torch.Tensor, sigma1: torch.Tensor, mu2: torch.Tensor, sigma2: torch.Tensor) -> float:
    """|mu1 − mu2|² + tr(sigma1 + sigma2 − 2·(sigma1·sigma2)^½), a squared distance.

    Args:
        mu1, mu2: Means [D].
        sigma1, sigma2: Covariances [D, D], symmetric, positive semi-definite; singular ones are fine.

    Returns:
        The distance, computed in float64 and never below 0.
    """
    mu1, sigma1, mu2, sigma2 = (t.to(torch.float64) for t in (mu1, sigma1, mu2, sigma2))
    traces = sigma1.trace() + sigma2.trace() - 2 * trace_of_sqrt(sigma1, sigma2)
    return max((mu1 - mu2).square().sum().item() + traces.item(), 0.0)


def trace_of_sqrt(sigma1: torch.Tensor, sigma2: torch.Tensor) -> torch.Tensor:
    """tr((sigma1·sigma2)^½) of symmetric positive semi-definite matrices, float64 scalar.

    With sigma_i = F_i·F_iᵀ the eigenvalues of the product are the squared singular values of F_1ᵀ·F_2, so the
    trace is their plain sum. Nothing is squared and then rooted: rounding stays at the level of float64 also where a
    covariance is singular, e.g. from fewer images than features. (The square root of an eigenvalue that should be 0
    would lift noise of 1e-16 to 1e-8.)
    """
    return torch.linalg.svdvals(_factor(sigma1).T @ _factor(sigma2)).sum()


def _factor(sigma: torch.Tensor) -> torch.Tensor:
    """F [D, rank] with sigma = F·Fᵀ; directions at or below rounding level are left out."""
    values, vectors = torch.linalg.eigh(sigma)
    kept = values > values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()
