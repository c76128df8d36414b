"""Detectors: what is loaded, how it is called, what its numbers may be called."""

import pytest
import torch

from refine.checkpoints.native import save_networks
from refine.metrics import detectors
from refine.metrics.detectors import TorchScriptDetector, load_detector, metric_names
from refine.metrics.digits import DigitsDetector
from tests.metrics.networks import PixelDetector

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


def script(path, module) -> TorchScriptDetector:
    torch.jit.script(module).save(str(path))
    return load_detector(path)


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


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, 28, 28), torch.zeros(1, 1, 32, 32)])
def test_digits_detector_takes_grey_bytes_only(images):
    dtype = torch.float32 if images.shape == (1, 1, 32, 32) else torch.uint8
    with pytest.raises(ValueError, match=r"expected uint8 \[N, 1, 32, 32\]"):
        DigitsDetector()(images.to(dtype))


def test_torchscript(tmp_path):
    detector = script(tmp_path / "Mean Colour.pt", MeanColour())
    images = torch.randint(0, 256, [4, 3, 8, 8], dtype=torch.uint8)
    torch.testing.assert_close(detector(images), images.float().mean(dim=[2, 3]))
    assert detector.feature_dim == 3 and detector.classify(images) is None
    assert metric_names(detector) == ("fd_mean_colour", "kid_mean_colour")


def test_nvidias_call_returns_features_of_rgb(tmp_path):
    detector = script(tmp_path / "n.pt", NvidiaStyle())
    grey = torch.full([2, 1, 8, 8], 7, dtype=torch.uint8)
    assert detector(grey).tolist() == [[7, 7, 7]] * 2


def test_only_known_weights_may_be_called_fid(tmp_path, monkeypatch):
    pretender = script(tmp_path / "inception-2015-12-05.pt", NvidiaStyle())
    assert metric_names(pretender) == ("fd_inception_2015_12_05", "kid_inception_2015_12_05")
    monkeypatch.setitem(detectors.KNOWN_TORCHSCRIPT, pretender.sha256, detectors.INCEPTION_SPACE)
    assert metric_names(load_detector(tmp_path / "inception-2015-12-05.pt")) == ("fid", "kid")
    liar = PixelDetector()
    liar.space = detectors.INCEPTION_SPACE
    assert metric_names(liar)[0] != "fid"


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
