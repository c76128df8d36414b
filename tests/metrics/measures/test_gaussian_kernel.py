"""The Gaussian kernel's discrepancy against scikit-learn's kernel, a closed form, and its rule of bandwidths."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from refine.metrics import blocks
from refine.metrics.evaluate import measure
from refine.metrics.measures.gaussian_kernel import UNIT_BANDWIDTH, bandwidth_for, gaussian_mmd
from refine.metrics.references import load_reference, save_reference
from refine.metrics.sampling import sample_images
from refine.metrics.statistics import FeatureStatistics
from tests.metrics.networks import PixelDetector, PlainGenerator


def normal(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


@pytest.mark.parametrize("side", [7, 1024])
def test_equals_scikit_learns_kernel(monkeypatch, side):
    pairwise = pytest.importorskip("sklearn.metrics.pairwise")
    monkeypatch.setattr(blocks, "SIDE", side)
    x, y, bandwidth = 0.8 * normal(0, 40, 5) + 0.3, normal(1, 30, 5), 2.3
    xx, yy, xy = (pairwise.rbf_kernel(a, b, 0.5 / bandwidth**2) for a, b in ((x, x), (y, y), (x, y)))
    expected = (xx.sum() - 40) / (40 * 39) + (yy.sum() - 30) / (30 * 29) - 2 * xy.mean()
    assert gaussian_mmd(x, y, bandwidth)[0] == pytest.approx(1000 * expected, rel=1e-11)


def test_equals_the_closed_form_of_gaussians():
    # E k(x, y) = (σ²/(σ² + a + b))^(D/2) · exp(−|μ−ν|² / (2(σ² + a + b))) for x ~ N(μ, a), y ~ N(ν, b)
    dim, shift, a, b, bandwidth = 4, 0.5, 1.0, 0.64, 2.0

    def expectation(first, second, squared_distance):
        width = bandwidth**2 + first + second
        return (bandwidth**2 / width) ** (dim / 2) * math.exp(-squared_distance / (2 * width))

    true = 1000 * (expectation(a, a, 0) + expectation(b, b, 0) - 2 * expectation(a, b, dim * shift**2))
    found = [
        gaussian_mmd(b**0.5 * normal(seed, 200, dim) + shift, normal(99 + seed, 250, dim), bandwidth)[0]
        for seed in range(30)
    ]
    assert abs(np.mean(found) - true) < 3 * np.std(found) / math.sqrt(len(found)) < 0.1 * true


def test_equal_distributions_scatter_about_zero_and_far_ones_reach_the_limit():
    found = [gaussian_mmd(normal(seed, 50, 3), normal(99 + seed, 60, 3), 2.0)[0] for seed in range(40)]
    assert abs(np.mean(found)) < 3 * np.std(found) / math.sqrt(40) and min(found) < 0 < max(found)
    point = torch.zeros(5, 3)
    assert gaussian_mmd(point, point + 1e3, 2.0)[0] == 2000  # a bounded kernel: farther changes nothing more


def test_bandwidths():
    unit = normal(2, 50, 8) / normal(2, 50, 8).norm(dim=1, keepdim=True)
    assert bandwidth_for(unit.float()) == UNIT_BANDWIDTH == 10
    assert bandwidth_for(torch.tensor([[0.0], [1.0], [3.0], [7.0]])) == 3.5  # distances 1 2 3 4 6 7
    assert bandwidth_for(3 * unit) == pytest.approx(3 * torch.pdist(unit).quantile(0.5).item())
    many = normal(3, 2500, 2)
    assert bandwidth_for(many) == torch.pdist(many[::3]).quantile(0.5)
    assert bandwidth_for(torch.full([5, 2], 3.0)) == 0
    assert bandwidth_for(torch.tensor([[0.0, 0]] * 9 + [[3.0, 4]])) == 5  # most are the same: of those that differ


def test_the_influence_is_what_leaving_an_image_out_changes():
    x, y = normal(4, 150, 3) + 0.5, normal(5, 200, 3)
    whole, influence = gaussian_mmd(x, y, 2.0)
    expected = torch.tensor(
        [149 * (whole - gaussian_mmd(torch.cat([x[:i], x[i + 1 :]]), y, 2.0)[0]) for i in range(150)]
    )
    assert torch.corrcoef(torch.stack([influence, expected]))[0, 1] > 0.999
    assert influence.std().item() == pytest.approx(expected.std().item(), rel=0.05)


def test_measured_where_it_is_asked_for(tmp_path):
    detector, images = PixelDetector(), list(sample_images(PlainGenerator(), range(40)))
    features = FeatureStatistics(keep_features=True).update(torch.rand(30, 4) * 0.2 + 0.4)
    save_reference(tmp_path / "r.npz", features, detector)
    reference = load_reference(tmp_path / "r.npz")
    found = measure(images, detector, reference, ("mmd",), contributions=True)
    bandwidth = found.results["mmd_pixels_bandwidth"]
    value, influence = gaussian_mmd(detector(images[0].images), features.features, bandwidth)
    assert found.results["mmd_pixels"] == value > 0 and bandwidth == bandwidth_for(features.features)
    assert torch.equal(found.contributions["mmd_pixels"], influence)
    one_image = dataclasses.replace(reference, features=torch.full([9, 4], 0.7))
    assert "mmd_pixels" not in measure(images, detector, one_image, ("mmd",)).results
