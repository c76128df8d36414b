"""Sums of objectives between Gaussians."""

import copy

import pytest
import torch

from refine.noise import SigmaLaw, make_weighting
from refine.objectives import REGISTRY, Ikl, Sid, Sum, make_objective
from refine.objectives.base import Objective
from tests.objectives.gaussians import PLAIN, levels, two_gaussians
from tests.test_diff_instruct import unet  # noqa: F401


@pytest.mark.parametrize("sigma", [0.3, 3.0])
def test_parts_that_agree_make_the_first_ones_gradient(sigma):
    """ikl's k δ and sim's k u, with δ and u parallel: once sim's is as long as ikl's, the two are equal."""
    teacher, aux, x, delta, k = two_gaussians(sigma)
    for text in ("ikl+sim", "ikl:0.2+sim:5", "sim+ikl"):
        found = make_objective(text)(teacher, aux, x, None, levels(64, sigma), torch.randn_like(x), PLAIN)
        length = 1.0 if text.startswith("ikl") else 1 / delta.norm()
        assert torch.allclose(found.gradient[:, :, 0, 0], (length * k * delta).expand(64, 2), rtol=1e-3, atol=1e-5)
        assert torch.allclose(found.gap, (k * delta).abs().mean().expand(64), rtol=1e-3)


def test_further_gradients_are_as_long_as_the_first_and_averaged_by_weight():
    """ikl's is k δ for every image, sid's k² δ / n with n that differs from image to image."""
    sigma = 1.0
    teacher, aux, x, delta, k = two_gaussians(sigma)
    noise = torch.randn_like(x)
    found = make_objective("ikl:3+sid:1")(teacher, aux, x, None, levels(64, sigma), noise, PLAIN)
    n = (x - teacher(x + sigma * noise, levels(64, sigma))).abs().mean(dim=[1, 2, 3])
    shape = (1 / n) / (1 / n).square().mean().sqrt()  # sid's length over the images, with the length of ikl's
    expected = k * delta * (0.75 + 0.25 * shape)[:, None]
    assert torch.allclose(found.gradient[:, :, 0, 0], expected, rtol=1e-3, atol=1e-5)
    assert torch.allclose(found.logged["Loss/ikl_gradient"], (k * delta).square().mean().expand(64), rtol=1e-3)
    sid = (k**2 * delta / n[:, None]).square().mean(dim=1)
    assert torch.allclose(found.logged["Loss/sid_gradient"], sid, rtol=1e-2)


def test_each_denoiser_is_evaluated_once_and_the_parts_are_those_alone(unet):  # noqa: F811
    teacher, aux = unet, copy.deepcopy(unet)
    with torch.no_grad():
        for p in aux.parameters():
            p.add_(0.02 * torch.randn_like(p))
    x, sigma, noise = torch.randn(3, 1, 8, 8), SigmaLaw().sample(3), torch.randn(3, 1, 8, 8)
    given = teacher, aux, x, torch.eye(3), sigma, noise, make_weighting("sigma^-1")
    alone = [make_objective(name)(*given).gradient for name in REGISTRY]
    calls = []
    for network in (teacher, aux):
        network.register_forward_hook(lambda module, *_: calls.append(module))
    found = make_objective("+".join(REGISTRY))(*given)
    assert calls == [teacher, aux]
    expected = sum(alone[0].norm() / g.norm() * g for g in alone) / len(alone)
    assert torch.allclose(found.gradient, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_a_part_that_asks_for_nothing_adds_nothing(unet):  # noqa: F811
    given = unet, copy.deepcopy(unet), torch.randn(2, 1, 8, 8), None, SigmaLaw().sample(2), torch.randn(2, 1, 8, 8)
    found = make_objective("ikl+dmd+sim")(*given, PLAIN)
    assert torch.equal(found.gradient, torch.zeros(2, 1, 8, 8))


def test_broken_gradients_stay_broken():
    teacher, aux, x, _, _ = two_gaussians(1.0)
    found = make_objective("ikl+sid")(
        teacher, aux, x, None, levels(64, 1.0), torch.randn_like(x), lambda sigma, *_: sigma * torch.inf
    )
    assert not found.gradient.isfinite().any()


class Hungry(Ikl):
    name, further_networks = "hungry", ("head",)


def test_a_sum_needs_what_its_parts_need():
    parts: tuple[Objective, ...] = (Sid(), Hungry())
    assert Sum(parts, (1.0, 1.0)).further_networks == ("head",)


def test_texts_are_read():
    assert make_objective("ikl:0.7+sid:0.3", {"sid_alpha": 1.2, "lr": 1.0}) == Sum((Ikl(), Sid(1.2)), (0.7, 0.3))
    assert make_objective(" ikl + sid ") == Sum((Ikl(), Sid()), (1.0, 1.0))


@pytest.mark.parametrize(
    "text", ["ikl+", "+", "ikl+gan", "ikl+ikl", "ikl:0.5", "ikl:0+sid", "ikl:x+sid", "ikl:nan+sid"]
)
def test_impossible_texts_are_refused(text):
    with pytest.raises(ValueError, match=r"expected .*ikl"):
        make_objective(text)
