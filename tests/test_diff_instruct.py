"""The algorithm on distributions whose scores are known in closed form."""

import copy

import pytest
import torch
from torch import nn

from refine.diff_instruct import aux_loss, student_gradient
from refine.networks.edm import EDMPrecond
from refine.noise import SigmaLaw, make_weighting

PLAIN = make_weighting("1")


class GaussianDenoiser(nn.Module):
    """E[x0 | x_sigma] for x0 ~ N(mean, factor factorᵀ) in 2-D; images are (N, 2, 1, 1)."""

    def __init__(self, mean, factor):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x, sigma, c=None):
        cov = self.factor @ self.factor.t()
        noisy = cov + sigma.flatten()[:, None, None] ** 2 * torch.eye(2)
        delta = torch.linalg.solve(noisy, (x.flatten(1) - self.mean)[:, :, None])
        return (self.mean + (cov @ delta)[:, :, 0])[:, :, None, None]


class MixtureDenoiser(nn.Module):
    """E[x0 | x_sigma] for an even mixture of N(±centre, std²) in 1-D; images are (N, 1, 1, 1)."""

    def __init__(self, centre, std):
        super().__init__()
        self.centre, self.std = centre, std

    def forward(self, x, sigma, c=None):
        var = self.std**2 + sigma**2
        side = torch.tanh(x * self.centre / var)  # P(+) − P(−)
        return (self.std**2 * x + sigma**2 * self.centre * side) / var


class AffineGenerator(nn.Module):
    """x = A z + b."""

    def __init__(self, matrix, offset):
        super().__init__()
        self.matrix, self.offset = nn.Parameter(torch.tensor(matrix)), nn.Parameter(torch.tensor(offset))

    def forward(self, z):
        return (z @ self.matrix.t() + self.offset)[:, :, None, None]


def diff_instruct(G, teacher, aux, sigma_law, steps, lr, aux_lr, batch=256, weighting=PLAIN):
    """The two steps of Algorithm 1 in turn, with Adam and a rate that falls to zero."""
    student_opt = torch.optim.Adam(G.parameters(), lr=lr, betas=(0.0, 0.99))
    aux_opt = torch.optim.Adam(aux.parameters(), lr=aux_lr, betas=(0.0, 0.99))
    for step in range(steps):
        student_opt.param_groups[0]["lr"] = lr * (1 - step / steps)
        aux_opt.param_groups[0]["lr"] = aux_lr * (1 - step / steps)
        aux_opt.zero_grad()
        x = G(torch.randn(batch, G.matrix.shape[1]))
        aux_loss(aux, x, None, sigma_law.sample(batch), torch.randn_like(x)).mean().backward()
        aux_opt.step()
        student_opt.zero_grad()
        x = G(torch.randn(batch, G.matrix.shape[1]))
        sigma, noise = sigma_law.sample(batch), torch.randn_like(x)
        gradient, _ = student_gradient(teacher, aux, x.detach(), None, sigma, noise, weighting)
        x.backward(gradient / batch)
        student_opt.step()


@pytest.mark.parametrize("sigma", [0.05, 0.5, 2.0, 20.0])
def test_gradient_of_two_gaussians_is_the_closed_form(sigma):
    s, m_teacher, m_student = 0.7, torch.tensor([1.0, -2.0]), torch.tensor([0.25, 0.5])
    teacher = GaussianDenoiser(m_teacher.tolist(), [[s, 0.0], [0.0, s]])
    aux = GaussianDenoiser(m_student.tolist(), [[s, 0.0], [0.0, s]])
    x = torch.randn(5, 2, 1, 1)
    gradient, gap = student_gradient(teacher, aux, x, None, torch.full([5, 1, 1, 1], sigma), torch.randn_like(x), PLAIN)
    expected = sigma**2 / (s**2 + sigma**2) * (m_student - m_teacher)  # the same for every x: the covariances agree
    assert torch.allclose(gradient[:, :, 0, 0], expected.expand(5, 2), rtol=1e-4, atol=1e-5)
    assert torch.allclose(gap, expected.abs().mean().expand(5), rtol=1e-4, atol=1e-5)


def test_gradient_is_minus_sigma_squared_times_the_derivative_of_the_kl():
    """For N(m_q, s²) and N(m_p, s²), dKL(q_σ, p_σ)/dm_q = (m_q − m_p) / (s² + σ²); weight 1 is w = σ² on scores."""
    s, sigma, m_q = 0.5, 0.8, torch.tensor([0.3, 0.1], requires_grad=True)
    m_p = torch.tensor([-0.4, 0.9])
    kl = (m_q - m_p).square().sum() / (2 * (s**2 + sigma**2))
    (derivative,) = torch.autograd.grad(kl, m_q)
    teacher = GaussianDenoiser(m_p.tolist(), [[s, 0.0], [0.0, s]])
    aux = GaussianDenoiser(m_q.tolist(), [[s, 0.0], [0.0, s]])
    point = torch.zeros(1, 2, 1, 1), None, torch.full([1, 1, 1, 1], sigma), torch.randn(1, 2, 1, 1)
    gradient, _ = student_gradient(teacher, aux, *point, PLAIN)
    assert torch.allclose(gradient.flatten(), sigma**2 * derivative, rtol=1e-5, atol=1e-6)
    by_scores, _ = student_gradient(teacher, aux, *point, make_weighting("sigma^-2"))
    assert torch.allclose(by_scores.flatten(), derivative, rtol=1e-5, atol=1e-6)


