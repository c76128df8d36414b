"""What was read is given back: the same container with other numbers, other formats, the command."""

import copy
import pickletools

import pytest
import torch

from refine.checkpoints import export, load_generator, load_teacher, native
from refine.checkpoints.foreign.opening import open_container
from refine.cli.main import run_command
from tests.checkpoints.builders import Format, edm_file, stylegan2_file, write
from tests.checkpoints.foreign import test_tensorflow as tf
from tests.checkpoints.foreign.test_nvidia import (
    FORMATS,
    PICKLES,
    assert_same,
    golden_network,
    golden_teacher,
    load_members,
)
from tests.checkpoints.rosinality_reference import random_generator


def globals_of(path):
    """Names of all globals of a pickle, also those spelled by text on the stack, and of the storages inside."""
    names, texts = [], []
    for op, arg, _ in pickletools.genops(path.read_bytes()):
        if op.name == "GLOBAL":
            names.append(arg)
        elif "UNICODE" in op.name:
            texts.append(arg)
        elif op.name == "STACK_GLOBAL":
            names.append("STACK_GLOBAL")
    protocol_2 = path.read_bytes()[1] == 2  # whose texts are also bytes, and whose globals are spelled out
    return names, None if protocol_2 else texts


def perturbed(network):
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if not name.endswith("resample_filter"):  # what no training changes, and not every format holds
                tensor.add_(torch.randn_like(tensor) * 0.01)
    return network


ORIGINALS = ["plain_t17_p3", "plain_t213_p4", "converted_tf01_ada_skip_uncond_t17", "edm_song_ddpmpp_edm_cond_mult222"]
ORIGINALS += ["tf01_ada_skip_uncond", "tf04_stylegan2_skip_uncond"]


@pytest.mark.parametrize("name", ORIGINALS)
def test_nothing_changed_gives_the_same_bytes(name, tmp_path):
    source, out = PICKLES / f"{name}.pkl", tmp_path / "out.pkl"
    assert export.write_like(source, out, load_members(source)) == []
    assert out.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("name", ORIGINALS)
