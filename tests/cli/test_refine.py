"""`python refine.py`: what a user can get wrong, and a run from the first option to the last file."""

import json
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from refine import load_generator
from refine.checkpoints import registry
from refine.checkpoints.native import save_networks
from refine.cli.main import run_command
from refine.config import OPTIONS
from refine.dnnlib import sha256_of_file
from refine.networks import edm2
from refine.networks.edm import EDMPrecond
from tests.training.test_trainer import make_student, make_teacher


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    save_networks(folder / "gan.safetensors", {"G_ema": make_student()}, provenance={})
    save_networks(folder / "teacher.safetensors", {"ema": make_teacher()}, provenance={})
    save_networks(folder / "teacher16.safetensors", {"ema": make_teacher(3, 16)}, provenance={})
    save_networks(folder / "gan5.safetensors", {"G_ema": make_student(5)}, provenance={})
    (folder / "text.pkl").write_text("these are not the weights you are looking for\n")
    whole = (folder / "gan.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.pkl").touch()
    (folder / "page.pkl").write_text("<!DOCTYPE html><html><body>404</body></html>")
    return folder


def call(capsys, *args):
    """Exit code, stdout and stderr of a command run in this process."""
    with pytest.raises(SystemExit) as stop:
        run_command("refine", [str(arg) for arg in args])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


