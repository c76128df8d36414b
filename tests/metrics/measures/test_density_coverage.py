"""Density and coverage against brute force and closed forms, and measured like any other metric."""

import math

import numpy as np
import pytest
import torch

from refine.metrics import blocks
from refine.metrics.evaluate import measure
from refine.metrics.measures.density_coverage import NEIGHBOURS, density_coverage
from refine.metrics.references import load_reference, save_reference
from refine.metrics.sampling import sample_images
from refine.metrics.statistics import FeatureStatistics
from tests.metrics.networks import PixelDetector, PlainGenerator


def brute_force(real, fake, k):
    """The definitions, pair by pair."""
    radii = [sorted(math.dist(x, y) for y in real)[k] for x in real]  # the nearest of all is the point itself
    inside = [[math.dist(x, y) <= radius for x, radius in zip(real, radii, strict=True)] for y in fake]
    counts = [sum(row) / k for row in inside]
    return counts, [any(row[index] for row in inside) for index in range(len(real))]


def normal(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_equals_brute_force(monkeypatch, k):
    monkeypatch.setattr(blocks, "SIDE", 7)  # several blocks
    real, fake = normal(0, 40, 3), 0.7 * normal(1, 30, 3) + 0.4
    densities, held = density_coverage(real, fake, k)
    expected = brute_force(real.tolist(), fake.tolist(), k)
    assert densities.tolist() == pytest.approx(expected[0], abs=1e-15) and held.tolist() == expected[1]
    assert 0 < held.double().mean() < 1


def test_the_real_images_themselves():
    real = normal(2, 50, 4)
    densities, held = density_coverage(real, real, 5)
    assert densities.mean().item() == pytest.approx(6 / 5), "a ball holds its centre and its k neighbours"
    assert held.all()
    shifted = density_coverage(real + 1e3, real + 1e3, 5)
    assert torch.equal(shifted[0], densities) and shifted[1].all()


def test_images_far_away_and_copies_of_one():
    real = normal(3, 50, 4)
    densities, held = density_coverage(real, real + 100)
    assert densities.sum() == 0 and not held.any()
    densities, held = density_coverage(real, real[:1].expand(20, -1))
    assert held.sum() == densities[0] * NEIGHBOURS and held.double().mean() < 0.5


def test_equal_distributions_have_the_expected_values():
    n, m, k, draws = 60, 90, 4, 60
    found = [density_coverage(normal(seed, n, 3), normal(1000 + seed, m, 3), k) for seed in range(draws)]
    density, coverage = (torch.stack([part[i].double().mean() for part in found]) for i in range(2))
    expected = 1 - math.prod((n - i) / (n + m - i) for i in range(1, k + 1))
    for values, value in ((density, 1.0), (coverage, expected)):
        assert abs(values.mean().item() - value) < 4 * values.std().item() / math.sqrt(draws)


def test_one_outlier_does_not_make_everything_dense():
    real = torch.cat([normal(4, 200, 2), torch.full([1, 2], 50.0, dtype=torch.float64)])
    between = torch.full([10, 2], 30.0, dtype=torch.float64)  # in the outlier's ball only
    assert density_coverage(real, between)[0].tolist() == [1 / NEIGHBOURS] * 10


@pytest.mark.parametrize("shapes", [((5, 3), (9, 3)), ((9, 3), (0, 3)), ((9, 3), (9, 2))])
def test_what_cannot_be_measured(shapes):
    with pytest.raises(ValueError, match=r"expected .N, D. and .M, D. with N at least 6"):
        density_coverage(*(torch.zeros(shape) for shape in shapes))


def test_measured_where_it_is_asked_for(tmp_path):
    detector = PixelDetector()
    features = FeatureStatistics(keep_features=True).update(torch.rand(30, 4) * 0.2 + 0.4)
    save_reference(tmp_path / "r.npz", features, detector)
    reference = load_reference(tmp_path / "r.npz")
    found = measure(sample_images(PlainGenerator(), range(40)), detector, reference, ("dc",), contributions=True)
    mine = torch.cat([detector(batch.images) for batch in sample_images(PlainGenerator(), range(40))])
    densities, held = density_coverage(reference.features, mine)
    assert found.results["density"] == densities.mean().item() > 0
    assert found.results["coverage"] == held.double().mean().item() > 0
    assert torch.equal(found.contributions["density"], densities) and "coverage" not in found.contributions