def test_refined_networks_in_the_originals(name, tmp_path):
    source, out = PICKLES / f"{name}.pkl", tmp_path / "out.pkl"
    before = load_members(source)
    refined = {key: perturbed(net) for key, net in load_members(source).items() if key != "D"}
    assert export.write_like(source, out, refined) == [key for key in before if key == "D"]
    after = load_members(out)
    for key, net in refined.items():
        if name.startswith("tf0"):  # a stored bias without its 1 cannot hold every float
            for a, b in zip(net.state_dict().values(), after[key].state_dict().values(), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
        else:
            assert_same(net, after[key])
    if "D" in before:
        assert_same(before["D"], after["D"])
    assert globals_of(out) == globals_of(source)
    assert len(out.read_bytes()) == len(source.read_bytes())


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("kind", ["stylegan2", "edm", "tf"])
def test_every_way_of_writing(kind, options, tmp_path):
    form, source, out = Format(**options), tmp_path / "in.pkl", tmp_path / "out.pkl"
    if kind == "stylegan2":
        G, D = golden_network("g02_skip_cond_clamp")[0], golden_network("d03_skip_cond")[0]
        write(source, stylegan2_file(form, G, G=perturbed(golden_network("g02_skip_cond_clamp")[0]), D=D, style=3))
    elif kind == "edm":
        write(source, edm_file(form, golden_teacher("song_ncsnpp_ve_uncond")[0]))
    else:
        name = "tf06_ada_boxfilter_none"
        data = tf.tf_file(form, tf.read_json(f"stylegan2/tf/{name}"), tf.numpy_arrays(name))
        write(source, data)
    before = load_members(source)
    export.write_like(source, out, before)
    assert out.read_bytes() == source.read_bytes()
    refined = {key: perturbed(copy.deepcopy(net)) for key, net in before.items() if key in ("G_ema", "ema")}
    export.write_like(source, out, refined)
    for key, net in load_members(out).items():
        expected = refined.get(key, before[key]).state_dict()
        for a, b in zip(expected.values(), net.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-7 if kind == "tf" else 0)
    assert globals_of(out) == globals_of(source)


@pytest.mark.parametrize("channels_last, dtype", [(True, torch.float32), (False, torch.float16), (True, torch.float64)])
def test_layout_and_dtype_stay(channels_last, dtype, tmp_path):
    G, _ = golden_network("g03_resnet_uncond")
    source = write(tmp_path / "in.pkl", stylegan2_file(Format(channels_last=channels_last, dtype=dtype), G))
    refined = perturbed(load_generator(source)).to(memory_format=torch.channels_last)
    export.write_like(source, tmp_path / "out.pkl", {"G_ema": refined})
    for a, b in zip(refined.parameters(), load_generator(tmp_path / "out.pkl").parameters(), strict=True):
        assert torch.equal(a.to(dtype).float(), b)
    with open_container(tmp_path / "out.pkl") as container:
        ref = container.network("G_ema").tensors["synthesis.b8.conv1.weight"]
    assert ref.storage.dtype == dtype and (ref.stride[1] == 1) == channels_last


def test_trained_student_in_train_mode(tmp_path):
    source = PICKLES / "plain_t213_p4.pkl"
    G = load_generator(source).train().requires_grad_(True).to(memory_format=torch.channels_last)
    torch.optim.SGD(G.parameters(), lr=0.1).zero_grad()
    with torch.no_grad():
        G.synthesis.b8.conv0.weight.mul_(2)
    native.save_networks(tmp_path / "snapshot.safetensors", {"G_ema": G}, provenance={})
    snapshot = native.load_networks(tmp_path / "snapshot.safetensors")
    assert export.write_like(source, tmp_path / "out.pkl", snapshot) == ["G", "D"]
    assert_same(load_generator(tmp_path / "out.pkl"), G)


def test_networks_that_share_their_numbers(tmp_path):
    G, _ = golden_network("g01_skip_uncond")
    form = Format()
    shared = form.module(G, G.init_kwargs)
    source = write(tmp_path / "in.pkl", form.dumps({"G": shared, "G_ema": shared}))
    nets = load_members(source)
    export.write_like(source, tmp_path / "out.pkl", nets)
    assert (tmp_path / "out.pkl").read_bytes() == source.read_bytes()
    with pytest.raises(ValueError, match="share their numbers"):
        export.write_like(source, tmp_path / "x.pkl", {**nets, "G_ema": perturbed(nets["G_ema"])})
    assert not (tmp_path / "x.pkl").exists()


def test_filters_that_a_tensorflow_file_cannot_hold(tmp_path):
    source = PICKLES / "tf01_ada_skip_uncond.pkl"
    G = load_generator(source)
    G.synthesis.b8.resample_filter.mul_(2)
    with pytest.raises(ValueError, match=r"synthesis.b8.resample_filter .* no place in the file"):
        export.write_like(source, tmp_path / "x.pkl", {"G_ema": G})


def test_what_does_not_fit(tmp_path):
    source, out = PICKLES / "plain_t213_p4.pkl", tmp_path / "out.pkl"
    with pytest.raises(ValueError, match="arguments are not those"):
        export.write_like(source, out, {"G_ema": golden_network("g01_skip_uncond")[0]})
    with pytest.raises(ValueError, match="no network 'ema'"):
        export.write_like(source, out, {"ema": golden_teacher("song_ddpmpp_edm_uncond")[0]})
    with pytest.raises(ValueError, match=r"it is a stylegan2.Generator; got a edm"):
        export.write_like(source, out, {"G_ema": golden_teacher("song_ddpmpp_edm_uncond")[0]})
    native.save_networks(tmp_path / "n.safetensors", {"G_ema": load_generator(source)}, provenance={})
    with pytest.raises(ValueError, match="only other programs' pickles"):
        export.write_like(tmp_path / "n.safetensors", out, {"G_ema": load_generator(source)})
    export.write_plain(tmp_path / "p.safetensors", {"G_ema": load_generator(source)})
    with pytest.raises(ValueError, match="only other programs' pickles"):
        export.write_like(tmp_path / "p.safetensors", out, {"G_ema": load_generator(source)})
    assert not out.exists() and not list(tmp_path.glob(".*tmp"))


# The command.


def run(capsys, *args):
    with pytest.raises(SystemExit) as caught:
        run_command("export", [str(arg) for arg in args])
    return caught.value.code, *capsys.readouterr()


def test_command_like(capsys, tmp_path):
    source, out = PICKLES / "plain_t213_p4.pkl", tmp_path / "out.pkl"
    native.save_networks(tmp_path / "s.safetensors", {"G_ema": perturbed(load_generator(source))}, provenance={})
    code, text, err = run(capsys, f"--network={tmp_path / 's.safetensors'}", f"--like={source}", f"--out={out}")
    assert (code, err) == (0, "") and text == f"Wrote {out}\n  G is the original's\n  D is the original's\n"
    assert_same(load_generator(out), load_generator(tmp_path / "s.safetensors"))


def test_command_between_formats(capsys, tmp_path):
    source = PICKLES / "edm_song_ddpmpp_edm_cond_mult222.pkl"
    files = {name: tmp_path / f"{name}.safetensors" for name in ("native", "plain", "again")}
    assert run(capsys, f"--network={source}", f"--out={files['native']}")[0] == 0
    assert run(capsys, f"--network={files['native']}", f"--out={files['plain']}", "--format=plain")[0] == 0
    assert run(capsys, f"--network={files['plain']}", f"--out={files['again']}")[0] == 0
    for path in files.values():
        assert_same(load_teacher(path), load_teacher(source))
    assert native.read_metadata(files["native"])["provenance"]["converted_from"]["file"] == source.name


def test_command_to_rosinality_and_back(capsys, tmp_path):
    G = golden_rosinality(tmp_path / "a.pt")
    assert run(capsys, f"--network={tmp_path / 'a.pt'}", f"--out={tmp_path / 'n.safetensors'}")[0] == 0
    code, text, _ = run(capsys, f"--network={tmp_path / 'n.safetensors'}", f"--out={tmp_path / 'b.pt'}")
    assert code == 0 and text == f"Wrote {tmp_path / 'b.pt'}\n"
    assert_same(load_generator(tmp_path / "b.pt"), G)
    code, _, err = run(capsys, f"--network={tmp_path / 'a.pt'}", f"--like={tmp_path / 'a.pt'}", "--out=x.pt")
    assert code == 2 and err.startswith("Error: --like") and "only other programs' pickles are written back" in err


def golden_rosinality(path):
    torch.save({"g_ema": random_generator(4, 2, 1, 8), "latent_avg": torch.randn(8)}, path)
    return load_generator(path)


def test_command_failures(capsys, tmp_path):
    source = PICKLES / "plain_t213_p4.pkl"
    code, _, err = run(capsys, f"--network={source}", f"--out={tmp_path / 'x.pkl'}")
    assert code == 2 and "a .pkl beside --like, the pickle that it came from" in err
    code, _, err = run(capsys, f"--network={source}", f"--out={tmp_path / 'x.pt'}")
    assert code == 2 and err.startswith("Error: --network") and "3 classes" in err and err.count("\n") == 1
    export.write_native(tmp_path / "n.safetensors", {"G_ema": load_generator(source)}, source)
    code, _, err = run(
        capsys, f"--network={source}", f"--like={tmp_path / 'n.safetensors'}", f"--out={tmp_path / 'x.pkl'}"
    )
    assert code == 2 and err.startswith("Error: --like") and "only other programs' pickles" in err
    edm = PICKLES / "edm_song_ddpmpp_edm_cond_mult222.pkl"
    code, _, err = run(capsys, f"--network={edm}", f"--like={source}", f"--out={tmp_path / 'x.pkl'}")
    assert code == 2 and "none of these" in err
    assert run(capsys, f"--network={edm}", f"--like={edm}", "--out=x", "--format=plain")[0] == 2
    assert run(capsys, f"--network={edm}", f"--out={tmp_path / 'no' / 'way' / 'x'}", "--format=plain")[0] == 2
    assert not (tmp_path / "x.pkl").exists()
