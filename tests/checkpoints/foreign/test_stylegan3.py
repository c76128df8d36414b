"""Pickles of StyleGAN3 and StyleGAN-XL: the originals' own tiny files, and variants built from plain data."""

import itertools

import pytest
import torch

from refine.checkpoints import load_generator, native, peek
from refine.checkpoints.describe import as_text, inspect_file
from refine.checkpoints.export import write_like
from refine.checkpoints.foreign.opening import open_container
from refine.networks.stylegan2 import Discriminator
from tests.checkpoints.builders import Call, write
from tests.checkpoints.foreign.test_nvidia import FORMATS, PICKLES, assert_same, load_members
from tests.checkpoints.stylegan3_files import Form, projected_discriminator, stylegan3_file, t_generator, xl_generator
from tests.checkpoints.test_export import globals_of, perturbed
from tests.golden import max_error, read_arrays, read_json

TOLERANCE = 1e-5
FORMS = {f"{name}-dill{dill}": {**form, "dill": dill} for name, form in FORMATS.items() for dill in (0, 1, 2)}
FORMS = {name: form for name, form in FORMS.items() if not (form["dill"] == 1 and form["protocol"] == 5)}
ORIGINALS = ["sg3t_uncond", "sg3r_cond", "sgxl_stem_cond", "sgxl_super_cond"]


def generators():
    torch.manual_seed(3)
    made = {"t": t_generator(), "xl": xl_generator(), "xl without classes": xl_generator(c_dim=0)}
    for G in made.values():
        with torch.no_grad():
            for name, tensor in G.state_dict().items():
                if name.endswith(("bias", "w_avg", "magnitude_ema")):
                    tensor.add_(torch.rand_like(tensor))
    return made


