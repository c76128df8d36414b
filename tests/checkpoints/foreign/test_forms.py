"""Every form in which people have these networks: read, with the right images, or refused with the right sentence.

docs/files.md has the table of these cases.
"""

import argparse
import collections
import datetime
import gzip
import io
import os
import pathlib
import pickle
import zipfile
from typing import ClassVar

import numpy as np
import pytest
import torch

from refine.checkpoints import export, load_generator, load_teacher, peek
from refine.checkpoints.foreign import rosinality
from refine.checkpoints.foreign.opening import open_container
from refine.networks.edm import EDMPrecond, VPPrecond
from refine.networks.stylegan2 import Discriminator, Generator
from tests.checkpoints import builders
from tests.checkpoints.builders import Call, Format, Global, New, ZipFormat, dumps, plain_module, write
from tests.checkpoints.foreign import test_tensorflow as tf
from tests.checkpoints.foreign.test_nvidia import PICKLES
from tests.checkpoints.rosinality_reference import generate, random_generator
from tests.golden import max_error, read_arrays, read_json

SMALL = {"mapping_kwargs": {"num_layers": 2}, "synthesis_kwargs": {"channel_base": 64, "channel_max": 8}}


@pytest.fixture(scope="module")
def G():
    torch.manual_seed(1)
    made = Generator(6, 0, 6, 8, 3, **SMALL).eval().requires_grad_(False)
    for name, value in made.state_dict().items():
        if value.ndim <= 1 and "resample" not in name:
            value.add_(torch.randn_like(value) * 0.2)
    return made


@pytest.fixture(scope="module")
def D():
    torch.manual_seed(2)
    return Discriminator(0, 8, 3, channel_base=64, channel_max=8).requires_grad_(False)


@pytest.fixture(scope="module")
def T():
    torch.manual_seed(3)
    kwargs = {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
    return EDMPrecond(8, 3, model_type="SongUNet", **kwargs).eval().requires_grad_(False)


def assert_images(loaded, G, psi=0.7, atol=1e-5):
    z = torch.randn(2, G.z_dim)
    c = torch.eye(2, G.c_dim) if G.c_dim else None
    a, b = (net(z, c, truncation_psi=psi, noise_mode="const") for net in (loaded, G))
    assert max_error(a, b) < atol


class Mine(dict):
    """A table of somebody's program; pickled, a name of a module that is not there when the file is read."""

    __module__, __qualname__ = "somebody.program", "Mine"


# Beside the networks.

BESIDE = {
    "progress": {"cur_nimg": 1000, "best_fid": 12.5, "ada_stats": None},
    "numpy": {"np": np.float32(3.5), "arr": np.arange(5), "i64": np.int64(3), "bool": np.bool_(True)},
    "optimiser": {"G_opt": {"state": {0: {"step": 3.0}}, "param_groups": [{"betas": (0, 0.99), "params": [0]}]}},
    "datetime": {"when": datetime.datetime(2021, 1, 1), "delta": datetime.timedelta(3)},
    "path": {"path": pathlib.PurePosixPath("/data/x")},
    "defaultdict": {"stats": collections.defaultdict(list, {"a": [1]})},
    "counter": {"n": collections.Counter("aab"), "d": collections.deque([1, 2], maxlen=3)},
    "namespace": {"args": argparse.Namespace(a=1, path=pathlib.PurePosixPath("x"))},
    "state of a generator of numbers": {"rng": np.random.RandomState(0).get_state()},
    "generator of numbers": {"rng": np.random.RandomState(0), "new": np.random.default_rng(0)},
    "torch": {"device": torch.device("cuda", 0), "size": torch.Size([3, 4]), "dtype": torch.float16},
    "complex": {"c": complex(1, 2)},
    "keys": {5: "x", (1, 2): "y", None: 1, 1.5: 2, frozenset([1]): 3, "in": {b"a": 1, (3,): 4}},
    "built-in": {"fs": frozenset([1, (2, 3)]), "by": b"abc", "ba": bytearray(b"abc"), "sl": slice(1, 2), "s": {None}},
    "function": {"fn": os.path.join},
    "class of a dict": {"x": Mine(a=1)},
    "object": {"x": New(Global("somebody.program", "Options"), {"a": 1})},
    "object with arguments": {"x": Call(Global("omegaconf.dictconfig", "DictConfig"), {"a": 1}, state={"b": 2})},
}  # fmt: skip


def dumped(value, protocol):
    """A pickle by Python's own rules, with ours for networks; `Mine` and its like go in by their names."""

    class Pickler(builders.Pickler):
        def save_global(self, obj, name=None):
            if obj is Mine:
                self.save_name(Global("somebody.program", "Mine"))
            else:
                super().save_global(obj, name)

        dispatch: ClassVar = {**builders.Pickler.dispatch, type: save_global}

    file = io.BytesIO()
    Pickler(file, protocol).dump(value)
    return file.getvalue()


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("case", BESIDE)
def test_objects_beside_the_networks(case, protocol, G, tmp_path):
    form = Format(protocol=protocol)
    table = {**BESIDE[case], "G_ema": form.module(G, G.init_kwargs)}
    assert_images(load_generator(write(tmp_path / "x.pkl", dumped(table, protocol))), G)


@pytest.mark.parametrize("protocol", [0, 1])
def test_protocols_of_old(protocol, G, D, T, tmp_path):
    """What Python's own pickler makes of tables, bytes and modules without the opcodes of later ones."""
    form = Format(protocol=protocol)
    numbers = {
        "n": [True, False, 1 << 40, -3, 2.5, float("inf"), 1e-7],
        "t": ["", "é\n\\x", "ж" * 300],
        "b": b"\0\n" * 9,
    }
    kwargs = {**G.init_kwargs, "synthesis_kwargs": form.easy(G.init_kwargs["synthesis_kwargs"])}
    table = {**numbers, "G_ema": form.module(G, kwargs), "D": form.module(D, D.init_kwargs)}
    path = write(tmp_path / "x.pkl", dumped(table, protocol))
    with open_container(path) as container:
        assert list(container.members) == ["G_ema", "D"]
        assert_images(container.load("G_ema").eval(), G)
    changed = changed_copy(G)
    changed.load_state_dict({name: value + 0.25 for name, value in G.state_dict().items()})
    if protocol:
        assert export.write_like(path, tmp_path / "y.pkl", {"G_ema": changed}) == ["D"]
        assert_images(load_generator(tmp_path / "y.pkl"), changed)
    else:
        with pytest.raises(ValueError, match="which is not written back"):
            export.write_like(path, tmp_path / "y.pkl", {"G_ema": changed})
    (tmp_path / "s.pkl").write_bytes(pickle.dumps({"G_ema": G.state_dict()}, protocol))
    assert_images(load_generator(tmp_path / "s.pkl"), G)
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 3.0])
    loaded = load_teacher(write(tmp_path / "e.pkl", dumped({"ema": form.module(T, T.init_kwargs)}, protocol)))
    assert torch.equal(loaded(x, sigma), T(x, sigma))


