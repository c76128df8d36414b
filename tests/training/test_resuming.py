"""What a training state may bring about, and what may stand beside --resume."""

import json
import shutil

import pytest
import torch

from refine.checkpoints.native import save_networks
from refine.checkpoints.sources import fetch
from refine.checkpoints.sources.reach import reach_of
from refine.cli.main import run_command
from refine.training.best import mend_best
from refine.training.finding import training_states
from refine.training.run_dir import RunDir
from refine.training.state import load_training_state
from tests.cli.test_refine import call
from tests.training.test_monitor import read
from tests.training.test_trainer import make_student, make_teacher

RUN = (
    "--kimg=0.008",
    "--batch=4",
    "--tick=0.004",
    "--snap=1",
    "--lr=0.001",
    "--desc=x",
    "--device=cpu",
    "--metrics=none",
    "--adversarial=0",
)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A folder with a finished run beside its files."""
    folder = tmp_path_factory.mktemp("first")
    save_networks(folder / "gan.safetensors", {"G_ema": make_student()}, provenance={})
    save_networks(folder / "teacher.safetensors", {"ema": make_teacher()}, provenance={})
    with pytest.raises(SystemExit) as caught:
        run_command("refine", [*arguments(folder), "--resume=auto"])
    assert caught.value.code == 0
    return folder


def arguments(folder):
    files = (f"--gan={folder}/gan.safetensors", f"--teacher={folder}/teacher.safetensors")
    return [*files, *RUN, f"--outdir={folder}/out"]


@pytest.fixture
def begun(first, tmp_path):
    """That folder as if the run had been made in `tmp_path`; the arguments that begin it there."""
    shutil.copytree(first, tmp_path, dirs_exist_ok=True)
    run = tmp_path / "out" / "00000-x"
    for path in (run / "training_options.json", run / "log.txt"):
        path.write_text(path.read_text().replace(str(first), str(tmp_path)))
    for path in training_states(run):
        state = load_training_state(path)
        torch.save({**state, "config": state["config"].replace(str(first), str(tmp_path))}, path)
    return arguments(tmp_path)


def change_state(outdir, **options):
    path = training_states(outdir / "00000-x")[0]
    state = load_training_state(path)
    state["config"] = json.dumps({**json.loads(state["config"]), **options})
    torch.save(state, path)
    return path


@pytest.fixture
def no_way_out(monkeypatch, tmp_path):
    """Beside the user lies a module that must not be imported; nothing may be downloaded."""
    (tmp_path / "payload.py").write_text("open('ran', 'w')\ndef main(): raise SystemError\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fetch, "_download", lambda *_: pytest.fail("a download"))
    monkeypatch.setenv("REFINE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"gan": "payload:main"}, "payload:main, code to be imported; give --gan=payload:main again"),
        ({"gan": "payload:main@/etc/passwd"}, "code to be imported; give --gan="),
        ({"gan": "https://example.com/a.pkl"}, "a download; give --gan=https://example.com/a.pkl again"),
        ({"teacher": "https://example.com/a.pkl"}, "a download; give --teacher="),
        ({"gan": "stylegan2-ada-cifar10-cond"}, "a download; give --gan=stylegan2-ada-cifar10-cond again"),
        ({"metrics": ["fd10-https://example.com/d.pt"], "ref": "x.npz"}, "a download; give --metrics="),
        ({"metrics": ["fid10_full"], "ref": "digits-reference"}, "a download; give --metrics=fid10_full again"),
        ({"metrics": ["fd10-{}/program.pt"], "ref": "digits-reference"}, "a program; give --metrics="),
        ({"metrics": ["fd10-digits"], "ref": "http://example.com/r.npz"}, "a download; give --ref="),
    ],
)
def test_a_state_reaches_for_nothing(begun, tmp_path, capsys, no_way_out, options, word):
    torch.jit.script(torch.nn.Flatten()).save(tmp_path / "program.pt")
    if "metrics" in options:
        options = {**options, "metrics": [name.format(tmp_path) for name in options["metrics"]]}
    change_state(tmp_path / "out", **options)
    code, _, err = call(capsys, "--resume=latest", begun[-1])
    assert code == 2 and word in err and len(err.splitlines()) == 1, err
    assert not (tmp_path / "ran").exists()


def test_a_state_cannot_trust_a_detector_in_the_users_place(begun, tmp_path, capsys, no_way_out):
    torch.jit.script(torch.nn.Flatten()).save(tmp_path / "program.pt")
    metric = f"fd10-{tmp_path}/program.pt"
    change_state(tmp_path / "out", metrics=[metric], ref="digits-reference", trust_detector=True)
    code, _, err = call(capsys, "--resume=latest", begun[-1], f"--metrics={metric}")
    assert code == 2 and "can do more than compute" in err and "--trust-detector" in err, err


def test_code_that_is_given_again_is_meant(begun, tmp_path, capsys, no_way_out):
    change_state(tmp_path / "out", gan="payload:main")
    code, _, err = call(capsys, "--resume=latest", begun[-1], "--gan=payload:main")
    assert code == 2 and "payload:main() failed" in err and (tmp_path / "ran").exists()


def test_what_reaches_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert reach_of("digits-gan") is None and reach_of("nothing") is None and reach_of("/nowhere/a.pkl") is None
    assert reach_of("ftp://x/y") == "a download" and reach_of("a.b:c") == "code to be imported"
    (tmp_path / "a:b").symlink_to("nowhere")
    assert reach_of("a:b") == "code to be imported"


@pytest.mark.parametrize(
    "config",
    [
        *(b"x", 7, "[]", "null", "{", json.dumps({"gan": 3}), json.dumps({"lr": "1"})),
        *("[" * 100_000, '{"a":' * 100_000, '{"kimg": ' + "9" * 5000 + "}", '{"metrics": [' + "[]," * 400_000 + "[]]}"),
    ],
    ids=lambda config: str(config)[:20],
)
def test_options_that_are_none_are_one_line(begun, tmp_path, capsys, config):
    path = training_states(tmp_path / "out" / "00000-x")[0]
    torch.save({**load_training_state(path), "config": config}, path)
    code, _, err = call(capsys, "--resume=latest", begun[-1])
    assert code == 2 and len(err.splitlines()) == 1 and err.startswith("Error: --"), err


def test_a_moved_run_goes_on_with_the_same_files_in_their_new_place(begun, tmp_path, capsys):
    new = tmp_path / "new"
    new.mkdir()
    shutil.move(tmp_path / "out" / "00000-x", new / "run")
    for name in ("gan", "teacher"):
        shutil.move(tmp_path / f"{name}.safetensors", new / f"{name}-moved.safetensors")
    code, _, err = call(capsys, f"--resume={new}/run", "--kimg=0.012")
    assert code == 2 and "--gan was" in err and "is not there any more; give --gan where it is now" in err, err
    places = [f"--gan={new}/gan-moved.safetensors", f"--teacher={new}/teacher-moved.safetensors"]
    code, out, err = call(capsys, f"--resume={new}/run", "--kimg=0.012", *places)
    assert code == 0 and "going on at 0.0 of 0.012 kimg" in out, err
    assert load_training_state(training_states(new / "run")[0])["nimg"] == 12


@pytest.mark.parametrize("name", ["gan", "teacher"])
@pytest.mark.parametrize("given", [True, False])
def test_other_files_are_refused(begun, tmp_path, capsys, name, given):
    """Also in the old place, where a file was replaced."""
    network = make_student(seed=7) if name == "gan" else make_teacher(seed=7)
    key = "G_ema" if name == "gan" else "ema"
    path = tmp_path / (f"other-{name}.safetensors" if given else f"{name}.safetensors")
    save_networks(path, {key: network}, provenance={})
    more = [f"--{name}={path}"] if given else []
    code, _, err = call(capsys, "--resume=latest", begun[-1], *more)
    assert code == 2 and f"--{name} has the sha256" in err and "expected the same file" in err, err


def test_a_reference_that_changed_is_refused_unless_it_is_another(begun, tmp_path, capsys):
    from refine.metrics.detectors import load_detector
    from refine.metrics.references import save_reference
    from refine.metrics.statistics import FeatureStatistics

    detector = load_detector(tmp_path / "teacher.safetensors")

    def write(name):
        features = FeatureStatistics(keep_features=True).update(torch.rand(70, detector.feature_dim))
        save_reference(tmp_path / name, features, detector)

    write("ref.npz")
    digits = ["--metrics=fd2-digits", "--ref=digits-reference"]  # which cannot look at images of 8x8
    code, _, err = call(capsys, *begun, *digits, f"--outdir={tmp_path}/other")
    assert code == 2 and "--metrics: the digits detector got uint8 images of shape [2, 1, 8, 8]" in err, err
    assert not (tmp_path / "other").exists()
    metrics = ["--metrics=fd2-teacher", f"--ref={tmp_path}/ref.npz"]
    code, _, err = call(capsys, *begun, "--resume=auto", *metrics, "--kimg=0.012")
    assert code == 0, err
    write("ref.npz")
    code, _, err = call(capsys, "--resume=latest", begun[-1])
    assert code == 2 and "--ref has the sha256" in err, err
    write("new.npz")
    code, _, err = call(capsys, "--resume=latest", begun[-1], f"--ref={tmp_path}/new.npz")
    assert code == 0, err


def test_a_folder_of_images_is_the_reference_of_a_run(begun, tmp_path, capsys, monkeypatch):
    """In the teacher's own features: these networks make images of 8x8."""
    from PIL import Image

    monkeypatch.setenv("REFINE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "real").mkdir()
    for index in range(6):
        Image.new("L", (8, 8), 40 * index).save(tmp_path / "real" / f"{index}.png")
    metrics = ["--metrics=fd2-teacher", f"--ref={tmp_path}/real"]
    code, _, err = call(capsys, *begun, "--resume=auto", *metrics, "--kimg=0.012")
    assert code == 0, err
    lines = (tmp_path / "out" / "00000-x" / "metric-fd2-teacher.jsonl").read_text().splitlines()
    results = json.loads(lines[-1])["results"]
    (key,) = (key for key in results if key.startswith("fd_"))
    assert results[key] > 0 and key.startswith("fd_teacher_") and not key.endswith("-vs-teacher")
    assert [results["reference"][name] for name in ("name", "num", "form")] == ["real", 6, "folder of images"]
    Image.new("L", (8, 8), 255).save(tmp_path / "real" / "6.png")
    code, _, err = call(capsys, "--resume=latest", begun[-1])
    assert code == 2 and "--ref has the sha256" in err, err


def test_one_command_line_begins_goes_on_and_is_finished(begun, tmp_path, capsys):
    code, out, err = call(capsys, *begun, "--resume=auto")
    assert code == 0 and "changed" not in out, err
    assert "finished    all of its 0.008 kimg are done; a larger --kimg would go on" in out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["00000-x"]
    code, _, err = call(capsys, *begun, "--resume=auto", "--batch=8")
    assert code == 2 and "--batch cannot be changed" in err
    code, _, err = call(capsys, *begun, "--resume=auto", "--gan=one-step")
    assert code == 2 and "--gan is one-step, but the run was made with" in err


def test_extending_a_short_run_keeps_what_tensorboard_shows(begun, tmp_path, capsys):
    run = tmp_path / "out" / "00000-x"
    code, _, err = call(capsys, "--resume=latest", begun[-1], "--kimg=0.016")
    assert code == 0, err
    assert [event.step for event in read(run).Scalars("Loss/aux")] == [4, 8, 12, 16]
    # A length at which the axis once was another.
    code, _, err = call(capsys, "--resume=latest", begun[-1], "--kimg=64", "--time-limit=0:00.001")
    assert code == 0, err
    assert [event.step for event in read(run).Scalars("Loss/aux")][:4] == [4, 8, 12, 16]


def test_a_dry_run_shows_the_folder_that_it_would_go_on_in(begun, tmp_path, capsys):
    code, out, err = call(capsys, "--resume=latest", begun[-1], "--dry-run", "--json")
    assert code == 0 and json.loads(out)["run_dir"] == str(tmp_path / "out" / "00000-x"), err


@pytest.mark.parametrize("damage", [lambda best: best.write_bytes(b""), lambda best: best.unlink()])
def test_a_best_that_is_empty_is_noticed_and_made_again(tmp_path, damage):
    run_dir = RunDir(tmp_path, quiet=True)
    best, snapshot = (tmp_path / f"network-snapshot-{name}.safetensors" for name in ("best", "000001"))
    snapshot.write_bytes(b"a network")
    best.write_bytes(b"a network")
    mend_best(run_dir, snapshot.name)
    assert not (tmp_path / "log.txt").exists()
    damage(best)
    mend_best(run_dir, "../" + snapshot.name)  # a state cannot name what lies elsewhere
    assert best.read_bytes() == b"a network" and "is one again" in (tmp_path / "log.txt").read_text()
    snapshot.unlink()
    damage(best)
    mend_best(run_dir, snapshot.name)
    assert "the best snapshot is lost" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("name", ["student_optimizer", "rng", "skips", "best", "elapsed", "nimg", "networks", "files"])
@pytest.mark.parametrize("value", ["text", {"a": {"b": "c"}}])
def test_a_state_with_something_else_inside_is_one_line(begun, tmp_path, capsys, name, value):
    path = training_states(tmp_path / "out" / "00000-x")[0]
    torch.save({**load_training_state(path), name: value}, path)
    code, _, err = call(capsys, f"--resume={path}")
    assert code == 2 and len(err.splitlines()) == 1 and err.startswith("Error: --resume: "), err


def test_the_best_by_another_metric_is_no_measure(begun, tmp_path, capsys, monkeypatch):
    """A best value that no other metric could reach, and patience that was used up."""
    monkeypatch.setenv("REFINE_CACHE", str(tmp_path / "cache"))
    best = {"metric": "pr20-x", "value": -1e9, "snapshot": "network-snapshot-000000.008.safetensors", "kimg": 0.008}
    path = training_states(tmp_path / "out/00000-x")[0]
    torch.save({**load_training_state(path), "best": best, "since_best": 9}, path)
    more = ["--kimg=0.016", "--metrics=fd8-teacher", "--patience=9"]
    code, out, err = call(capsys, *(arg for arg in begun if arg not in RUN), "--resume=latest", *more)
    assert code == 0, err
    found = load_training_state(training_states(tmp_path / "out/00000-x")[0])
    assert found["nimg"] == 16 and found["best"]["metric"].startswith("fd8-teacher"), out
