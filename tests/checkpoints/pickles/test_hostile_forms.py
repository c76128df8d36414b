"""Hostile variants of what `test_forms.py` reads: refused with one line, or read with the right shapes; nothing is run.

`attempt` holds every case to that, and to limits of time and memory.
"""

import random

import pytest
import torch

from refine.checkpoints import load_generator, load_teacher
from refine.checkpoints.pickles.names import is_harmless
from refine.networks.edm import EDMPrecond
from refine.networks.stylegan2 import Generator
from tests.checkpoints.builders import Call, Format, Global, New, ZipFormat, plain_module
from tests.checkpoints.foreign.test_nvidia import PICKLES
from tests.checkpoints.pickles.test_hostile import FORBIDDEN, PAYLOAD, attempt, bomb
from tests.checkpoints.rosinality_reference import random_generator

R3GAN = {name: (PICKLES / f"r3gan_{name}16.pkl").read_bytes() for name in ("current_uncond", "old_cond")}
HARMLESS = [("datetime", "datetime"), ("somebody.program", "Thing"), ("torch.nn.modules.linear", "Linear")]


@pytest.fixture(scope="module")
def G():
    torch.manual_seed(1)
    small = {"mapping_kwargs": {"num_layers": 1}, "synthesis_kwargs": {"channel_base": 16, "channel_max": 4}}
    return Generator(4, 0, 4, 4, 1, **small).requires_grad_(False)


# Names.


@pytest.mark.parametrize("module, name", [*FORBIDDEN, ("refine.cli.main", "main"), ("nt", "system"), ("a b", "c")])
def test_names_that_are_refused_wherever_they_stand(module, name, G, tmp_path):
    assert not is_harmless(module, name)
    form = Format()
    stranger = Global(module, name)
    for value in (New(stranger, {"a": 1}), Call(stranger, PAYLOAD), stranger, Call(stranger, state={"a": 1})):
        refusal = attempt(tmp_path / "x.pkl", form.dumps({"x": value, "G_ema": form.module(G, G.init_kwargs)}))
        assert f"names {module}.{name}" in refusal
    zipped = ZipFormat()
    data = zipped.dumps({"x": bomb(module, name), "G_ema": {k: zipped.tensor(v) for k, v in G.state_dict().items()}})
    assert f"names {module}.{name}" in attempt(tmp_path / "x.pt", data)


@pytest.mark.parametrize("module, name", HARMLESS)
def test_names_that_stay_closed(module, name, G, tmp_path):
    form, stranger = Format(), Global(module, name)
    values = [
        New(stranger, {"a": 1}),
        Call(stranger, PAYLOAD),
        stranger,
        New(stranger, items={"a": 1}),
        Call(stranger, state=1),
    ]
    for value in values:
        data = form.dumps({"x": value, "G_ema": form.module(G, G.init_kwargs)})
        assert attempt(tmp_path / "x.pkl", data, G) is None
        needed = form.module(G, G.init_kwargs)
        needed.args[0]["state"]["_parameters"]["x"] = value
        assert attempt(tmp_path / "x.pkl", form.dumps({"G_ema": needed})) is not None


def test_modules_in_themselves_and_without_end(tmp_path):
    form = Format()
    circle = plain_module(form, "somebody.Net", {})
    circle.state["_modules"]["x"] = circle
    deep = plain_module(form, "somebody.Net", {"x": torch.zeros(2)})
    for _ in range(25):
        deep = plain_module(form, "somebody.Net", {}, {"x": deep, "y": deep})
    wrapped = plain_module(form, "torch.nn.parallel.DataParallel", {})
    wrapped.state["_modules"]["module"] = wrapped
    table = {"a": 1}
    for _ in range(60):
        table = {"a": table, "b": table, "c": table}
    for value in (circle, {"G_ema": circle}, wrapped, {"G_ema": wrapped}, deep, table):
        assert attempt(tmp_path / "x.pkl", form.dumps(value)) is not None


# R3GAN's pickles, cut off, with bytes changed, and with other names in place of their own.


@pytest.mark.parametrize("part", range(8))
@pytest.mark.parametrize("name", R3GAN)
def test_r3gan_cut_off_and_changed(name, part, tmp_path):
    data, rng = R3GAN[name], random.Random(f"{name}{part}")
    assert attempt(tmp_path / "x.pkl", data[: rng.randrange(len(data))]) is not None
    broken = bytearray(data)
    for _ in range(rng.choice([1, 4, 30])):
        broken[rng.randrange(len(broken))] = rng.randrange(256)
    attempt(tmp_path / "x.pkl", bytes(broken))


