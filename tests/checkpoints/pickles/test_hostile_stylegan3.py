"""Hostile and broken pickles of StyleGAN3 and StyleGAN-XL, whose discriminators are read past: nothing is run."""

import random

import pytest
import torch

from refine.checkpoints import load_generator
from tests.checkpoints.builders import Call, Global, New, dumps
from tests.checkpoints.pickles.test_hostile import FORBIDDEN, HUGE, PAYLOAD, attempt, bomb, positions
from tests.checkpoints.stylegan3_files import (
    Form,
    init_kwargs,
    projected_discriminator,
    stylegan3_file,
    t_generator,
    xl_generator,
)

KINDS = {"t": t_generator, "xl": xl_generator}
WHERE = list(positions(Form(), t_generator(), 0))


def hostile(kind, where, bad):
    """A file with a hostile value at one level; the one of StyleGAN-XL has its discriminator before it."""
    G, form = KINDS[kind](), Form(dill=0 if kind == "t" else 2)
    value = positions(form, G, bad)[where]
    if kind == "xl" and isinstance(value, dict):
        value = {"D": projected_discriminator(form), **value}
    return form.dumps(value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", WHERE)
def test_forbidden_global_at_every_level(where, kind, tmp_path):
    refusal = attempt(tmp_path / "x.pkl", hostile(kind, where, bomb("builtins", "eval")))
    assert "names builtins.eval" in refusal


@pytest.mark.parametrize("where", WHERE)
def test_wrong_value_at_every_level(where, tmp_path):
    refusal = attempt(tmp_path / "x.pkl", hostile("xl", where, "x" * 300), xl_generator())
    must = where in ("top", "parameter", "buffer", "module", "storage", "shape", "bytes", "meta", "array")
    assert refusal is not None or not must


# What the discriminator of a StyleGAN-XL may hold.

INERT = [("builtins", "getattr"), ("functools", "partial"), ("timm.models", "create_model"), ("pg_modules", "x")]
INERT += [("torch.nn.modules.linear", "Linear"), ("dill._dill", "_create_type"), ("builtins", "setattr")]


@pytest.mark.parametrize("module, name", [*FORBIDDEN, ("dill", "loads"), ("dill._dill", "_eval_repr"), *INERT])
def test_names_in_a_discriminator(module, name, tmp_path):
    """Names of programs are refused, those of a discriminator stay closed: the generator loads, with its weights."""
    G, form = xl_generator(), Form(dill=2)
    D = projected_discriminator(form, bomb(module, name))
    refusal = attempt(tmp_path / "x.pkl", stylegan3_file(form, G, D=D), G)
    assert (refusal is None) == ((module, name) in INERT)
    assert refusal is None or "names" in refusal or "StyleGAN-XL pickle without" in refusal


def dill(name, *args):
    return Call(Global("dill._dill", name), *args)


READ_PAST = {
    "a module by name": dill("_import_module", "os"),
    "a function of a module": dill("_get_attr", dill("_import_module", "os"), "system"),
    "that function called": Call(dill("_get_attr", dill("_import_module", "os"), "system"), PAYLOAD),
    "a type by name": dill("_load_type", "CodeType"),
    "that type called": Call(dill("_load_type", "FunctionType"), dill("_create_code", PAYLOAD), {}),
    "getattr": Call(Global("builtins", "getattr"), Global("timm", "x"), "__init__"),
    "what getattr gives, called": Call(Call(Global("builtins", "getattr"), Global("timm", "x"), "y"), PAYLOAD),
    "a state of anything": New(Global("timm.models", "Net"), {"__class__": Global("timm", "x"), "__dict__": {}}),
    "a table of a module": New(Global("timm.models", "Net"), [1, 2, {"x": PAYLOAD}]),
    "keys that are no names": {(1, 2): 3, None: 4, 2.5: 5},
    "a set of tuples": {(1, 2), "x"},
    "calls of calls": Call(Global("timm", "a"), Call(Global("timm", "b"), Call(Global("timm", "c"), PAYLOAD))),
}


@pytest.mark.parametrize("case", READ_PAST)
def test_read_past(case, tmp_path):
    G, form = xl_generator(), Form(dill=1, numpy=1)
    data = stylegan3_file(form, G, D=projected_discriminator(form, READ_PAST[case]))
    assert attempt(tmp_path / "x.pkl", data, G) is None
    item = form.module(G, {})
    item.args[0]["state"]["hook"] = READ_PAST[case]
    refusal = attempt(tmp_path / "x.pkl", form.dumps({"D": projected_discriminator(form), "G_ema": item}))
    assert ("has no place" in refusal) if refusal else case in ("keys that are no names", "a set of tuples")


REFUSED = {
    "an array made by another function": dill("_create_array", Global("timm", "x"), (), ()),
    "an array made by nothing": dill("_create_array", 1, (), ()),
    "an array without arguments": dill("_create_array"),
    "an array of objects": dill("_create_array", Global("numpy.core.multiarray", "_reconstruct"), (1, (0,), b"b"), 1),
    "a call of a number": Call(1, PAYLOAD),
    "a call of an object": Call(Call(Global("timm", "x")), PAYLOAD),
    "the machine": bomb("refine.checkpoints.pickles.machine", "Machine"),
    "the persistence": bomb("torch_utils.persistence", "import_hook"),
    "a name of no module": bomb("timm.models.__class__", "__subclasses__"),
    "a long name": bomb("timm." + "x" * 300, "y"),
    "a name with spaces": bomb("timm models", "y z"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_even_there(case, tmp_path):
    G, form = xl_generator(), Form(dill=2)
    data = stylegan3_file(form, G, D=projected_discriminator(form, REFUSED[case]))
    assert attempt(tmp_path / "x.pkl", data) is not None


def test_a_large_discriminator_takes_little(tmp_path):
    """Thousands of objects of other programs, and one called many times with a long list."""
    G, form = xl_generator(), Form(dill=2)
    many = [Call(form.name("timm", "x"), index) for index in range(8000)]
    assert attempt(tmp_path / "x.pkl", stylegan3_file(form, G, D=projected_discriminator(form, many)), G) is None
    words = [f"{index:05d}" for index in range(20_000)]
    calls = [Call(form.name("timm", "x"), words) for _ in range(100)]
    refusal = attempt(tmp_path / "y.pkl", stylegan3_file(form, G, D=projected_discriminator(form, calls)))
    assert "copy more than" in refusal


# Arguments that ask for too much.

T_HUGE = {name: change for name, change in HUGE.items() if "synthesis_kwargs" not in change}
T_HUGE.pop("layers of some width")
T_HUGE["resolution no power of two"] = {"img_resolution": 3}
T_HUGE |= {
    "layers, many": {"num_layers": 1 << 20},
    "layers, none": {"num_layers": 0},
    "layers, all critical": {"num_layers": 2},
    "layers, negative": {"num_layers": -3},
    "layers, a text": {"num_layers": "x"},
    "critical, negative": {"num_critical": -1},
    "channel base": {"channel_base": 1 << 40, "channel_max": 1 << 20},
    "channel base, zero": {"channel_base": 0},
    "channels, infinite": {"channel_max": float("inf"), "channel_base": float("inf")},
    "cutoff": {"first_cutoff": 0},
    "cutoff, negative": {"first_cutoff": -2.0},
    "cutoff, tiny": {"first_cutoff": 1e-300},
    "stopband": {"first_stopband": 0},
    "stopband, huge": {"last_stopband_rel": 1e300},
    "margin": {"margin_size": 1 << 20},
    "margin, negative": {"margin_size": -20},
    "taps": {"filter_size": 1 << 20, "use_radial_filters": True},
    "taps, some": {"filter_size": 1000, "use_radial_filters": True},
    "taps, none": {"filter_size": 0},
    "upsampling": {"lrelu_upsampling": 1 << 20},
    "upsampling, none": {"lrelu_upsampling": 0},
    "kernel": {"conv_kernel": 1 << 19},
    "kernel, none": {"conv_kernel": 0},
    "clamp, a text": {"conv_clamp": "x"},
    "clamp, negative": {"conv_clamp": -1},
    "decay, a text": {"magnitude_ema_beta": "x"},
    "scale, a text": {"output_scale": "x"},
    "fp16, a list": {"num_fp16_res": []},
    "unknown": {"import": "os"},
    "several lines": {"a\nb\x1b[2J": 1},
}


@pytest.mark.parametrize("case", T_HUGE)
def test_arguments_that_ask_for_too_much(case, tmp_path):
    G = t_generator()
    assert attempt(tmp_path / "x.pkl", stylegan3_file(Form(), G, changes=T_HUGE[case])) is not None


def spoilt(layer=None, synthesis=None, mapping=None, top=None, source=None, attributes=None, arguments=None):
    """A StyleGAN-XL file whose objects tell something else of themselves; `layer` is of the second one."""
    G, form = xl_generator(), Form(dill=2)
    item = form.module(G, init_kwargs(form, G))
    state = item.args[0]["state"]
    parts = state["_modules"]["synthesis"].args[0]["state"]
    inner = parts["_modules"]["L1_36_6"].args[0]["state"]
    inner |= attributes or {}
    if arguments is not None:
        state["_modules"]["mapping"].args[0]["state"]["_init_kwargs"] = arguments
        return form.dumps({"D": projected_discriminator(form), "G_ema": item})
    for target, changes in ((state, top), (parts, synthesis), (inner["_init_kwargs"].items, layer)):
        target |= changes or {}
    parts["_modules"]["input"].args[0]["state"] |= source or {}
    state["_modules"]["mapping"].args[0]["state"]["_init_kwargs"].items |= mapping or {}
    return form.dumps({"D": projected_discriminator(form), "G_ema": item})


SPOILT = {
    "size": {"layer": {"out_size": 1 << 30}},
    "size, negative": {"layer": {"out_size": -1}},
    "size, not square": {"layer": {"out_size": [36, 52]}},
    "size, a text": {"layer": {"out_size": "36"}},
    "size, fractional": {"layer": {"out_size": 36.5}},
    "size, of three": {"layer": {"out_size": [1, 2, 3]}},
    "rate, zero": {"layer": {"out_sampling_rate": 0}},
    "rate, odd": {"layer": {"out_sampling_rate": 17}},
    "rate, huge": {"layer": {"out_sampling_rate": 1 << 30}},
    "cutoff, infinite": {"layer": {"out_cutoff": float("inf")}},
    "cutoff, not a number": {"layer": {"out_cutoff": float("nan")}},
    "cutoff, another": {"layer": {"in_cutoff": 3.0}},
    "half width, negative": {"layer": {"out_half_width": -1.0}},
    "channels, many": {"layer": {"out_channels": 1 << 30}},
    "channels, others": {"layer": {"out_channels": 7}},
    "channels, true": {"layer": {"out_channels": True}},
    "taps": {"layer": {"filter_size": 1 << 20}},
    "taps, circular": {"layer": {"filter_size": 4000, "use_radial_filters": True}},
    "upsampling": {"layer": {"lrelu_upsampling": 1 << 16}},
    "kernel": {"layer": {"conv_kernel": 1 << 19}},
    "clamp": {"layer": {"conv_clamp": "x"}},
    "decay": {"layer": {"magnitude_ema_beta": []}},
    "padding, a number": {"attributes": {"padding": 3}},
    "padding, texts": {"attributes": {"padding": ["x"] * 4}},
    "padding, another": {"attributes": {"padding": [1, 2, 3, 4]}},
    "padding, long": {"attributes": {"padding": [9] * 5000}},
    "factor, none": {"attributes": {"up_factor": None}},
    "factor, another": {"attributes": {"down_factor": 3}},
    "arguments, a list": {"arguments": ["lr_multiplier"]},
    "arguments, a text": {"arguments": "w_avg_beta"},
    "arguments, none": {"attributes": {"_init_kwargs": None}, "arguments": {}},
    "names, none": {"synthesis": {"layer_names": []}},
    "names, a text": {"synthesis": {"layer_names": "L0_36_6"}},
    "names, others": {"synthesis": {"layer_names": ["forward"]}},
    "names, numbers": {"synthesis": {"layer_names": [1, 2]}},
    "names, many": {"synthesis": {"layer_names": ["L0_36_6"] * 5000}},
    "names, twice": {"synthesis": {"layer_names": ["L0_36_6", "L0_36_6"]}},
    "names, special": {"synthesis": {"layer_names": ["__class__"]}},
    "scale": {"synthesis": {"output_scale": "x"}},
    "scale, none": {"synthesis": {"output_scale": None}},
    "decay of w": {"mapping": {"w_avg_beta": "x"}},
    "rate of w": {"mapping": {"lr_multiplier": []}},
    "classes": {"top": {"c_dim": 1 << 20}},
    "classes, negative": {"top": {"c_dim": -1}},
    "latents": {"top": {"z_dim": 1 << 20}},
    "latents, none": {"top": {"z_dim": None}},
    "resolution": {"top": {"img_resolution": 1 << 20}},
    "resolution, another": {"top": {"img_resolution": 32}},
    "input": {"source": {"channels": 1 << 20}},
    "input, another": {"source": {"bandwidth": 3.0}},
}


@pytest.mark.parametrize("case", SPOILT)
def test_layers_that_ask_for_too_much(case, tmp_path):
    assert attempt(tmp_path / "x.pkl", spoilt(**SPOILT[case])) is not None


def test_the_unspoilt_file_loads(tmp_path):
    assert attempt(tmp_path / "x.pkl", spoilt(), xl_generator()) is None


def test_one_storage_for_a_huge_network(tmp_path):
    """Views of one small storage cannot make a network larger than the file."""
    big, form = t_generator(w_dim=512, channel_max=512, channel_base=1 << 16, num_layers=8), Form()
    shared = form.tensor(torch.zeros(512, 512, 3, 3))
    large = torch.Size((512, 512, 3, 3))
    form.parameter = lambda tensor: shared if tensor.shape == large else Form.parameter(form, tensor)
    data = stylegan3_file(form, big)
    assert len(data) < 60 << 20
    refusal = attempt(tmp_path / "x.pkl", data)
    assert "more memory than the file" in refusal


# Breakage of whole small files.


def small_file(kind):
    G, form = KINDS[kind](), Form(dill=0 if kind == "t" else 2)
    return stylegan3_file(form, G, D=projected_discriminator(form) if form.dill else None), G


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", range(4))
def test_cut_off(kind, part, tmp_path):
    data, _ = small_file(kind)
    rng = random.Random(f"{kind}{part}")
    for _ in range(3):
        assert attempt(tmp_path / "x.pkl", data[: rng.randrange(len(data))], load=load_generator) is not None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", range(4))
def test_random_bytes_changed(kind, part, tmp_path):
    data, G = small_file(kind)
    rng = random.Random(f"{kind}{part}")
    for _ in range(4):
        broken = bytearray(data)
        for _ in range(rng.choice([1, 1, 4, 30])):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        attempt(tmp_path / "x.pkl", bytes(broken), G)


def test_a_discriminator_alone(tmp_path):
    form = Form(dill=2)
    refusal = attempt(tmp_path / "x.pkl", dumps({"D": projected_discriminator(form)}))
    assert "names pg_modules" in refusal or "StyleGAN-XL" in refusal or "Projected GAN" in refusal