FAULTS = {
    "a wrong path": (["--gan=nowhere.pkl", "--teacher={}/teacher.safetensors"], "--gan"),
    "a text file": (["--gan={}/text.pkl", "--teacher={}/teacher.safetensors"], "--gan"),
    "a text file as teacher": (["--gan={}/gan.safetensors", "--teacher={}/text.pkl"], "--teacher"),
    "a truncated file": (["--gan={}/truncated.safetensors", "--teacher={}/teacher.safetensors"], "--gan"),
    "an empty file": (["--gan={}/empty.pkl", "--teacher={}/teacher.safetensors"], "--gan"),
    "an error page": (["--gan={}/page.pkl", "--teacher={}/teacher.safetensors"], "HTML"),
    "a folder": (["--gan={}", "--teacher={}/teacher.safetensors"], "--gan"),
    "a teacher as the GAN": (["--gan={}/teacher.safetensors", "--teacher={}/teacher.safetensors"], "--gan"),
    "a GAN as the teacher": (["--gan={}/gan.safetensors", "--teacher={}/gan.safetensors"], "--teacher"),
    "another resolution": (["--gan={}/gan.safetensors", "--teacher={}/teacher16.safetensors"], "img_resolution 8"),
    "another number of classes": (["--gan={}/gan5.safetensors", "--teacher={}/teacher.safetensors"], "classes 5"),
    "an unknown option": (["--gan={}/gan.safetensors", "--teacher={}/teacher.safetensors", "--magic=1"], "--magic"),
    "a negative batch": (["--gan={}/gan.safetensors", "--teacher={}/teacher.safetensors", "--batch=-4"], "--batch"),
    "an unknown preset": (["--gan={}/gan.safetensors", "--preset=fast"], "--preset"),
    "a word for a number": (["--gan={}/gan.safetensors", "--teacher={}/teacher.safetensors", "--kimg=many"], "--kimg"),
    "no teacher": (["--gan={}/gan.safetensors"], "--teacher is missing"),
    "no GAN": (["--teacher={}/teacher.safetensors"], "--gan is missing"),
    "an impossible law": (
        ["--gan={}/gan.safetensors", "--teacher={}/teacher.safetensors", "--sigma=cauchy"],
        "--sigma",
    ),
    "an impossible range": (
        ["--gan={}/gan.safetensors", "--teacher={}/teacher.safetensors", "--sigma-range=5,1"],
        "--sigma",
    ),
    "an unknown weighting": (
        ["--gan={}/gan.safetensors", "--teacher={}/teacher.safetensors", "--weighting=x"],
        "--weighting",
    ),
    "an unknown objective": (
        ["--gan={}/gan.safetensors", "--teacher={}/teacher.safetensors", "--objective=kl"],
        "--objective: unknown objective 'kl'; expected one of ikl, dmd, sid, sim",
    ),
    "the normaliser as a weighting": (
        ["--gan={}/gan.safetensors", "--teacher={}/teacher.safetensors", "--weighting=dmd"],
        "--objective=dmd",
    ),
    "a prior that is no list": (
        ["--gan={}/gan.safetensors", "--teacher={}/teacher.safetensors", "--label-dist=often"],
        "--label-dist",
    ),
    "a prior of other classes": (
        ["--gan={}/gan.safetensors", "--teacher={}/teacher.safetensors", "--label-dist=[1,2]"],
        "--label-dist has 2 numbers",
    ),
    "guidance without a null label": (
        ["--gan={}/gan.safetensors", "--teacher={}/teacher.safetensors", "--guidance=2"],
        "--guidance",
    ),
    "a function that is not there": (["--gan=json:nothing", "--teacher={}/teacher.safetensors"], "no function nothing"),
    "an impossible sigma_init": (
        ["--gan=one-step", "--teacher={}/teacher.safetensors", "--sigma-init=-1"],
        "--sigma-init",
    ),
    "an unknown metric": (
        ["--gan={}/gan.safetensors", "--teacher={}/teacher.safetensors", "--metrics=fid50k_half", "--ref=x.npz"],
        "--metrics",
    ),
    "a missing reference": (
        ["--gan={}/gan.safetensors", "--teacher={}/teacher.safetensors", "--metrics=fd2k-digits", "--ref=none"],
        "--ref",
    ),
    "real images for nobody": (
        ["--gan={}/gan.safetensors", "--teacher={}/teacher.safetensors", "--data={}", "--adversarial=0"],
        "add --adversarial",
    ),
    "real images that are not there": (
        ["--gan={}/gan.safetensors", "--teacher={}/teacher.safetensors", "--adversarial=1", "--data={}/nothing"],
        "--data",
    ),
    "real images from a device that never ends": (
        ["--gan={}/gan.safetensors", "--teacher={}/teacher.safetensors", "--data=/dev/zero"],
        "--data: /dev/zero is not a regular file",
    ),
    "real images from a URL": (
        ["--gan={}/gan.safetensors", "--teacher={}/teacher.safetensors", "--data=https://example.invalid/a.zip"],
        "--data: found 'https://example.invalid/a.zip'",
    ),
    "real images from nowhere": (
        ["--gan={}/gan.safetensors", "--teacher={}/teacher.safetensors", "--data="],
        "--data: found ''",
    ),
    "a bank beyond all seeds": (
        ["--gan={}/gan.safetensors", "--teacher={}/teacher.safetensors", "--bank=1000000000000"],
        "--bank is 1000000000000; expected a whole number, 2 to",
    ),
    "a metric beyond all seeds": (
        ["--gan={}/gan.safetensors", "--teacher={}/teacher.safetensors", "--metrics=fd1000000000k-teacher"],
        "--metrics: fd1000000000k-teacher measures 1000000000000 images; expected at most",
    ),
    "a folder without real images": (
        ["--gan={}/gan.safetensors", "--teacher={}/teacher.safetensors", "--adversarial=1", "--data={}"],
        "--data",
    ),
    "an absent device": (
        ["--gan={}/gan.safetensors", "--teacher={}/teacher.safetensors", "--device=cuda:77"],
        "--device",
    ),
    "nothing to resume": (["--resume=latest"], "--resume"),
    "resume with other options": (["--resume=latest", "--lr=1"], "--resume"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_line_and_leave_nothing(files, tmp_path, capsys, fault):
    args, word = FAULTS[fault]
    outdir = tmp_path / "out"
    code, out, err = call(capsys, *(arg.format(files) for arg in args), f"--outdir={outdir}")
    assert code != 0
    assert len(err.strip().splitlines()) == 1 and err.startswith("Error: "), err
    assert word in err and "Traceback" not in err
    assert out == ""
    assert not outdir.exists()


@pytest.mark.parametrize(
    "fault", ["a teacher as the GAN", "a GAN as the teacher", "another resolution", "another number of classes"]
)
def test_a_pair_that_does_not_fit_is_refused_before_a_network_is_built(files, tmp_path, capsys, fault, monkeypatch):
    built, build = [], registry.build_empty
    monkeypatch.setattr(registry, "build_empty", lambda *args: built.append(args[0]) or build(*args))
    args, word = FAULTS[fault]
    code, _, err = call(capsys, *(arg.format(files) for arg in args), f"--outdir={tmp_path / 'out'}")
    assert code != 0 and word in err and built == []
    pair = (f"--gan={files}/gan.safetensors", f"--teacher={files}/teacher.safetensors")
    assert call(capsys, *pair, "--metrics=none", "--adversarial=0", "--dry-run", f"--outdir={tmp_path / 'out'}")[0] == 0
    assert built == ["stylegan2.Generator", "edm.EDMPrecond"]  # so the count counts


@pytest.mark.parametrize("place", ["file", "below a file", "read-only"])
def test_outdir_that_cannot_be_written(files, tmp_path, capsys, place):
    (tmp_path / "file").touch()
    outdir = {"file": tmp_path / "file", "below a file": tmp_path / "file" / "runs", "read-only": "/proc/runs"}[place]
    pair = (f"--gan={files}/gan.safetensors", f"--teacher={files}/teacher.safetensors")
    code, out, err = call(capsys, *pair, "--metrics=none", "--adversarial=0", f"--outdir={outdir}")
    assert code != 0 and out == ""
    assert len(err.strip().splitlines()) == 1 and err.startswith("Error: ") and "--outdir" in err


def test_dry_run_prints_the_options_and_writes_nothing(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("refine.metrics.references.teacher_bank", lambda *_, **__: pytest.fail("images are drawn"))
    pair = (f"--gan={files}/gan.safetensors", f"--teacher={files}/teacher.safetensors")
    code, out, err = call(capsys, *pair, f"--outdir={tmp_path}/runs", "--batch=4", "-n", "--json")
    assert code == 0 and err == ""
    options = json.loads(out)
    assert "--batch=4" in options["differs"] and options["notes"] == []
    assert options["batch"] == 4 and options["run_dir"].endswith("00000-gan-teacher-batch4")
    assert not (tmp_path / "runs").exists()


def test_a_preset_is_shown(capsys):
    code, out, err = call(capsys, "--preset=DEMO", "--show")
    assert code == 0 and err == "" and "--kimg=6.4  (default: 200.0)" in out.splitlines()
    code, out, err = call(capsys, "--preset=demo", "--show", "--kimg=5")
    assert code == 2 and out == "" and "expected no --kimg beside it" in err


def test_what_has_no_part_in_a_run_is_noted_once(files, tmp_path, capsys):
    pair = (f"--gan={files}/gan.safetensors", f"--teacher={files}/teacher.safetensors", f"--outdir={tmp_path / 'runs'}")
    idle = ("--sigma-init=2.5", "--ema-kimg=9", "--ref=digits-reference", "--precision=fp16")
    code, out, err = call(capsys, *pair, *idle, "--metrics=none", "--adversarial=0", "--dry-run", "--json")
    assert code == 0 and [line.split()[:2] for line in err.splitlines()] == [
        ["note:", "--sigma-init"],
        ["note:", "--ema-kimg"],
        ["note:", "--ref"],
        ["note:", "fp16:"],
    ], err
    assert [f"note: {note}" for note in json.loads(out)["notes"]] == err.splitlines()


def test_an_edm2_teacher(files, tmp_path, capsys):
    teacher = edm2.Precond(8, 1, 3, model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4])
    torch.nn.init.ones_(teacher.unet.out_gain)
    save_networks(tmp_path / "edm2.safetensors", {"ema": teacher}, provenance={})
    pair = (f"--gan={files}/gan.safetensors", f"--teacher={tmp_path}/edm2.safetensors", f"--outdir={tmp_path / 'runs'}")
    options = (
        "--kimg=0.008",
        "--batch=4",
        "--tick=0.004",
        "--snap=1",
        "--lr=0.001",
        "--dropout=true",
        "--metrics=none",
        "--adversarial=0",
    )
    assert call(capsys, *pair, *options)[0] == 0
    G = load_generator(next(tmp_path.glob("runs/*/network-snapshot-*.safetensors")))
    moved = [(a - b).abs().max().item() for a, b in zip(G.parameters(), make_student().parameters(), strict=True)]
    assert max(moved) > 0 and all(torch.isfinite(p).all() for p in G.parameters())


def test_a_run_and_going_on_with_it(files, tmp_path, capsys):
    pair = (f"--gan={files}/gan.safetensors", f"--teacher={files}/teacher.safetensors")
    options = (
        "--kimg=0.016",
        "--batch=4",
        "--tick=0.008",
        "--snap=1",
        "--lr=0.001",
        "--desc=try",
        "--metrics=none",
        "--adversarial=0",
    )
    code, out, err = call(capsys, *pair, *options, f"--outdir={tmp_path}")
    assert code == 0, err
    assert "tick 1" in out and "ETA" in out and "done" in out
    run = tmp_path / "00000-try"
    options = json.loads((run / "training_options.json").read_text())
    assert options["lr"] == 0.001 and set(options["files"]) == {"student", "teacher"}
    assert (run / "log.txt").read_text() in out
    G = load_generator(run / "network-snapshot-000000.016.safetensors")
    assert (G.img_resolution, G.c_dim) == (8, 3)
    code, out, err = call(capsys, f"--resume={run}", f"--outdir={tmp_path / 'elsewhere'}")
    assert code == 0 and err.startswith("note: --outdir has no part in this run"), err
    # A finished run has nothing left to do, and says so without an error.
    code, out, err = call(capsys, "--resume=latest", f"--outdir={tmp_path}")
    assert code == 0, err
    assert "going on at 0.0 of 0.016 kimg" in out and "changed" not in out
    code, out, err = call(
        capsys, "--resume=latest", f"--outdir={tmp_path}", "--keep=3", "--metrics=none", "--adversarial=0"
    )
    assert code == 0, err
    assert out.count("changed") == 1 and "changed     --keep from 2 to 3" in out


def test_a_run_without_a_reference_is_measured_against_its_teacher_and_ends_by_itself(
    files, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("REFINE_CACHE", str(tmp_path / "cache"))
    teacher = tmp_path / "teacher.safetensors"
    shutil.copy(files / "teacher.safetensors", teacher)
    pair = (f"--gan={files}/gan.safetensors", f"--teacher={teacher}", f"--outdir={tmp_path}/runs")
    options = ("--kimg=1", "--batch=4", "--tick=0.004", "--snap=1", "--lr=0", "--desc=try", "--average=ema")
    code, out, err = call(capsys, *pair, *options, "--metrics=fd20-teacher", "--patience=2", "--bank=20")
    assert code == 0, err
    assert "data        data-free: a critic compares the student with 20 images of the teacher\n" in out
    assert "no better fd20-teacher in 2 snapshots: done" in out and out.count("result      ") == 1
    key = f"fd_teacher_{sha256_of_file(teacher)[:8]}-vs-teacher"
    assert f"result      nothing gained: {key} " in out and "keep the generator as it came" in out
    run = tmp_path / "runs" / "00000-try"
    assert (run / "network-snapshot-best.safetensors").exists() and (run / "training-state-000000.012.pt").exists()
    lines = [json.loads(line) for line in (run / "metric-fd20-teacher.jsonl").read_text().splitlines()]
    assert [line["kimg"] for line in lines] == [0.0, 0.004, 0.008, 0.012] and key in lines[0]["results"]
    assert json.loads((run / "training_options.json").read_text())["ref"] == "teacher"
    moved = tmp_path / "moved.safetensors"
    teacher.rename(moved)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher").touch()  # no path: it is the word for --teacher
    code, out, err = call(capsys, "--resume=latest", pair[2], f"--teacher={moved}", "--patience=3", "--kimg=0.016")
    assert code == 0 and "going on at 0.0" in out and "result      nothing gained" in out, err
    code, out, err = call(capsys, "--resume=latest", pair[2], f"--teacher={moved}", "--metrics=none")
    assert code == 0 and "changed     --patience from 3 to 0" in out and "result" not in out, err


def test_a_teacher_that_gives_no_features_names_the_option(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(EDMPrecond, "_ends_of_encoder", lambda self: [])
    pair = (f"--gan={files}/gan.safetensors", f"--teacher={files}/teacher.safetensors")
    code, out, err = call(capsys, *pair, f"--outdir={tmp_path / 'out'}")
    assert code == 2 and out == "" and err.startswith("Error: --metrics: ") and len(err.splitlines()) == 1, err
    assert "no encoder" in err and "--metrics=none" in err and not (tmp_path / "out").exists()


def test_a_gan_from_a_pickle_goes_back_into_a_copy_of_it(root, tmp_path, capsys):
    source = root / "tests" / "golden" / "pickles" / "plain_t213_p4.pkl"
    G = load_generator(source)
    kwargs = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1}
    teacher = EDMPrecond(G.img_resolution, G.img_channels, G.c_dim, **kwargs)
    save_networks(tmp_path / "teacher.safetensors", {"ema": teacher}, provenance={})
    pair = (f"--gan={source}", f"--teacher={tmp_path}/teacher.safetensors", f"--outdir={tmp_path}/runs")
    code, out, err = call(capsys, *pair, "--kimg=0.004", "--batch=2", "--lr=0.001", "--metrics=none", "--adversarial=0")
    assert code == 0, err
    run = next((tmp_path / "runs").iterdir())
    native = load_generator(run / "network-snapshot-000000.safetensors").state_dict()
    pickled = load_generator(run / "network-snapshot-000000.pkl").state_dict()
    assert all(torch.equal(value, pickled[name]) for name, value in native.items())
    moved = [name for name, value in G.state_dict().items() if not torch.equal(value, pickled[name])]
    assert "synthesis.b4.conv1.weight" in moved and "synthesis.b4.conv1.noise_const" not in moved
    assert "container that the GAN came in" in out


def test_help_needs_no_torch():
    code = "import sys, runpy\nsys.argv = ['refine.py', '--help']\n"
    code += "try:\n    runpy.run_path('refine.py', run_name='__main__')\n"
    code += "except SystemExit as stop:\n    assert not stop.code\nassert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "--teacher" in result.stdout and "--gan" in result.stdout


def test_options_of_a_file(files, tmp_path, capsys):
    """A run's training_options.json makes the same run again; the command line takes precedence."""
    pair = (f"--gan={files}/gan.safetensors", f"--teacher={files}/teacher.safetensors")
    quick = ("--kimg=0.008", "--batch=4", "--tick=0.004", "--metrics=none", "--adversarial=0", "--sigma=karras:5")
    assert call(capsys, *pair, *quick, f"--outdir={tmp_path / 'runs'}", "--lr=0.002")[0] == 0
    saved = next(tmp_path.glob("runs/*/training_options.json"))
    code, out, err = call(capsys, f"--config={saved}", "--batch=8", "--dry-run", "--json")
    assert code == 0, err
    first, again = json.loads(saved.read_text()), json.loads(out)
    assert again.pop("batch") == 8 and again["run_dir"] != first["run_dir"]
    for name in OPTIONS.keys() - {"batch", "device"}:
        assert again[name] == first[name], name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "is not an object in JSON"),
        ("{", "is not an object in JSON"),
        ("[" * 100_000, "is not an object in JSON"),
        ('{"lr": 1, "leraning_rate": 2}', "leraning_rate, which is no option"),
        ('{"gan": "g", "teacher": "t", "lr": "x"}', "--lr is x; expected"),
        ('{"gan": "g", "teacher": "t", "sigma": {"P_men": 1}}', "--sigma is"),
        ('{"gan": "g", "teacher": "t", "sigma": 3, "batch": "4"}', "is"),
        ('{"gan": ["g"], "teacher": null, "label_dist": {}, "metrics": 3}', "is"),
        ('{"gan": "payload:main", "teacher": "digits-teacher"}', "--config: the file names payload:main, code"),
        ('{"gan": "digits-gan", "teacher": "http://127.0.0.1:9/x.pkl"}', "the file names http://127.0.0.1:9/x.pkl"),
    ],
)
def test_a_file_of_options_that_cannot_be_used(tmp_path, capsys, text, words):
    (tmp_path / "options.json").write_text(text)
    code, out, err = call(capsys, f"--config={tmp_path / 'options.json'}", f"--outdir={tmp_path / 'runs'}")
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and words in err, err
    assert not (tmp_path / "runs").exists()


