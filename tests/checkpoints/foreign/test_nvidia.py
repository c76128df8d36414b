"""Pickles of StyleGAN2-ADA and EDM: the originals' own tiny files, and variants of them built from plain data."""

import copy
import itertools

import numpy as np
import pytest
import torch

from refine.checkpoints import load_generator, load_teacher
from refine.checkpoints.export import write_like
from refine.checkpoints.foreign.opening import open_container
from refine.checkpoints.native import save_networks
from refine.networks import edm, edm2
from refine.networks.stylegan2 import Discriminator, Generator
from tests.checkpoints import builders
from tests.checkpoints.builders import Call, Format, edm2_file, edm_file, stylegan2_file, write
from tests.golden import ROOT, max_error, read_arrays, read_json, sample_error

PICKLES = ROOT / "pickles"
TOLERANCE = 3e-5

GENERATORS = [name for name, case in read_json("stylegan2/nets/index").items() if case["kind"] == "generator"]
DISCRIMINATORS = [name for name, case in read_json("stylegan2/nets/index").items() if case["kind"] == "discriminator"]
TEACHERS = [
    *("song_ddpmpp_edm_uncond", "song_ddpmpp_edm_cond_mult222", "song_ncsnpp_edm_cond", "song_ncsnpp_ve_uncond"),
    *("song_ddpmpp_vp_cond", "song_skip_skip_edm", "adm_edm_cond_attn", "adm_edm_uncond_augment", "adm_iddpm_cond"),
]

FORMATS = {
    f"p{protocol}-numpy{numpy}-torch{style}": {"protocol": protocol, "numpy": numpy, "torch_style": style}
    for protocol, numpy, style in [(2, 1, 1), (3, 1, 1), (4, 1, 2), (4, 2, 2), (5, 2, 2)]
}


def load_members(path):
    with open_container(path) as container:
        return {name: container.load(name).eval() for name in container.members}


def golden_network(name):
    """A network of the golden collection, and its numbers."""
    case, data = read_json("stylegan2/nets/index")[name], read_arrays(f"stylegan2/nets/{name}")
    net = {"generator": Generator, "discriminator": Discriminator}[case["kind"]](**case["init_kwargs"]).eval()
    net.load_state_dict({k.split("/", 1)[1]: v for k, v in data.items() if k.startswith(("param/", "buffer/"))})
    return net, data


def each_with_a_format(names):
    """Every network in one of the ways of writing in turn, and the first one in all of them."""
    pairs = [(name, form) for name, form in zip(names, itertools.cycle(FORMATS), strict=False)]
    pairs += [(names[0], form) for form in FORMATS if (names[0], form) not in pairs]
    return pytest.mark.parametrize("name, form", pairs)


def golden_teacher(name):
    case, data = read_json(f"edm/{name}"), read_arrays(f"edm/{name}")
    net = getattr(edm, case["precond"])(**case["init_kwargs"]).eval()
    net.load_state_dict({k[2:]: v.float() for k, v in data.items() if k.startswith("w:")})
    return net, data


def assert_generator(G, data, key="out/img_psi1_const_fused1"):
    image = G(data["in/z"], data["in/c"], noise_mode="const", force_fp32=True)
    assert max_error(image, data[key]) < TOLERANCE


def assert_teacher(net, data):
    D_x = net(data["x"], data["sigma"], data.get("class_labels"))
    assert sample_error(D_x, data["base:D"]) < TOLERANCE


def assert_same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


# The originals' own files.