def test_aux_loss_is_least_for_the_denoiser_of_the_students_distribution():
    torch.manual_seed(0)
    x = AffineGenerator([[0.8, 0.0], [0.3, 0.5]], [1.0, -1.0])(torch.randn(20_000, 2))
    sigma, noise = torch.full([len(x), 1, 1, 1], 0.6), torch.randn_like(x)

    def loss(mean, factor):
        return aux_loss(GaussianDenoiser(mean, factor), x, None, sigma, noise).mean().item()

    best = loss([1.0, -1.0], [[0.8, 0.0], [0.3, 0.5]])
    assert best < loss([1.1, -1.0], [[0.8, 0.0], [0.3, 0.5]])
    assert best < loss([1.0, -1.0], [[0.9, 0.0], [0.3, 0.5]])
    assert best < loss([1.0, -1.0], [[0.8, 0.0], [0.1, 0.5]])


def test_linear_generator_becomes_the_teachers_gaussian():
    torch.manual_seed(0)
    factor = torch.tensor([[1.0, 0.0], [0.6, 0.4]])
    teacher = GaussianDenoiser([0.5, -1.0], factor.tolist()).requires_grad_(False)
    aux = GaussianDenoiser([0.5, -1.0], factor.tolist())
    G = AffineGenerator([[0.3, 0.1], [-0.2, 1.5]], [-1.0, 1.0])
    diff_instruct(G, teacher, aux, SigmaLaw("lognormal", -0.5, 1.0), steps=600, lr=0.03, aux_lr=0.06)
    covariance = (G.matrix @ G.matrix.t()).detach()
    assert torch.allclose(G.offset.detach(), teacher.mean, atol=0.1)
    assert torch.allclose(covariance, factor @ factor.t(), atol=0.15)


def test_a_narrow_generator_finds_one_mode_of_a_mixture():
    """Reverse KL: a Gaussian student settles on one of two modes instead of spreading over both."""
    for offset, side in ((0.4, 1), (-0.4, -1)):
        torch.manual_seed(0)
        G = AffineGenerator([[0.3]], [offset])
        aux = ScalarGaussianDenoiser(offset, 0.3)
        law = SigmaLaw("loguniform", sigma_min=0.05, sigma_max=0.8)
        diff_instruct(G, MixtureDenoiser(2.0, 0.3), aux, law, steps=600, lr=0.03, aux_lr=0.06)
        assert abs(G.offset.item() - side * 2.0) < 0.15
        assert 0.15 < abs(G.matrix.item()) < 0.5


class ScalarGaussianDenoiser(nn.Module):
    """E[x0 | x_sigma] for N(mean, std²) in 1-D, both to be learned."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(std))

    def forward(self, x, sigma, c=None):
        return (self.std**2 * x + sigma**2 * self.mean) / (self.std**2 + sigma**2)


@pytest.fixture
def unet():
    torch.manual_seed(0)
    net = EDMPrecond(8, 1, 3, model_type="SongUNet", model_channels=8, channel_mult=[1], num_blocks=1, dropout=0.5)
    for p in net.parameters():  # no layer may stay at its zero start
        nn.init.normal_(p, std=0.1)
    return net


@pytest.mark.parametrize("weighting", ["1", "sigma^-1"])
def test_gradient_is_zero_when_aux_is_the_teacher(unet, weighting):
    aux = copy.deepcopy(unet).train()  # dropout would make them differ, were it active
    x, c = torch.randn(4, 1, 8, 8), torch.eye(3)[[0, 1, 2, 0]]
    gradient, gap = student_gradient(
        unet, aux, x, c, SigmaLaw().sample(4), torch.randn_like(x), make_weighting(weighting)
    )
    assert torch.equal(gradient, torch.zeros_like(x))
    assert torch.equal(gap, torch.zeros(4))


def test_student_gradient_has_no_side_effects(unet):
    teacher, aux = copy.deepcopy(unet).eval(), copy.deepcopy(unet).train()
    aux.model.eval()  # a mixed state must come back mixed
    before = [m.training for net in (teacher, aux) for m in net.modules()]
    state = copy.deepcopy((teacher.state_dict(), aux.state_dict()))
    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    gradient, gap = student_gradient(teacher, aux, x, None, SigmaLaw().sample(2), torch.randn(2, 1, 8, 8), PLAIN)
    assert not gradient.requires_grad and not gap.requires_grad
    assert [m.training for net in (teacher, aux) for m in net.modules()] == before
    assert all(p.grad is None for net in (teacher, aux) for p in net.parameters())
    for old, net in zip(state, (teacher, aux), strict=True):
        assert all(torch.equal(value, net.state_dict()[key]) for key, value in old.items())


def test_modes_are_restored_after_an_error(unet):
    unet.train()
    with pytest.raises(ValueError):
        student_gradient(
            unet, unet, torch.zeros(2, 3, 8, 8), None, SigmaLaw().sample(2), torch.zeros(2, 3, 8, 8), PLAIN
        )
    assert all(m.training for m in unet.modules())


def test_the_algorithm_fits_on_a_page():
    import refine.diff_instruct

    with open(refine.diff_instruct.__file__) as file:
        assert len(file.readlines()) <= 80
