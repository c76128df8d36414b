"""`.pt` state dicts of rosinality's names, against an evaluation of those names that shares no code with ours."""

import argparse
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from refine.checkpoints import export, load_generator
from refine.checkpoints.foreign import rosinality
from refine.checkpoints.foreign.opening import open_container
from refine.networks.stylegan2 import Discriminator, Generator, MappingNetwork
from tests.checkpoints.rosinality_reference import generate, random_generator
from tests.golden import max_error

TOLERANCE = 3e-5


@pytest.fixture(scope="module")
def state():
    return random_generator(size=8, layers=2, dim=32)


def save(path, table, legacy=False):
    torch.save(table, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize(
    "size, multiplier, layers, dim, legacy", [(4, 2, 1, 16, True), (8, 2, 8, 16, False), (64, 1, 2, 8, False)]
)
def test_images(size, multiplier, layers, dim, legacy, tmp_path):
    state = random_generator(size, multiplier, layers, dim)
    latent_avg = torch.randn(dim)
    path = save(tmp_path / "x.pt", {"g_ema": OrderedDict(state), "latent_avg": latent_avg}, legacy)
    G = load_generator(path)
    assert (G.z_dim, G.w_dim, G.c_dim, G.img_resolution, G.mapping.num_layers) == (dim, dim, 0, size, layers)
    z = torch.randn(1 if size == 64 else 2, dim)
    for psi in (1.0, 0.7):
        image = G(z, None, truncation_psi=psi, noise_mode="const")
        assert max_error(image, generate(state, z, psi, latent_avg)) < TOLERANCE


def test_files_of_the_training_script(state, tmp_path):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(3, 3)

    optimizer = torch.optim.Adam(Module().parameters(), betas=(0.0, 0.99))
    table = {"g": state, "g_ema": state, "d": {}, "g_optim": optimizer.state_dict(), "d_optim": optimizer.state_dict()}
    table |= {"args": argparse.Namespace(size=8, path="/private"), "ada_aug_p": 0.0}
    for legacy in (False, True):
        path = save(tmp_path / "000100.pt", table, legacy)
        with open_container(path) as container:
            assert set(container.members) == {"G_ema", "G"}  # nothing in it makes "d" a discriminator
            assert any("no mean of w" in note for note in container.network("G_ema").notes)
        assert torch.equal(load_generator(path).synthesis.b4.const, state["input.input"][0])


@pytest.mark.parametrize("legacy", [False, True])
def test_prefix_of_dataparallel(state, legacy, tmp_path):
    wrapped = {f"module.{name}": value for name, value in state.items()}
    for table in ({"g_ema": wrapped, "g": state}, wrapped):
        G = load_generator(save(tmp_path / "x.pt", table, legacy))
        assert torch.equal(G.synthesis.b8.conv0.weight, state["convs.0.conv.weight"][0])


def test_big_endian(state, tmp_path):
    with (
        zipfile.ZipFile(save(tmp_path / "x.pt", {"g_ema": state})) as good,
        zipfile.ZipFile(tmp_path / "y.pt", "w") as bad,
    ):
        for name in good.namelist():
            data = good.read(name)
            data = np.frombuffer(data, "<f4").astype(">f4").tobytes() if "/data/" in name else data
            bad.writestr(name, b"big" if name.endswith("/byteorder") else data)
    little, big = (load_generator(tmp_path / name).state_dict() for name in ("x.pt", "y.pt"))
    assert all(torch.equal(value, big[name]) for name, value in little.items())


def test_bare_state_dict_and_no_noises(state, tmp_path):
    bare = {name: value for name, value in state.items() if not name.startswith("noises.")}
    path = save(tmp_path / "x.pt", bare)
    with open_container(path) as container:
        assert any("noise" in note for note in container.network("G_ema").notes)
        again = container.load("G_ema")
    torch.manual_seed(5)
    assert torch.equal(load_generator(path).synthesis.b8.conv0.noise_const, again.synthesis.b8.conv0.noise_const)
    assert torch.equal(load_generator(path).synthesis.b8.conv0.weight, state["convs.0.conv.weight"][0])


def test_missing_mean_of_w_is_estimated(state, tmp_path):
    G = load_generator(save(tmp_path / "x.pt", {"g_ema": state}))
    w = G.mapping(torch.randn(20_000, 32), None)[:, 0]
    error = (G.mapping.w_avg - w.mean(dim=0)).abs().max()
    assert 0 < error < 6 * w.std(dim=0).max() / 10_000**0.5


def test_a_larger_mapping_is_estimated_from_fewer_draws(state, tmp_path, monkeypatch):
    """So that it takes no longer, whatever size a file claims."""
    path, drawn, forward = save(tmp_path / "x.pt", {"g_ema": state}), [], MappingNetwork.forward
    monkeypatch.setattr(
        MappingNetwork, "forward", lambda self, z, *a, **k: drawn.append(len(z)) or forward(self, z, *a, **k)
    )
    monkeypatch.setattr(rosinality, "_MEAN_WEIGHTS", 2 * 33 * 32)  # of this one
    load_generator(path)
    assert sum(drawn) == 10_000
    monkeypatch.setattr(rosinality, "_MEAN_WEIGHTS", 2 * 33 * 32 // 4)
    load_generator(path)
    assert sum(drawn) == 12_500


def test_large_constant_noise_that_is_missing(tmp_path):
    """Above 64×64 the empty network has no memory for it."""
    state = random_generator(128, 1, 1, 4)
    bare = {name: value for name, value in state.items() if not name.startswith("noises.")}
    G = load_generator(save(tmp_path / "x.pt", {"g_ema": bare}))
    assert not any(tensor.is_meta for tensor in G.state_dict().values())
    assert 0.9 < G.synthesis.b128.conv1.noise_const.std() < 1.1


def test_strided_tensors_and_aliased_storages(state, tmp_path):
    """Converter files hold transposed arrays; here even all tensors in one storage."""
    flat = torch.empty(sum(v.numel() for v in state.values()))
    position, views = 0, {}
    for name, value in state.items():
        part = flat[position : position + value.numel()]
        if value.ndim == 5 and value.shape[-1] == 3:
            part = part.view(1, 3, 3, *value.shape[2:0:-1]).permute(0, 4, 3, 1, 2)
        views[name] = part.view_as(value) if part.ndim == 1 else part
        views[name].copy_(value)
        position += value.numel()
    assert not views["conv1.conv.weight"].is_contiguous()
    for legacy in (False, True):
        G = load_generator(save(tmp_path / "x.pt", {"g_ema": views}, legacy))
        assert torch.equal(G.synthesis.b4.conv1.weight, state["conv1.conv.weight"][0])
        assert G.synthesis.b4.conv1.weight.untyped_storage().nbytes() == G.synthesis.b4.conv1.weight.nbytes


def _with(state, **changes):
    state = dict(state)
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del state[name]
        else:
            state[name] = value
    return state


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"dwt__ll": torch.zeros(2, 2)}, "not one of StyleGAN2's"),
        ({"x__iwt__ll": torch.zeros(2, 2)}, "SWAGAN"),
        ({"to_rgb1__bias": torch.zeros(1, 12, 1, 1)}, "SWAGAN"),
        ({"conv1__noise__weight": None}, "lacks"),
        ({"conv1__conv__weight": torch.zeros(1, 512, 512, 1, 1)}, "shape"),
        ({"style__1__weight": torch.zeros(4, 4)}, "shape"),
        ({"convs__0__conv__blur__kernel": torch.ones(2, 2)}, "filters"),
        ({"input__input": torch.zeros(1, 512, 4, 4, dtype=torch.int64)}, "floating point"),
        ({"input__input": torch.zeros(2, 512, 4, 4)}, "axes of size 1"),
    ],
)
def test_refused(state, changes, reason, tmp_path):
    with pytest.raises(ValueError, match=reason) as caught:
        load_generator(save(tmp_path / "x.pt", {"g_ema": _with(state, **changes)}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "table, family",
    [
        ({"net": {}, "optimizer_state": {}}, "a training state of EDM"),
        ({"networks": {}, "aux_optimizer": {}}, "a training state of this toolkit"),
        ({"model": {}, "optimizer": {}}, "a training state"),
        ({"layer.weight": torch.zeros(2)}, "state dict of another network"),
        ({"state_dict": {}, "latent_avg": torch.zeros(2)}, "a table with the keys"),
        ({"state_dict": {"decoder.conv1.conv.weight": torch.zeros(2)}, "opts": {}}, "a pSp/e4e checkpoint"),
        ([1, 2], "a PyTorch file"),
    ],
)
def test_other_files_are_named(table, family, tmp_path):
    for legacy in (False, True):
        with pytest.raises(ValueError, match=f"x.pt is .*{family}.*; expected"):
            load_generator(save(tmp_path / "x.pt", table, legacy))


# Writing.


def ours(**changes):
    kwargs = {"z_dim": 16, "c_dim": 0, "w_dim": 16, "img_resolution": 8, "img_channels": 3}
    kwargs |= {"mapping_kwargs": {"num_layers": 2}, "synthesis_kwargs": {}}
    for name, value in changes.items():
        part, _, key = name.rpartition("__")
        (kwargs[part] if part else kwargs)[key] = value
    G = Generator(**kwargs)
    for p in G.parameters():
        if p.ndim <= 1:
            p.data.add_(0.3 * torch.randn_like(p))
    G.mapping.w_avg.copy_(torch.randn(16))
    return G.eval().requires_grad_(False)


@pytest.mark.parametrize(
    "changes, error",
    [({}, 0), ({"mapping_kwargs__lr_multiplier": 0.1}, 1e-6), ({"synthesis_kwargs__use_noise": False}, 0)],
)
def test_written_files(changes, error, tmp_path):
    G = ours(**changes)
    export.write_rosinality(tmp_path / "x.pt", {"G_ema": G})
    table = torch.load(tmp_path / "x.pt", weights_only=True)
    assert set(table) == {"g_ema", "latent_avg"} and set(table["g_ema"]) == set(random_generator(8, 2, 2, 16))
    z = torch.randn(2, 16)
    expected = G(z, None, 0.7, noise_mode="const")
    assert max_error(generate(table["g_ema"], z, 0.7, table["latent_avg"]), expected) < TOLERANCE
    loaded = load_generator(tmp_path / "x.pt")
    assert max_error(loaded(z, None, 0.7, noise_mode="const"), expected) <= max(error * 10, 1e-6)
    for name, value in G.state_dict().items():
        if "conv1.resample_filter" not in name and "b4.resample" not in name:
            factor = 10 if "fc" in name and error else 1
            torch.testing.assert_close(loaded.state_dict()[name], value * factor, rtol=error, atol=0)


def test_there_and_back_again(state, tmp_path):
    table = {"g_ema": state, "latent_avg": torch.randn(32)}
    G = load_generator(save(tmp_path / "a.pt", table))
    assert export.write_rosinality(tmp_path / "b.pt", {"G_ema": G}) == []
    again = torch.load(tmp_path / "b.pt", weights_only=True)
    assert torch.equal(again["latent_avg"], table["latent_avg"])
    assert set(again["g_ema"]) == set(state)
    for name, value in state.items():
        assert torch.equal(again["g_ema"][name], value), name


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"c_dim": 3}, "3 classes"),
        ({"z_dim": 8}, "z has 8"),
        ({"mapping_kwargs__layer_features": 12}, "width"),
        ({"mapping_kwargs__activation": "relu"}, "leaky ReLU"),
        ({"synthesis_kwargs__architecture": "resnet"}, "architecture is resnet"),
        ({"synthesis_kwargs__resample_filter": [1, 1]}, "4×4"),
    ],
)
def test_what_cannot_be_written(changes, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        export.write_rosinality(tmp_path / "x.pt", {"G_ema": ours(**changes)})
    assert not (tmp_path / "x.pt").exists()


def test_discriminator_there_and_back_again(state, tmp_path):
    D = Discriminator(0, 8, 3, epilogue_kwargs={"mbstd_group_size": 4}).requires_grad_(False)
    G = load_generator(save(tmp_path / "a.pt", {"g_ema": state}))
    assert export.write_rosinality(tmp_path / "b.pt", {"G_ema": G, "D": D}) == []
    with open_container(tmp_path / "b.pt") as container:
        again = container.load("D")
    x = torch.randn(8, 3, 8, 8)
    assert torch.equal(again(x), D(x))
    cifar = Discriminator(0, 8, 3, architecture="orig")
    assert "architecture is orig" in export.write_rosinality(tmp_path / "c.pt", {"G_ema": G, "D": cifar})[0]
