"""The kernel distance of subsets against torch-fidelity, the distance of all pairs, and its own scatter."""

import numpy as np
import pytest
import torch

from refine.metrics.evaluate import measure
from refine.metrics.measures.kernel import kernel_distance
from refine.metrics.measures.kernel_subsets import SEED, SIZE, SUBSETS, kernel_distance_of_subsets
from refine.metrics.references import load_reference, save_reference
from refine.metrics.sampling import sample_images
from refine.metrics.statistics import FeatureStatistics
from tests.golden import read_json
from tests.metrics.networks import PixelDetector, PlainGenerator
from tests.metrics.oracles import oracle


def normal(seed, *shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape))


def sets():
    mix = normal(7, 24, 24) / 5
    return normal(8, 1200, 24) @ mix * 0.8 + 0.3, normal(9, 1100, 24) @ mix


def test_the_published_protocol():
    assert (SUBSETS, SIZE) == (100, 1000)


def test_equals_torch_fidelitys_golden_numbers():
    mean, std, _ = kernel_distance_of_subsets(*sets(), subsets=20)
    assert [mean, std] == pytest.approx(read_json("metrics/torch_fidelity_kid_subsets"), rel=1e-10)


def test_equals_torch_fidelitys():
    oracle("torch_fidelity")
    from torch_fidelity.metric_kid import kid_features_to_metric

    options = {"kid_subsets": 20, "kid_subset_size": SIZE, "rng_seed": SEED, "verbose": False, "save_cpu_ram": False}
    expected = list(kid_features_to_metric(*sets(), **options).values())
    assert list(kernel_distance_of_subsets(*sets(), subsets=20)[:2]) == pytest.approx(expected, rel=1e-10)


def test_a_subset_that_is_everything_is_the_distance_of_all_pairs():
    fake, real = (part[:200] for part in sets())
    mean, std, influence = kernel_distance_of_subsets(fake, real, subsets=3)
    whole, of_whole = kernel_distance(fake, real)
    assert mean == pytest.approx(whole, rel=1e-12) and std < 1e-12
    assert torch.allclose(influence, of_whole, rtol=1e-10)
    mean, std, _ = kernel_distance_of_subsets(fake, real, subsets=400, size=50)
    assert mean == pytest.approx(whole, abs=4 * std / 20) and std > 0


def test_the_influence_tells_how_far_the_mean_scatters():
    # The number scatters because of the images and because of the draws; the influence knows of both.
    real, values, expected = normal(1, 400, 6), [], []
    for seed in range(60):
        mean, _, influence = kernel_distance_of_subsets(normal(100 + seed, 300, 6) + 0.5, real, 10, 40, seed)
        values.append(mean)
        expected.append(influence.std().item() / 300**0.5)
    drawn_once = [kernel_distance(normal(100 + seed, 300, 6) + 0.5, real)[0] for seed in range(60)]
    # what remains of the scatter comes from the draws of the reference's side, which both networks share
    assert np.std(drawn_once) < np.mean(expected) < np.std(values) * 1.2


def test_measured_where_it_is_asked_for(tmp_path):
    detector, images = PixelDetector(), list(sample_images(PlainGenerator(), range(40)))
    features = FeatureStatistics(keep_features=True).update(torch.rand(30, 4) * 0.2 + 0.4)
    save_reference(tmp_path / "r.npz", features, detector)
    found = measure(images, detector, load_reference(tmp_path / "r.npz"), ("kidsub",), contributions=True)
    mean, std, influence = kernel_distance_of_subsets(detector(images[0].images), features.features)
    assert (found.results["kidsub_pixels"], found.results["kidsub_pixels_std"]) == (mean, std) and std > 0
    assert torch.equal(found.contributions["kidsub_pixels"], influence)