@pytest.mark.parametrize("case", BESIDE)
def test_objects_as_attributes(case, G, tmp_path):
    form = Format()
    attributes = {"cfg": BESIDE[case], "lst": [BESIDE[case]]}
    data = dumped({"G_ema": form.module(G, G.init_kwargs, attributes=attributes)}, 4)
    assert_images(load_generator(write(tmp_path / "x.pkl", data)), G)


def test_objects_that_are_needed_are_named(G, tmp_path):
    form = Format()
    stranger = Call(Global("somebody.program", "Tensor"), 1)
    form.parameter = lambda tensor: stranger
    with pytest.raises(ValueError, match=r"G_ema: synthesis\.\S+ is not a tensor but an object of somebody.program.T"):
        load_generator(write(tmp_path / "x.pkl", form.dumps({"G_ema": form.module(G, G.init_kwargs)})))


# Containers of StyleGAN2.


def containers(form, G, D):
    g, d = form.module(G, G.init_kwargs), form.module(D, D.init_kwargs)
    wrapped = plain_module(form, "torch.nn.parallel.data_parallel.DataParallel", {}, {"module": g})
    return {
        "G and D": {"G": g, "D": d},
        "G is None": {"G": None, "D": None, "G_ema": g},
        "lower case": {"g_ema": g},
        "Gs": {"Gs": g},
        "tuple": (g, d, g),
        "list": [g, d, g],
        "bare": g,
        "generator": {"generator": g, "epoch": 3},
        "ema": {"ema": g, "model": None},
        "net": {"net": g, "cfg": {"a": [1, {"b": torch.zeros(2)}]}},
        "generator_ema": {"generator_ema": g, "discriminator": d},
        "nested": {"models": {"G": d, "nets": {"G_ema": g}}},
        "in a list": [{"step": 3}, g],
        "DataParallel": {"G_ema": wrapped},
    }


CONTAINERS = list(containers(Format(), Generator(4, 0, 4, 4, 1), Discriminator(0, 8, 1)))


@pytest.mark.parametrize("zipped", [False, True], ids=["pickle", "torch.save"])
@pytest.mark.parametrize("case", CONTAINERS)
def test_containers(case, zipped, G, D, tmp_path):
    form = ZipFormat() if zipped else Format()
    path = write(tmp_path / "x.pt", form.dumps(containers(form, G, D)[case]))
    loaded = load_generator(path)
    assert_images(loaded, G)
    assert loaded.notes == () and peek(path, "generator").img_resolution == 8


def test_a_compressed_zip_of_torch(G, tmp_path):
    form = ZipFormat()
    data = form.dumps({"G_ema": form.module(G, G.init_kwargs)}, zipfile.ZIP_DEFLATED)
    assert_images(load_generator(write(tmp_path / "x.pt", data)), G)