@pytest.mark.parametrize("name", ORIGINALS)
def test_originals(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    expected, init = read_arrays(f"pickles/{name}_expected"), read_json(f"pickles/{name}_init")
    nets = load_members(PICKLES / f"{name}.pkl")
    assert set(nets) == {"G", "G_ema"} | ({"D"} if name.startswith("sg3") else set())
    for key in ("G_ema", "G"):
        G = nets[key]
        assert G.synthesis.layer_names == init["G_layer_names"]
        for psi, label in ((1.0, "1"), (0.7, "07")):
            image = G(expected["z"], expected["c"], truncation_psi=psi)
            assert max_error(image, expected[f"{key}_img_psi{label}"]) < TOLERANCE
        ws = G.mapping(expected["z"], expected["c"], 0.7)
        assert max_error(ws, expected[f"{key}_ws_psi07"][:, None].expand_as(ws)) < TOLERANCE
    if "D" in nets:
        logits = nets["D"](nets["G_ema"](expected["z"], expected["c"]), expected["c"])
        assert max_error(logits, expected["D_logits_of_G_ema"]) < TOLERANCE
        assert {k: v for k, v in nets["G_ema"].init_kwargs.items() if k in init["G"]} == init["G"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ORIGINALS)
def test_back_into_the_originals(name, tmp_path):
    source, same, out = PICKLES / f"{name}.pkl", tmp_path / "same.pkl", tmp_path / "out.pkl"
    assert write_like(source, same, load_members(source)) == []
    assert same.read_bytes() == source.read_bytes()
    refined = {key: perturbed(net) for key, net in load_members(source).items() if key != "D"}
    write_like(source, out, refined)
    assert "problem" not in str(inspect_file(out))
    after = load_members(out)
    for key, net in refined.items():
        assert_same(net, after[key])
    assert globals_of(out) == globals_of(source) and out.stat().st_size == source.stat().st_size


KINDS = ["t", "xl", "xl without classes"]


@pytest.mark.parametrize(
    "form, kind", [*zip(FORMS, itertools.cycle(KINDS), strict=False), *zip(FORMS, KINDS[1:] * 7, strict=False)]
)
def test_every_way_of_writing(form, kind, tmp_path):
    G, form = generators()[kind], Form(**FORMS[form])
    D = projected_discriminator(form) if form.dill else None
    path = write(tmp_path / "x.pkl", stylegan3_file(form, G, G=G, D=D))
    loaded = load_generator(path)
    assert_same(loaded, G)
    z, c = torch.randn(2, 8), torch.eye(3)[:2] if G.c_dim else None
    assert torch.equal(loaded(z, c, truncation_psi=0.5), G(z, c, truncation_psi=0.5))
    flags = [[m.use_fp16 for m in net.synthesis.children() if hasattr(m, "use_fp16")] for net in (loaded, G)]
    assert flags[0] == flags[1] and any(flags[0])


def test_members_and_families(tmp_path):
    G, xl, form = t_generator(), xl_generator(), Form()
    D = Discriminator(c_dim=3, img_resolution=8, img_channels=1, channel_base=64, channel_max=8)
    with open_container(write(tmp_path / "t.pkl", stylegan3_file(form, G, G=G, D=D))) as container:
        assert container.family == "a StyleGAN3 pickle"
        assert container.members == {"G_ema": "generator", "G": "generator", "D": "discriminator"}
        assert_same(container.load("D"), D)
    form = Form(dill=1, numpy=1)
    data = stylegan3_file(form, xl, D=projected_discriminator(form))
    with open_container(write(tmp_path / "xl.pkl", data)) as container:
        assert container.family == "a StyleGAN-XL pickle" and container.members == {"G_ema": "generator"}
    assert peek(tmp_path / "xl.pkl", "generator").classes == 3
    text = as_text(inspect_file(tmp_path / "xl.pkl"))
    assert "stylegan_xl.Generator 16×16×1, 3 classes" in text and "layers=(5 entries)" in text
    assert all(len(line) < 400 for line in text.splitlines())


def test_a_file_without_dill_or_discriminator(tmp_path):
    """As people save it again, cut down to the generator."""
    G, form = xl_generator(), Form()
    assert_same(load_generator(write(tmp_path / "x.pkl", form.dumps({"G_ema": form.module(G, {})}))), G)


@pytest.mark.parametrize("kind", KINDS)
def test_native_files(kind, tmp_path):
    G = generators()[kind]
    native.save_networks(tmp_path / "x.safetensors", {"G_ema": G}, provenance={})
    loaded = load_generator(tmp_path / "x.safetensors")
    assert_same(loaded, G)
    assert loaded.init_kwargs == G.init_kwargs
    z, c = torch.randn(2, 8), torch.eye(3)[:2] if G.c_dim else None
    assert torch.equal(loaded(z, c), G(z, c))


@pytest.mark.parametrize("kind, dtype", [*itertools.product(["t", "xl"], [torch.float64, torch.float16])])
def test_dtypes_stay(kind, dtype, tmp_path):
    G = generators()[kind]
    form = Form(dtype=dtype)
    path = write(tmp_path / "x.pkl", stylegan3_file(form, G))
    refined = perturbed(load_generator(path))
    write_like(path, tmp_path / "y.pkl", {"G_ema": refined})
    for a, b in zip(
        refined.state_dict().values(), load_generator(tmp_path / "y.pkl").state_dict().values(), strict=True
    ):
        assert torch.equal(a.to(dtype).float(), b)


def test_layers_that_are_not_those_of_the_arguments(tmp_path):
    G, form = t_generator(), Form()
    for changes in (
        {"margin_size": 4},
        {"first_cutoff": 1.5},
        {"num_layers": 5},
        {"conv_clamp": 3},
        {"filter_size": 8},
    ):
        path = write(tmp_path / "x.pkl", stylegan3_file(form, G, changes=changes))
        with pytest.raises(
            ValueError, match=r"x.pkl: G_ema: it(s layer| lacks|s \w+ has|.* has shape|s layers)|has shape"
        ):
            load_generator(path)


@pytest.mark.parametrize("where", ["attribute", "hook", "module", "parameter", "layer names"])
def test_nothing_of_the_discriminator_may_be_part_of_a_generator(where, tmp_path):
    G, form = xl_generator(), Form(dill=2)
    bad = Call(form.name("timm.models", "create_model"), "x")
    item = form.module(G, {})
    state = item.args[0]["state"]
    parts = {
        "attribute": ("z_dim", bad),
        "hook": ("_forward_hooks", {0: bad}),
        "module": ("_modules", {**state["_modules"], "x": bad}),
    }
    parts |= {"parameter": ("_parameters", {"x": bad}), "layer names": ("names", [[bad]])}
    key, value = parts[where]
    state[key] = value
    path = write(tmp_path / "x.pkl", form.dumps({"D": projected_discriminator(form, bad), "G_ema": item}))
    with pytest.raises(ValueError, match=r"holds timm.models.create_model, which has no place"):
        load_generator(path)
