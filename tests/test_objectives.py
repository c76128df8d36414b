"""The objectives on Gaussians, where gradient, direction and zero are known in closed form."""

import copy

import pytest
import torch

from refine.diff_instruct import aux_loss, student_gradient
from refine.noise import SigmaLaw, make_weighting
from refine.objectives import PSEUDO_HUBER, dmd, inverse_distance, make_objective, sid, sim
from tests.test_diff_instruct import AffineGenerator, GaussianDenoiser, unet  # noqa: F401

PLAIN = make_weighting("1")
NAMES = ("ikl", "dmd", "sid", "sim")


def isotropic(mean, std):
    return GaussianDenoiser(mean, [[std, 0.0], [0.0, std]])


def levels(n, sigma):
    return torch.full([n, 1, 1, 1], sigma)


def two_gaussians(sigma, s=0.7):
    """Teacher N(m_T, s²), aux N(m_q, s²), images, and k = σ² / (s² + σ²): D_aux − D_teacher = k (m_q − m_T)."""
    m_T, m_q = torch.tensor([1.0, -2.0]), torch.tensor([0.25, 0.5])
    x = m_q[:, None, None] + s * torch.randn(64, 2, 1, 1)
    return isotropic(m_T.tolist(), s), isotropic(m_q.tolist(), s), x, m_q - m_T, sigma**2 / (s**2 + sigma**2)


@pytest.mark.parametrize("sigma", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_sid_is_half_the_gradient_of_the_fisher_divergence(sigma, alpha):
    """Both networks are linear with the same slope 1 − k, so every image gets k² (m_q − m_T) / n, whatever α is;
    ‖D_T − D_q‖² = k² ‖m_q − m_T‖² has twice that derivative by m_q."""
    teacher, aux, x, delta, k = two_gaussians(sigma)
    torch.manual_seed(1)
    gradient, gap = sid(teacher, aux, x, None, levels(64, sigma), PLAIN, alpha=alpha)
    torch.manual_seed(1)
    D_teacher = teacher(x + sigma * torch.randn_like(x), levels(64, sigma))
    expected = k**2 * delta[:, None, None] * inverse_distance(x, D_teacher)
    assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-5)
    assert torch.allclose(gap, (k * delta).abs().mean().expand(64), rtol=1e-3)


@pytest.mark.parametrize("sigma", [0.1, 1.0, 10.0])
def test_sim_is_the_unit_step_that_its_distance_asks_for(sigma):
    """u = d′(y) with y = k (m_q − m_T), and the loss ⟨u, x − D_aux⟩ has the derivative k u by x."""
    teacher, aux, x, delta, k = two_gaussians(sigma)
    gradient, _ = sim(teacher, aux, x, None, levels(64, sigma), PLAIN)
    y = k * delta
    u = y / (y.square().sum() + PSEUDO_HUBER**2 * 2).sqrt()
    assert torch.allclose(gradient[:, :, 0, 0], (k * u).expand(64, 2), rtol=1e-3, atol=1e-6)


def test_dmd_is_ikl_over_the_distance_to_the_teachers_image():
    teacher, aux, x, _, _ = two_gaussians(0.5)
    for weighting in (PLAIN, make_weighting("sigma^-1")):
        torch.manual_seed(3)
        plain, gap = student_gradient(teacher, aux, x, None, levels(64, 0.5), weighting)
        torch.manual_seed(3)
        normalised, same_gap = dmd(teacher, aux, x, None, levels(64, 0.5), weighting)
        torch.manual_seed(3)
        D_teacher = teacher(x + 0.5 * torch.randn_like(x), levels(64, 0.5))
        n = (x - D_teacher).abs().mean(dim=[1, 2, 3], keepdim=True)
        assert torch.allclose(normalised, plain / n, rtol=1e-5) and torch.equal(gap, same_gap)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("s_q", "s_T"), [(1.5, 0.5), (0.4, 1.2)])
def test_a_student_too_wide_is_drawn_together_and_one_too_narrow_apart(name, s_q, s_T):
    """The derivative by the scale of x = s_q ε, ⟨gradient, ε⟩, has the sign of s_q − s_T when aux is the student's."""
    eps = torch.randn(4000, 2, 1, 1)
    gradient, _ = make_objective(name)(
        isotropic([0.0, 0.0], s_T), isotropic([0.0, 0.0], s_q), s_q * eps, None, levels(4000, 0.8), PLAIN
    )
    by_scale = (gradient * eps).sum(dim=1).mean()
    assert by_scale * (s_q - s_T) > 0.02


