"""`.pt` files of guided-diffusion and consistency_models: what shapes tell, what has to be said, what is refused."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from refine.checkpoints import describe, load_generator, load_teacher, native, peek, registry
from refine.checkpoints.foreign import adm
from refine.checkpoints.foreign.opening import open_container
from refine.checkpoints.pickles.inert import Refused
from refine.checkpoints.pickles.tensors import Storage, TensorRef
from refine.cli.generate import command
from refine.cli.main import run_command
from refine.networks.stylegan2 import Generator
from tests.cli.test_refine import call
from tests.golden import ROOT, read_arrays, read_json, unlikeness
from tests.networks import test_adm_golden as golden

OFFICIAL = read_json("adm/official_shapes")
LINEAR = {"use_new_attention_order": False, "noise_schedule": "linear"}
# Name → kwargs that no shape tells, as their makers' scripts have them.
KNOWN = {
    "64x64_diffusion": (64, {"qkv_order": "thirds", "noise_schedule": "cosine", "num_head_channels": 64}, 0.1),
    "128x128_diffusion": (128, {"qkv_order": "heads", "noise_schedule": "linear", "num_heads": 4}, 0.0),
    "256x256_diffusion": (256, {"qkv_order": "heads", "noise_schedule": "linear", "num_head_channels": 64}, 0.0),
    "256x256_diffusion_uncond": (256, {"qkv_order": "heads", "noise_schedule": "linear"}, 0.0),
    "512x512_diffusion": (512, {"qkv_order": "heads", "noise_schedule": "linear", "num_head_channels": 64}, 0.0),
    "lsun_horse": (256, {"qkv_order": "heads", "noise_schedule": "linear", "num_head_channels": 64}, 0.1),
    "lsun_horse_nodropout": (256, {"qkv_order": "heads", "noise_schedule": "linear", "num_head_channels": 64}, 0.0),
    "edm_imagenet64_ema": (64, {"qkv_order": "thirds", "num_head_channels": 64}, 0.1),
    "edm_cat256_ema": (256, {"qkv_order": "thirds", "num_head_channels": 64}, 0.1),
}


def shapes_of(name):
    """(name, shape) of every tensor of a published file, in order."""
    kind = "lsun_256" if name.startswith("lsun") else "edm_lsun256_ema" if name == "edm_cat256_ema" else name
    listed = OFFICIAL[kind]["state_dict"]
    if isinstance(listed, str):  # "same as …"
        kind = next(key for key in OFFICIAL if key in listed.split() and key != kind)
        listed = OFFICIAL[kind]["state_dict"]
    return [(key, tuple(shape)) for key, shape in listed], OFFICIAL[kind]["num_params"]


def ref(shape):
    stride = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return TensorRef(Storage(torch.float32, math.prod(shape), None, 0), 0, tuple(shape), tuple(stride))


@pytest.mark.parametrize("name", KNOWN)
def test_official_sizes(name, tmp_path):
    """Everything follows from names and shapes, and the network has exactly these, in this order."""
    shapes, num_params = shapes_of(name)
    family, members = adm.members({key: ref(shape) for key, shape in shapes}, tmp_path / f"{name}.pt")
    network = members["ema"][1]()
    size, hidden, dropout = KNOWN[name]
    kwargs = network.init_kwargs
    assert (family == adm.CM_FAMILY) == name.startswith("edm") == (network.class_name == "adm.CMPrecond")
    assert kwargs["img_resolution"] == size and kwargs["dropout"] == dropout and hidden.items() <= kwargs.items()
    assert f"image_size {size}" in network.notes[-1]
    net = registry.build_empty(network.class_name, kwargs, (len(shapes), num_params))
    assert [(key, tuple(t.shape)) for key, t in net.state_dict().items()] == [
        (f"model.{key}", shape) for key, shape in shapes
    ]
    assert sum(p.numel() for p in net.parameters()) == num_params


@pytest.mark.parametrize("name", [*golden.ADM, *golden.CM])
def test_structure_of_the_golden_networks(name, tmp_path):
    state = {key: ref(shape) for key, shape in golden.facts(name)["state_dict"].items()}
    said = golden.kwargs_for_people(name)
    (_, members), expected = adm.members(state, tmp_path / "x.pt", said), golden.init_kwargs(name)
    found = {"rescale_timesteps": False, **members["ema"][1]().init_kwargs}
    expected |= {"dropout": 0.0, "rescale_timesteps": False}
    missing = {"num_heads": 1, "num_head_channels": None}
    assert {**missing, **found} == expected


@pytest.mark.parametrize("name", golden.FILES)
def test_files_as_the_originals_write_them(name, tmp_path):
    path, said = ROOT / "adm" / f"{name}.pt", golden.kwargs_for_people(name)
    info, net = peek(path, "teacher", said), load_teacher(path, said)
    assert (info.img_resolution, info.img_channels, info.classes) == (8, 3, 10 if "consistency" in name else 0)
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    storages = {p.untyped_storage().data_ptr() for p in net.parameters()}
    assert len(storages) == len(list(net.parameters()))  # of two that the file has, none is kept whole
    data = read_arrays(f"adm/{name}.expected")
    labels = golden.labels_of(name, data.get("y"))
    # What is said may also lie beside the file, and the file may come from DistributedDataParallel, or in half floats.
    state = {f"module.{key.removeprefix('model.')}": value for key, value in net.state_dict().items()}
    torch.save(state, tmp_path / "net.pt")
    (tmp_path / "net.json").write_text(json.dumps({**said, "use_fp16": True, "num_res_blocks": 0}))
    assert torch.equal(
        load_teacher(tmp_path / "net.pt")(data["x"], data["sigma"], labels), net(data["x"], data["sigma"], labels)
    )
    torch.save({key: value.half() for key, value in state.items()}, tmp_path / "net.pt")
    assert unlikeness(load_teacher(tmp_path / "net.pt")(data["x"], data["sigma"], labels), data["D"]) < 1e-2


WRAPPED = {
    "ema": lambda state: {"ema": state, "step": 3},
    "both": lambda state: {"model": {name: value * 0 for name, value in state.items()}, "ema": state},
    "state_dict": lambda state: {"state_dict": state, "epoch": 1},
    "Lightning": lambda state: {"state_dict": {f"model.{name}": value for name, value in state.items()}},
    "compiled": lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    "nested": lambda state: {"models": {"net": {f"module.{name}": value for name, value in state.items()}}},
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrap", WRAPPED)
def test_wherever_the_state_dict_is(wrap, legacy, tmp_path):
    name = "cm_edm_cond" if legacy else "cond_cosine_new"
    net, said = golden.network(name), golden.kwargs_for_people(name)
    state = {key.removeprefix("model."): value for key, value in net.state_dict().items()}
    torch.save(WRAPPED[wrap](state), tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    x, c = torch.randn(2, 3, 8, 8), torch.eye(2, net.label_dim)
    assert torch.equal(load_teacher(tmp_path / "x.pt", said)(x, 0.7, c), net(x, 0.7, c))


def test_they_become_native_files(tmp_path):
    net = golden.network("cond_cosine_new")
    native.save_networks(tmp_path / "x", {"ema": net}, provenance={})
    again, x, c = load_teacher(tmp_path / "x"), torch.randn(2, 3, 8, 8), torch.eye(10)[:2]
    assert torch.equal(again(x, 0.7, c), net(x, 0.7, c)) and again.sigma_min == net.sigma_min


def save(path, changes=(), name="uncond_linear_legacy"):
    """A file of a golden network with tensors added, replaced or (None) removed."""
    state = {key[2:]: value.float() for key, value in golden.arrays(name).items() if key.startswith("w:")}
    for key, value in dict(changes).items():
        state.pop(key, None)
        if value is not None:
            state[key] = value
    torch.save(state, path)
    return path


def test_what_is_not_known_is_asked_for_in_one_line(tmp_path):
    path = save(tmp_path / "mine.pt")
    with pytest.raises(ValueError) as refusal:
        load_teacher(path)
    assert str(refusal.value) == (
        f"{path}: ema: its shapes do not tell image_size, num_head_channels (or num_heads), use_new_attention_order, "
        'noise_schedule; say what it was trained with, as in --teacher-kwargs=\'{"image_size": 256, '
        '"num_head_channels": 64, "use_new_attention_order": false, "noise_schedule": "linear"}\', or in mine.json '
        "beside it"
    )
    with pytest.raises(ValueError, match="its shapes do not tell noise_schedule; say"):
        load_teacher(path, {"image_size": 8, "num_heads": 1, "use_new_attention_order": False})
    with pytest.raises(ValueError, match=r"its shapes do not tell image_size, num_head_channels \(or num_heads\); say"):
        load_teacher(save(tmp_path / "cm.pt", name="cm_edm_cond"))


def test_commands_that_take_any_network_ask_for_it_too(tmp_path, capsys):
    args = [f"--network={save(tmp_path / 'mine.pt')}", "--seeds=0", f"--outdir={tmp_path}/out"]
    for more, code, said in (
        ((), 2, "its shapes do not tell image_size"),
        (
            ('--teacher-kwargs={"image_size": 8}',),
            2,
            "its shapes do not tell num_head_channels (or num_heads), use_new",
        ),
        (("--teacher-kwargs=[1]",), 2, "--teacher-kwargs: found '[1]'; expected a JSON object"),
        ((f"--teacher-kwargs={json.dumps({'image_size': 8, 'num_head_channels': 16, **LINEAR})}",), 0, ""),
    ):
        with pytest.raises(SystemExit) as ended:
            run_command(command, [*args, *more])
        err = capsys.readouterr().err
        assert ended.value.code == code and said in err, err
        assert (tmp_path / "out/seed0000.png").exists() == (code == 0)


def test_what_was_assumed_is_said(tmp_path):
    path = save(tmp_path / "mine.pt")
    with open_container(path, kwargs={"image_size": 8, "num_head_channels": 16, **LINEAR}) as container:
        notes = container.network("ema").notes
    assert notes == ["assumed, as is usual: diffusion_steps 1000, rescale_timesteps False, dropout 0.0"]
    assert load_teacher(path, {"image_size": 8, "num_head_channels": 16, **LINEAR}).notes == tuple(notes)
    (tmp_path / "mine.json").write_text(json.dumps({"image_size": 8, "num_heads": 2, **LINEAR}))
    report = describe.inspect_file(path)["networks"]["ema"]
    assert report["kind"] == "teacher" and report["notes"] == notes and report["img_resolution"] == 8


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"image_size": "8"}, "image_size is 8; expected a whole number"),
        ({"image_size": True}, "image_size is True; expected a whole number"),
        ({"image_size": 0}, "image_size is 0; expected at least 2"),
        ({"image_size": 1 << 40}, "expected at most 4096"),
        ({"image_size": 9}, "img_resolution is 9, expected a multiple of 2"),
        ({"num_head_channels": 0}, "num_head_channels is 0; expected at least 1"),
        ({"num_head_channels": 24}, "a layer of 64 channels cannot have heads of 24 channels"),
        ({"use_new_attention_order": 1}, "use_new_attention_order is 1; expected true or false"),
        ({"noise_schedule": "sigmoid"}, "noise_schedule is sigmoid; expected linear or cosine"),
        ({"noise_schedule": None}, "noise_schedule is None; expected a word"),
        ({"diffusion_steps": 10**9}, "expected at most 10000"),
        ({"dropout": 1}, r"dropout is 1; expected a rate in \[0, 1\)"),
        ({"dropout": math.nan}, r"expected a rate in \[0, 1\)"),
        ({"num_channels": 128}, "num_channels is 128, but the file has 32"),
        ({"class_cond": True}, "class_cond is True, but the file has False"),
        ({"use_scale_shift_norm": False}, "use_scale_shift_norm is False, but the file has True"),
        ({"predict_xstart": True}, "expected a network that predicts the noise"),
        ({"image_sice": 8}, "unknown image_sice; expected some of image_size, num_heads"),
        ({"x\n\x1b[31m": 8}, "unknown x"),
    ],
)
def test_options_that_cannot_be(options, reason, tmp_path):
    path = save(tmp_path / "x.pt")
    with pytest.raises(ValueError, match=reason) as refusal:
        load_teacher(path, {"image_size": 8, "num_head_channels": 16, **LINEAR, **options})
    assert str(refusal.value).isprintable() and str(refusal.value).startswith(str(path))


def test_options_for_a_file_that_tells_everything_are_refused(tmp_path):
    native.save_networks(tmp_path / "x", {"ema": golden.network("cond_cosine_new")}, provenance={})
    for path in (tmp_path / "x", ROOT / "pickles/edm_song_ddpmpp_edm_cond_mult222.pkl"):
        with pytest.raises(ValueError, match="tells how its networks are built; expected no --teacher-kwargs"):
            load_teacher(path, {"image_size": 8})


@pytest.mark.parametrize("text", ["[1]", "{", "1" * 100, '{"a":' * 5000])
def test_a_broken_file_of_options_is_refused(text, tmp_path):
    path = save(tmp_path / "x.pt")
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x.json beside it is not a JSON object"):
        load_teacher(path)


OTHERS = {
    "an upsampler of guided-diffusion": {"input_blocks.0.0.weight": torch.zeros(32, 6, 3, 3)},
    "a U-Net for 4 channels, of latents": {"input_blocks.0.0.weight": torch.zeros(32, 4, 3, 3)},
    "a U-Net for 0 channels": {"input_blocks.0.0.weight": torch.zeros(32)},
    "a U-Net that is guided by text": {"middle_block.1.transformer_blocks.0.norm1.weight": torch.zeros(3)},
    "a U-Net like that of guided-diffusion, with other": {"middle_block.1.qkv.weight": None},
}


@pytest.mark.parametrize("what", OTHERS)
def test_networks_with_the_same_names_that_are_no_teachers(what, tmp_path):
    path = save(tmp_path / "x.pt", OTHERS[what])
    with pytest.raises(ValueError) as refusal:
        load_teacher(path)
    assert str(refusal.value).startswith(f"{path} is {what}") and "expected a teacher: " in str(refusal.value)
    with pytest.raises(ValueError, match="expected a generator"):
        load_generator(path)


def test_a_classifier_and_a_consistency_model_are_no_teachers(tmp_path):
    names = golden.facts("uncond_linear_legacy")["state_dict"]
    path = save(tmp_path / "x.pt", {name: None for name in names if name.startswith("output_blocks")})
    with pytest.raises(ValueError, match="is a classifier of guided-diffusion; expected a teacher"):
        load_teacher(path)
    for name in ("cd_imagenet64_lpips.pt", "ct_cat256.pt"):
        with pytest.raises(ValueError, match=r"is a consistency model \(by its name\), a generator of few steps"):
            load_teacher(save(tmp_path / name, name="cm_edm_cond"))


def test_a_teacher_is_no_generator(tmp_path):
    with pytest.raises(ValueError, match=r"is a guided-diffusion \.pt; expected a generator"):
        load_generator(save(tmp_path / "x.pt"))


def test_structure_is_refused_where_it_contradicts_itself():
    shapes, _ = shapes_of("256x256_diffusion_uncond")
    state = {key: ref(shape) for key, shape in shapes}
    for changes, reason in (
        ({"out.2.weight": ref([4, 256, 3, 3])}, "gives 4 channels for images of 3"),
        ({"time_embed.0.weight": ref([1024])}, "expected 2 axes"),
        ({"output_blocks.2.2.in_layers.0.weight": None}, "do not have equally many blocks"),
        ({"output_blocks.4.0.in_layers.0.weight": None}, "does not begin with a residual block"),
        ({"output_blocks.15.0.emb_layers.1.weight": ref([7, 1024])}, "its embedding has 7 outputs"),
        ({"output_blocks.9999.0.in_layers.0.weight": ref([32])}, "expected at most 200"),
        ({"middle_block.1.qkv.weight": ref([3072, 1024])}, "has 2 axes; expected 3 or 4"),
        (
            {"output_blocks.15.0.out_layers.0.weight": None},
            "it lacks the tensor output_blocks.15.0.out_layers.0.weight",
        ),
    ):
        changed = {key: value for key, value in {**state, **changes}.items() if value is not None}
        with pytest.raises(Refused, match=reason):
            adm._structure(changed)


def test_a_run_with_such_a_teacher_goes_on_without_saying_it_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("REFINE_CACHE", str(tmp_path / "cache"))
    path = save(tmp_path / "mine.pt", name="cond_cosine_new")
    said = {"image_size": 8, "num_head_channels": 16, "use_new_attention_order": True, "noise_schedule": "cosine"}
    mapping, synthesis = {"num_layers": 1}, {"channel_base": 64, "channel_max": 8}
    native.save_networks(tmp_path / "gan", {"G_ema": Generator(8, 10, 8, 8, 3, mapping, synthesis)}, provenance={})
    options = ("--aux-dropout=0.1", "--metrics=fd4-teacher", "--tick=0.004", "--snap=1", "--adversarial=0", "--desc=x")
    args = [f"--gan={tmp_path}/gan", f"--teacher={path}", *options, "--batch=4", "--device=cpu", f"--outdir={tmp_path}"]
    code, _, err = call(capsys, *args, "--kimg=0.004")
    assert code == 2 and err.startswith("Error: --teacher: ") and "its shapes do not tell image_size" in err
    code, _, err = call(capsys, *args, "--kimg=0.004", f"--teacher-kwargs={json.dumps(said)}")
    assert code == 0, err
    log = (tmp_path / "00000-x/log.txt").read_text()
    assert "            assumed, as is usual: diffusion_steps 1000, rescale_timesteps False, dropout 0.0" in log
    assert "metric fd4-teacher at 0.0 kimg" in log
    code, _, err = call(capsys, f"--outdir={tmp_path}", "--resume=latest", "--kimg=0.008")
    assert code == 0, err
    other = json.dumps({**said, "noise_schedule": "linear"})
    code, _, err = call(capsys, f"--outdir={tmp_path}", "--resume=latest", f"--teacher-kwargs={other}")
    assert code == 2 and "--teacher-kwargs cannot be changed" in err


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
@pytest.mark.parametrize("name", ["cond_cosine_new", "cm_edm_cond"])
def test_the_same_names_in_other_files(suffix, name, tmp_path):
    """What a .pt holds, saved as safetensors or .npz, is the same teacher, told in the same way."""
    pt, path = save(tmp_path / "x.pt", name=name), tmp_path / f"y.{suffix}"
    state = torch.load(pt, weights_only=True)
    if suffix == "npz":
        np.savez(path, **{key: value.numpy() for key, value in state.items()})
    else:
        save_file({key: value.contiguous() for key, value in state.items()}, path)
    said = {"image_size": 8, "num_head_channels": 16}
    if not name.startswith("cm"):
        said |= {"use_new_attention_order": True, "noise_schedule": "cosine"}
    with pytest.raises(ValueError, match="its shapes do not tell image_size"):
        load_teacher(path)
    mine, theirs = load_teacher(path, said), load_teacher(pt, said)
    assert mine.init_kwargs == theirs.init_kwargs and type(mine) is type(theirs)
    for key, value in theirs.state_dict().items():
        assert torch.equal(mine.state_dict()[key], value), key


@pytest.mark.parametrize("typed, other", [("--teacher-kwargs", "--gan-kwargs"), ("--gan-kwargs", "--teacher-kwargs")])
def test_commands_for_any_network_name_the_option_that_was_typed(typed, other, tmp_path, capsys):
    path = save(tmp_path / "x.pt")
    for bad in ("{", "[1]", '{"image_size": 0}', '{"x": 1}', '{"image_size": 8}'):
        for verb, args in (("inspect", [str(path)]), ("export", [f"--network={path}", f"--out={tmp_path}/y.pt"])):
            with pytest.raises(SystemExit) as caught:
                run_command(verb, [*args, f"{typed}={bad}"])
            out, err = capsys.readouterr()
            assert typed in out + err and other not in out + err, (verb, bad, out + err)
            assert verb == "inspect" or caught.value.code != 0
    for verb, args in (("inspect", [str(path)]), ("export", [f"--network={path}", f"--out={tmp_path}/y.pt"])):
        with pytest.raises(SystemExit) as caught:
            run_command(verb, [*args, f"{typed}={{}}", f"{other}={{}}"])
        assert caught.value.code != 0 and "expected one of them" in capsys.readouterr().err


def test_refusals_name_the_option_that_was_given(tmp_path):
    path, pickle = save(tmp_path / "x.pt"), ROOT / "pickles/edm_song_ddpmpp_edm_cond_mult222.pkl"
    said = {"image_size": 8, "num_head_channels": 16, **LINEAR}
    for bad, file in (({**said, "image_size": 0}, path), (said, pickle), ({}, path)):
        with pytest.raises(ValueError, match="--teacher-kwargs") as of_teacher:
            load_teacher(file, bad)
        with pytest.raises(ValueError, match="--gan-kwargs") as of_generator:
            load_generator(f"one-step:{file}", bad)
        assert str(of_generator.value) == str(of_teacher.value).replace("--teacher-kwargs", "--gan-kwargs")
    assert load_generator(f"one-step:{path}", said, 1.0).img_resolution == 8
