"""`python -m refine inspect` on files of other programs."""

import json

import pytest
import torch

from refine.checkpoints import native
from refine.cli.main import run_command
from tests.checkpoints.builders import Format, stylegan2_file, write
from tests.checkpoints.foreign.test_nvidia import golden_network
from tests.checkpoints.rosinality_reference import random_generator
from tests.golden import ROOT

PICKLES = ROOT / "pickles"


def inspect(capsys, path, *options):
    with pytest.raises(SystemExit) as caught:
        run_command("inspect", [str(path), *options])
    out, err = capsys.readouterr()
    of_use = "nothing in it can be used" not in err
    assert caught.value.code == (0 if of_use else 2) and err.count("\n") == (0 if of_use else 1)
    return out


def report(capsys, path):
    return json.loads(inspect(capsys, path, "--json"))


def test_stylegan2(capsys):
    found = report(capsys, PICKLES / "plain_t213_p4.pkl")
    assert found["description"] == "a StyleGAN2 pickle" and found["written_back"] and len(found["sha256"]) == 64
    assert list(found["networks"]) == ["G_ema", "G", "D"]
    G = found["networks"]["G_ema"]
    assert (G["kind"], G["img_resolution"], G["img_channels"], G["classes"]) == ("generator", 16, 3, 3)
    assert G["serves_as"] == (
        "student, with a teacher for 16×16×3 images (or a whole fraction of that size) and 3 classes (or none)"
    )
    assert G["init_kwargs"]["synthesis_kwargs"]["num_fp16_res"] == 4 and G["w_avg_norm"] > 0
    assert found["networks"]["D"]["serves_as"] is None
    assert "serves    as student, with a teacher for 16×16×3 images" in inspect(capsys, PICKLES / "plain_t213_p4.pkl")


def test_teacher_and_tensorflow(capsys):
    ema = report(capsys, PICKLES / "edm_song_ddpmpp_edm_cond_mult222.pkl")["networks"]["ema"]
    assert ema["serves_as"].startswith("teacher, with a student for 8×8×3 images (or a whole multiple of that size)")
    found = report(capsys, PICKLES / "tf04_stylegan2_skip_uncond.pkl")
    assert found["description"] == "a legacy TensorFlow pickle of StyleGAN2"
    assert found["networks"]["G_ema"]["serves_as"].endswith("no classes (or any)")


def test_rosinality_and_notes(capsys, tmp_path):
    torch.save({"g_ema": random_generator(4, 2, 1, 16)}, tmp_path / "x.pt")
    found = report(capsys, tmp_path / "x.pt")
    assert found["description"] == "a rosinality-style .pt" and not found["written_back"]
    assert any("no mean of w" in note for note in found["networks"]["G_ema"]["notes"])
    assert "note      " in inspect(capsys, tmp_path / "x.pt")


def test_half_precision_is_told(capsys, tmp_path):
    path = write(tmp_path / "x.pkl", stylegan2_file(Format(dtype=torch.float16), golden_network("g01_skip_uncond")[0]))
    assert report(capsys, path)["networks"]["G_ema"]["dtypes"] == ["float16"]


def test_a_discriminator_of_another_kind(capsys, tmp_path):
    form, G = Format(), golden_network("g01_skip_uncond")[0]
    D = form.persistent("ProjectedDiscriminator", {"_modules": {}})
    path = write(tmp_path / "x.pkl", form.dumps({"G_ema": form.module(G, G.init_kwargs), "D": D}))
    networks = report(capsys, path)["networks"]
    assert networks["G_ema"]["parameters"] > 0 and "ProjectedDiscriminator" in networks["D"]["problem"]
    assert "problem   " in inspect(capsys, path)


def test_what_cannot_be_read(capsys):
    found = report(capsys, PICKLES / "bad_outer_global.pkl")
    assert "posix.mkdir" in found["problem"] and "networks" not in found
    assert "problem     " in inspect(capsys, PICKLES / "bad_outer_global.pkl")


def test_native_networks_say_what_they_serve_as(capsys, tmp_path):
    native.save_networks(tmp_path / "x", {"G_ema": golden_network("g01_skip_uncond")[0]}, provenance={})
    assert report(capsys, tmp_path / "x")["networks"]["G_ema"]["serves_as"].startswith("student")
