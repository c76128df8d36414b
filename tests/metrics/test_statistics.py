"""Streaming mean and covariance against one pass with numpy."""

import numpy as np
import pytest
import torch

from refine.metrics.statistics import FeatureStatistics


def features(n=101, d=5, seed=0, offset=0.0):
    return torch.from_numpy(np.random.RandomState(seed).randn(n, d) @ np.diag(np.arange(1.0, d + 1)) + offset)


def test_equals_one_pass():
    x = features()
    stats = FeatureStatistics()
    for batch in x.split(17):
        stats.update(batch)
    assert stats.num == 101 and stats.dim == 5
    np.testing.assert_allclose(stats.mean, x.numpy().mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(stats.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-12)


def test_merge_equals_one_pass():
    x = features()
    parts = [FeatureStatistics(keep_features=True).update(part) for part in x.split(40)]
    merged = FeatureStatistics(keep_features=True)
    for part in parts:
        merged.merge(part)
    merged.merge(FeatureStatistics(keep_features=True))  # nothing seen
    np.testing.assert_allclose(merged.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-12)
    assert torch.equal(merged.features, x.float())
    assert parts[0].num == 40, "merging must not change what is merged"


def test_far_from_zero_nothing_cancels():
    x = features(offset=1e7)
    stats = FeatureStatistics()
    for batch in x.split(10):
        stats.update(batch)
    np.testing.assert_allclose(stats.covariance, np.cov((x - 1e7).numpy(), rowvar=False), rtol=1e-7, atol=1e-7)


def test_float32_features_are_summed_in_float64():
    x = features(n=5000).float()
    stats = FeatureStatistics()
    for batch in x.split(7):
        stats.update(batch)
    np.testing.assert_allclose(stats.covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-11, atol=1e-11)


def test_bad_input_is_told():
    stats = FeatureStatistics().update(features())
    with pytest.raises(ValueError, match="NaN"):
        stats.update(torch.full([2, 5], float("nan")))
    with pytest.raises(ValueError, match=r"\[2, 4\].*\[N, 5\]"):
        stats.update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="did not keep"):
        _ = stats.features
    with pytest.raises(ValueError, match="1 images are too few"):
        _ = FeatureStatistics().update(torch.zeros(1, 3)).covariance
    with pytest.raises(ValueError, match="5 features into statistics of 3"):
        FeatureStatistics().update(torch.zeros(2, 3)).merge(stats)
    assert stats.update(torch.zeros(0, 5)).num == 101
