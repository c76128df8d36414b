"""generate.py: the images that were asked for, and one line for what cannot be made."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from refine.checkpoints import load_generator
from refine.checkpoints.native import save_networks
from refine.cli.main import run_command
from refine.cli.options import parse_ints
from refine.evaluation.generate import folder_and_grid
from refine.images import to_uint8
from refine.metrics.image_sets import ImageSet
from refine.metrics.sampling import latents_of_seeds
from refine.networks.edm import EDMPrecond
from refine.networks.stylegan2 import Generator


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    torch.manual_seed(0)
    options = {"mapping_kwargs": {"num_layers": 1}, "synthesis_kwargs": {"channel_base": 64, "channel_max": 8}}
    for name, c_dim, channels in (("labels", 10, 1), ("rgb", 0, 3)):
        G = Generator(z_dim=8, c_dim=c_dim, w_dim=8, img_resolution=16, img_channels=channels, **options)
        save_networks(folder / f"{name}.safetensors", {"G_ema": G}, provenance={})
    teacher = EDMPrecond(16, 1, label_dim=3, model_type="SongUNet", model_channels=8, channel_mult=[1], num_blocks=1)
    save_networks(folder / "teacher.safetensors", {"ema": teacher}, provenance={})
    (folder / "text.txt").write_text("hello")
    return folder


def run(capsys, *args):
    with pytest.raises(SystemExit) as caught:
        run_command("generate", args)
    return caught.value.code, *capsys.readouterr()


def read(path):
    with Image.open(path) as file:
        return np.asarray(file)


def test_images_are_those_of_the_seeds(files, tmp_path, capsys):
    out = tmp_path / "out"
    code, stdout, _ = run(
        capsys, f"--network={files}/labels.safetensors", "--seeds=0-2,40", f"--outdir={out}", "--class=3"
    )
    assert code == 0 and stdout.startswith("4 images")
    names = ["seed0000.png", "seed0001.png", "seed0002.png", "seed0040.png"]
    assert sorted(path.name for path in out.iterdir()) == names == ImageSet(out).names
    z, _ = latents_of_seeds([40], [8])
    with torch.no_grad():
        expected = load_generator(files / "labels.safetensors")(z, torch.eye(10)[[3]], noise_mode="const")
    difference = read(out / "seed0040.png").astype(int) - to_uint8(expected)[0, 0].numpy()
    assert abs(difference).max() <= 1  # another memory layout may round across a level
    assert np.array_equal(read(tmp_path / "out-grid.png")[16:, 16:], read(out / "seed0040.png"))


def test_batch_size_does_not_matter_and_class_does(files, tmp_path, capsys):
    for name, more in (("a", ["--batch=1"]), ("b", ["--batch=3"]), ("c", ["--class=1"]), ("d", ["--class=2"])):
        assert (
            run(capsys, f"--network={files}/labels.safetensors", "--seeds=0-3", f"--outdir={tmp_path / name}", *more)[0]
            == 0
        )
    images = {name: read(tmp_path / f"{name}-grid.png").astype(int) for name in "abcd"}
    assert abs(images["a"] - images["b"]).max() <= 1 and abs(images["c"] - images["d"]).max() > 1


def test_rgb_and_teacher(files, tmp_path, capsys):
    assert run(capsys, f"--network={files}/rgb.safetensors", "--seeds=7", f"--outdir={tmp_path / 'rgb'}")[0] == 0
    assert read(tmp_path / "rgb" / "seed0007.png").shape == (16, 16, 3)
    assert (
        run(capsys, f"--network={files}/teacher.safetensors", "--seeds=1-2", f"--outdir={tmp_path / 't'}", "--class=2")[
            0
        ]
        == 0
    )
    assert read(tmp_path / "t" / "seed0002.png").shape == (16, 16)


def test_a_denoiser_that_is_used_once(files, tmp_path, capsys):
    """Its images are those of D(sigma · z; sigma), and a noise level of another is another generator."""
    once = f"one-step:{files}/teacher.safetensors"
    for name, more in (("a", ["--sigma-init=4"]), ("b", ["--sigma-init=9"])):
        out = tmp_path / name
        assert run(capsys, f"--network={once}", "--seeds=3", f"--outdir={out}", "--class=2", *more)[0] == 0
    G = load_generator(once, sigma_init=4.0)
    images = to_uint8(G(latents_of_seeds([3], [G.z_dim])[0], torch.eye(3)[2:]))
    assert np.abs(read(tmp_path / "a/seed0003.png").astype(int) - images[0, 0].numpy()).max() <= 1
    assert not np.array_equal(read(tmp_path / "a/seed0003.png"), read(tmp_path / "b/seed0003.png"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"network": "missing.safetensors"}, "--network: .*missing.safetensors"),
        ({"network": "text.txt"}, "--network: .*text.txt"),
        ({"network": "rgb.safetensors", "class": "1"}, "--class: .*unconditional"),
        ({"class": "10"}, "--class: class 10 .*0 to 9"),
        ({"class": "-1"}, "'--class'"),
        ({"seeds": "3-1"}, "--seeds: '3-1' is not a list"),
        ({"seeds": ""}, "--seeds: "),
        ({"seeds": "-1"}, "--seeds: "),
        ({"seeds": "0-99999999999"}, "--seeds: .*more than"),
        ({"seeds": "4294967296"}, "--seeds: 4294967296 is too large"),
        ({"outdir": "text.txt"}, "--outdir: .*is a file"),
        ({"outdir": "x" * 255}, "--outdir: .*-grid.png: File name too long"),
        ({"network": "x" * 256}, "--network: .*x: File name too long"),
        ({"batch": "0"}, "'--batch'"),
        ({"noise-mode": "loud"}, "'--noise-mode'"),
    ],
)
def test_bad_input_is_one_line(files, tmp_path, capsys, change, message):
    options = {"network": files / "labels.safetensors", "seeds": "0-1", "outdir": tmp_path / "out"}
    for key, value in change.items():
        options[key] = files / value if key in ("network", "outdir") else value
    code, out, err = run(capsys, *(f"--{key}={value}" for key, value in options.items()))
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and re.search(f"^Error: .*{message}", err), err
    assert not (tmp_path / "out").exists()


def test_parse_ints():
    assert parse_ints("0-3, 7,2") == [0, 1, 2, 3, 7]
    assert parse_ints("5") == [5]
    for text in ("", "a", "1-", "-1", "2-1", "1,,2", "1.5", "²"):
        with pytest.raises(ValueError, match="not a list of numbers"):
            parse_ints(text)


def test_a_run_folder_gives_its_best_snapshot(files, tmp_path, capsys):
    run_folder = tmp_path / "00000-run"
    run_folder.mkdir()
    for number, name in (("000001", "rgb"), ("000002", "labels"), ("best", "rgb")):
        (run_folder / f"network-snapshot-{number}.safetensors").write_bytes(
            (files / f"{name}.safetensors").read_bytes()
        )
    code, _, err = run(capsys, f"--network={run_folder}", "--seeds=7", f"--outdir={tmp_path / 'out'}")
    assert code == 0 and "note: Taken from 00000-run: network-snapshot-000001.safetensors (1 kimg), the best" in err
    assert read(tmp_path / "out" / "seed0007.png").shape == (16, 16, 3)
    for command, args in (("inspect", [str(run_folder)]), ("export", [f"--network={run_folder}"])):
        more = [f"--out={tmp_path / 'x.safetensors'}"] if command == "export" else ["--json"]
        with pytest.raises(SystemExit) as caught:
            run_command(command, [*args, *more])
        out, err = capsys.readouterr()
        assert caught.value.code == 0 and "note: Taken from 00000-run: network-snapshot-000001" in err
        assert command == "export" or json.loads(out)["path"].endswith("network-snapshot-000001.safetensors")
    assert load_generator(tmp_path / "x.safetensors").img_channels == 3
    (tmp_path / "empty").mkdir()
    code, out, err = run(capsys, f"--network={tmp_path / 'empty'}", "--seeds=7", f"--outdir={tmp_path / 'no'}")
    assert code == 2 and "--network: " in err and "holds no network-snapshot" in err and len(err.splitlines()) == 1


def test_the_sampler_of_a_diffusion_model(files, tmp_path, capsys):
    network, images = f"--network={files}/teacher.safetensors", {}
    spellings = {"usual": [], "steps": ["--steps=3"], "churn": ["--S_churn=30", "--steps=3", "--S_noise=1.1"]}
    spellings["ours"] = ["--s-churn=30", "--steps=3", "--s-noise=1.1"]
    spellings["range"] = ["--steps=3", "--sigma_max=20", "--sigma-min=0.01", "--rho=5"]
    for name, given in spellings.items():
        code, _, err = run(capsys, network, "--seeds=1", f"--outdir={tmp_path / name}", *given)
        assert code == 0 and "note: teacher.safetensors is sampled with" in err
        assert "18 Heun steps, as published" in err if not given else "as asked for, the rest as published" in err
        images[name] = read(tmp_path / name / "seed0001.png").astype(int)
    assert np.array_equal(images["churn"], images["ours"])
    assert all(abs(images["steps"] - images[name]).max() > 1 for name in ("churn", "range"))
    code, _, err = run(
        capsys, f"--network={files}/rgb.safetensors", "--steps=3", "--seeds=1", f"--outdir={tmp_path / 'no'}"
    )
    assert code == 2 and "--steps is for diffusion models" in err and not (tmp_path / "no").exists()


def test_the_grid_is_named_as_the_folder_is(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert folder_and_grid("out") == (Path("out"), Path("out-grid.png"))
    assert folder_and_grid("../a/b")[1] == Path("../a/b-grid.png")
    assert folder_and_grid(".")[1] == tmp_path / "here-grid.png"
    assert folder_and_grid(tmp_path / "out")[1] == tmp_path / "out-grid.png"