@pytest.mark.parametrize(
    "kwargs, note",
    [
        ({"square": False}, "square=False"),
        ({"square": True}, "square=True"),
        ({"init_res": [4, 4]}, "init_res=[4, 4]"),
        ({"some_option": None}, "some_option=None"),
        ({"class_name": "training.networks.Generator"}, "class_name"),
        ({"synthesis_kwargs": {**SMALL["synthesis_kwargs"], "force_fp32": False}}, "force_fp32"),
        ({"mapping_kwargs": {**SMALL["mapping_kwargs"], "extra": False}}, "extra=False"),
    ],
)
def test_arguments_of_forks_that_change_nothing(kwargs, note, G, tmp_path):
    form = Format()
    usual = {**G.init_kwargs}
    if not kwargs.keys() & {"synthesis_kwargs", "mapping_kwargs"}:
        usual["synthesis_kwargs"] = form.easy(usual["synthesis_kwargs"])
    loaded = load_generator(write(tmp_path / "x.pkl", form.dumps({"G_ema": form.module(G, {**usual, **kwargs})})))
    assert_images(loaded, G)
    assert any(note in line for line in loaded.notes)


@pytest.mark.parametrize("place", ["kwargs", "synthesis_kwargs", "mapping_kwargs"])
def test_arguments_of_forks_that_change_something(place, G, tmp_path):
    kwargs = {**G.init_kwargs}
    if place == "kwargs":
        kwargs["attention"] = 3
    else:
        kwargs[place] = {**kwargs[place], "attention": 3}
    form = Format()
    with pytest.raises(ValueError, match=r"x.pkl: G_ema: it.* was made with the argument attention=3, which") as caught:
        load_generator(write(tmp_path / "x.pkl", form.dumps({"G_ema": form.module(G, kwargs)})))
    assert "__init__" not in str(caught.value)


def test_another_name_of_the_class(G, tmp_path):
    class StyleGAN2Generator(Generator):
        pass

    form, renamed = Format(), StyleGAN2Generator(6, 0, 6, 8, 3, **SMALL).eval()
    renamed.load_state_dict(G.state_dict())
    loaded = load_generator(write(tmp_path / "x.pkl", form.dumps({"G_ema": form.module(renamed, G.init_kwargs)})))
    assert_images(loaded, G)
    assert any("StyleGAN2Generator" in note for note in loaded.notes)


def changed_copy(G):
    copy = Generator(6, 0, 6, 8, 3, **SMALL).eval().requires_grad_(False)
    copy.load_state_dict(G.state_dict())
    return copy


def test_buffers_and_modules_of_forks(G, tmp_path):
    form, copy = Format(), changed_copy(G)
    copy.register_buffer("my_counter", torch.zeros([], dtype=torch.int64))
    data = form.module(copy, G.init_kwargs)
    identity = plain_module(form, "torch.nn.modules.linear.Identity", {})
    data.args[0]["state"]["_modules"]["lpips"] = identity
    loaded = load_generator(write(tmp_path / "x.pkl", form.dumps({"G_ema": data})))
    assert_images(loaded, G)
    assert any("my_counter" in note for note in loaded.notes)
    data.args[0]["state"]["_modules"]["lpips"] = plain_module(form, "somebody.Net", {"weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"1 tensors that a Generator does not have, such as lpips.weight"):
        load_generator(write(tmp_path / "y.pkl", form.dumps({"G_ema": data})))


def test_missing_buffers(G, tmp_path):
    form, copy = Format(), changed_copy(G)
    del copy.mapping._buffers["w_avg"]
    for block in (copy.synthesis.b4.conv1, copy.synthesis.b8.conv0, copy.synthesis.b8.conv1):
        del block._buffers["noise_const"]
    path = write(tmp_path / "x.pkl", form.dumps({"G_ema": form.module(copy, G.init_kwargs)}))
    loaded = load_generator(path)
    assert any("mean of w" in note for note in loaded.notes) and any("noise" in note for note in loaded.notes)
    z = torch.randn(2, 6)
    assert max_error(loaded(z, noise_mode="none"), G(z, noise_mode="none")) < 1e-5
    w = G.mapping(torch.randn(5000, 6), None)[:, 0]
    assert (loaded.mapping.w_avg - w.mean(dim=0)).abs().max() < 0.1 * w.std()
    notes = []
    assert export.write_like(path, tmp_path / "y.pkl", {"G_ema": loaded}, notes) == []
    assert len(notes) == 2 and load_generator(tmp_path / "y.pkl").notes == loaded.notes


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda data: gzip.compress(data), "a gzip archive, to be unpacked first"),
        (lambda data: zipped_file("half.pkl", data), "a zip archive with a checkpoint in it, to be unpacked first"),
        (lambda data: data[: len(data) // 2], "cut off"),
        (lambda data: pickle.dumps({"G_ema": [1]}, 0), "a pickle of a table with the keys 'G_ema'"),
        (lambda data: pickle.dumps({"G_ema": [1]}, 1), "a pickle of a table with the keys 'G_ema'"),
    ],
)
def test_files_that_are_refused(change, reason, G, tmp_path):
    form = Format()
    data = change(form.dumps({"G_ema": form.module(G, G.init_kwargs)}))
    with pytest.raises(ValueError, match=reason) as caught:
        load_generator(write(tmp_path / "x.pkl", data))
    assert "\n" not in str(caught.value)


def zipped_file(name, data):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, data)
    return file.getvalue()


