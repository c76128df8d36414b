"""Runs that are killed, stopped, starved of disk or robbed of their folder, and go on."""

import dataclasses
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import time
import zipfile

import pytest
import torch

from refine.checkpoints.native import save_networks
from refine.metrics.named import NamedMetric
from refine.training.finding import find_training_states, training_states
from refine.training.state import load_newest, load_training_state, save_training_state
from refine.training.stopping import StopRequests
from tests.launch import launch, wait
from tests.training.test_trainer import make_run, make_student, make_teacher, run

OPTIONS = (
    "--kimg=0.06",
    "--batch=4",
    "--tick=0.008",
    "--snap=2",
    "--lr=0.001",
    "--aux-lr=0.001",
    "--desc=x",
    "--metrics=none",
    "--adversarial=0",
)
LAST = "00000-x/network-snapshot-000000.060.safetensors"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    save_networks(folder / "gan.safetensors", {"G_ema": make_student()}, provenance={})
    save_networks(folder / "teacher.safetensors", {"ema": make_teacher()}, provenance={})
    return (f"--gan={folder}/gan.safetensors", f"--teacher={folder}/teacher.safetensors")


def wait_until(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)


def steps_done(run_dir):
    stats = run_dir / "stats.jsonl"
    return len(stats.read_text().splitlines()) if stats.exists() else 0


def test_a_run_that_is_killed_again_and_again_equals_one_that_is_not(pair, tmp_path):
    """SIGKILL at random moments of a run that saves its state after every step, so that many fall into the saving."""
    options = [*pair, *OPTIONS, "--aux-warmup-kimg=0.02", "--dropout=true"]
    log = tmp_path / "log.txt"
    assert wait([launch([*options, f"--outdir={tmp_path}/whole"], log)]) == [0], log.read_text()
    outdir, draw, kills = f"--outdir={tmp_path}/killed", random.Random(1), 0
    killed = tmp_path / "killed" / "00000-x"
    process = launch([*options, outdir, "--state-minutes=0", "--keep=3"], log)
    while kills < 6:
        states = training_states(killed)
        wait_until(lambda states=states: training_states(killed) != states, process)  # every process gets on a little
        time.sleep(draw.random() * 0.15)
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
        if process.exitcode == 0:
            break
        process = launch(["--resume=latest", outdir], log)
    assert wait([process]) == [0], log.read_text()
    assert kills >= 3
    assert (tmp_path / "whole" / LAST).read_bytes() == (tmp_path / "killed" / LAST).read_bytes()
    assert len(training_states(killed)) == 3
    assert not list(killed.glob(".*")), "what a kill left in the middle of a file"
    ours, theirs = (
        [json.loads(line) for line in (tmp_path / name / "00000-x" / "stats.jsonl").read_text().splitlines()]
        for name in ("killed", "whole")
    )
    for a, b in zip(ours, theirs, strict=True):  # the means of a tick survive a kill in its middle
        assert {k: v for k, v in a.items() if k.split("/")[0] in ("Loss", "Gap", "Grad", "kimg", "tick")} == {
            k: v for k, v in b.items() if k.split("/")[0] in ("Loss", "Gap", "Grad", "kimg", "tick")
        }


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_ends_the_run_with_its_state_saved(pair, tmp_path, number, code):
    log, run_dir = tmp_path / "log.txt", tmp_path / "00000-x"
    process = launch([*pair, *OPTIONS, "--kimg=100", "--snap=0", f"--outdir={tmp_path}"], log)
    wait_until(lambda: steps_done(run_dir) > 0, process)
    os.kill(process.pid, number)
    assert wait([process]) == [code], log.read_text()
    lines = log.read_text().splitlines()
    assert any(line.startswith(f"{number.name}: stopping after this iteration") for line in lines)
    assert lines[-1].startswith("stopped; saved at 0.0 of 100 kimg; go on with  python refine.py --resume=")
    state = load_training_state(find_training_states(lines[-1].partition("--resume=")[2])[0])
    assert state["nimg"] > 0 and "Traceback" not in log.read_text()


def test_a_second_signal_ends_it_at_once():
    with StopRequests() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.signal == signal.SIGUSR1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # as it was


