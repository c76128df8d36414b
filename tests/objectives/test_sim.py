"""Score implicit matching between Gaussians."""

import pytest
import torch

from refine.objectives import Sim
from tests.objectives.gaussians import PLAIN, levels, two_gaussians


@pytest.mark.parametrize("sigma", [0.1, 1.0, 10.0])
def test_sim_is_the_unit_step_that_its_distance_asks_for(sigma):
    """u = d′(y) with y = k (m_q − m_T), and the loss ⟨u, x − D_aux⟩ has the derivative k u by x."""
    teacher, aux, x, delta, k = two_gaussians(sigma)
    found = Sim()(teacher, aux, x, None, levels(64, sigma), torch.randn_like(x), PLAIN)
    y = k * delta
    u = y / (y.square().sum() + Sim().huber ** 2 * 2).sqrt()
    assert torch.allclose(found.gradient[:, :, 0, 0], (k * u).expand(64, 2), rtol=1e-3, atol=1e-6)
