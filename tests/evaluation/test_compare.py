"""compare_fid.py: numbers, verdicts, files, and one line for what cannot be compared."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from refine.checkpoints import load_generator
from refine.checkpoints.native import save_networks
from refine.cli.main import run_command
from refine.evaluation import compare as module
from refine.evaluation.compare import compare
from refine.evaluation.teachers import TeacherOptions
from refine.metrics.detectors import load_detector
from refine.metrics.digits import DigitsDetector
from refine.metrics.references import load_reference, save_reference
from refine.metrics.sampling import sample_images
from refine.metrics.statistics import FeatureStatistics
from refine.networks.edm import EDMPrecond
from refine.networks.stylegan2 import Generator

NUM = 20


def small_generator(seed, **kwargs):
    torch.manual_seed(seed)
    options = {"mapping_kwargs": {"num_layers": 1}, "synthesis_kwargs": {"channel_base": 128, "channel_max": 8}}
    return Generator(
        **{"z_dim": 8, "c_dim": 10, "w_dim": 8, "img_resolution": 32, "img_channels": 1, **options, **kwargs}
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths of small networks, a detector and a reference that is close to `good` and far from `bad`."""
    folder = tmp_path_factory.mktemp("compare")
    good, bad = small_generator(0), small_generator(1)
    for name, parameter in bad.named_parameters():
        if name.endswith("torgb.bias"):
            parameter.data += 1.0  # too bright
    networks = {
        "good": good,
        "bad": bad,
        "small": small_generator(2, img_resolution=16),
        "plain": small_generator(3, c_dim=0),
        "rgb": small_generator(4, img_channels=3),
        "large": small_generator(5, img_resolution=64),
    }
    for name, G in networks.items():
        save_networks(folder / f"{name}.safetensors", {"G_ema": G}, provenance={})
    torch.manual_seed(0)
    save_networks(
        folder / "detector.safetensors", {"detector": DigitsDetector(channels=(4, 8, 8), feature_dim=4)}, provenance={}
    )
    teacher = EDMPrecond(
        32,
        1,
        label_dim=10,
        model_type="SongUNet",
        model_channels=8,
        channel_mult=[1],
        num_blocks=1,
        attn_resolutions=[],
    )
    save_networks(folder / "teacher.safetensors", {"ema": teacher}, provenance={})
    for parameter in teacher.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    save_networks(folder / "teacher-2.safetensors", {"ema": teacher}, provenance={})
    detector = load_detector(folder / "detector.safetensors")
    statistics = FeatureStatistics(keep_features=True)
    for images, _ in sample_images(good.eval(), range(10_000, 10_040)):
        statistics.update(detector(images))
    save_reference(folder / "reference.npz", statistics, detector)
    (folder / "text.txt").write_text("hello")
    np.savez(folder / "other.npz", mu=np.zeros(7), sigma=np.eye(7))
    return folder


def arguments(files, before="good", after="bad", **options):
    options = {"ref": "reference.npz", "detector": "detector.safetensors", **options}
    named = {"before": f"{before}.safetensors", "after": f"{after}.safetensors", **options}
    paths = {key: files / value for key, value in named.items() if key in ("before", "after", "ref", "detector")}
    return {**named, **paths}


def run(capsys, **options):
    with pytest.raises(SystemExit) as caught:
        run_command("compare", [f"--{key}={value}" for key, value in options.items()])
    return caught.value.code, *capsys.readouterr()


def test_worse_and_better(files):
    worse = compare(**arguments(files), num=NUM, progress=False)
    better = compare(**arguments(files, "bad", "good"), num=NUM, progress=False)
    assert worse["verdict"] == "worse" and better["verdict"] == "better" and better["metric"] == "fd_digits"
    assert better["before"]["fd_digits"] == worse["after"]["fd_digits"]
    difference = better["difference"]["fd_digits"]
    expected = np.subtract(better["after"]["fd_digits"]["values"], better["before"]["fd_digits"]["values"])
    assert difference["values"] == expected.tolist() and difference["interval"][1] < 0
    assert better["ratio"] == pytest.approx(
        better["after"]["fd_digits"]["mean"] / better["before"]["fd_digits"]["mean"]
    )
    assert better["seeds"] == ["0-19", "20-39", "40-59"]
    assert "better" in better["summary"] and "fell" in better["summary"]
    json.dumps(better)


def test_a_network_equals_itself_exactly(files):
    results = compare(**arguments(files, "good", "good"), num=NUM, progress=False)
    assert results["verdict"] == "not distinguishable" and results["ratio"] == 1
    for name, difference in results["difference"].items():
        assert difference["values"] == [0, 0, 0] and difference["verdict"] == "not distinguishable", name


