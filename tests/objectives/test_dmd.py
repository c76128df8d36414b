"""DMD beside the integral KL divergence."""

import pytest
import torch

from refine.diff_instruct import student_gradient
from refine.noise import make_weighting
from refine.objectives import Dmd
from tests.objectives.gaussians import levels, two_gaussians


@pytest.mark.parametrize("weighting", ["1", "sigma^-1"])
def test_dmd_is_ikl_over_the_distance_to_the_teachers_image(weighting):
    teacher, aux, x, _, _ = two_gaussians(0.5)
    noise = torch.randn_like(x)
    given = teacher, aux, x, None, levels(64, 0.5), noise, make_weighting(weighting)
    plain, gap = student_gradient(*given)
    found = Dmd()(*given)
    n = (x - teacher(x + 0.5 * noise, levels(64, 0.5))).abs().mean(dim=[1, 2, 3], keepdim=True)
    assert torch.allclose(found.gradient, plain / n, rtol=1e-5) and torch.equal(found.gap, gap)
