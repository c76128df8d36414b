"""Fréchet and kernel distance, precision and recall against closed forms and brute force."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from refine.metrics import blocks
from refine.metrics.measures.frechet import frechet_distance, trace_of_sqrt
from refine.metrics.measures.kernel import kernel_distance
from refine.metrics.measures.precision_recall import precision_recall


def covariance(rng, d, rank=None):
    factor = rng.randn(d, rank or 2 * d)
    return torch.from_numpy(factor @ factor.T / d)


def test_frechet_of_commuting_gaussians():
    rng = np.random.RandomState(0)
    basis = torch.from_numpy(np.linalg.qr(rng.randn(6, 6))[0])
    a, b = torch.tensor([0.0, 0.1, 1, 2, 3, 4.0]).double(), torch.tensor([1, 0.5, 0, 7, 2, 1e-3]).double()
    mu1, mu2 = torch.from_numpy(rng.randn(6)), torch.from_numpy(rng.randn(6))
    got = frechet_distance(mu1, basis @ a.diag() @ basis.T, mu2, basis @ b.diag() @ basis.T)
    expected = (mu1 - mu2).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert got == pytest.approx(expected.item(), rel=1e-12)


def test_frechet_in_one_dimension():
    one = torch.ones(1, 1)
    got = frechet_distance(torch.zeros(1), 4 * one, torch.ones(1) * 3, 9 * one)
    assert got == pytest.approx(9 + (2 - 3) ** 2, rel=1e-14)


def test_trace_of_sqrt_equals_the_matrix_square_root():
    rng = np.random.RandomState(1)
    a, b = covariance(rng, 40), covariance(rng, 40)
    root = scipy.linalg.sqrtm((a @ b).numpy())
    assert trace_of_sqrt(a, b).item() == pytest.approx(np.trace(root).real, rel=1e-10)


@pytest.mark.parametrize("smallest", [1.0, 1e-3, 1e-6, 1e-12, 0.0])
@pytest.mark.parametrize("flat_first", [True, False])
def test_trace_of_sqrt_is_exact_however_small_the_eigenvalues(smallest, flat_first):
    basis = torch.from_numpy(np.linalg.qr(np.random.RandomState(4).randn(60, 60))[0])
    values = torch.linspace(1, 0, 60).double() + smallest * torch.linspace(0, 1, 60).double()
    steep, flat = basis @ values.diag() @ basis.T, 3 * torch.eye(60, dtype=torch.float64)
    got = trace_of_sqrt(flat, steep) if flat_first else trace_of_sqrt(steep, flat)
    assert got.item() == pytest.approx((3 * values).sqrt().sum().item(), rel=1e-8 if smallest == 1e-12 else 1e-11)


def test_fewer_images_than_features_equals_the_sample_form():
    # For centred samples X, Y: tr sqrt(XᵀX YᵀY) is the nuclear norm of X·Yᵀ, which needs no D×D matrix.
    rng = np.random.RandomState(2)
    x, y = (torch.from_numpy(rng.randn(n, 64)) for n in (20, 30))
    x, y = x - x.mean(0), y - y.mean(0)
    sample_form = torch.linalg.svdvals(x @ y.T).sum() / math.sqrt(19 * 29)
    assert trace_of_sqrt(torch.cov(x.T), torch.cov(y.T)).item() == pytest.approx(sample_form.item(), rel=1e-12)


@pytest.mark.parametrize("rank", [1, 5, 40])
def test_identical_statistics_have_distance_zero(rank):
    rng = np.random.RandomState(3)
    mu, sigma = torch.from_numpy(rng.randn(20)), covariance(rng, 20, rank)
    assert frechet_distance(mu, sigma, mu, sigma) < 1e-12 * sigma.trace()


def test_frechet_of_constant_images():
    mu, zero, sigma = torch.zeros(3), torch.zeros(3, 3), torch.eye(3)
    assert frechet_distance(mu, zero, mu, zero) == 0
    assert frechet_distance(mu, zero, mu + 1, sigma) == pytest.approx(6)


def brute_force_kernel_distance(x, y):
    def k(a, b):
        return (a @ b / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


@pytest.mark.parametrize("side", [1, 7, 1024])
def test_kernel_distance_equals_brute_force(monkeypatch, side):
    monkeypatch.setattr(blocks, "SIDE", side)
    rng = np.random.RandomState(0)
    x, y = rng.randn(13, 4), rng.randn(17, 4) + 0.3
    got, _ = kernel_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert got == pytest.approx(brute_force_kernel_distance(x, y), rel=1e-12)


def test_kernel_distance_is_unbiased():
    # Of one distribution it scatters about 0 on both sides; the biased estimate would be positive every time.
    rng = np.random.RandomState(0)
    values = [kernel_distance(*torch.from_numpy(rng.randn(2, 100, 8)))[0] for _ in range(60)]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(60)
    assert 10 < sum(value < 0 for value in values) < 50
    shifted, _ = kernel_distance(torch.from_numpy(rng.randn(100, 8)), torch.from_numpy(rng.randn(100, 8) + 1))
    assert shifted > 10 * np.std(values)


def grid(*offset):
    return torch.stack(torch.meshgrid(*[torch.arange(4.0)] * 2, indexing="ij"), dim=-1).reshape(-1, 2) + torch.tensor(
        offset
    )


def shares(real, fake):
    """Precision and recall."""
    return tuple(part.double().mean().item() for part in precision_recall(real, fake))


def test_precision_recall_of_known_layouts():
    square = grid(0.0, 0.0)
    assert shares(square, square) == (1, 1)
    assert shares(square, grid(100.0, 0)) == (0, 0)
    half = torch.cat([square[:8], square[:8] + 1000])  # half of the fakes are far away, the other half are real ones
    precision, recall = shares(square, half)
    assert precision == 0.5 and recall == 0.75  # radius of the near half is 1 or √2: it reaches one more row
    collapsed = square[5].repeat(16, 1)  # one point again and again: perfect precision, no coverage but itself
    assert shares(square, collapsed) == (1, 1 / 16)


@pytest.mark.parametrize("seed", range(3))
def test_precision_recall_equals_brute_force(seed, monkeypatch):
    monkeypatch.setattr(blocks, "SIDE", 7)  # several blocks, the last one smaller
    rng = np.random.RandomState(seed)
    real, fake = rng.randn(40, 3), rng.randn(30, 3) * 0.7 + 0.5

    def covered(points, manifold):
        within = np.linalg.norm(manifold[:, None] - manifold[None], axis=-1)
        radii = np.sort(within, axis=1)[:, 3]
        return (np.linalg.norm(points[:, None] - manifold[None], axis=-1) <= radii).any(axis=1).mean()

    got = shares(torch.from_numpy(real), torch.from_numpy(fake))
    assert got == (covered(fake, real), covered(real, fake))


def test_far_from_the_origin_precision_recall_is_the_same():
    rng = np.random.RandomState(5)
    real, fake = torch.from_numpy(rng.randn(60, 4)), torch.from_numpy(rng.randn(50, 4))
    assert shares(real + 1e5, fake + 1e5) == shares(real, fake)


def test_too_few_or_unlike_features_are_told():
    with pytest.raises(ValueError, match="at least 4"):
        precision_recall(torch.zeros(3, 2), torch.zeros(10, 2))
    with pytest.raises(ValueError, match="at least 2"):
        kernel_distance(torch.zeros(1, 2), torch.zeros(10, 2))
    with pytest.raises(ValueError, match=r"\[5, 2\] and \[5, 3\]"):
        kernel_distance(torch.zeros(5, 2), torch.zeros(5, 3))