def test_bytes_behind_the_pickle(G, tmp_path):
    form = Format()
    data = form.dumps({"G_ema": form.module(G, G.init_kwargs)}) + b"\0" * 100
    assert_images(load_generator(write(tmp_path / "x.pt", data)), G)


# State dicts under NVIDIA's names.


def big_endian(value):
    return value.numpy().astype(">f4")


WRAPPED = {
    "bare": lambda state: state,
    "G_ema": lambda state: {"G_ema": state},
    "module": lambda state: {f"module.{name}": value for name, value in state.items()},
    "Lightning": lambda state: {
        "state_dict": {f"G_ema.{name}": value for name, value in state.items()}
        | {f"G.{name}": torch.zeros_like(value) for name, value in state.items()}
        | {"D.b4.fc.weight": torch.zeros(2, 2)},
        "epoch": 3,
        "hyper_parameters": {"lr": 0.1},
    },
    "state_dict": lambda state: {"state_dict": state},
    "generator": lambda state: {"iter": 5, "generator": state},
    "nested": lambda state: {"models": {"ema": {f"module.{name}": value for name, value in state.items()}}},
    "tuple": lambda state: (state, {"epoch": 3}),
    "in a list": lambda state: [{"losses": [0.5] * 20}, {"G_ema": state}],
    "big-endian arrays": lambda state: {name: big_endian(value) for name, value in state.items()},
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("case", WRAPPED)
def test_state_dicts(case, legacy, G, tmp_path):
    path = tmp_path / "x.pt"
    torch.save(WRAPPED[case](G.state_dict()), path, _use_new_zipfile_serialization=not legacy)
    loaded = load_generator(path)
    assert_images(loaded, G)
    assert len(loaded.notes) == 2 and "conv_clamp" in loaded.notes[0] and "lr_multiplier" in loaded.notes[1]
    assert peek(path, "generator").img_channels == 3


@pytest.mark.parametrize("name", ["sg2_lightning_orig_cond16.ckpt", "sg2_statedict_resnet16.pt"])
def test_golden_state_dicts(name):
    stem = name.partition(".")[0]
    data, kwargs = read_arrays(f"pickles/{stem}.expected"), read_json("pickles/sg2_torchsave.init")[stem]
    G = load_generator(PICKLES / name)
    assert {key: G.init_kwargs[key] for key in kwargs if not key.endswith("_kwargs")} == {
        key: value for key, value in kwargs.items() if not key.endswith("_kwargs")
    }
    assert_golden(G, data)


def assert_golden(G, data):
    c = data["c"] if G.c_dim else None
    for psi, key in ((1, "img_psi1_const_fp32"), (0.7, "img_psi07_const_fp32")):
        assert max_error(G(data["z"], c, truncation_psi=psi, noise_mode="const"), data[key]) < 3e-5


def test_golden_module_of_torch_save(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    G = load_generator(PICKLES / "sg2_torchsave_module_cond16.pt")
    assert_golden(G, read_arrays("pickles/sg2_torchsave_module_cond16.expected"))
    kwargs = read_json("pickles/sg2_torchsave.init")["sg2_torchsave_module_cond16"]
    assert G.init_kwargs["synthesis_kwargs"] == kwargs["synthesis_kwargs"] and G.notes == ()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "kwargs",
    [
        {"img_channels": 4},
        {"c_dim": 3, "mapping_kwargs": {"num_layers": 1, "embed_features": 5}},
        {"z_dim": 5, "w_dim": 7, "mapping_kwargs": {"num_layers": 3, "layer_features": 4}},
        {"mapping_kwargs": {"num_layers": 0}},
        {"synthesis_kwargs": {"channels": [3, 7]}},
        {"synthesis_kwargs": {"channel_base": 64, "channel_max": 8, "use_noise": False}},
        {"synthesis_kwargs": {"channel_base": 100, "channel_max": 30, "resample_filter": [1, 1]}},
        {"synthesis_kwargs": {"channel_base": 64, "channel_max": 8, "resample_filter": [1] * 8}},
        {"synthesis_kwargs": {"channel_base": 64, "channel_max": 8, "kernel_size": 1}},
    ],
)
def test_sizes_follow_from_shapes(kwargs, tmp_path):
    usual = {"z_dim": 6, "c_dim": 0, "w_dim": 6, "img_resolution": 8, "img_channels": 3, **SMALL}
    G = Generator(**{**usual, **kwargs}).eval().requires_grad_(False)
    G.mapping.w_avg.normal_()
    torch.save(G.state_dict(), tmp_path / "x.pt")
    assert_images(load_generator(tmp_path / "x.pt"), G)


def test_the_mean_of_w_of_a_generator_with_classes_is_estimated_over_them(tmp_path):
    G = Generator(6, 3, 6, 8, 3, **SMALL).eval().requires_grad_(False)
    torch.save({name: value for name, value in G.state_dict().items() if name != "mapping.w_avg"}, tmp_path / "x.pt")
    loaded = load_generator(tmp_path / "x.pt")
    w = G.mapping(torch.randn(6000, 6), torch.eye(3).repeat(2000, 1))[:, 0]
    assert (loaded.mapping.w_avg - w.mean(dim=0)).abs().max() < 0.1 * w.std()


def test_what_no_tensor_tells_can_be_given(tmp_path):
    kwargs = {"z_dim": 6, "c_dim": 0, "w_dim": 6, "img_resolution": 8, "img_channels": 3}
    told = {"mapping_kwargs": {"lr_multiplier": 0.1}, "synthesis_kwargs": {"conv_clamp": 0.5}}
    made = {key: {**SMALL[key], **told[key]} for key in told}
    G = Generator(**kwargs, **made).eval().requires_grad_(False)
    torch.save(G.state_dict(), tmp_path / "x.pt")
    loaded = load_generator(tmp_path / "x.pt", kwargs=told)
    assert_images(loaded, G)
    assert loaded.notes == ()
    z = torch.randn(2, 6)
    without = load_generator(tmp_path / "x.pt")(z, noise_mode="const")
    assert max_error(without, G(z, noise_mode="const")) > 1e-3
    with pytest.raises(ValueError, match="tells how its networks are built; expected no --gan-kwargs"):
        load_generator(PICKLES / "plain_t213_p4.pkl", kwargs=told)


def test_several_generators_without_an_average(G, tmp_path):
    torch.save({"one": G.state_dict(), "two": G.state_dict()}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"several generators \(one, two\); expected one of them under the name G_ema"):
        load_generator(tmp_path / "x.pt")


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_state_dicts_in_other_containers(suffix, G, tmp_path):
    import safetensors.torch

    path, state = tmp_path / f"x.{suffix}", {f"G_ema.{name}": value for name, value in G.state_dict().items()}
    if suffix == "npz":
        np.savez(path, **{name: value.numpy() for name, value in state.items()})
    else:
        safetensors.torch.save_file(state, path)
    assert_images(load_generator(path), G)


# rosinality.


@pytest.fixture(scope="module")
def state():
    return random_generator(size=8, layers=2, dim=16)


MEANS = {
    "tensor": lambda w: w,
    "1xD": lambda w: w[None],
    "layers": lambda w: w[None].repeat(4, 1),
    "1xlayers": lambda w: w[None, None].repeat(1, 4, 1),
    "numpy": lambda w: w.numpy(),
    "half": lambda w: w.half(),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("form", MEANS)
def test_means_of_w(form, legacy, state, tmp_path):
    w = torch.randn(16).half().float()
    table = {"g_ema": state, "latent_avg": MEANS[form](w)}
    torch.save(table, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    G = load_generator(tmp_path / "x.pt")
    assert torch.equal(G.mapping.w_avg, w)
    z = torch.randn(2, 16)
    assert max_error(G(z, None, 0.5, noise_mode="const"), generate(state, z, 0.5, w)) < 3e-5


def test_means_of_w_that_differ_between_layers(state, tmp_path):
    means = torch.randn(4, 16)
    torch.save({"g_ema": state, "latent_avg": means}, tmp_path / "x.pt")
    G = load_generator(tmp_path / "x.pt")
    torch.testing.assert_close(G.mapping.w_avg, means.mean(dim=0))
    assert any("differs between layers" in note for note in G.notes)
    torch.save({"g_ema": state, "latent_avg": torch.randn(4, 15)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"its mean of w has shape \[4, 15\]; expected 16 numbers"):
        load_generator(tmp_path / "x.pt")


ROSINALITY = {
    "args": lambda s: {"g": s, "g_ema": s, "args": argparse.Namespace(size=8, d=collections.defaultdict(int))},
    "numpy scalars": lambda s: {"g_ema": s, "ada_aug_p": np.float64(0.3), "loss": np.float32(2)},
    "deque": lambda s: {"g_ema": s, "losses": collections.deque([1, 2])},
    "half": lambda s: {"g_ema": {k: v.half().float().half() for k, v in s.items()}},
    "module outside": lambda s: {"module.g_ema": s},
    "state_dict": lambda s: {"state_dict": s},
    "prefixed": lambda s: {"g_ema": {f"generator.{k}": v for k, v in s.items()}},
    "bare": lambda s: s,
    "generator": lambda s: {"generator": s},
    "params_ema": lambda s: {"params_ema": s},
    "no noises": lambda s: {"g_ema": {k: v for k, v in s.items() if not k.startswith("noises")}},
    "no kernels": lambda s: {"g_ema": {k: v for k, v in s.items() if "kernel" not in k}},
    "parameters": lambda s: {"g_ema": {k: torch.nn.Parameter(v) for k, v in s.items()}},
    "extra tensor": lambda s: {"g_ema": {**s, "extra_counter": torch.zeros([])}},
    "truncation_latent": lambda s: {"g_ema": {**s, "truncation_latent": torch.ones(16)}},
    "optimisers": lambda s: {"g_ema": s, "d_optim": {"state": {}, "param_groups": []}, "date": None, "note": "ok"},
    "pSp": lambda s: {"state_dict": {f"decoder.{k}": v for k, v in s.items()}, "latent_avg": torch.ones(4, 16)},
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("case", ROSINALITY)
def test_rosinality(case, legacy, state, tmp_path):
    torch.save(ROSINALITY[case](state), tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    G, z = load_generator(tmp_path / "x.pt"), torch.randn(2, 16)
    if case == "no noises":
        assert torch.equal(G.synthesis.b8.conv0.weight, state["convs.0.conv.weight"][0])
        return
    expected = {k: v.half().float() for k, v in state.items()} if case == "half" else state
    assert max_error(G(z, None, noise_mode="const"), generate(expected, z, 1.0, torch.zeros(16))) < 3e-5
    if case in ("truncation_latent", "pSp"):
        assert torch.equal(G.mapping.w_avg, torch.ones(16))


def as_rosinality(G):
    return rosinality.generator_state(G)


@pytest.mark.parametrize("channels", [1, 2, 4])
@pytest.mark.parametrize("widths", [{"channel_base": 128, "channel_max": 12}, {"channels": [5, 12]}])
def test_other_channels_and_widths(channels, widths, tmp_path):
    made = {"mapping_kwargs": {"num_layers": 1}, "synthesis_kwargs": widths}
    G = Generator(16, 0, 16, 8, channels, **made).eval().requires_grad_(False)
    G.mapping.w_avg.normal_()
    state, w = as_rosinality(G)
    torch.save({"g_ema": state, "latent_avg": w}, tmp_path / "x.pt")
    loaded = load_generator(tmp_path / "x.pt")
    assert_images(loaded, G)
    notes = export.write_rosinality(tmp_path / "y.pt", {"G_ema": loaded})  # back into the fork that it came from
    assert any("channels" in note for note in notes)
    assert_images(load_generator(tmp_path / "y.pt"), G)


def test_a_whole_module_of_rosinality(state, tmp_path):
    """torch.save(g_ema): classes that are not here, tensors under the names of their modules."""
    form, tree = ZipFormat(), {}
    for name, value in state.items():
        *path, leaf = name.split(".")
        at = tree
        for part in path:
            at = at.setdefault(part, {})
        at[leaf] = value

    def module(table):
        children = {name: module(part) for name, part in table.items() if isinstance(part, dict)}
        tensors = {name: part for name, part in table.items() if not isinstance(part, dict)}
        return plain_module(form, "model.Generator", tensors, children)

    G, z = load_generator(write(tmp_path / "x.pt", form.dumps(module(tree)))), torch.randn(2, 16)
    assert max_error(G(z, None, noise_mode="const"), generate(state, z, 1.0, torch.zeros(16))) < 3e-5


# TensorFlow.

TF = "tf04_stylegan2_skip_uncond"


def tf_networks(**kwargs):
    form, table, arrays = Format(protocol=3, numpy=1), read_json(f"stylegan2/tf/{TF}"), tf.numpy_arrays(TF)
    for name in ("Gs", "D"):
        table[name]["static_kwargs"] |= kwargs
    return [builders.tf_network(form, table[name], arrays, name) for name in ("Gs", "D", "Gs")]


def assert_tf(path):
    data = read_arrays(f"stylegan2/tf/{TF}")
    image = load_generator(path)(data["io/z"], None, noise_mode="const")
    assert max_error(image, data["io/Gs_img_psi1_const"]) < 3e-5


@pytest.mark.parametrize(
    "kwargs",
    [
        {"resolution_w": 16, "resolution_h": 16},
        {"min_h": 4, "min_w": 4, "res_log2": 4},
        {"impl": "ref"},
        {"use_attention": False},
        {"num_fp16_res": 0},
    ],
)
def test_arguments_of_tensorflow_forks(kwargs, tmp_path):
    assert_tf(write(tmp_path / "x.pkl", dumps(tuple(tf_networks(**kwargs)), 3)))


@pytest.mark.parametrize(
    "kwargs, reason",
    [({"resolution_w": 16, "resolution_h": 8}, "its images are 16×8"), ({"use_attention": 3}, "use_attention=3")],
)
def test_arguments_of_tensorflow_forks_that_are_refused(kwargs, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        load_generator(write(tmp_path / "x.pkl", dumps(tuple(tf_networks(**kwargs)), 3)))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda G, D, Gs: Gs,
        lambda G, D, Gs: (D, Gs),
        lambda G, D, Gs: [G, D, Gs],
        lambda G, D, Gs: (G, D, Gs, G),
        lambda G, D, Gs: {"G": G, "D": D, "Gs": Gs},
        lambda G, D, Gs: (None, None, Gs),
    ],
)
def test_containers_of_tensorflow(wrap, tmp_path):
    assert_tf(write(tmp_path / "x.pkl", dumps(wrap(*tf_networks()), 3)))


def test_a_discriminator_alone(tmp_path):
    with pytest.raises(ValueError, match=r"a single TensorFlow network \(D_"):
        load_generator(write(tmp_path / "x.pkl", dumps(tf_networks()[1], 3)))


# EDM.


def edm_containers(form, T):
    t = form.module(T, T.init_kwargs, attributes={"sigma_min": 0.002, "sigma_max": 80.0})
    return {
        "ema": {"ema": t},
        "net": {"net": t},
        "bare": t,
        "G_ema": {"G_ema": t, "loss_fn": None},
        "both": {"ema": t, "G": t},
    }


@pytest.mark.parametrize("zipped", [False, True], ids=["pickle", "torch.save"])
@pytest.mark.parametrize("case", edm_containers(Format(), EDMPrecond(8, 1, model_type="SongUNet", model_channels=8)))
def test_denoisers(case, zipped, T, tmp_path):
    form = ZipFormat() if zipped else Format()
    path = write(tmp_path / "x.pkl", form.dumps(edm_containers(form, T)[case]))
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 3.0])
    assert torch.equal(load_teacher(path)(x, sigma), T(x, sigma))
    G = load_generator(f"one-step:{path}", sigma_init=5.0)  # a student of SiD is of the same form
    z = torch.randn(2, G.z_dim)
    assert torch.equal(G(z), T(5 * z.reshape(2, 3, 8, 8), torch.tensor(5.0)))
    assert peek(f"one-step:{path}", "generator").kind == "generator"
    with pytest.raises(ValueError, match="a denoiser that is used once is one-step:FILE"):
        load_generator(path)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"model_type": "SongUNet", "embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual",
         "resample_filter": [1, 3, 3, 1], "label_dim": 3, "augment_dim": 9},
        {"model_type": "SongUNet", "encoder_type": "skip", "decoder_type": "skip", "num_blocks": 2},
        {"model_type": "DhariwalUNet", "label_dim": 4, "channel_mult": [2, 3]},
    ],
)  # fmt: skip
@pytest.mark.parametrize("cls", [EDMPrecond, VPPrecond])
def test_state_dicts_of_denoisers(cls, kwargs, tmp_path):
    usual = {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "img_channels": 3}
    T = cls(8, **{**usual, **kwargs}).eval().requires_grad_(False)
    for p in T.parameters():
        p.add_(torch.randn_like(p) * 0.05)  # some begin at zero
    torch.save({"ema": T.state_dict(), "net": T.state_dict()}, tmp_path / "x.pt")
    given = None if cls is EDMPrecond else {"class": "VPPrecond"}
    loaded = load_teacher(tmp_path / "x.pt", given)
    x, sigma, c = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 3.0]), torch.eye(2, T.label_dim) if T.label_dim else None
    assert max_error(loaded(x, sigma, c), T(x, sigma, c)) < 1e-5
    assert any(cls.__name__ in note for note in loaded.notes)