def test_a_sigterm_by_two_ways_is_one():
    # to a group of processes: from the sender, and from make, which hands it on
    with StopRequests() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        time.sleep(0.6)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    with StopRequests(), pytest.raises(KeyboardInterrupt):  # a key that is hit twice is meant
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_a_time_limit_is_kept_and_the_run_goes_on_afterwards(pair, tmp_path):
    log = tmp_path / "log.txt"
    options = [*pair, *OPTIONS, "--kimg=100", "--snap=0", "--time-limit=0:02"]
    start = time.monotonic()
    assert wait([launch([*options, f"--outdir={tmp_path}"], log)]) == [0], log.read_text()
    assert time.monotonic() - start < 60
    assert "time is up; saved at" in log.read_text().splitlines()[-1]
    nimg = load_training_state(find_training_states(tmp_path)[0])["nimg"]
    changes = [f"--kimg={(nimg + 8) / 1000}", "--lr=0.0005"]
    assert wait([launch(["--resume=latest", f"--outdir={tmp_path}", *changes], log)]) == [0], log.read_text()
    text = log.read_text()
    assert f"changed     --kimg from 100.0 to {(nimg + 8) / 1000}" in text and "changed     --lr" in text
    assert load_training_state(find_training_states(tmp_path)[0])["nimg"] == nimg + 8