def test_the_command_that_a_stopped_run_of_ones_own_code_prints_goes_on(files, tmp_path, capsys, monkeypatch):
    (tmp_path / "my_code.py").write_text(
        "from tests.training.test_trainer import make_student, make_teacher\n"
        "class Own(__import__('torch').nn.Module):\n"
        "    z_dim, c_dim, img_resolution, img_channels = 8, 3, 8, 1\n"
        "    def __init__(self):\n        super().__init__()\n        self.inner = make_student()\n"
        "    def forward(self, z, c):\n"
        "        STOPS.pop(len(z), None) and os.kill(os.getpid(), signal.SIGTERM)\n        return self.inner(z, c)\n"
        "import os, signal\nSTOPS = {4: True}\n"  # at the first batch of the training
    )
    monkeypatch.syspath_prepend(tmp_path)
    pair = ("--gan=my_code:Own", f"--teacher={files}/teacher.safetensors", f"--outdir={tmp_path / 'my runs'}")
    quick = ("--batch=4", "--kimg=0.02", "--tick=0.004", "--metrics=none", "--adversarial=0", "--aux-warmup-kimg=0")
    code, out, err = call(capsys, *pair, *quick)
    assert code == 128 + signal.SIGTERM, err
    command = out.splitlines()[-1].partition("go on with  python refine.py ")[2]
    assert "--gan=my_code:Own" in command
    code, out, err = call(capsys, *shlex.split(command))
    assert code == 0 and "going on at 0.0" in out and "\ndone" in out, err
