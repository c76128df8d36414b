"""Metrics by name: what names mean, what they lead with, which are refused."""

import types

import numpy as np
import pytest
import torch

from refine.config import RefineConfig
from refine.metrics import named
from refine.metrics.detectors import INCEPTION_SPACE
from refine.metrics.named import NamedMetric
from refine.metrics.references import save_reference
from refine.metrics.statistics import FeatureStatistics
from refine.training import assemble
from tests.metrics.networks import PixelDetector, PlainGenerator


@pytest.fixture
def space(monkeypatch, tmp_path):
    """A detector in place of Inception's and of every other, and a reference with features."""
    detector = PixelDetector(num_classes=4)
    loaded = []

    def load(name, trust):
        loaded.append(name)
        assert not trust
        detector.fid_basis = "in a test" if name == INCEPTION_SPACE else None
        return detector

    monkeypatch.setattr(named, "load_detector", load)
    features = FeatureStatistics(keep_features=True).update(torch.rand(30, 4))
    save_reference(tmp_path / "r.npz", features, detector)
    return tmp_path / "r.npz", loaded


@pytest.mark.parametrize(
    "name, num, key, direction, detector",
    [
        ("fid50k_full", 50_000, "fid", "lower", INCEPTION_SPACE),
        ("kid50k_full", 50_000, "kid", "lower", INCEPTION_SPACE),
        ("pr50k3_full", 50_000, "precision", "higher", INCEPTION_SPACE),
        ("is50k", 50_000, "is", "higher", INCEPTION_SPACE),
        ("fid2k", 2000, "fid", "lower", INCEPTION_SPACE),
        ("fidinf5k_full", 5000, "fidinf", "lower", INCEPTION_SPACE),
        ("fd5k-digits", 5000, "fd_pixels", "lower", "digits"),
        ("fd500-digits", 500, "fd_pixels", "lower", "digits"),
        ("kid5k-digits", 5000, "kid_pixels", "lower", "digits"),
        ("pr5k3-digits", 5000, "precision", "higher", "digits"),
        ("is5k-digits", 5000, "is_pixels", "higher", "digits"),
        ("fdinf5k-digits", 5000, "fdinf_pixels", "lower", "digits"),
        ("dc50k5_full", 50_000, "density", "higher", INCEPTION_SPACE),
        ("kidsub50k_full", 50_000, "kidsub", "lower", INCEPTION_SPACE),
        ("kidsub5k-digits", 5000, "kidsub_pixels", "lower", "digits"),
        ("mmd50k_full", 50_000, "mmd", "lower", INCEPTION_SPACE),
        ("mmd5k-digits", 5000, "mmd_pixels", "lower", "digits"),
        ("sliced5k-digits", 5000, "sliced_pixels", "lower", "digits"),
        ("fd5k-/a/b/my-net.pt", 5000, "fd_pixels", "lower", "/a/b/my-net.pt"),
    ],
)
def test_names(space, name, num, key, direction, detector):
    metric = NamedMetric(name, space[0])
    assert (metric.num, metric.key, metric.direction) == (num, key, direction) and space[1] == [detector]
    assert metric.name == ("fd5k-my-net" if "/" in name else name)


@pytest.mark.parametrize(
    "name",
    [
        *("fid40-digits", "fd40-digits", "kid40-digits", "pr40-digits", "is40-digits", "fdinf40-x"),
        *("dc40-digits", "kidsub40-digits", "mmd40-digits", "sliced40-x"),
    ],
)
def test_measured_under_its_key(space, name):
    if name.startswith("fid"):
        with pytest.raises(ValueError, match="Inception-2015-12-05 only"):
            NamedMetric(name, space[0])
        return
    G = PlainGenerator(c_dim=4)
    before = torch.get_rng_state()
    metric = NamedMetric(name, space[0], batch=16)
    results = metric.measure(G, "cpu")
    assert np.isfinite(results[metric.key]) and results["num"] == 40 and results["seeds"] == "0-39"
    assert torch.equal(torch.get_rng_state(), before)
    assert results["covariance"] == "divided by N - 1" and results["detector"]["resize"] == "none"
    assert metric.measure(G, "cpu")[metric.key] == results[metric.key]


@pytest.mark.parametrize("name", ["", "fid", "fd5k", "fid0k", "fid1", "xx5k-digits", "fid50k3_full", "fid-5", "fd2k-"])
def test_unknown_names(space, name):
    with pytest.raises(ValueError, match=r"unknown metric|expected at least 2"):
        NamedMetric(name, space[0])


@pytest.mark.parametrize(
    "name, instead", [("mind5k-digits", "sliced5k-digits"), ("MIND50k_full", "sliced50k_full"), ("cmmd50k", "mmd50k")]
)
def test_names_of_others_are_answered_with_what_is_near(space, name, instead):
    with pytest.raises(ValueError, match=rf"^'{name}': C?M\w+ is not measured here; expected {instead}, which is near"):
        NamedMetric(name, space[0])


def test_references_that_are_not_enough(space, tmp_path):
    np.savez(tmp_path / "plain.npz", mu=np.zeros(4), sigma=np.eye(4))
    for name in ("kid5k-digits", "pr5k3-digits"):
        with pytest.raises(ValueError, match=r"needs features of the reference, but plain\.npz"):
            NamedMetric(name, tmp_path / "plain.npz")
    with pytest.raises(ValueError, match="needs a reference"):
        NamedMetric("fd5k-digits", None)
    assert NamedMetric("is40-digits", None).measure(PlainGenerator(), "cpu")["is_pixels"] >= 1


def test_products_are_exact_while_measuring(space):
    """Whatever a run computes in: its numbers are those that compare_fid.py would find."""
    seen = []

    class Noting(PlainGenerator):
        def forward(self, *args, **kwargs):
            seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
            return super().forward(*args, **kwargs)

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        NamedMetric("is40-digits", space[0], batch=16).measure(Noting(c_dim=4), "cpu")
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (True, True)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    assert seen == [(False, False)] * 3


@pytest.mark.parametrize(
    ("asked", "resolutions", "expected"),
    [
        (None, (32, 32), 100),
        (None, (256, 256), 100),
        (None, (512, 64), 25),
        (None, (1024, 1024), 6),
        (7, (1024, 64), 7),
    ],
)
def test_as_many_images_at_once_as_are_asked_for_or_fit(monkeypatch, asked, resolutions, expected):
    seen = []
    monkeypatch.setattr(assemble, "NamedMetric", lambda name, ref, **options: seen.append(options["batch"]))
    student, teacher = (types.SimpleNamespace(img_resolution=resolution, img_channels=1) for resolution in resolutions)
    pair = types.SimpleNamespace(student=student, teacher=teacher, source=None)
    config = RefineConfig("g", "t", metrics=("fd2k-digits",), metrics_batch=asked)
    assemble._load_metrics(config, pair, torch.device("cpu"), dry_run=True, brought=assemble.Brought())
    assert seen == [expected]
