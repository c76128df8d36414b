"""The public API: `import refine`, load_generator, load_teacher."""

import subprocess
import sys

import pytest
import safetensors.torch
import torch

import refine
from refine.checkpoints import native
from refine.networks.edm import EDMPrecond
from refine.networks.stylegan2 import Discriminator, Generator

UNET = {
    "img_resolution": 32,
    "img_channels": 1,
    "label_dim": 10,
    "model_channels": 8,
    "channel_mult": [1],
    "num_blocks": 1,
}


def make_generator() -> Generator:
    mapping, synthesis = {"num_layers": 1}, {"channel_base": 64, "channel_max": 4}
    return Generator(4, 10, 4, 32, 1, mapping_kwargs=mapping, synthesis_kwargs=synthesis)


@pytest.fixture
def save(tmp_path):
    def save(**networks):
        native.save_networks(tmp_path / "net", networks, provenance={})
        return tmp_path / "net"

    return save


def refusal(function, path) -> str:
    with pytest.raises(ValueError) as caught:
        function(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_import_is_cheap(root):
    code = (
        "import sys, refine, refine.checkpoints, refine.cli.main\n"
        "assert 'load_generator' in dir(refine)\n"
        "print([m for m in ('torch', 'numpy', 'scipy', 'matplotlib') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True).strip() == "[]"


def test_unknown_name():
    with pytest.raises(AttributeError, match="load_everything"):
        refine.load_everything  # noqa: B018


def test_generator(save):
    G, G_ema = make_generator(), make_generator()
    loaded = refine.load_generator(save(G=G, G_ema=G_ema))
    assert (loaded.z_dim, loaded.c_dim, loaded.w_dim, loaded.num_ws) == (4, 10, 4, 8)
    assert (loaded.img_resolution, loaded.img_channels) == (32, 1)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    z, c = torch.randn(2, 4), torch.eye(10)[:2]
    x = loaded(z, c, truncation_psi=1.0, noise_mode="const")
    assert x.shape == (2, 1, 32, 32) and x.dtype == torch.float32
    assert torch.equal(x, G_ema.eval()(z, c)), "G_ema is the one to use"
    assert torch.equal(loaded.synthesis(loaded.mapping(z, c)), x)


def test_generator_without_ema(save):
    G = make_generator()
    loaded = refine.load_generator(save(G=G, D=Discriminator(10, 32, 1, channel_max=4), aux=EDMPrecond(**UNET)))
    assert torch.equal(loaded.mapping.fc0.weight, G.mapping.fc0.weight)


def test_teacher(save):
    T = EDMPrecond(**UNET)
    loaded = refine.load_teacher(str(save(ema=T)))
    assert (loaded.sigma_min, loaded.label_dim, loaded.img_resolution, loaded.img_channels) == (T.sigma_min, 10, 32, 1)
    assert loaded.sigma_max > 1 and not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    x, sigma, c = torch.randn(2, 1, 32, 32), torch.tensor([0.5, 2.0]), torch.eye(10)[:2]
    assert torch.equal(loaded(x, sigma, class_labels=c), T.eval()(x, sigma, class_labels=c))
    assert loaded(x, sigma).shape == x.shape


def test_student_and_teacher_mixed_up(save):
    path = save(ema=EDMPrecond(**UNET))
    assert refusal(refine.load_generator, path) == (
        f"{path} holds a teacher (EDMPrecond 32×32×1, 10 classes); expected a generator"
    )
    path = save(G_ema=make_generator(), G=make_generator())
    assert refusal(refine.load_teacher, path) == (
        f"{path} holds a generator (Generator 32×32×1, 10 classes); expected a teacher"
    )
    path = save(G=make_generator(), aux=EDMPrecond(**UNET))
    assert "expected a teacher" in refusal(refine.load_teacher, path), "a run's auxiliary network is not a teacher"


def test_which_of_several(save):
    path = save(a=make_generator(), b=make_generator())
    assert "holds the generators a, b; expected one of them to be called G_ema" in refusal(refine.load_generator, path)


@pytest.mark.parametrize("function", [refine.load_generator, refine.load_teacher])
def test_files_that_cannot_be_used(function, tmp_path):
    kind = function.__name__.removeprefix("load_")
    path = tmp_path / "net.pkl"
    assert refusal(function, path) == f"{path}: no such file"
    assert (
        refusal(function, tmp_path)
        == f"{tmp_path} is a folder; expected a file, or a folder of diffusers (with config.json)"
    )
    assert "neither a file nor a known name" in refusal(function, "no-such-network")
    for data, what in [
        (b"", "an empty file"),
        (b"<html></html>", "an HTML page"),
        (b"\x80\x04}.", "a pickle of an empty table"),
        (safetensors.torch.save({"a": torch.zeros(1)}), "a safetensors file of another program"),
    ]:
        path.write_bytes(data)
        message = refusal(function, path)
        assert message.startswith(f"{path} is {what}") and f"expected a {kind}" in message


def test_nothing_in_a_pickle_runs(tmp_path):
    """A pickle that would touch a file if it were loaded."""
    path, canary = tmp_path / "net.pkl", tmp_path / "canary"
    path.write_bytes(b"cpathlib\nPath.touch\n(cpathlib\nPath\n(V" + str(canary).encode() + b"\ntRtR.")
    refusal(refine.load_generator, path)
    path.write_bytes(b"\x80\x02" + path.read_bytes())
    refusal(refine.load_generator, path)
    assert not canary.exists()


def test_shipped_names():
    G, T = refine.load_generator("digits-gan"), refine.load_teacher("digits-teacher")
    assert G.img_resolution == T.img_resolution == 32 and G.img_channels == T.img_channels == 1
    assert G.c_dim in (0, 10) and T.label_dim == G.c_dim
    assert "expected a generator" in refusal(refine.load_generator, "digits-teacher")
    assert "expected a teacher" in refusal(refine.load_teacher, "digits-gan")
    assert "expected a generator" in refusal(refine.load_generator, "digits-reference")
