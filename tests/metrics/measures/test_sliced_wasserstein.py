"""The sliced Wasserstein distance against optimal assignment, closed forms and POT."""

import math

import numpy as np
import pytest
import scipy.optimize
import torch

from refine.metrics.evaluate import measure
from refine.metrics.measures import sliced_wasserstein as module
from refine.metrics.measures.sliced_wasserstein import directions, sliced_wasserstein
from refine.metrics.references import load_reference, save_reference
from refine.metrics.sampling import sample_images
from refine.metrics.statistics import FeatureStatistics
from tests.metrics.networks import PixelDetector, PlainGenerator

ONE = torch.ones(1, 1, dtype=torch.float64)


def normal(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


def cheapest(x, y):
    """Squared distance of the best plan between numbers: each as often as makes both sets equally large."""
    x, y = (
        x.repeat_interleave(math.lcm(len(x), len(y)) // len(x)),
        y.repeat_interleave(math.lcm(len(x), len(y)) // len(y)),
    )
    costs = (x[:, None] - y[None]).square().numpy()
    return costs[scipy.optimize.linear_sum_assignment(costs)].mean()


@pytest.mark.parametrize("n, m", [(1, 1), (1, 6), (6, 1), (7, 7), (6, 9), (9, 6), (8, 15), (20, 13)])
def test_equals_the_cheapest_assignment(monkeypatch, n, m):
    monkeypatch.setattr(module, "_HELD", 5 * (n + m))  # several blocks of directions
    monkeypatch.setattr(module, "_ROWS", 4)
    x, y, theta = 0.7 * normal(0, n, 3) + 0.4, normal(1, m, 3), directions(3)[:12]
    expected = np.mean([cheapest(x @ line, y @ line) for line in theta])
    assert sliced_wasserstein(x, y, theta)[0] == pytest.approx(expected, rel=1e-12)


def test_sets_made_by_hand():
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[5.0], [3.0]])
    assert sliced_wasserstein(x, y, ONE)[0] == (9 + 16) / 2  # 0 goes to 3, and 1 to 5
    assert sliced_wasserstein(x, x.flip(0), ONE)[0] == 0
    one = torch.tensor([[2.0]])
    assert sliced_wasserstein(one, y, ONE)[0] == (9 + 1) / 2


def test_a_shift_is_exact_whatever_its_direction():
    x, shift = normal(2, 50, 12), normal(3, 12)
    distance, _ = sliced_wasserstein(x + shift, x, directions(12))
    assert distance == pytest.approx(shift.square().sum().item() / 12, rel=1e-12)


def test_between_gaussians():
    # N(0, s²) and N(0, 1) in D dimensions are (s − 1)² apart on every line; finite sets are a little farther
    found, _ = sliced_wasserstein(1.5 * normal(4, 2000, 6), normal(5, 2500, 6), directions(6)[:240])
    assert found == pytest.approx(0.25, rel=0.05)
    floor, _ = sliced_wasserstein(normal(6, 2000, 6), normal(5, 2500, 6), directions(6)[:240])
    assert 0 < floor < 0.01


def test_equals_pots():
    ot = pytest.importorskip("ot")
    x, y, theta = 0.8 * normal(0, 300, 16) + 0.2, normal(1, 400, 16), directions(16)
    expected = ot.sliced_wasserstein_distance(x.numpy(), y.numpy(), projections=theta.numpy().T, p=2) ** 2
    assert sliced_wasserstein(x, y, theta)[0] == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("dim, count", [(1, 1000), (3, 1002), (400, 1200), (700, 1000)])
def test_directions_are_orthonormal_bases(monkeypatch, dim, count):
    monkeypatch.setattr(module, "_LARGEST_BASIS", 500)
    theta, size = directions(dim), min(dim, 500)
    assert theta.shape == (count, dim) and torch.equal(theta, directions(dim))
    for basis in (theta[:size], theta[-size:]):
        assert torch.allclose(basis @ basis.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert dim == 1 or not torch.allclose(theta[:size], theta[-size:])


@pytest.mark.parametrize("m", [120, 170, 60])
def test_the_influence_is_what_leaving_an_image_out_changes(m):
    x, y, theta = normal(4, 120, 3) * 1.5 + 0.5, normal(5, m, 3), directions(3)[:99]
    whole, influence = sliced_wasserstein(x, y, theta)
    rest = [sliced_wasserstein(torch.cat([x[:i], x[i + 1 :]]), y, theta)[0] for i in range(120)]
    expected = torch.tensor([119 * (whole - one) for one in rest])
    assert torch.corrcoef(torch.stack([influence, expected]))[0, 1] > 0.995
    assert influence.std().item() == pytest.approx(expected.std().item(), rel=0.08)
    assert abs(influence.mean().item()) < 1e-12


@pytest.mark.parametrize("shapes", [((0, 3), (9, 3)), ((9, 3), (0, 3)), ((9, 3), (9, 2))])
def test_what_cannot_be_measured(shapes):
    with pytest.raises(ValueError, match=r"expected .N, D. and .M, D. with N at least 1"):
        sliced_wasserstein(*(torch.zeros(shape) for shape in shapes), ONE)


def test_measured_where_it_is_asked_for(tmp_path):
    detector, images = PixelDetector(), list(sample_images(PlainGenerator(), range(40)))
    features = FeatureStatistics(keep_features=True).update(torch.rand(30, 4) * 0.2 + 0.4)
    save_reference(tmp_path / "r.npz", features, detector)
    found = measure(images, detector, load_reference(tmp_path / "r.npz"), ("sliced",), contributions=True)
    value, influence = sliced_wasserstein(detector(images[0].images), features.features, directions(4))
    assert found.results["sliced_pixels"] == value > 0
    assert torch.equal(found.contributions["sliced_pixels"], influence)