@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_sid_on_scales_is_the_closed_form(alpha):
    """L = δ x_σ ((a_T − αδ) x_σ − x) with a = s²/(s²+σ²), δ = a_T − a_q: E dL/ds_q = 2 s_q δ (a_T − αδ − 1)."""
    s_q, s_T, sigma, eps = 1.5, 0.5, 0.8, torch.randn(100_000, 2, 1, 1)
    teacher, aux = isotropic([0.0, 0.0], s_T), isotropic([0.0, 0.0], s_q)
    torch.manual_seed(2)
    gradient, _ = sid(teacher, aux, s_q * eps, None, levels(len(eps), sigma), PLAIN, alpha=alpha)
    torch.manual_seed(2)
    D_teacher = teacher(s_q * eps + sigma * torch.randn_like(eps), levels(len(eps), sigma))
    by_scale = (gradient / inverse_distance(s_q * eps, D_teacher) * eps).mean()
    a_T, a_q = s_T**2 / (s_T**2 + sigma**2), s_q**2 / (s_q**2 + sigma**2)
    expected = 2 * s_q * (a_T - a_q) * (a_T - alpha * (a_T - a_q) - 1)
    assert by_scale.item() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weighting", ["1", "sigma^-1"])
def test_the_gradient_is_zero_when_aux_is_the_teacher(unet, name, weighting):  # noqa: F811
    aux = copy.deepcopy(unet).train()  # dropout would make them differ, were it active
    x, c = torch.randn(4, 1, 8, 8), torch.eye(3)[[0, 1, 2, 0]]
    gradient, gap = make_objective(name)(unet, aux, x, c, SigmaLaw().sample(4), make_weighting(weighting))
    # Through the networks two equal parts cancel: rounding stays, and sim divides it by C and sigma.
    assert gradient.shape == x.shape and gradient.abs().max() < (1e-4 if name in ("sid", "sim") else 1e-30)
    assert torch.equal(gap, torch.zeros(4))


@pytest.mark.parametrize("name", ["sid", "sim"])
def test_the_gradient_goes_through_both_networks_and_is_that_of_the_loss(unet, name):  # noqa: F811
    """Against the loss written out and differenced numerically, in float64, with n and the noise held fixed."""
    teacher = unet
    aux = copy.deepcopy(unet)
    with torch.no_grad():
        for p in aux.parameters():
            p.add_(0.02 * torch.randn_like(p))
    x, sigma = 0.5 * torch.randn(2, 1, 8, 8), torch.tensor([0.4, 1.5]).reshape(2, 1, 1, 1)
    torch.manual_seed(7)
    gradient, _ = make_objective(name, sid_alpha=1.2)(teacher, aux, x, None, sigma, PLAIN)
    torch.manual_seed(7)
    noise = torch.randn_like(x)
    n = 1 / inverse_distance(x, teacher.eval()(x + sigma * noise, sigma))

    @torch.no_grad()
    def loss(x):
        D_T, D_aux = (net.eval()(x + sigma * noise, sigma).double() for net in (teacher, aux))
        if name == "sid":
            return ((D_T - D_aux) * ((D_T - x) - 1.2 * (D_T - D_aux)) / n).sum()
        y = D_aux - D_T
        return (y / (y.square().sum(dim=[1, 2, 3], keepdim=True) + PSEUDO_HUBER**2 * 64).sqrt() * (x - D_aux)).sum()

    direction = torch.randn_like(x)
    step = 1e-3
    numerical = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(numerical.item(), rel=0.02, abs=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_objectives_have_no_side_effects(unet, name):  # noqa: F811
    teacher, aux = copy.deepcopy(unet).eval().requires_grad_(False), copy.deepcopy(unet).train()
    aux.model.eval()  # a mixed state must come back mixed
    before = [m.training for net in (teacher, aux) for m in net.modules()]
    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    gradient, gap = make_objective(name)(teacher, aux, x, None, SigmaLaw().sample(2), PLAIN)
    assert not gradient.requires_grad and not gap.requires_grad and x.grad is None
    assert [m.training for net in (teacher, aux) for m in net.modules()] == before
    assert all(p.grad is None for net in (teacher, aux) for p in net.parameters())
    assert all(p.requires_grad for p in aux.parameters())


@pytest.mark.parametrize("name", ["dmd", "sid", "sim"])
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
        aux_loss(aux, G(torch.randn(64, 2)), None, law.sample(64)).mean().backward()
        aux_opt.step()
        x = G(torch.randn(64, 2))
        gradient, _ = objective(teacher, aux, x.detach(), None, law.sample(64), PLAIN)
        x.backward(gradient / 64)
        student_opt.step()
    covariance = (G.matrix @ G.matrix.t()).detach()
    assert torch.allclose(G.offset.detach(), teacher.mean, atol=0.12)
    assert torch.allclose(covariance, 0.36 * torch.eye(2), atol=0.12)


def test_unknown_objectives_are_refused():
    with pytest.raises(ValueError, match="ikl, dmd, sid, sim"):
        make_objective("gan")
