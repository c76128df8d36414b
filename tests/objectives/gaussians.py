"""Gaussians, between which gradient, direction and zero of an objective are known in closed form."""

import torch

from refine.noise import make_weighting
from tests.test_diff_instruct import GaussianDenoiser

PLAIN = make_weighting("1")


def isotropic(mean, std):
    return GaussianDenoiser(mean, [[std, 0.0], [0.0, std]])


def levels(n, sigma):
    return torch.full([n, 1, 1, 1], sigma)


def two_gaussians(sigma, s=0.7):
    """Teacher N(m_T, s²), aux N(m_q, s²), images, and k = σ² / (s² + σ²): D_aux − D_teacher = k (m_q − m_T)."""
    m_T, m_q = torch.tensor([1.0, -2.0]), torch.tensor([0.25, 0.5])
    x = m_q[:, None, None] + s * torch.randn(64, 2, 1, 1)
    return isotropic(m_T.tolist(), s), isotropic(m_q.tolist(), s), x, m_q - m_T, sigma**2 / (s**2 + sigma**2)