@pytest.mark.parametrize("theirs", [b"R3GAN.Networks", b"training.networks", b"R3GAN.FusedOperators"])
def test_r3gan_with_other_names(theirs, tmp_path):
    data = R3GAN["current_uncond"]
    assert theirs in data
    length = len(theirs)
    refusal = attempt(tmp_path / "x.pkl", data.replace(theirs, b"subprocess".ljust(length, b".")[:length]))
    assert refusal is not None
    assert attempt(tmp_path / "x.pkl", data.replace(theirs, b"z" * length)) is None  # a name of nobody's: never called


# State dicts.


def saved(path, state, load=load_generator, **given):
    form = ZipFormat()
    data = form.dumps({name: form.tensor(value) for name, value in state.items()})
    return attempt(path, data, load=lambda file: load(file, **given))


STYLEGAN2 = {
    "a resolution of no end": {"synthesis.b1073741824.conv1.weight": torch.zeros(1)},
    "a resolution that is missing": {"synthesis.b16.conv1.weight": torch.zeros(4, 4, 3, 3)},
    "a constant of whole numbers": {"synthesis.b4.const": torch.zeros(4, 4, 4, dtype=torch.int64)},
    "a constant of no numbers": {"synthesis.b4.const": torch.zeros(0, 4, 4)},
    "a constant of one axis": {"synthesis.b4.const": torch.zeros(64)},
    "a weight of no axes": {"synthesis.b4.conv1.weight": torch.zeros([])},
    "a weight of no channels": {"synthesis.b4.conv1.weight": torch.zeros(0, 4, 3, 3)},
    "a kernel of even size": {"synthesis.b4.conv1.weight": torch.zeros(4, 4, 2, 2)},
    "a large kernel": {"synthesis.b4.conv1.weight": torch.zeros(4, 4, 99, 99)},
    "an affine layer of no width": {"synthesis.b4.conv1.affine.weight": torch.zeros(4, 0)},
    "no affine layer": {"synthesis.b4.conv1.affine.weight": None},
    "no image": {"synthesis.b4.torgb.weight": None},
    "an embedding wider than the mapping": {"mapping.embed.weight": torch.zeros(9, 3)},
    "many layers": {f"mapping.fc{i}.weight": torch.zeros(4, 4) for i in range(100)},
    "layers with a hole": {"mapping.fc5.weight": torch.zeros(4, 4)},
    "a filter of many taps": {"synthesis.b4.resample_filter": torch.zeros(400, 400)},
    "a filter of no taps": {"synthesis.b4.resample_filter": torch.zeros(0)},
    "a mean of another width": {"mapping.w_avg": torch.zeros(5)},
    "another layer": {"synthesis.b4.attention.weight": torch.zeros(2)},
    "another network": {"encoder.weight": torch.zeros(2)},
    "lines in a name": {"synthesis.b4.a\n\x1b[2J": torch.zeros(2)},
}


@pytest.mark.parametrize("case", STYLEGAN2)
def test_state_dicts_of_stylegan2(case, G, tmp_path):
    state = {name: value for name, value in {**G.state_dict(), **STYLEGAN2[case]}.items() if value is not None}
    assert saved(tmp_path / "x.pt", state) is not None
    assert saved(tmp_path / "x.pt", G.state_dict()) is None


ARGUMENTS = [
    *({"img_resolution": 1 << 20}, {"z_dim": -1}, {"synthesis_kwargs": 3}, {"synthesis_kwargs": {"import": "os"}}),
    *({"mapping_kwargs": {"num_layers": 1 << 30}}, {"self": 1}, {"__class__": "os"}, {"w_dim": [1]}),
    *({"mapping_kwargs": {"activation": "eval"}}, {"synthesis_kwargs": {"channels": [1] * 1000}}),
    *({"synthesis_kwargs": {"channels": "os"}}, {"synthesis_kwargs": {"channels": [1 << 19]}}),
    *({"a": {"b": {"c": {"d": {"e": {"f": 1}}}}}},),
]


@pytest.mark.parametrize("given", ARGUMENTS)
def test_arguments_that_are_given(given, G, tmp_path):
    assert saved(tmp_path / "x.pt", G.state_dict(), kwargs=given) is not None