@pytest.mark.parametrize("name", ["plain_t17_p3", "plain_t213_p4", "ok_module_src_canary"])
def test_originals_of_stylegan2(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    family = "plain_t213" if name != "plain_t17_p3" else "plain_t17"
    expected, init = read_arrays(f"pickles/{family}_expected"), read_json(f"pickles/{family}_init")
    nets = load_members(PICKLES / f"{name}.pkl")
    assert set(nets) == {"G", "D", "G_ema"} and nets["G_ema"].init_kwargs == init["G"]
    z, c = expected["z"], expected["c"]
    for key, net, psi in (("G_ema", "G_ema", 1), ("G_ema", "G_ema", 0.7), ("G", "G", 1)):
        image = nets[net](z, c, truncation_psi=psi, noise_mode="const")
        assert max_error(image, expected[f"{key}_img_psi{'1' if psi == 1 else '07'}_const_fp32"]) < TOLERANCE
    logits = nets["D"](nets["G_ema"](z, c, noise_mode="const"), c)
    assert max_error(logits, expected["D_logits_of_G_ema_fp32"]) < TOLERANCE
    assert not list(tmp_path.iterdir())


def test_original_converted_from_tensorflow():
    data = read_arrays("stylegan2/tf/tf01_ada_skip_uncond")
    nets = load_members(PICKLES / "converted_tf01_ada_skip_uncond_t17.pkl")
    image = nets["G_ema"](data["io/z"], None, noise_mode="const")
    assert max_error(image, data["io/Gs_img_psi1_const"]) < TOLERANCE
    assert max_error(nets["D"](image), data["io/D_logits_of_Gs_img"]) < TOLERANCE


def test_original_of_edm():
    net = load_teacher(PICKLES / "edm_song_ddpmpp_edm_cond_mult222.pkl")
    assert_teacher(net, read_arrays("edm/song_ddpmpp_edm_cond_mult222"))
    assert not net.training and not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("name, reason", [("bad_outer_global", "posix.mkdir"), ("bad_tensor_out_of_bounds", "storage")])
def test_bad_originals_are_refused(name, reason):
    with pytest.raises(ValueError, match=reason):
        load_generator(PICKLES / f"{name}.pkl")


# Built files: every golden network, in every way of writing.


@each_with_a_format(GENERATORS)
def test_generators(name, form, tmp_path):
    G, data = golden_network(name)
    loaded = load_generator(write(tmp_path / "x.pkl", stylegan2_file(Format(**FORMATS[form]), G)))
    assert_same(loaded, G)
    assert_generator(loaded, data)


@pytest.mark.parametrize("style", [1, 2, 3])
@pytest.mark.parametrize("name", GENERATORS)
def test_styles_of_init_kwargs(name, style, tmp_path):
    G, data = golden_network(name)
    loaded = load_generator(write(tmp_path / "x.pkl", stylegan2_file(Format(), G, style=style)))
    assert_same(loaded, G)
    assert_generator(loaded, data)
    fp16 = [getattr(loaded.synthesis, f"b{r}").use_fp16 for r in loaded.synthesis.block_resolutions]
    assert fp16 == [getattr(G.synthesis, f"b{r}").use_fp16 for r in G.synthesis.block_resolutions]


def test_defaults_of_the_stylegan3_code(tmp_path):
    """It flattens the options and leaves out those at its own defaults: num_fp16_res 4, conv_clamp 256, beta .998."""
    mapping = {"num_layers": 2, "w_avg_beta": 0.998}
    synthesis = {"channel_base": 256, "channel_max": 16, "num_fp16_res": 4, "conv_clamp": 256}
    G = Generator(16, 0, 16, 32, 3, mapping_kwargs=mapping, synthesis_kwargs=synthesis)
    form = Format()
    written = {"z_dim": 16, "c_dim": 0, "w_dim": 16, "img_resolution": 32, "img_channels": 3}
    written |= {"mapping_kwargs": {"num_layers": 2}, "channel_base": 256, "channel_max": 16}
    data = form.dumps({"G_ema": form.module(G, written)})
    loaded = load_generator(write(tmp_path / "x.pkl", data))
    assert loaded.synthesis.b32.use_fp16 and loaded.synthesis.b32.conv1.conv_clamp == 256
    assert loaded.mapping.w_avg_beta == 0.998
    assert loaded.init_kwargs["synthesis_kwargs"]["num_fp16_res"] == 4


def test_positional_arguments(tmp_path):
    G, data = golden_network("g02_skip_cond_clamp")
    kwargs, form = dict(G.init_kwargs), Format()
    args = [kwargs.pop(key) for key in ("z_dim", "c_dim", "w_dim")]
    path = write(tmp_path / "x.pkl", form.dumps({"G_ema": form.module(G, kwargs, args)}))
    assert_generator(load_generator(path), data)


@pytest.mark.parametrize(
    "channels_last, dtype", list(itertools.product([False, True], [torch.float32, torch.float64, torch.float16]))
)
def test_memory_formats_and_dtypes(channels_last, dtype, tmp_path):
    G, data = golden_network("g03_resnet_uncond")
    form = Format(channels_last=channels_last, dtype=dtype)
    loaded = load_generator(write(tmp_path / "x.pkl", stylegan2_file(form, G)))
    assert all(p.dtype == torch.float32 and p.is_contiguous() for p in loaded.parameters())
    if dtype == torch.float16:
        assert all(torch.equal(a.half().float(), b) for a, b in zip(G.parameters(), loaded.parameters(), strict=True))
    else:
        assert_same(loaded, G)
        assert_generator(loaded, data)


def test_values_of_all_kinds_beside_the_networks(tmp_path):
    """Of the data set, of the augmentation, and attributes of modules: read past, harmless as they are."""
    G, data = golden_network("g01_skip_uncond")
    form = Format()
    path = Call(form.name("pathlib", "PosixPath"), "/", "data", "x.zip")
    array = builders.tf_array(form, np.arange(4, dtype=np.int32))
    device = Call(form.name("torch", "device"), "cuda", 1)
    options = {"rotate": form.scalar(1.0), "xy": (1, 2.5, None, ["a", {"b": True}]), "device": device}
    pipe = form.persistent("AugmentPipe", {"_parameters": {}, "_buffers": {}, "_modules": {}, **options})
    table = {"training_set_kwargs": {"path": path, "raw_idx": array}, "augment_pipe": pipe}
    table["G_ema"] = form.module(G, G.init_kwargs, attributes={"dtype": form.name("torch", "float16")})
    (tmp_path / "x.pkl").write_bytes(form.dumps(table))
    assert_generator(load_generator(tmp_path / "x.pkl"), data)


@pytest.mark.parametrize("location", ["cuda:0", "cuda:1", "mps:0"])
def test_weights_saved_on_other_devices(location, tmp_path):
    G, data = golden_network("g01_skip_uncond")
    cpu, other = (b"X" + len(name).to_bytes(4, "little") + name.encode() for name in ("cpu", location))
    storages = []
    form = Format(wrap=lambda stored: storages.append(cpu in stored) or stored.replace(cpu, other))
    (tmp_path / "x.pkl").write_bytes(stylegan2_file(form, G))
    assert all(storages)
    assert_generator(load_generator(tmp_path / "x.pkl"), data)


@pytest.mark.parametrize("extras", ["all", "none", "missing"])
@pytest.mark.parametrize("with_d", [False, True])
def test_with_and_without_the_rest(extras, with_d, tmp_path):
    G, data = golden_network("g01_skip_uncond")
    D, d_data = golden_network("d02_resnet_uncond")
    file = stylegan2_file(Format(), G, G=G, D=D if with_d else None, extras=extras)
    nets = load_members(write(tmp_path / "x.pkl", file))
    assert set(nets) == {"G", "G_ema"} | ({"D"} if with_d else set())
    assert_generator(nets["G_ema"], data)
    if with_d:
        assert max_error(nets["D"](d_data["in/img"], d_data["in/c"]), d_data["out/logits"]) < TOLERANCE


@each_with_a_format(DISCRIMINATORS)  # with 8 and with 0 mapping layers among them
def test_discriminators(name, form, tmp_path):
    G, _ = golden_network("g01_skip_uncond")
    D, data = golden_network(name)
    loaded = load_members(write(tmp_path / "x.pkl", stylegan2_file(Format(**FORMATS[form]), G, D=D)))["D"]
    assert_same(loaded, D)
    assert max_error(loaded(data["in/img"], data["in/c"]), data["out/logits"]) < TOLERANCE


@pytest.mark.parametrize("layers", [0, 8])
def test_discriminator_mapping_layers(layers, tmp_path):
    kwargs = {"c_dim": 3, "img_resolution": 8, "img_channels": 3, "channel_base": 64, "channel_max": 8}
    D = Discriminator(**kwargs, mapping_kwargs={"num_layers": layers})
    G = Generator(8, 3, 8, 8, 3, {"num_layers": 1}, {"channel_base": 64, "channel_max": 8})
    loaded = load_members(write(tmp_path / "x.pkl", stylegan2_file(Format(protocol=3, numpy=1), G, D=D)))
    assert_same(loaded["D"], D)
    x, c = torch.randn(4, 3, 8, 8), torch.eye(4, 3)
    assert torch.equal(loaded["D"](x, c), D(x, c))


def test_frozen_discriminator(tmp_path):
    kwargs = {"c_dim": 0, "img_resolution": 16, "img_channels": 3, "channel_base": 64, "channel_max": 8}
    D = Discriminator(**kwargs, block_kwargs={"freeze_layers": 3})
    assert "b16.conv0.weight" in dict(D.named_buffers())
    G, _ = golden_network("g01_skip_uncond")
    loaded = load_members(write(tmp_path / "x.pkl", stylegan2_file(Format(), G, D=D)))["D"]
    assert_same(loaded, D)
    assert "b16.conv0.weight" in dict(loaded.named_buffers())


@each_with_a_format(TEACHERS)
def test_teachers(name, form, tmp_path):
    net, data = golden_teacher(name)
    loaded = load_teacher(write(tmp_path / "x.pkl", edm_file(Format(**FORMATS[form]), net)))
    assert_same(loaded, net)
    assert (loaded.sigma_min, loaded.sigma_max) == (net.sigma_min, net.sigma_max)
    assert_teacher(loaded, data)


def test_teacher_file_with_nothing_else(tmp_path):
    net, data = golden_teacher("song_ddpmpp_edm_uncond")
    assert_teacher(load_teacher(write(tmp_path / "x.pkl", edm_file(Format(), net, extras=False))), data)


def test_live_attributes_of_a_teacher_win(tmp_path):
    net, _ = golden_teacher("song_ddpmpp_edm_uncond")
    form = Format()
    live = {"sigma_min": form.scalar(0.002), "sigma_max": 80.0, "sigma_data": 0.25}
    loaded = load_teacher(write(tmp_path / "x.pkl", edm_file(form, net, attributes=live)))
    assert (loaded.sigma_min, loaded.sigma_max, loaded.sigma_data) == (0.002, 80.0, 0.25)
    vp, _ = golden_teacher("song_ddpmpp_vp_cond")
    loaded = load_teacher(write(tmp_path / "y.pkl", edm_file(form, vp, attributes={"sigma_min": 2e-3})))
    assert loaded.sigma_min == 2e-3


@pytest.mark.parametrize("form", FORMATS)
def test_edm2(form, tmp_path):
    """A file as published: all tensors in float16."""
    case, data = read_json("edm/edm2_cond"), read_arrays("edm/edm2_cond")
    net = edm2.Precond(**case["init_kwargs"]).requires_grad_(False)
    net.load_state_dict({k[2:]: v.float() for k, v in data.items() if k.startswith("w:")})
    form = Format(**FORMATS[form], dtype=torch.float16)
    path = write(tmp_path / "x.pkl", edm2_file(form, net))
    loaded = load_teacher(path)
    assert_same(loaded, net)
    assert_teacher(loaded, {**data, "base:D": data["fp32params:D"]})
    assert all(
        value.dtype == (torch.float16 if value.ndim else torch.float32) for value in loaded.state_dict().values()
    )
    wide, inputs = copy.deepcopy(loaded).float(), (data["x"], data["sigma"], data["class_labels"])
    assert torch.equal(loaded(*inputs), wide(*inputs))
    assert all(p.dtype == torch.float32 for p in load_generator(f"one-step:{path}").parameters())
    save_networks(tmp_path / "ours.safetensors", {"ema": loaded}, provenance={})
    assert torch.equal(load_teacher(tmp_path / "ours.safetensors")(*inputs), wide(*inputs))
    assert (loaded.label_dim, loaded.img_resolution, loaded.img_channels, loaded.use_fp16) == (10, 16, 3, True)
    with open_container(path) as container:
        assert container.family == "an EDM2 pickle"
        assert next(iter(container.network("ema").tensors.values())).storage.dtype == torch.float16
    with torch.no_grad():
        net.unet.out_gain.add_(0.5)
    write_like(path, tmp_path / "y.pkl", {"ema": net})
    assert_same(load_teacher(tmp_path / "y.pkl"), net)


@pytest.mark.parametrize("spoilt", [{"dropout": "x"}, {"clip_act": "x"}, {"res_balance": None}, {"num_blocks": 2}])
def test_edm2_with_impossible_arguments(spoilt, tmp_path):
    net = edm2.Precond(8, 3, model_channels=8, channel_mult=[1], num_blocks=1)
    form = Format()
    with pytest.raises(ValueError, match=r"x.pkl: ema: it(s \w+ is not a number| lacks)") as caught:
        load_teacher(write(tmp_path / "x.pkl", edm2_file(form, net, **spoilt)))
    assert "\n" not in str(caught.value)


def test_wrong_kind(tmp_path):
    G, _ = golden_network("g01_skip_uncond")
    path = write(tmp_path / "g.pkl", stylegan2_file(Format(), G))
    with pytest.raises(ValueError, match=r"g.pkl is a StyleGAN2 pickle; expected a teacher: an EDM or EDM2 pickle"):
        load_teacher(path)
    net, _ = golden_teacher("song_ddpmpp_edm_uncond")
    with pytest.raises(ValueError, match="is an EDM pickle; expected a generator"):
        load_generator(write(tmp_path / "e.pkl", edm_file(Format(), net)))


def _tree(form, **classes):
    """A module with children of the given classes, without tensors."""
    children = {name: form.persistent(cls, {"_modules": {}}) for name, cls in classes.items()}
    return {"_parameters": {}, "_buffers": {}, "_modules": children, "_init_args": (), "_init_kwargs": {}}


def other_families(form):
    g3 = form.persistent("SynthesisNetwork", _tree(form, input="SynthesisInput", L0_36_512="SynthesisLayer"))
    g3 = form.persistent("Generator", {"_modules": {"synthesis": g3}, "_init_kwargs": {}})
    timm = form.persistent("ProjectedDiscriminator", {"_modules": {"feature_network": form.name("timm.models", "Net")}})
    other = form.persistent("Precond", _tree(form, unet="UNet", logvar_linear="MPConv"))
    latent = form.persistent("Precond", {"_modules": {"unet": form.persistent("UNet", _tree(form, enc="Block"))}})
    return {
        "StyleGAN3": {"G": g3, "D": form.persistent("Discriminator", _tree(form)), "G_ema": g3},
        "StyleGAN-XL": {"G": g3, "D": timm, "G_ema": g3},
        "an EDM2 diffusion model": form.easy({"encoder": form.persistent("StandardRGBEncoder", {}), "ema": other}),
        "an EDM2 diffusion model of latents": form.easy(
            {"encoder": form.persistent("StabilityVAEEncoder", {"raw_mean": [5.81, 3.25]}), "ema": latent}
        ),
        "object of the class InceptionV3": form.persistent("InceptionV3", {"_modules": {}}),
        "statistics": {"capture_all": False, "num_items": 4, "raw_mean": 1, "raw_cov": 2},
        "a pickle of a list": [1, 2],
        "a pickle of a table with the keys 'x'": {"x": 1},
        r"Generator\)": {"G_ema": form.persistent("Generator", _tree(form, synthesis="Other"))},
    }


@pytest.mark.parametrize("family", list(other_families(Format())))
def test_other_families_are_named(family, tmp_path):
    form = Format()
    path = write(tmp_path / "x.pkl", form.dumps(other_families(form)[family]))
    with pytest.raises(ValueError, match=f"x.pkl is .*{family}.*; expected a generator: a StyleGAN2 pickle") as caught:
        load_generator(path)
    assert "\n" not in str(caught.value)