def test_denoisers_that_are_refused(T, tmp_path):
    form = Format()
    t = form.module(T, {**T.init_kwargs, "foo": 1})
    with pytest.raises(ValueError, match=r"ema: it was made with the argument foo=1, which changes it"):
        load_teacher(write(tmp_path / "x.pkl", form.dumps({"ema": t})))
    t, other = (form.module(T, T.init_kwargs) for _ in range(2))
    with pytest.raises(ValueError, match="several networks under 'ema'"):
        load_teacher(write(tmp_path / "x.pkl", form.dumps({"ema": [t, other]})))


def test_a_training_state_of_edm(T, tmp_path):
    form = ZipFormat()
    state = {"net": form.module(T, T.init_kwargs), "optimizer_state": {"state": {0: {"step": torch.ones(1)}}}}
    loaded = load_teacher(write(tmp_path / "x.pt", form.dumps(state)))
    x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 3.0])
    assert torch.equal(loaded(x, sigma), T(x, sigma)) and "not its average" in loaded.notes[0]


@pytest.mark.parametrize("wrap", [lambda t: {"model": {"ema": t}}, lambda t: [t], lambda t: {"ema": [t]}])
def test_a_denoiser_somewhere_in_a_file(wrap, T, tmp_path):
    form = Format()
    loaded = load_teacher(write(tmp_path / "x.pkl", form.dumps(wrap(form.module(T, T.init_kwargs)))))
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(loaded(x, 2.0), T(x, 2.0))


