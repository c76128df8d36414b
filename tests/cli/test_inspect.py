import hashlib
import json
import zipfile

import numpy as np
import pytest
import torch

from refine.checkpoints import native
from refine.cli.main import run_command
from refine.images import png_bytes
from refine.networks.edm import EDMPrecond
from refine.networks.stylegan2 import Generator


@pytest.fixture
def file(tmp_path):
    mapping, synthesis = {"num_layers": 1}, {"channel_base": 32, "channel_max": 4}
    G = Generator(4, 3, 4, 8, 1, mapping_kwargs=mapping, synthesis_kwargs=synthesis)
    G.mapping.w_avg[:2] = 3.0
    T = EDMPrecond(
        img_resolution=8, img_channels=2, model_channels=8, channel_mult=[1], num_blocks=1, model_type="SongUNet"
    )
    path = tmp_path / "net.safetensors"
    native.save_networks(path, {"G_ema": G, "ema": T}, provenance={"recipe": "by hand"})
    return path, G, T


def run(capsys, *args) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        run_command("inspect", [str(arg) for arg in args])
    return caught.value.code, *capsys.readouterr()


def test_json(capsys, file):
    path, G, T = file
    code, out, err = run(capsys, path, "--json")
    report = json.loads(out)
    assert code == 0 and err == "" and report["kind"] == "native" and report["bytes"] == path.stat().st_size
    assert report["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert report["provenance"] == {"recipe": "by hand"}
    g, t = report["networks"]["G_ema"], report["networks"]["ema"]
    assert (g["class"], g["kind"], g["img_resolution"], g["img_channels"], g["classes"]) == (
        "stylegan2.Generator", "generator", 8, 1, 3,
    )  # fmt: skip
    assert (t["class"], t["kind"], t["img_channels"], t["classes"]) == ("edm.EDMPrecond", "teacher", 2, 0)
    assert g["parameters"] == sum(p.numel() for p in G.parameters()) and g["init_kwargs"] == G.init_kwargs
    assert t["buffers"] == sum(b.numel() for b in T.buffers()) and t["dtypes"] == ["float32"]
    assert g["w_avg_norm"] == pytest.approx(18**0.5) and "w_avg_norm" not in t and g["non_finite"] == 0


def test_json_has_no_numbers_that_json_lacks(capsys, tmp_path):
    G = Generator(4, 0, 4, 8, 1, {"num_layers": 1}, {"channel_base": 32, "channel_max": 4})
    G.mapping.w_avg[0] = float("nan")
    T = EDMPrecond(8, 1, sigma_max=float("inf"), model_channels=8, channel_mult=[1], num_blocks=1)
    native.save_networks(tmp_path / "x", {"G": G, "ema": T}, provenance={})
    networks = json.loads(run(capsys, tmp_path / "x", "--json")[1], parse_constant=pytest.fail)["networks"]
    assert networks["G"]["w_avg_norm"] == "nan" and networks["ema"]["init_kwargs"]["sigma_max"] == "inf"


def test_text(capsys, file):
    path, G, _ = file
    code, out, _ = run(capsys, path)
    assert code == 0 and "G_ema       generator, stylegan2.Generator 8×8×1, 3 classes" in out
    assert "ema         teacher, edm.EDMPrecond 8×8×2\n" in out and "recipe=by hand" in out and "WARNING" not in out
    G.mapping.w_avg[0] = float("nan")
    native.save_networks(path, {"G": G}, provenance={})
    assert "WARNING   1 values are NaN or infinite" in run(capsys, path)[1]


def test_other_files(capsys, tmp_path):
    (tmp_path / "x.pkl").write_text("<html></html>")
    code, out, err = run(capsys, tmp_path / "x.pkl")
    assert code == 2 and "an HTML page" in out
    assert err.count("\n") == 1 and "nothing in it can be used; it is an HTML page" in err
    assert json.loads(run(capsys, tmp_path / "x.pkl", "--json")[1])["kind"] == "html"


def test_failures(capsys, file):
    path = file[0]
    code, out, err = run(capsys, "nothing.pkl")
    assert (code, out, err) == (2, "", "Error: nothing.pkl: no such file\n")
    path.write_bytes(path.read_bytes()[:-1])
    code, out, _ = run(capsys, path)
    assert code == 2 and "cut off" in out  # what it is can be told: a broken file


def test_what_is_no_network_may_be_of_use(capsys, tmp_path, root):
    code, out, err = run(capsys, root / "pretrained/digits-reference.npz")
    assert (code, err) == (0, "") and "statistics of images, as --ref, 5,000 of them" in out and "problem" not in out
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for index in range(2):
            archive.writestr(f"{index}.png", png_bytes(torch.zeros(1, 4, 4)))
    assert json.loads(run(capsys, tmp_path / "x.zip", "--json")[1])["use"] == "a set of 2 images, as --data or --ref"
    with zipfile.ZipFile(tmp_path / "y.zip", "w") as archive:
        archive.writestr("x.txt", "hello")
    code, _, err = run(capsys, tmp_path / "y.zip")
    assert code == 2 and err.count("\n") == 1 and "nothing in it can be used" in err
    np.savez(tmp_path / "z.npz", a=np.zeros(3, dtype=np.int64))
    code, out, err = run(capsys, tmp_path / "z.npz", "--json")
    assert code == 2 and "problem" in json.loads(out) and err.count("\n") == 1
