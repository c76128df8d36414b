"""Score identity distillation between Gaussians."""

import pytest
import torch

from refine.objectives import Sid, inverse_distance
from tests.objectives.gaussians import PLAIN, isotropic, levels, two_gaussians


@pytest.mark.parametrize("sigma", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_sid_is_half_the_gradient_of_the_fisher_divergence(sigma, alpha):
    """Both networks are linear with the same slope 1 − k, so every image gets k² (m_q − m_T) / n, whatever α is;
    ‖D_T − D_q‖² = k² ‖m_q − m_T‖² has twice that derivative by m_q."""
    teacher, aux, x, delta, k = two_gaussians(sigma)
    noise = torch.randn_like(x)
    found = Sid(alpha)(teacher, aux, x, None, levels(64, sigma), noise, PLAIN)
    D_teacher = teacher(x + sigma * noise, levels(64, sigma))
    expected = k**2 * delta[:, None, None] * inverse_distance(x, D_teacher)
    assert torch.allclose(found.gradient, expected, rtol=1e-3, atol=1e-5)
    assert torch.allclose(found.gap, (k * delta).abs().mean().expand(64), rtol=1e-3)


@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_sid_on_scales_is_the_closed_form(alpha):
    """L = δ x_σ ((a_T − αδ) x_σ − x) with a = s²/(s²+σ²), δ = a_T − a_q: E dL/ds_q = 2 s_q δ (a_T − αδ − 1)."""
    s_q, s_T, sigma, eps = 1.5, 0.5, 0.8, torch.randn(100_000, 2, 1, 1)
    teacher, aux, noise = isotropic([0.0, 0.0], s_T), isotropic([0.0, 0.0], s_q), torch.randn_like(eps)
    found = Sid(alpha)(teacher, aux, s_q * eps, None, levels(len(eps), sigma), noise, PLAIN)
    D_teacher = teacher(s_q * eps + sigma * noise, levels(len(eps), sigma))
    by_scale = (found.gradient / inverse_distance(s_q * eps, D_teacher) * eps).mean()
    a_T, a_q = s_T**2 / (s_T**2 + sigma**2), s_q**2 / (s_q**2 + sigma**2)
    expected = 2 * s_q * (a_T - a_q) * (a_T - alpha * (a_T - a_q) - 1)
    assert by_scale.item() == pytest.approx(expected, rel=0.03)