def test_a_denoiser_of_another_name(T, tmp_path):
    class EDMPrecondCond(EDMPrecond):
        pass

    renamed = EDMPrecondCond(**T.init_kwargs).eval()
    renamed.load_state_dict(T.state_dict())
    form = Format()
    loaded = load_teacher(write(tmp_path / "x.pkl", form.dumps({"ema": form.module(renamed, T.init_kwargs)})))
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(loaded(x, 2.0), T(x, 2.0))
    assert any("EDMPrecondCond" in note for note in loaded.notes)


# R3GAN.


@pytest.mark.parametrize("name", ["r3gan_current_uncond16", "r3gan_old_cond16"])
def test_r3gan(name, tmp_path):
    data, path = read_arrays(f"pickles/{name}.expected"), PICKLES / f"{name}.pkl"
    with open_container(path) as container:
        nets = {key: container.load(key) for key in container.members}
    assert set(nets) == {"G", "G_ema"}
    c = data["c"] if nets["G"].c_dim else None
    for key, net in nets.items():
        assert max_error(net(data["z"], c), data[f"{key}_img_fp32"]) < 1e-5
    half = nets["G_ema"](data["z"], c, force_fp32=False)
    assert (half - data["G_ema_img_bf16stages"]).abs().max() < 0.05
    assert export.write_like(path, tmp_path / "x.pkl", nets) == []
    assert (tmp_path / "x.pkl").read_bytes() == path.read_bytes()
    G = load_generator(path)
    for wrap in WRAPPED.values():
        torch.save(wrap({f"Model.{key}": value for key, value in G.state_dict().items()}), tmp_path / "x.pt")
        loaded = load_generator(tmp_path / "x.pt", {"bf16_stages": G.init_kwargs["bf16_stages"]})
        assert torch.equal(loaded(data["z"], c), G(data["z"], c)) and loaded.notes == ()
    assert any("bf16_stages" in note for note in load_generator(tmp_path / "x.pt").notes)


