"""Statistics as other tools cache them: the same mean and covariance from every form."""

import io
import pickle
import sys
import types

import numpy as np
import pytest
import torch

from refine.checkpoints.native import save_networks
from refine.metrics.references import Looking, load_reference
from refine.networks.stylegan2 import Generator
from tests.metrics.networks import PixelDetector

FEATURES = np.random.RandomState(0).standard_normal([40, 4])
MU, SIGMA = FEATURES.mean(axis=0), np.cov(FEATURES, rowvar=False)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("REFINE_CACHE", str(tmp_path_factory.mktemp("cache")))


def easy_dict(monkeypatch, table):
    """A pickled table of the class that StyleGAN's caches hold."""
    module = types.ModuleType("dnnlib.util")
    module.EasyDict = type("EasyDict", (dict,), {"__module__": "dnnlib.util"})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "dnnlib.util", module)
        return pickle.dumps(module.EasyDict(table), protocol=4)


def check(reference, features=False):
    np.testing.assert_allclose(reference.mu.numpy(), MU, rtol=1e-12)
    np.testing.assert_allclose(reference.sigma.numpy(), SIGMA, rtol=1e-10)
    assert (reference.features is not None) == features


def test_stylegans_cache_of_sums(tmp_path, monkeypatch):
    table = {
        "capture_all": False,
        "capture_mean_cov": True,
        "max_items": None,
        "num_items": 40,
        "num_features": 4,
        "all_features": None,
        "raw_mean": FEATURES.sum(axis=0),
        "raw_cov": FEATURES.T @ FEATURES,
    }
    (tmp_path / "s.pkl").write_bytes(easy_dict(monkeypatch, table))
    reference = load_reference(tmp_path / "s.pkl", PixelDetector())
    check(reference)
    assert reference.num == 40 and "N − 1" in reference.form
    for change, message in [
        ({"num_items": 1}, "num_items 1"),
        ({"raw_cov": np.zeros([3, 3])}, "expected .D. and .D, D."),
    ]:
        (tmp_path / "bad.pkl").write_bytes(easy_dict(monkeypatch, table | change))
        with pytest.raises(ValueError, match=message):
            load_reference(tmp_path / "bad.pkl")


def test_stylegans_cache_of_features(tmp_path, monkeypatch):
    table = {"capture_all": True, "num_items": 40, "all_features": [FEATURES[:25], FEATURES[25:]]}
    (tmp_path / "f.pkl").write_bytes(easy_dict(monkeypatch, table))
    check(load_reference(tmp_path / "f.pkl"), features=True)


def test_edm2s_pickle(tmp_path):
    table = {"num_images": 40, "fid": {"mu": MU, "sigma": SIGMA}, "fd_dinov2": {"mu": np.zeros(9), "sigma": np.eye(9)}}
    (tmp_path / "img64.pkl").write_bytes(pickle.dumps(table))
    assert load_reference(tmp_path / "img64.pkl").num == 40
    check(load_reference(tmp_path / "img64.pkl"))


@pytest.mark.parametrize("new", [True, False])
def test_torch_fidelitys_caches(tmp_path, new):
    torch.save({"mu": MU, "sigma": SIGMA}, tmp_path / "stat.pt", _use_new_zipfile_serialization=new)
    check(load_reference(tmp_path / "stat.pt"))
    torch.save(torch.from_numpy(FEATURES), tmp_path / "features.pt", _use_new_zipfile_serialization=new)
    check(load_reference(tmp_path / "features.pt"), features=True)


def test_npz_of_adm_and_of_clean_fid(tmp_path):
    images = np.zeros([2, 4, 4, 3], np.uint8)
    np.savez(tmp_path / "adm.npz", mu=MU, sigma=SIGMA, mu_s=np.zeros(3), sigma_s=np.eye(3), arr_0=images)
    reference = load_reference(tmp_path / "adm.npz", PixelDetector())
    check(reference)
    assert reference.form == "ADM reference batch (mu, sigma)"
    np.savez(tmp_path / "kid.npz", feats=FEATURES)
    check(load_reference(tmp_path / "kid.npz"), features=True)


def test_pickles_that_run_something_or_hold_something_else(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    for name, value in {"evil.pkl": Evil(), "list.pkl": [1, 2], "table.pkl": {"a": 1}}.items():
        (tmp_path / name).write_bytes(pickle.dumps(value) if name != "evil.pkl" else _dumped(value))
        with pytest.raises(ValueError, match=name) as caught:
            load_reference(tmp_path / name, PixelDetector())
        assert "\n" not in str(caught.value)


def _dumped(value):
    stream = io.BytesIO()
    pickle.Pickler(stream, protocol=2).dump(value)
    return stream.getvalue()


def test_another_generator(tmp_path):
    synthesis = {"channel_base": 64, "channel_max": 4}
    kwargs = {"z_dim": 4, "c_dim": 0, "w_dim": 4, "img_resolution": 8, "img_channels": 1}
    G = Generator(**kwargs, mapping_kwargs={"num_layers": 1}, synthesis_kwargs=synthesis)
    save_networks(tmp_path / "G.safetensors", {"G_ema": G}, provenance={})
    reference = load_reference(tmp_path / "G.safetensors", PixelDetector(), Looking(num=20, batch=8))
    assert reference.num == 20 and reference.form == "generator, 20 images" and len(reference.features) == 20
    again = load_reference(tmp_path / "G.safetensors", PixelDetector(), Looking(num=20, batch=8))
    assert torch.equal(again.mu, reference.mu)


def test_statistics_that_contradict_themselves_and_those_of_equal_images(tmp_path):
    np.savez(tmp_path / "r.npz", mu=np.zeros(4), sigma=np.eye(4), features=np.ones([3, 4], np.float32), num=7)
    with pytest.raises(ValueError, match=r"has a num of 7 and features of 3 images"):
        load_reference(tmp_path / "r.npz")
    np.savez(tmp_path / "r.npz", mu=np.zeros(4), sigma=np.zeros([4, 4]), num=7)
    assert load_reference(tmp_path / "r.npz").sigma.abs().max() == 0
    np.savez(tmp_path / "r.npz", mu=np.zeros(4), sigma=-1e-9 * np.eye(4), num=7)
    with pytest.raises(ValueError, match="sigma with negative eigenvalues"):
        load_reference(tmp_path / "r.npz")
