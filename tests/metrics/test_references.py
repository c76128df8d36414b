"""Reference files: what is read, what is refused and in which words."""

import zipfile

import numpy as np
import pytest
import torch

from refine.metrics.references import load_reference, save_reference
from refine.metrics.statistics import FeatureStatistics
from tests.metrics.networks import PixelDetector

MU, SIGMA = np.zeros(4), np.eye(4)


def test_round_trip(tmp_path):
    features = torch.randn(50, 4)
    stats = FeatureStatistics(keep_features=True).update(features)
    save_reference(tmp_path / "r.npz", stats, PixelDetector())
    reference = load_reference(tmp_path / "r.npz")
    assert reference.num == 50 and reference.name == "r.npz" and reference.detector == "pixels"
    assert torch.equal(reference.mu, stats.mean) and torch.equal(reference.sigma, stats.covariance)
    assert torch.equal(reference.features, features)
    reference.check_detector(PixelDetector())
    other = PixelDetector()
    other.sha256 = "1" * 64
    with pytest.raises(ValueError, match="made with other detector weights"):
        reference.check_detector(other)


def test_mu_and_sigma_alone_are_enough(tmp_path):
    np.savez(tmp_path / "edm.npz", mu=MU, sigma=SIGMA)
    reference = load_reference(tmp_path / "edm.npz")
    assert reference.features is None and reference.num is None and reference.sigma.dtype == torch.float64
    reference.check_detector(PixelDetector())
    wide = PixelDetector()
    wide.feature_dim = 2048
    with pytest.raises(ValueError, match=r"edm.npz holds statistics of 4 features, but .* gives 2048"):
        reference.check_detector(wide)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"mu": MU}, "holds mu, expected mu and sigma"),
        ({"arr_0": np.zeros([2, 8, 8, 3], np.uint8)}, "which need a detector|has arr_0 of shape"),
        ({"mu": MU, "sigma": np.eye(3)}, r"\[4\] and sigma of shape \[3, 3\]"),
        ({"mu": SIGMA, "sigma": SIGMA}, r"expected \[D\] and \[D, D\]"),
        ({"mu": np.float64(1), "sigma": SIGMA}, "expected"),
        ({"mu": MU * np.nan, "sigma": SIGMA}, "NaN or infinity in"),
        ({"mu": MU, "sigma": np.full([4, 4], np.inf)}, "NaN or infinity in sigma"),
        ({"mu": MU.astype(int), "sigma": SIGMA}, "mu of dtype int64, expected floats"),
        ({"mu": MU, "sigma": np.triu(np.ones([4, 4]))}, "not symmetric"),
        ({"mu": MU, "sigma": SIGMA, "features": np.zeros([5, 3])}, r"features of shape \[5, 3\]"),
        ({"mu": MU, "sigma": SIGMA, "num": np.zeros(2)}, "num that is not an integer"),
    ],
)
def test_other_contents_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        load_reference(tmp_path / "bad.npz")
    assert "bad.npz" in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_no_npz_are_refused(tmp_path):
    np.savez(tmp_path / "whole.npz", mu=MU, sigma=SIGMA)
    whole = (tmp_path / "whole.npz").read_bytes()
    np.save(tmp_path / "single.npy", MU)
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with zipfile.ZipFile(tmp_path / "text.zip", "w") as archive:
        archive.writestr("mu", "no array")
        archive.writestr("sigma", "no array")
    (tmp_path / "text.npz").write_text("mu sigma")
    (tmp_path / "nothing.npz").write_bytes(b"")
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(whole)
    flipped[200] ^= 255
    (tmp_path / "flipped.npz").write_bytes(flipped)
    np.savez(tmp_path / "pickled.npz", mu=np.array([{"a": 1}], dtype=object), sigma=SIGMA)
    for name in (
        "single.npy",
        "empty.zip",
        "text.zip",
        "text.npz",
        "nothing.npz",
        "cut.npz",
        "flipped.npz",
        "pickled.npz",
    ):
        with pytest.raises(ValueError, match="expected") as caught:
            load_reference(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value), name
    with pytest.raises(ValueError, match=r"missing.npz"):
        load_reference(tmp_path / "missing.npz")
    with pytest.raises(ValueError, match="holds no images"):
        load_reference(tmp_path)