# Back into files.


def test_defaults_written_out_are_the_same_architecture(G, D, tmp_path):
    """A pickle that leaves its defaults out takes a network that has them written out, and one from rosinality."""
    form = Format()
    path = write(tmp_path / "x.pkl", form.dumps({"G": None, "G_ema": form.module(G, G.init_kwargs)}))
    spelled = {key: G.init_kwargs[key] for key in ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels")}
    mapping = {
        "num_layers": 2,
        "embed_features": None,
        "layer_features": 6,
        "activation": "lrelu",
        "lr_multiplier": 0.01,
    }
    synthesis = {"architecture": "skip", "channels": [8, 8], "conv_clamp": None, "num_fp16_res": 3, "use_noise": True}
    same = Generator(**spelled, mapping_kwargs=mapping, synthesis_kwargs=synthesis).eval().requires_grad_(False)
    same.load_state_dict({name: value + 0.5 for name, value in G.state_dict().items()})
    assert export.write_like(path, tmp_path / "y.pkl", {"G_ema": same}) == []
    assert_images(load_generator(tmp_path / "y.pkl"), same)
    state, w = as_rosinality(G)
    torch.save(
        {"g_ema": {k: v * 1.5 for k, v in state.items() if "kernel" not in k}, "latent_avg": w}, tmp_path / "r.pt"
    )
    theirs, notes = load_generator(tmp_path / "r.pt"), []
    assert export.write_like(path, tmp_path / "z.pkl", {"G_ema": theirs}, notes) == [] and notes == []
    assert_images(load_generator(tmp_path / "z.pkl"), theirs)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"mapping_kwargs": {"num_layers": 2, "lr_multiplier": 0.1}}, "mapping.fc0.weight_gain"),
        ({"mapping_kwargs": {"num_layers": 2, "activation": "relu"}}, "mapping.fc0.activation"),
        ({"synthesis_kwargs": {**SMALL["synthesis_kwargs"], "architecture": "resnet"}}, "architecture"),
        ({"mapping_kwargs": {"num_layers": 3}}, "num_layers"),
    ],
)
def test_other_functions_are_not_written(change, reason, G, tmp_path):
    form = Format()
    path = write(tmp_path / "x.pkl", form.dumps({"G_ema": form.module(G, G.init_kwargs)}))
    other = Generator(**{**G.init_kwargs, **change})
    with pytest.raises(ValueError, match=f"the arguments are not those of the network to be written: its .*{reason}"):
        export.write_like(path, tmp_path / "y.pkl", {"G_ema": other})
    assert not (tmp_path / "y.pkl").exists()


def test_a_clamp_is_only_noted(G, tmp_path):
    form, notes = Format(), []
    kwargs = {**G.init_kwargs, "synthesis_kwargs": {**SMALL["synthesis_kwargs"], "conv_clamp": 256}}
    clamped = Generator(**kwargs)
    clamped.load_state_dict(G.state_dict())
    path = write(tmp_path / "x.pkl", form.dumps({"G_ema": form.module(clamped, kwargs)}))
    export.write_like(path, tmp_path / "y.pkl", {"G_ema": G}, notes)
    assert len(notes) == 1 and "clamps activations" in notes[0]
    assert load_generator(tmp_path / "y.pkl").synthesis.b8.conv1.conv_clamp == 256
