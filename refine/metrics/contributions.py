"""What each image contributes to a distance: its first-order influence, from which a bootstrap over images is cheap.

A statistic T of N images changes, when image i counts a little more, by its influence: T(weights) ≈ T + mean(w_i·I_i).
Resampling images then means resampling numbers (the infinitesimal jackknife; Efron 1982). With the same seeds for two
networks the difference of two contributions belongs to one latent, and their common part cancels. A Fréchet distance
resampled in full would cost a matrix square root each time.
"""

from __future__ import annotations

import torch


def frechet_contributions(
    features: torch.Tensor, mu1: torch.Tensor, sigma1: torch.Tensor, mu2: torch.Tensor, sigma2: torch.Tensor
) -> torch.Tensor:
    """Influence of each of `features` [N, D] on the Fréchet distance of their statistics to (mu2, sigma2).

    With A = sigma2^½ (sigma2^½ sigma1 sigma2^½)^(−½) sigma2^½, the optimal transport map, the derivative of the
    distance is 2·(mu1 − mu2) towards mu1 and identity − A towards sigma1. Directions without spread in sigma1 are left
    out.

    Returns:
        float64 [N], of mean about 0.
    """
    mu1, sigma1, mu2, sigma2 = (t.to(torch.float64) for t in (mu1, sigma1, mu2, sigma2))
    values, vectors = torch.linalg.eigh(sigma2)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    values, vectors = torch.linalg.eigh(root @ sigma1 @ root)
    cutoff = values[-1].clamp(min=0) * len(values) * torch.finfo(torch.float64).eps
    kept = values > cutoff
    half = root @ vectors[:, kept] / values[kept].pow(0.25)  # half·halfᵀ = A
    total = (sigma1.trace() - half.T.mul(half.T @ sigma1).sum()).item()
    parts = []
    for block in features.split(4096):
        centred = block.to(torch.float64) - mu1
        quadratic = centred.square().sum(dim=1) - (centred @ half).square().sum(dim=1)
        parts.append(2 * centred @ (mu1 - mu2) + quadratic - total)
    return torch.cat(parts)


def kernel_contributions(fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Influence of each of `fake` [N, D] on the kernel distance to `real` [M, D]: Hájek's projection, float64 [N]."""
    x, y = fake.to(torch.float64), real.to(torch.float64)
    within, across = [], []
    for block in x.split(max((1 << 22) // max(len(x), len(y)), 1)):
        own = (block.square().sum(dim=1) / x.shape[1] + 1).pow(3)
        within.append(((block @ x.T / x.shape[1] + 1).pow(3).sum(dim=1) - own) / (len(x) - 1))
        across.append((block @ y.T / x.shape[1] + 1).pow(3).mean(dim=1))
    influence = 2 * (torch.cat(within) - torch.cat(across))
    return influence - influence.mean()