def test_a_network_equals_itself_also_far_from_the_reference(files):
    assert compare(**arguments(files, "bad", "bad"), num=NUM, progress=False)["verdict"] == "not distinguishable"


def test_labels_on_one_side_only(files, tmp_path):
    results = compare(**arguments(files, "good", "plain"), num=NUM, progress=False, outdir=tmp_path)
    assert "label_accuracy" in results["before"] and "label_accuracy" not in results["difference"]
    assert "fd_digits" in results["difference"] and (tmp_path / "comparison.png").is_file()


def test_teacher_is_sampled_and_compared(files):
    results = compare(**arguments(files, "good", "teacher"), num=4, progress=False)
    assert results["after"]["sampling"] == "18 Heun steps" and results["before"]["sampling"] == "psi 1, noise random"
    assert "CIFAR-10" in results["after"]["sampling_reason"] and "sampling_reason" not in results["before"]
    assert any("--after is sampled with 18 Heun steps" in note for note in results["notes"])
    assert results["after"]["fd_digits"]["mean"] > 0


def test_a_denoiser_that_is_used_once(files):
    """`one-step:FILE` on either side is a generator: no sampler, and as good as the file of one made of it."""
    once = f"one-step:{files / 'teacher.safetensors'}"
    save_networks(files / "once.safetensors", {"G_ema": load_generator(once, sigma_init=4.0)}, provenance={})
    named = {**arguments(files, after="once"), "before": once}
    results = compare(**named, num=4, progress=False, sigma_init=4.0)
    assert "Heun" not in results["before"]["sampling"]
    assert results["before"]["fd_digits"] == results["after"]["fd_digits"]
    assert results["verdict"] == "not distinguishable"
    assert compare(**named, num=4, progress=False, sigma_init=2.0)["ratio"] != 1


def test_a_guided_teacher_has_its_column(files, tmp_path):
    """The column is what the guided teacher draws, and its guidance is told."""
    found = {}
    for guidance in (1.0, 3.0):
        guide = files / "teacher-2.safetensors"
        teachers = TeacherOptions(str(guide), guidance, None) if guidance != 1 else None
        named = {**arguments(files), "teacher": files / "teacher.safetensors"}
        more = {"teachers": teachers} if teachers else {}
        found[guidance] = compare(**named, **more, num=4, progress=False, outdir=tmp_path / str(guidance))
    plain, guided = (found[guidance]["teacher"] for guidance in (1.0, 3.0))
    assert plain["fd_digits"]["mean"] != guided["fd_digits"]["mean"]
    assert "3" in guided["sampling"] and "guid" in guided["sampling"] and "guid" not in plain["sampling"]
    assert found[1.0]["before"]["fd_digits"] == found[3.0]["before"]["fd_digits"]


def test_files_of_a_comparison(files, tmp_path, capsys):
    code, out, err = run(capsys, **arguments(files), num=NUM, seeds="0,1,5", outdir=tmp_path / "a" / "b")
    assert code == 0 and "img/s" in err, f"progress belongs on stderr: {err}"
    assert "note: 20 images per seed range are few" in err
    header, *rows = out.splitlines()
    assert header.split() == ["before", "after", "difference"] and rows[0].startswith("fd_digits ")
    assert "not FID" in out and "FID" not in out.replace("not FID", "")
    assert "worse" in out and "Report: " in out
    folder = tmp_path / "a" / "b"
    names = ["comparison.json", "comparison.png", "diversity.png", "report.html"]
    assert sorted(path.name for path in folder.iterdir()) == names
    results = json.loads((folder / "comparison.json").read_text())
    assert results["seeds"] == ["0-19", "20-39", "100-119"]
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and str(files) not in page and str(tmp_path) not in page
    assert results["summary"] in page.replace("&gt;", ">") and "This is not FID" in page
    with Image.open(folder / "comparison.png") as picture:
        assert picture.width == 2 * 640 + 3 * 16


def test_json_on_stdout(files, capsys):
    code, out, _ = run(capsys, **arguments(files), num=NUM)
    text_lines = out.splitlines()
    with pytest.raises(SystemExit) as caught:
        run_command("compare", [f"--{k}={v}" for k, v in arguments(files).items()] + [f"--num={NUM}", "--json"])
    results = json.loads(capsys.readouterr().out)
    assert code == caught.value.code == 0
    mean = results["before"]["fd_digits"]["mean"]
    assert any(line.startswith("fd_digits") and f"{mean:.3g}"[:3] in line for line in text_lines)
    assert {"fd_digits", "kid_digits", "precision", "recall", "label_accuracy"} <= set(results["difference"])


