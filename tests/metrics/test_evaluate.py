"""All numbers of one set of images: presence, names and values."""

import json
import math

import pytest
import torch

from refine.metrics.evaluate import evaluate
from refine.metrics.measures.classes import ClassJudge
from refine.metrics.measures.frechet import frechet_distance
from refine.metrics.measures.spread import ClassSpread
from refine.metrics.metric import Observed
from refine.metrics.references import load_reference, save_reference
from refine.metrics.sampling import Batch, sample_images
from refine.metrics.statistics import FeatureStatistics
from tests.metrics.networks import PixelDetector, PlainGenerator


def reference_of(tmp_path, images, detector, keep=True):
    save_reference(tmp_path / "r.npz", FeatureStatistics(keep).update(detector(images)), detector)
    return load_reference(tmp_path / "r.npz")


def images_of(seeds, **kwargs):
    return torch.cat([batch.images for batch in sample_images(PlainGenerator(**kwargs), seeds)])


def test_all_numbers_with_their_names(tmp_path):
    detector = PixelDetector(num_classes=4)
    real = images_of(range(100, 200), c_dim=4)
    reference = reference_of(tmp_path, real, detector)
    result = evaluate(sample_images(PlainGenerator(c_dim=4), range(60), batch=25), detector, reference)
    json.dumps(result)
    assert {"fd_pixels", "kid_pixels", "precision", "recall", "label_accuracy", "confidence", "spread"} <= set(result)
    assert "fid" not in result and result["num"] == 60 and result["label_accuracy"] == 1
    assert result["confidence"] == pytest.approx(0.925) and sum(result["class_histogram"]) == pytest.approx(1)
    assert result["detector"]["sha256"] == detector.sha256 and len(result["reference"]["sha256"]) == 64
    fake = detector(images_of(range(60), c_dim=4)).double()
    real_features = detector(real).double()
    expected = frechet_distance(fake.mean(0), torch.cov(fake.T), real_features.mean(0), torch.cov(real_features.T))
    assert result["fd_pixels"] == pytest.approx(expected, rel=1e-9)


def test_the_same_images_have_distance_zero(tmp_path):
    real = images_of(range(50))
    result = evaluate([Batch(real, None)], PixelDetector(), reference_of(tmp_path, real, PixelDetector()))
    assert result["fd_pixels"] < 1e-9 and (result["precision"], result["recall"]) == (1, 1)
    assert "label_accuracy" not in result and "class_histogram" not in result


def test_without_features_only_the_frechet_distance(tmp_path):
    real = images_of(range(50))
    reference = reference_of(tmp_path, real, PixelDetector(), keep=False)
    result = evaluate([Batch(real, None)], PixelDetector(), reference)
    assert "fd_pixels" in result and not {"kid_pixels", "precision", "recall"} & set(result)


def test_constant_images_and_few_images(tmp_path):
    reference = reference_of(tmp_path, images_of(range(50)), PixelDetector())
    constant = torch.full([10, 1, 8, 8], 128, dtype=torch.uint8)
    result = evaluate([Batch(constant, None)], PixelDetector(), reference)
    assert math.isfinite(result["fd_pixels"]) and result["spread"] == 0
    assert "precision" not in evaluate([Batch(constant[:3], None)], PixelDetector(), reference)
    for count in (0, 1):
        with pytest.raises(ValueError, match=f"of {count} images are too few"):
            evaluate([Batch(constant[:count], None)] if count else [], PixelDetector(), reference)


def test_spread_is_the_root_mean_square_over_pairs():
    images = torch.randint(0, 256, [30, 1, 5, 5], dtype=torch.uint8)
    classes = torch.arange(30) % 3
    spread = ClassSpread()
    for part in range(0, 30, 7):
        spread.update(Observed(images[part : part + 7], classes[part : part + 7], None))
    expected = 0.0
    for index in range(3):
        x = images[classes == index].flatten(1).double() / 127.5
        squares = [(a - b).square().mean() for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
        expected += math.sqrt(sum(squares) / len(squares)) / 3
    assert spread.result() == pytest.approx(expected, rel=1e-12)
    one_class = ClassSpread()
    one_class.update(Observed(images[:1], None, None))
    assert one_class.result() == 0


def test_judge_counts():
    judge = ClassJudge()
    assert judge.result() == {}
    pixels = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    judge.update(Observed(pixels, torch.tensor([0, 1]), torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])))
    judge.update(Observed(pixels, None, torch.tensor([[0.5, 0.4, 0.1], [0.4, 0.6, 0.0]])))
    result = judge.result()
    assert result["label_accuracy"] == 0.5 and result["class_histogram"] == [0.5, 0.25, 0.25]
    assert result["confidence"] == pytest.approx((0.7 + 0.8 + 0.5 + 0.6) / 4)


def test_detector_of_another_dimension_is_told_before_sampling(tmp_path):
    reference = reference_of(tmp_path, images_of(range(50)), PixelDetector())
    wide = PixelDetector()
    wide.feature_dim = 7

    def never():
        raise AssertionError("sampled")
        yield

    with pytest.raises(ValueError, match="4 features"):
        evaluate(never(), wide, reference)
