"""Legacy TensorFlow pickles: the expected numbers were computed by TensorFlow."""

import numpy as np
import pytest
import torch

from refine.checkpoints import load_generator
from refine.checkpoints.foreign.opening import open_container
from tests.checkpoints.builders import Format, tf_file, write
from tests.golden import ROOT, max_error, read_arrays, read_json

NETS = sorted(path.stem for path in (ROOT / "stylegan2/tf").glob("*.npz"))
TOLERANCE = 3e-5
FORMATS = {f"p{p}-numpy{n}": {"protocol": p, "numpy": n} for p, n in [(2, 1), (3, 1), (4, 1), (4, 2), (5, 2)]}


def numpy_arrays(name):
    return dict(np.load(ROOT / f"stylegan2/tf/{name}.npz", allow_pickle=False))


def build(tmp_path, name, options=None, table=None, changes=None):
    table = table or read_json(f"stylegan2/tf/{name}")
    form = Format(**(options or {"protocol": 3}))
    return write(tmp_path / "x.pkl", tf_file(form, table, numpy_arrays(name), changes))


def assert_numbers(path, name, with_d=True):
    data = read_arrays(f"stylegan2/tf/{name}")
    z, c = data["io/z"], data["io/c"]
    with open_container(path) as container:
        assert container.members == {"G_ema": "generator", "G": "generator", "D": "discriminator"}
        G = container.load("G_ema").eval()
        D = container.load("D").eval() if with_d else None
    assert max_error(G.mapping(z, c), data["io/Gs_w"]) < TOLERANCE
    image = G(z, c, noise_mode="const")
    assert max_error(image, data["io/Gs_img_psi1_const"]) < TOLERANCE
    assert max_error(G(z, c, 0.7, noise_mode="const"), data["io/Gs_img_psi0.7_const"]) < TOLERANCE
    if with_d:
        assert max_error(D(data["io/Gs_img_psi1_const"], c), data["io/D_logits_of_Gs_img"]) < TOLERANCE


@pytest.mark.parametrize("name", ["tf01_ada_skip_uncond", "tf04_stylegan2_skip_uncond"])
def test_originals(name):
    assert_numbers(ROOT / f"pickles/{name}.pkl", name)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", NETS)
def test_every_network(name, form, tmp_path):
    assert_numbers(build(tmp_path, name, FORMATS[form]), name)


def test_there_are_six():
    assert len(NETS) == 6


def test_minibatch_groups_of_the_original(tmp_path):
    """The original takes groups of 4 where its file says nothing; NVIDIA's converter takes the whole batch."""
    with open_container(build(tmp_path, "tf04_stylegan2_skip_uncond")) as container:
        assert container.load("D").b4.mbstd.group_size == 4
    with open_container(build(tmp_path, "tf01_ada_skip_uncond")) as container:
        assert container.load("D").b4.mbstd.group_size == 32


def with_kwargs(name, **kwargs):
    table = read_json(f"stylegan2/tf/{name}")
    table["Gs"]["static_kwargs"] |= kwargs
    return table


def test_harmless_arguments(tmp_path):
    name = "tf01_ada_skip_uncond"
    harmless = {"fmap_min": 1, "fmap_decay": 1.0, "dtype": "float32", "truncation_psi": 0.5, "structure": "auto"}
    assert_numbers(build(tmp_path, name, table=with_kwargs(name, **harmless)), name)
    G = load_generator(build(tmp_path, name, table=with_kwargs(name, dlatent_avg_beta=0.9)))
    assert G.mapping.w_avg_beta == 0.9
    assert load_generator(build(tmp_path, name, table=with_kwargs(name, w_avg_beta=None))).mapping.w_avg_beta == 1


@pytest.mark.parametrize(
    "kwargs, reason",
    [
        ({"fmap_decay": 0.5}, "fmap_decay=0.5"),
        ({"fused_scale": "auto"}, "fused_scale=auto"),
        ({"architecture": "hierarchical"}, "architecture hierarchical"),
        ({"fmap_base": "x"}, "fmap_base"),
        ({"resolution": 2**30}, "img_resolution"),
        ({"resolution": 32}, "lacks"),
        ({"latent_size": 17}, "shape"),
    ],
)
def test_arguments_that_cannot_be_expressed(kwargs, reason, tmp_path):
    name = "tf01_ada_skip_uncond"
    with pytest.raises(ValueError, match=reason) as caught:
        load_generator(build(tmp_path, name, table=with_kwargs(name, **kwargs)))
    assert "\n" not in str(caught.value)


def test_conditional_networks_of_the_original(tmp_path):
    name = "tf04_stylegan2_skip_uncond"
    table, arrays = read_json(f"stylegan2/tf/{name}"), numpy_arrays(name)
    table["Gs"]["components"]["mapping"]["variables"].append(["LabelConcat/weight", [4, 16], "ndarray"])
    arrays["Gs|mapping|LabelConcat/weight"] = np.zeros((4, 16), np.float32)
    with pytest.raises(ValueError, match="class-conditional generator of the original StyleGAN2"):
        load_generator(write(tmp_path / "x.pkl", tf_file(Format(), table, arrays)))


@pytest.mark.parametrize(
    "change, family",
    [
        ({"version": 3}, "network version 3"),
        ({"build_func_name": "G_style"}, "StyleGAN1"),
        ({"static_kwargs": {"synthesis_func": "G_synthesis_stylegan_revised"}}, "configurations A–D"),
    ],
)
def test_other_families(change, family, tmp_path):
    path = build(tmp_path, "tf04_stylegan2_skip_uncond", changes={"Gs": change})
    with pytest.raises(ValueError, match=f"x.pkl is .*{family}.*; expected"):
        load_generator(path)


def test_tensors_own_their_memory(tmp_path):
    G = load_generator(build(tmp_path, "tf01_ada_skip_uncond"))
    for name, tensor in G.state_dict().items():
        assert tensor.is_contiguous() and tensor.dtype == torch.float32, name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