def test_reference_without_features(files, tmp_path):
    reference = load_reference(files / "reference.npz")
    np.savez(tmp_path / "plain.npz", mu=reference.mu, sigma=reference.sigma)
    results = compare(
        **{**arguments(files), "ref": tmp_path / "plain.npz"}, num=NUM, progress=False, outdir=tmp_path / "out"
    )
    assert "recall" not in results["difference"] and (tmp_path / "out" / "report.html").is_file()


def test_a_run_folder_is_a_curve(files, tmp_path, capsys):
    run_folder = tmp_path / "00000-run"
    run_folder.mkdir()
    for number, name in (("000000", "bad"), ("000000.320", "good"), ("000010", "plain"), ("best", "good")):
        network = (files / f"{name}.safetensors").read_bytes()
        (run_folder / f"network-snapshot-{number}.safetensors").write_bytes(network)
    results = compare(
        **{**arguments(files, "bad"), "after": run_folder}, num=NUM, progress=False, outdir=tmp_path / "out"
    )
    assert [(point["kimg"], point["judged"]) for point in results["curve"]] == [(0, False), (0.32, True), (10, False)]
    assert results["after"]["name"] == "network-snapshot-000000.320.safetensors" and results["verdict"] == "better"
    judged = (
        "Judged of 00000-run: network-snapshot-000000.320.safetensors (0.32 kimg), the best by the run's own metric."
    )
    assert results["summary"].endswith(judged)
    first, second, _ = results["curve"]
    assert first["fd_digits"] == results["before"]["fd_digits"]
    assert first["difference"]["fd_digits"]["verdict"] == "not distinguishable"
    assert second["fd_digits"] == results["after"]["fd_digits"]
    assert (tmp_path / "out" / "curve.png").is_file() and "The run" in (tmp_path / "out" / "report.html").read_text()
    alone = compare(**{**arguments(files, "bad"), "after": run_folder}, num=4, progress=False, curve=False)
    assert "curve" not in alone and alone["summary"].endswith(judged)
    assert alone["after"]["name"] == results["after"]["name"]
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"--after: .*nothing holds no network-snapshot"):
        compare(**{**arguments(files), "after": tmp_path / "nothing"}, num=NUM, progress=False)