ROSINALITY = {
    "a mean of many layers": {"latent_avg": torch.zeros(100_000, 8)},
    "a mean of no axes": {"latent_avg": torch.zeros([])},
    "a mean of another width": {"latent_avg": torch.zeros(9)},
    "many images": {f"to_rgbs.{i}.bias": torch.zeros(1, 3, 1, 1) for i in range(30)},
    "a bias of other axes": {"to_rgb1.bias": torch.zeros(3)},
    "a bias of many numbers": {"to_rgb1.bias": torch.zeros(1, 3, 2, 2)},
    "no channels": {"to_rgb1.bias": torch.zeros(1, 0, 1, 1)},
    "a convolution of four axes": {"conv1.conv.weight": torch.zeros(512, 512, 3, 3)},
    "no modulation": {"conv1.conv.modulation.weight": torch.zeros(512, 0)},
    "a modulation of no axes": {"conv1.conv.modulation.weight": torch.zeros([])},
    "noise of another size": {"noises.noise_0": torch.zeros(1, 1, 8, 8)},
    "noise of no end": {"noises.noise_99": torch.zeros(1, 1, 4, 4)},
}


@pytest.mark.parametrize("case", ROSINALITY)
def test_state_dicts_of_rosinality(case, tmp_path):
    state = {**random_generator(size=4, layers=1, dim=8), **ROSINALITY[case]}
    assert saved(tmp_path / "x.pt", state) is not None


R3GAN_STATES = {
    "a stage far away": {"MainLayers.99.Layers.0.LinearLayer.Layer.weight": torch.zeros(1, 1, 1, 1)},
    "a block far away": {"MainLayers.0.Layers.99.NonLinearity1.Bias": torch.zeros(1)},
    "a stage that is missing": {"MainLayers.5.Layers.0.Resampler.Kernel": torch.zeros(4, 4)},
    "a basis of no channels": {"MainLayers.0.Layers.0.Basis": torch.zeros(0, 4, 4)},
    "a basis of one axis": {"MainLayers.0.Layers.0.Basis": torch.zeros(4)},
    "no groups": {"MainLayers.0.Layers.1.LinearLayer2.Layer.weight": torch.zeros(4, 0, 3, 3)},
    "an expansion that is no whole number": {
        "MainLayers.0.Layers.1.LinearLayer2.Layer.weight": torch.zeros(13, 1, 3, 3)
    },
    "a wide embedding": {"EmbeddingLayer.weight": torch.zeros(1000, 3)},
    "a kernel of many taps": {"MainLayers.1.Layers.0.Resampler.Kernel": torch.zeros(300, 300)},
    "an image of one axis": {"AggregationLayer.Layer.weight": torch.zeros(3)},
}


@pytest.mark.parametrize("case", R3GAN_STATES)
def test_state_dicts_of_r3gan(case, tmp_path):
    state = load_generator(PICKLES / "r3gan_current_uncond16.pkl").state_dict()
    assert saved(tmp_path / "x.pt", {**state, **R3GAN_STATES[case]}) is not None


EDM = {
    "no blocks": {"model.enc.8x8_block0.conv1.weight": None},
    "levels with a hole": {"model.enc.1x1_block0.conv1.weight": torch.zeros(8, 8, 3, 3)},
    "widths of no multiple": {"model.enc.8x8_block0.conv1.weight": torch.zeros(9, 8, 3, 3)},
    "no first layer": {"model.enc.8x8_conv.weight": None},
    "a first layer of no channels": {"model.enc.8x8_conv.weight": torch.zeros(0, 3, 3, 3)},
    "an embedding of one axis": {"model.map_layer0.weight": torch.zeros(8)},
    "a level of no end": {"model.enc.9999x9999_block0.conv1.weight": torch.zeros(8, 8, 3, 3)},
    "labels of one axis": {"model.map_label.weight": torch.zeros(3)},
}


@pytest.mark.parametrize("case", EDM)
def test_state_dicts_of_edm(case, tmp_path):
    small = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    T = EDMPrecond(8, 3, model_type="SongUNet", **small)
    state = {name: value for name, value in {**T.state_dict(), **EDM[case]}.items() if value is not None}
    assert saved(tmp_path / "x.pt", state, load=load_teacher) is not None