def test_the_time_limit_leaves_room_for_two_slow_iterations(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert StopRequests(time_limit=100, since=time.monotonic() - 200).time_is_up()  # a teacher's images took so long
    stop = StopRequests(time_limit=100)
    seen = []
    for _ in range(10):
        now[0] += 10
        seen.append(stop.time_is_up())
    assert seen == [False] * 8 + [True] * 2
    assert not StopRequests(None).time_is_up()


# Where states come from, and which one is taken.


def test_states_are_kept_and_the_newest_whole_one_is_taken(tmp_path):
    training = make_run(tmp_path, keep=3, kimg=0.04)
    run(training)
    names = [path.name for path in training_states(tmp_path)]
    assert names == [f"training-state-000000.0{n}.pt" for n in (40, 32, 24)]
    newest = tmp_path / names[0]
    for damage in (lambda data: data[: len(data) // 2], lambda data: b"", flip_a_byte):
        whole = newest.read_bytes()
        newest.write_bytes(damage(whole))
        found = load_newest(find_training_states(tmp_path))
        assert found.path.name == names[1] and found.state["nimg"] == 32
        assert len(found.damaged) == 1 and names[0] in found.damaged[0]
        newest.write_bytes(whole)
    for path in training_states(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="nor can the 2 before it"):
        load_newest(find_training_states(tmp_path))


def flip_a_byte(data):
    """In the middle of the file's largest tensor."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        position = data.index(archive.read(largest)) + largest.file_size // 2
    changed = bytearray(data)
    changed[position] ^= 0xFF
    return bytes(changed)


def test_a_snapshot_leads_to_its_state(tmp_path):
    run(make_run(tmp_path, keep=2))
    found = find_training_states(tmp_path / "network-snapshot-000000.016.safetensors")
    assert [path.name for path in found] == ["training-state-000000.016.pt"]
    with pytest.raises(ValueError, match=r"no training-state-000000\.008\.pt .* kept: training-state-000000\.024\.pt"):
        find_training_states(tmp_path / "network-snapshot-000000.008.safetensors")


def test_whole_kimg_name_snapshots_where_they_suffice(tmp_path):
    usual = make_run(tmp_path / "usual", kimg=2.0, batch=500, tick=1.0, aux_warmup_kimg=0)
    run(usual)
    assert sorted(path.name for path in (tmp_path / "usual").glob("network-*")) == [
        f"network-snapshot-00000{n}.safetensors" for n in (1, 2)
    ]
    assert [path.name for path in training_states(tmp_path / "usual")] == [
        f"training-state-00000{n}.pt" for n in (2, 1)
    ]


def test_options_that_decide_what_is_trained_cannot_be_changed(tmp_path, capsys):
    from tests.cli.test_refine import call

    run(make_run(tmp_path))
    code, _, err = call(capsys, f"--resume={tmp_path}", "--sigma=karras")
    assert code == 2 and "--sigma cannot be changed" in err and "--kimg" in err


# What may go wrong with a disk.


def state_of(training):
    return {**training.state_dict(), "nimg": 100}


def test_a_full_disk_leaves_the_older_state_whole(tmp_path):
    training = make_run(tmp_path)
    run(training)
    before = {path.name: path.read_bytes() for path in training_states(tmp_path)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_training_state(tmp_path, state_of(training), "000000.100", 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name: path.read_bytes() for path in training_states(tmp_path)} == before
    assert not list(tmp_path.glob(".*")), "a temporary file was left"


def no_room():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))


def test_a_full_disk_ends_a_run_with_one_line(pair, tmp_path):
    log, options = tmp_path / "log.txt", [*pair, *OPTIONS, "--kimg=100", "--state-minutes=0"]
    assert wait([launch([*options, f"--outdir={tmp_path}"], log, prepare=no_room)]) == [2], log.read_text()
    lines = log.read_text().splitlines()
    assert "File too large" in lines[-1] and lines[-1].startswith(f"Error: {tmp_path}/00000-x/"), lines[-1]
    assert "Traceback" not in log.read_text()


def test_a_folder_whose_name_is_no_text_is_refused(pair, tmp_path):
    log = tmp_path / "log.txt"
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    assert wait([launch([*pair, *OPTIONS, f"--outdir={folder}"], log)]) == [2]
    assert "Error: --outdir: '" in log.read_text() and "\\udcff' is no text in UTF-8" in log.read_text()
    assert not os.path.exists(folder)


def test_a_folder_that_is_removed_ends_a_run_with_one_line(pair, tmp_path):
    log, run_dir = tmp_path / "log.txt", tmp_path / "out" / "00000-x"
    process = launch([*pair, *OPTIONS, "--kimg=100", f"--outdir={tmp_path}/out"], log)
    wait_until(lambda: steps_done(run_dir) > 0, process)
    shutil.rmtree(run_dir.rename(tmp_path / "gone"))  # at once: otherwise new files may keep it
    assert wait([process]) == [2], log.read_text()
    lines = log.read_text().splitlines()
    assert lines[-1].startswith("Error: ") and "00000-x" in lines[-1], lines
    assert "No such file or directory" in lines[-1] and "Traceback" not in log.read_text()


# Metrics.


class Numbers(NamedMetric):
    def __init__(self, *values):
        self.name, self.key, self.values = "fd10-fake", "fd_fake", iter(values)

    def measure(self, G, device, progress=False):
        value = next(self.values)
        if isinstance(value, Exception):
            raise value
        return {"fd_fake": value}


def test_the_best_is_the_highest_where_the_metric_says_so(tmp_path):
    metric = Numbers(9.0, 5.0, 7.0, 4.0)
    metric.direction = "higher"
    training = make_run(tmp_path, metrics=[metric])
    run(training)
    assert training.snapshots.standing.best.value == 7.0


def test_patience_ends_a_run_that_does_not_get_better(tmp_path):
    training = make_run(tmp_path, metrics=[Numbers(9.0, 5.0, 3.0, 4.0, 3.5, 1.0)], kimg=1.0, average="ema")
    training.config = dataclasses.replace(training.config, patience=2, metrics=("fd10-fake",), ref="x.npz")
    run(training)
    assert training.trainer.nimg == 32 and training.snapshots.standing.best.snapshot.endswith("000000.016.safetensors")
    assert "no better fd10-fake in 2 snapshots: done" in (tmp_path / "log.txt").read_text()
    best = (tmp_path / "network-snapshot-best.safetensors").read_bytes()
    assert best == (tmp_path / "network-snapshot-000000.016.safetensors").read_bytes()


@pytest.mark.parametrize("error", [KeyError("x"), MemoryError(), ZeroDivisionError("division"), OSError("no file")])
def test_no_failure_of_a_metric_ends_a_run(tmp_path, error):
    training = make_run(tmp_path, metrics=[Numbers(9.0, error, math.nan, 2.0)], average="ema")
    run(training)
    assert training.trainer.nimg == 24 and training.snapshots.standing.best.value == 2.0
    assert (tmp_path / "log.txt").read_text().count("metric fd10-fake failed: ") == 1


def test_out_of_memory_names_the_option(pair, tmp_path, capsys, monkeypatch):
    from refine.training.trainer import Trainer
    from tests.cli.test_refine import call

    def step(self):
        torch.empty(2**50)

    monkeypatch.setattr(Trainer, "step", step)
    code, _, err = call(capsys, *pair, *OPTIONS, f"--outdir={tmp_path}")
    assert code == 1 and err.startswith("Error: out of memory; try a smaller --batch-gpu"), err