def test_reference_of_images_shows_the_nearest(files, tmp_path, monkeypatch):
    monkeypatch.setenv("REFINE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "real").mkdir()
    for index in range(12):
        noise = np.random.RandomState(index).randint(0, 256, [32, 32], dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "real" / f"{index}.png")
    options = {**arguments(files), "ref": tmp_path / "real", "also": ["is", "fdinf"]}
    results = compare(**options, num=NUM, progress=False, outdir=tmp_path / "out")
    assert {"is_digits", "fdinf_digits", "recall"} <= set(results["difference"])
    assert "is_digits_std" in results["before"] and "is_digits_std" not in results["difference"]
    assert results["difference"]["spread"]["verdict"] in ("lower", "higher", "not distinguishable")
    assert results["difference"]["fd_digits"]["method"] == "the wider of both"
    assert results["difference"]["recall"]["method"] == "Student"
    assert results["reference"]["form"] == "folder of images" and results["reference"]["num"] == 12
    assert (tmp_path / "out" / "nearest.png").is_file()
    with pytest.raises(ValueError, match="--also: x is unknown"):
        compare(**{**options, "also": ["x"]}, num=NUM, progress=False)


def test_the_reference_decides_the_detector_where_it_can(files, tmp_path, monkeypatch, capsys):
    """Statistics name their detector; images, networks and other people's statistics do not."""
    shipped = {"before": files / "good.safetensors", "after": files / "bad.safetensors", "ref": "digits-reference"}
    results = compare(**shipped, num=4, progress=False)
    assert results["detector"]["name"] == "digits" and results["detector"]["resize"].startswith("none: 32x32 grey")
    for ref, why in (
        ("good.safetensors", "is images or a network, which name none"),
        ("teacher.safetensors", "is images or a network"),
        ("other.npz", "does not say what it was made with"),
        ("reference.npz", "was made with the detector digits, and none of that name fits .*4 features"),
    ):
        code, out, err = run(capsys, **{**shipped, "ref": files / ref}, num=4)
        assert code == 2 and out == "" and len(err.splitlines()) == 1
        assert re.search(f"--detector is missing.*{why}", err), err
        assert "none of that name fits" in err or "one of the names digits, inception-2015-12-05" in err
    reference = load_reference(files / "reference.npz")
    for name in ("http://127.0.0.1:9/detector.pt", str(files / "detector.safetensors"), "../x", "\x1b[31m"):
        np.savez(tmp_path / "theirs.npz", mu=reference.mu, sigma=reference.sigma, detector=np.str_(name))
        code, out, err = run(capsys, **{**shipped, "ref": tmp_path / "theirs.npz"}, num=4)
        assert code == 2 and "none of that name fits (it is a file's)" in err and "\x1b" not in err
    code, _, err = run(capsys, **{**shipped, "ref": files / "text.txt"}, num=4)
    assert code == 2 and "--ref: " in err


def test_larger_images_are_reduced_and_that_is_said(files, tmp_path, capsys):
    options = {**arguments(files, "large", "large"), "num": 4, "outdir": tmp_path / "out"}
    code, _, err = run(capsys, **options)
    said = "64x64 images are reduced to 32x32 (Lanczos)"
    assert code == 0 and f"note: the detector digits: {said}" in err
    results = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert said in results["detector"]["image_note"] and any(said in note for note in results["notes"])
    assert said in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"before": "missing.safetensors"}, "--before: .*missing.safetensors"),
        ({"after": "text.txt"}, "--after: .*text.txt"),
        ({"before": "detector.safetensors"}, "--before: .*expected a generator"),
        ({"ref": "text.txt"}, "--ref: .*text.txt"),
        ({"ref": "other.npz"}, "--ref: other.npz holds statistics of 7 features"),
        ({"detector": "good.safetensors"}, "--detector: .*expected a detector"),
        ({"detector": "nosuch"}, "--detector: .*nosuch"),
        (
            {"after": "small.safetensors"},
            r"--after: its images are \[1, 16, 16\], but those of --before are \[1, 32, 32\]",
        ),
        ({"before": "small.safetensors", "after": "small.safetensors"}, "--detector: .*expected uint8"),
        (
            {"before": "rgb.safetensors", "after": "rgb.safetensors"},
            r"--detector: .*shape \[2, 3, 32, 32\].*grey digits",
        ),
        ({"teacher": "good.safetensors"}, "--teacher: .*expected a teacher"),
        ({"teacher": "missing.safetensors"}, "--teacher: .*missing"),
        ({"data": "text.txt"}, "--data: "),
        ({"data": "missing"}, "--data: "),
        ({"steps": "20"}, "--steps is for diffusion models, and there is none here"),
        ({"teacher": "teacher.safetensors", "steps": "0"}, "--steps is 0; expected a whole number"),
        ({"teacher": "teacher.safetensors", "S_churn": "-1"}, "--s-churn is -1; expected"),
        ({"num": "-3"}, "'--num'.*-3"),
        ({"num": "many"}, "'--num'"),
        ({"seeds": "0,1"}, "--seeds is 0,1; expected at least 3"),
        ({"seeds": "0,0,1"}, "--seeds is 0,0,1"),
        ({"seeds": "x"}, "--seeds: .*not a list of numbers"),
        ({"seeds": "0,1,999999999"}, "--seeds is 0,1,999999999; expected ranges"),
        ({"device": "cuda:99"}, "--device: "),
        ({"device": "toaster"}, "--device: found 'toaster'"),
        ({"outdir": "text.txt/x"}, "--outdir: .*is a file"),
    ],
)
def test_bad_input_is_one_line(files, capsys, change, message):
    before = sorted(files.iterdir())
    options = {**arguments(files), "num": NUM}
    for key, value in change.items():
        names = ("before", "after", "ref", "detector", "outdir", "teacher", "data")
        in_folder = key in names and value != "nosuch"
        options[key] = files / value if in_folder else value
    code, out, err = run(capsys, **options)
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and err.startswith("Error: ")
    assert re.search(message, err), err
    assert sorted(files.iterdir()) == before


def test_missing_options_and_script(root):
    result = subprocess.run(
        [sys.executable, "compare_fid.py", "--before=x"], cwd=root, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr and "--after" in result.stderr


def test_nothing_is_written_when_sampling_fails(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        module.Side, "sample", lambda *_, **__: (_ for _ in ()).throw(ValueError("the network gave NaN"))
    )
    code, _, err = run(capsys, **arguments(files), num=NUM, outdir=tmp_path / "out")
    assert code == 2 and "Error: --before: the network gave NaN" in err and not (tmp_path / "out").exists()
