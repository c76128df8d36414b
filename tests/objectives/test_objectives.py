"""What holds for every objective in the registry."""

import copy

import pytest
import torch

from refine.diff_instruct import aux_loss
from refine.noise import SigmaLaw, make_weighting
from refine.objectives import REGISTRY, LossObjective, make_objective
from tests.objectives.gaussians import PLAIN, isotropic, levels
from tests.test_diff_instruct import AffineGenerator, unet  # noqa: F401

NAMES = tuple(REGISTRY)
LOSSES = [name for name, kind in REGISTRY.items() if issubclass(kind, LossObjective)]


def sid_by_hand(x, D_T, D_aux, n):
    return (D_T - D_aux) * ((D_T - x) - 1.2 * (D_T - D_aux)) / n


def sim_by_hand(x, D_T, D_aux, n):
    y = D_aux - D_T
    return y / (y.square().sum(dim=[1, 2, 3], keepdim=True) + 0.00054**2 * 64).sqrt() * (x - D_aux)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("s_q", "s_T"), [(1.5, 0.5), (0.4, 1.2)])
def test_a_student_too_wide_is_drawn_together_and_one_too_narrow_apart(name, s_q, s_T):
    """The derivative by the scale of x = s_q ε, ⟨gradient, ε⟩, has the sign of s_q − s_T when aux is the student's."""
    eps, noise = torch.randn(2, 4000, 2, 1, 1)
    found = make_objective(name)(
        isotropic([0.0, 0.0], s_T), isotropic([0.0, 0.0], s_q), s_q * eps, None, levels(4000, 0.8), noise, PLAIN
    )
    by_scale = (found.gradient * eps).sum(dim=1).mean()
    assert by_scale * (s_q - s_T) > 0.02


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weighting", ["1", "sigma^-1"])
def test_the_gradient_is_zero_when_aux_is_the_teacher(unet, name, weighting):  # noqa: F811
    aux = copy.deepcopy(unet).train()  # dropout would make them differ, were it active
    x, c, noise = torch.randn(4, 1, 8, 8), torch.eye(3)[[0, 1, 2, 0]], torch.randn(4, 1, 8, 8)
    found = make_objective(name)(unet, aux, x, c, SigmaLaw().sample(4), noise, make_weighting(weighting))
    # Through the networks two equal parts cancel: rounding stays, and sim divides it by C and sigma.
    assert found.gradient.shape == x.shape and found.gradient.abs().max() < (1e-4 if name in LOSSES else 1e-30)
    assert torch.equal(found.gap, torch.zeros(4))


@pytest.mark.parametrize(("name", "by_hand"), [("sid", sid_by_hand), ("sim", sim_by_hand)])
def test_the_gradient_goes_through_both_networks_and_is_that_of_the_loss(unet, name, by_hand):  # noqa: F811
    """Against the weighted loss, differenced numerically, with the normaliser 1/n held at its value."""
    teacher, aux, objective = unet.eval(), copy.deepcopy(unet).eval(), make_objective(name, {"sid_alpha": 1.2})
    with torch.no_grad():
        for p in aux.parameters():
            p.add_(0.02 * torch.randn_like(p))
    x, sigma = 0.5 * torch.randn(2, 1, 8, 8), torch.tensor([0.4, 1.5]).reshape(2, 1, 1, 1)
    noise, direction, step = torch.randn_like(x), torch.randn_like(x), 1e-3
    found = objective(teacher, aux, x, None, sigma, noise, make_weighting("sigma^1"))

    @torch.no_grad()
    def written_out(x):
        D_T, D_aux = (net(x + sigma * noise, sigma).double() for net in (teacher, aux))
        return (sigma * by_hand(x, D_T, D_aux, n)).sum(dim=[1, 2, 3])

    n = (x - teacher(x + sigma * noise, sigma)).detach().abs().mean(dim=[1, 2, 3], keepdim=True)
    numerical = (written_out(x + step * direction) - written_out(x - step * direction)).sum() / (2 * step)
    assert (found.gradient * direction).sum().item() == pytest.approx(numerical.item(), rel=0.02, abs=1e-3)
    assert torch.allclose(found.logged[f"Loss/{name}"].double(), written_out(x), rtol=1e-3)


@pytest.mark.parametrize("name", [*NAMES, "ikl+sid"])
def test_objectives_have_no_side_effects_draw_nothing_and_log_what_they_say(unet, name):  # noqa: F811
    teacher, aux = copy.deepcopy(unet).eval().requires_grad_(False), copy.deepcopy(unet).train()
    aux.model.eval()  # a mixed state must come back mixed
    before = [m.training for net in (teacher, aux) for m in net.modules()]
    x, noise, sigma = torch.randn(2, 1, 8, 8, requires_grad=True), torch.randn(2, 1, 8, 8), SigmaLaw().sample(2)
    objective, random = make_objective(name), torch.get_rng_state()
    found = objective(teacher, aux, x, None, sigma, noise, PLAIN)
    assert torch.equal(torch.get_rng_state(), random)
    assert not found.gradient.requires_grad and not found.gap.requires_grad and x.grad is None
    assert [m.training for net in (teacher, aux) for m in net.modules()] == before
    assert all(p.grad is None for net in (teacher, aux) for p in net.parameters())
    assert all(p.requires_grad for p in aux.parameters())
    assert tuple(found.logged) == objective.logs
    assert all(not value.requires_grad for value in found.logged.values())


@pytest.mark.parametrize("name", [*(name for name in NAMES if name != "ikl"), "ikl+sid"])
def test_a_linear_generator_becomes_the_teachers_gaussian(name):
    torch.manual_seed(0)
    teacher = isotropic([0.5, -1.0], 0.6).requires_grad_(False)
    aux, G = isotropic([0.5, -1.0], 0.6), AffineGenerator([[0.3, 0.1], [-0.2, 1.2]], [-0.5, 0.5])
    law, objective, steps = SigmaLaw("lognormal", -0.5, 1.0), make_objective(name), 250
    student_opt = torch.optim.Adam(G.parameters(), lr=0.03, betas=(0.0, 0.99))
    aux_opt = torch.optim.Adam(aux.parameters(), lr=0.06, betas=(0.0, 0.99))
    for step in range(steps):
        for optimizer, lr in ((student_opt, 0.03), (aux_opt, 0.06)):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            optimizer.zero_grad()
        x = G(torch.randn(64, 2))
        aux_loss(aux, x, None, law.sample(64), torch.randn_like(x)).mean().backward()
        aux_opt.step()
        x = G(torch.randn(64, 2))
        found = objective(teacher, aux, x.detach(), None, law.sample(64), torch.randn_like(x), PLAIN)
        x.backward(found.gradient / 64)
        student_opt.step()
    covariance = (G.matrix @ G.matrix.t()).detach()
    assert torch.allclose(G.offset.detach(), teacher.mean, atol=0.12)
    assert torch.allclose(covariance, 0.36 * torch.eye(2), atol=0.12)


def test_unknown_objectives_are_refused():
    with pytest.raises(ValueError, match="ikl, dmd, sid, sim"):
        make_objective("gan")
