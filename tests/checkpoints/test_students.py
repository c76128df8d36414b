"""Students of other families, from their files through refinement, sampling and back into their files."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from refine.checkpoints import load_generator, native
from refine.checkpoints.foreign import rosinality
from refine.cli.main import run_command
from refine.networks.edm import EDMPrecond
from refine.networks.stylegan2 import Generator
from tests.checkpoints.builders import Format, ZipFormat, write
from tests.checkpoints.foreign.test_nvidia import PICKLES
from tests.checkpoints.stylegan3_files import Form, stylegan3_file, t_generator
from tests.golden import read_arrays

QUICK = ["--kimg=0.008", "--batch=4", "--metrics=none", "--adversarial=0", "--aux-warmup-kimg=0", "--lr=0.001"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    torch.manual_seed(0)
    kwargs = {
        "model_type": "SongUNet",
        "model_channels": 8,
        "channel_mult": [1],
        "num_blocks": 1,
        "attn_resolutions": [],
    }
    T, path = EDMPrecond(16, 3, **kwargs), tmp_path_factory.mktemp("t") / "teacher.safetensors"
    native.save_networks(path, {"ema": T}, provenance={})
    return path


def run(capsys, command, *args):
    with pytest.raises(SystemExit) as caught:
        run_command(command, [str(arg) for arg in args])
    return caught.value.code, *capsys.readouterr()


def only(folder, pattern):
    (found,) = folder.glob(pattern)
    return found


def test_r3gan_is_refined_and_goes_back(teacher, capsys, tmp_path):
    source = PICKLES / "r3gan_current_uncond16.pkl"
    code, _, err = run(capsys, "refine", f"--gan={source}", f"--teacher={teacher}", f"--outdir={tmp_path}", *QUICK)
    assert code == 0, err
    before, data = load_generator(source), read_arrays("pickles/r3gan_current_uncond16.expected")
    snapshot, again = only(tmp_path, "*/network-snapshot-*.safetensors"), only(tmp_path, "*/network-snapshot-*.pkl")
    after = load_generator(snapshot)
    assert (after(data["z"]) - before(data["z"])).abs().max() > 1e-4
    assert torch.equal(load_generator(again)(data["z"]), after(data["z"]))
    assert len(again.read_bytes()) == len(source.read_bytes())
    out = tmp_path / "x.pkl"
    code, text, _ = run(capsys, "export", f"--network={snapshot}", f"--like={source}", f"--out={out}")
    assert code == 0 and text.startswith(f"Wrote {out}")
    assert torch.equal(load_generator(out)(data["z"]), after(data["z"]))


def test_a_one_step_generator_is_refined_and_goes_back(teacher, capsys, tmp_path):
    from refine.checkpoints import load_teacher

    T, form = load_teacher(teacher), Format()
    source = write(tmp_path / "sid.pkl", form.dumps({"G_ema": form.module(T, T.init_kwargs), "loss_fn": None}))
    options = [f"--gan=one-step:{source}", "--sigma-init=5", f"--teacher={teacher}", f"--outdir={tmp_path}"]
    code, _, err = run(capsys, "refine", *options, *QUICK)
    assert code == 0, err
    snapshot = only(tmp_path, "*/network-snapshot-*.safetensors")
    after = load_generator(snapshot)
    assert after.sigma_init == 5 and not list(tmp_path.glob("*/network-snapshot-*.pkl"))
    out = tmp_path / "x.pkl"
    code, _, err = run(capsys, "export", f"--network={snapshot}", f"--like={source}", f"--out={out}")
    assert code == 0, err
    z = torch.randn(2, after.z_dim)
    assert torch.equal(load_generator(f"one-step:{out}", sigma_init=5)(z), after(z))
    assert not torch.equal(load_generator(f"one-step:{source}", sigma_init=5)(z), after(z))
    images = ["--seeds=0-1", f"--outdir={tmp_path / 'images'}", "--sigma-init=5"]
    assert run(capsys, "generate", f"--network=one-step:{out}", *images)[0] == 0
    z = torch.from_numpy(np.random.RandomState(1).randn(1, after.z_dim)).float()
    expected = after(z).mul(127.5).add(128).clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "images/seed0001.png")), expected)


def test_a_state_dict_is_refined_as_a_one_step_generator_and_comes_back(teacher, capsys, tmp_path):
    from refine.checkpoints import load_teacher

    source = tmp_path / "dmd.pt"
    torch.save({"ema": load_teacher(teacher).state_dict()}, source)
    options = [f"--gan=one-step:{source}", "--sigma-init=5", f"--teacher={teacher}", f"--outdir={tmp_path}"]
    code, text, err = run(capsys, "refine", *options, *QUICK)
    assert code == 0 and "EDMPrecond" in text, err  # what no state dict tells is said
    snapshot, out = only(tmp_path, "*/network-snapshot-*.safetensors"), tmp_path / "x.safetensors"
    code, _, err = run(capsys, "export", f"--network={snapshot}", f"--out={out}")
    assert code == 0, err
    code, text, _ = run(capsys, "inspect", out)
    assert code == 0 and "one_step.OneStepGenerator 16×16×3" in text
    after, again = load_generator(snapshot), load_generator(out)
    before = load_generator(f"one-step:{source}", sigma_init=5)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in after.state_dict().items())
    assert again.sigma_init == 5 and not all(map(torch.equal, before.parameters(), again.parameters()))


def test_arguments_of_a_state_dict(capsys, tmp_path):
    small = {"mapping_kwargs": {"num_layers": 1}, "synthesis_kwargs": {"channel_base": 64, "channel_max": 8}}
    G = Generator(4, 0, 4, 8, 3, **small)
    torch.save(G.state_dict(), tmp_path / "G.pt")
    (tmp_path / "k.json").write_text(json.dumps({"synthesis_kwargs": {"conv_clamp": 2}}))
    code, text, _ = run(capsys, "inspect", tmp_path / "G.pt")
    assert code == 0 and "conv_clamp is taken as None, which no state dict tells" in text
    for given in (tmp_path / "k.json", '{"synthesis_kwargs": {"conv_clamp": 2}}'):
        code, text, _ = run(capsys, "inspect", tmp_path / "G.pt", f"--gan-kwargs={given}")
        assert code == 0 and "'conv_clamp': 2" in text and "conv_clamp is taken" not in text
    for given, reason in (
        ("{", "expected a JSON object"),
        ("[1]", "expected a JSON object"),
        ("no.json", "No such file"),
    ):
        code, _, err = run(capsys, "inspect", tmp_path / "G.pt", f"--gan-kwargs={given}")
        assert code == 2 and err.startswith("Error: --gan-kwargs: found") and reason in err and err.count("\n") == 1
    images = [f"--outdir={tmp_path / 'images'}", "--seeds=0"]
    code, _, err = run(capsys, "generate", f"--network={tmp_path / 'G.pt'}", *images)
    assert code == 0 and err.count("note: ") == 2


def test_rgba(teacher, capsys, tmp_path):
    small = {"mapping_kwargs": {"num_layers": 1}, "synthesis_kwargs": {"channel_base": 64, "channel_max": 8}}
    for channels in (4, 5):
        G = Generator(4, 0, 4, 16, channels, **small)
        native.save_networks(tmp_path / f"{channels}.safetensors", {"G_ema": G}, provenance={})
    images = ["--seeds=0-3", f"--outdir={tmp_path / 'images'}"]
    assert run(capsys, "generate", f"--network={tmp_path / '4.safetensors'}", *images)[0] == 0
    assert Image.open(tmp_path / "images/seed0003.png").mode == Image.open(tmp_path / "images-grid.png").mode == "RGBA"
    code, _, err = run(
        capsys, "generate", f"--network={tmp_path / '5.safetensors'}", "--seeds=0", f"--outdir={tmp_path}/x"
    )
    assert code == 2 and err.startswith("Error: --network: its images have 5 channels; expected 1 (grey)")
    options = [f"--gan={tmp_path / '4.safetensors'}", f"--teacher={teacher}", f"--outdir={tmp_path / 'runs'}"]
    code, _, err = run(capsys, "refine", *options, *QUICK)
    assert code == 2 and err.startswith("Error: --gan has img_channels 4, but --teacher has 3")
    assert not (tmp_path / "runs").exists() and not (tmp_path / "x").exists()


def tensorflow_file(path):
    path.write_bytes((PICKLES / "tf04_stylegan2_skip_uncond.pkl").read_bytes())


def rosinality_file(path):
    state, mean = rosinality.generator_state(Generator(8, 0, 8, 16, 3, {"num_layers": 2}, SMALL))
    torch.save({"g_ema": state, "latent_avg": mean + 0.5}, path)


def state_dict_file(path):
    torch.save({"G_ema": Generator(8, 0, 8, 16, 3, {"num_layers": 2}, SMALL).state_dict()}, path)


def stylegan3_file_r(path):
    path.write_bytes(stylegan3_file(Form(), t_generator(conv_kernel=1, use_radial_filters=True)))


def r3gan_state_dict_file(path):
    torch.save(load_generator(PICKLES / "r3gan_current_uncond16.pkl").state_dict(), path)


def module_file(path):
    """torch.save(G)"""
    form, G = ZipFormat(), Generator(8, 0, 8, 16, 3, {"num_layers": 2}, SMALL)
    path.write_bytes(form.dumps(form.module(G, G.init_kwargs)))


SMALL = {"channel_base": 128, "channel_max": 8}
FAMILIES = {  # how a file is made, its ending, and the options of export after which it is one of its family again
    "TensorFlow": (tensorflow_file, "pkl", True),
    "rosinality": (rosinality_file, "pt", False),
    "state dict": (state_dict_file, "pt", None),
    "StyleGAN3-r": (stylegan3_file_r, "pkl", True),
    "R3GAN state dict": (r3gan_state_dict_file, "pt", None),
    "torch.save(G)": (module_file, "pt", None),
    "StyleGAN2": (lambda path: path.write_bytes((PICKLES / "plain_t17_p3.pkl").read_bytes()), "pkl", True),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_refined_exported_inspected_and_loaded_again(family, capsys, tmp_path):
    make, ending, like = FAMILIES[family]
    source, out = tmp_path / f"gan.{ending}", tmp_path / f"out.{ending if like is not None else 'safetensors'}"
    make(source)
    before = load_generator(source)
    kwargs = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1}
    T = EDMPrecond(before.img_resolution, before.img_channels, before.c_dim, attn_resolutions=[], **kwargs)
    native.save_networks(tmp_path / "t.safetensors", {"ema": T}, provenance={})
    options = [f"--gan={source}", f"--teacher={tmp_path}/t.safetensors", f"--outdir={tmp_path}/runs", *QUICK]
    code, _, err = run(capsys, "refine", *options)
    assert code == 0, err
    snapshot = only(tmp_path, "runs/*/network-snapshot-*.safetensors")
    after = load_generator(snapshot)
    moved = [name for name, value in before.state_dict().items() if not torch.equal(value, after.state_dict()[name])]
    parts = ("MainLayers.", "AggregationLayer.") if family.startswith("R3GAN") else ("synthesis.", "mapping.")
    assert all(any(name.startswith(part) for name in moved) for part in parts)
    further = [f"--like={source}"] if like else []
    code, text, err = run(capsys, "export", f"--network={snapshot}", f"--out={out}", *further)
    assert code == 0 and text.startswith(f"Wrote {out}"), err
    code, text, err = run(capsys, "inspect", out)
    assert code == 0 and f"{before.img_resolution}×{before.img_resolution}" in text, err
    again = load_generator(out).state_dict()
    # Their numbers are others: the learning rate multiplier is folded in, or 1 is taken off.
    rounded = {"rosinality": lambda name: name.startswith("mapping."), "TensorFlow": lambda name: "affine.b" in name}
    for name, value in after.state_dict().items():
        if rounded.get(family, lambda name: False)(name):
            torch.testing.assert_close(again[name], value, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(again[name], value), name
