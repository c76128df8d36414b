"""The progress line of a tick, and its scalars."""

import dataclasses
import math
import shlex
import types

from refine.cli.main import cli
from refine.config import RefineConfig
from refine.training.report import TickReport, next_commands, outcome, result_line
from refine.training.run_dir import RunDir
from refine.training.snapshots import Best

REPORT = TickReport(
    tick=3,
    nimg=12_000,
    images=4_000,
    remaining=8_000,
    elapsed=120.0,
    seconds=40.0,
    processor_seconds=20.0,
    lr=1e-4,
    aux_lr=2e-4,
    means={"Loss/aux": 55.5, "Gap/class_0": 0.1},
    skipped={"student": 0, "aux": 2},
    memory={"cpumem": 1.5},
)


def test_the_line_says_how_fast_and_how_long():
    line = " ".join(REPORT.line().split())
    assert line == (
        "tick 3 kimg 12.0 time 2m 00s sec/tick 40.0 sec/kimg 10.00 img/s 100.0 ETA 1m 20s loss aux 55.5 cpumem 1.50 "
        "skipped aux steps 2"
    )
    assert "loss aux nan" in dataclasses.replace(REPORT, means={}).line()


def test_scalars_are_the_means_and_what_is_known_of_the_tick():
    assert REPORT.scalars() == {
        "Loss/aux": 55.5,
        "Gap/class_0": 0.1,
        "Progress/lr": 1e-4,
        "Progress/aux_lr": 2e-4,
        "Progress/skipped_student_steps": 0.0,
        "Progress/skipped_aux_steps": 2.0,
        "Timing/img_per_sec": 100.0,
        "Timing/sec_per_tick": 40.0,
        "Timing/total_hours": 120 / 3600,
        "Timing/cpu_sec_per_kimg": 5.0,
        "Resources/peak_cpumem_gb": 1.5,
    }
    assert all(math.isfinite(value) for value in REPORT.scalars().values())


RESULTS = {
    "init": {"fd_x": 7.218, "precision": 0.4711, "recall": 0.3152},
    "network-snapshot-000010.safetensors": {
        "fd_x": 0.8412,
        "precision": 0.7903,
        "recall": 0.4201,
        "average_length": 0.1,
    },
}


def say_result(folder, results=RESULTS, best="network-snapshot-000010.safetensors", direction="lower", key="fd_x"):
    folder.mkdir(exist_ok=True)
    run_dir = RunDir(folder, quiet=True)
    for snapshot, numbers in results.items():
        run_dir.append_metric("fd2k-x", numbers, snapshot, 0.0)
    metric = types.SimpleNamespace(name="fd2k-x", key=key, direction=direction)
    value = results.get(best, {}).get(key, 0.0)
    return result_line(folder, metric, best and Best("fd2k-x", value, best, 9.6), 31 * 60)


def test_the_result_is_one_line(tmp_path):
    assert say_result(tmp_path) == (
        "result      fd_x 7.22 → 0.841, precision 0.471 → 0.790, recall 0.315 → 0.420 in 31m 00s; "
        "take network-snapshot-best.safetensors (average 0.1, 9.6 kimg)"
    )


def test_the_outcome_for_tables_of_runs(tmp_path):
    say_result(tmp_path)
    best = Best("fd2k-x", 0.8412, "network-snapshot-000010.safetensors", 9.6)
    metric = types.SimpleNamespace(name="fd2k-x", key="fd_x")
    assert outcome(tmp_path, metric, best, 1800.0) == {
        "hours": 0.5,
        "fd_x_before": 7.218,
        "precision_before": 0.4711,
        "recall_before": 0.3152,
        "fd_x": 0.8412,
        "precision": 0.7903,
        "recall": 0.4201,
    }


def test_the_commands_that_follow_a_run_can_be_typed(tmp_path):
    folder = tmp_path / "my runs" / "00000-x"
    config = RefineConfig("/x/g.pkl", "/x/t.pkl", metrics=("fd2k-teacher",))
    lines = [shlex.split(line) for line in next_commands(folder, config, tmp_path / "g.pkl")]
    assert [line[:3] for line in lines] == [["python", "-m", "refine"]] * 3
    assert [line[3] for line in lines] == ["compare", "generate", "export"]
    assert {"--before=/x/g.pkl", f"--after={folder}", "--ref=/x/t.pkl", "--detector=/x/t.pkl"} <= set(lines[0])
    assert f"--like={tmp_path / 'g.pkl'}" in lines[2] and f"--out={folder / 'out'}.pkl" in lines[2]
    other = dataclasses.replace(config, gan="one-step", metrics=("fd2k-digits",), ref="digits-reference")
    lines = [shlex.split(line) for line in next_commands(folder, other, None)]
    assert {"--before=one-step:/x/t.pkl", "--ref=digits-reference", "--detector=digits"} <= set(lines[0])
    assert lines[2][-1] == f"--out={folder / 'out'}.safetensors"
    for line in lines:
        command = cli.get_command(None, line[3])
        command.make_context(line[3], line[4:])  # its options exist and are complete
    unmeasured = dataclasses.replace(config, metrics=(), ref=None, patience=0)
    assert [line.split()[3] for line in next_commands(folder, unmeasured, None)] == ["generate", "export"]


def test_a_result_that_is_none_says_so(tmp_path):
    worse = {"init": RESULTS["init"], "s": {"fd_x": 7.3, "average_length": None}}
    assert say_result(tmp_path / "a", worse, "s") == (
        "result      nothing gained: fd_x 7.22 → 7.3 in 31m 00s at best (9.6 kimg); keep the generator as it came"
    )
    assert "nothing gained" not in say_result(tmp_path / "b", worse, "s", "higher")
    assert "no snapshot was measured" in say_result(tmp_path / "c", best=None)
    late = {"s": {"fd_x": 7.3}}
    assert "fd_x 7.3, not measured at the start, in 31m" in say_result(tmp_path / "d", late, "s")
    assert "fd2k-x 0 at best" in say_result(tmp_path / "e", {}, "s")


def test_code_is_named_again_in_the_commands_after_a_run(tmp_path):
    """A file cannot bring code along, so the function stands before it; other tools could not read an export."""
    for number in ("000000", "000004"):
        (tmp_path / f"network-snapshot-{number}.safetensors").touch()
    config = RefineConfig("my.code:make@/old.safetensors", "/t.pkl", metrics=("fd2k-teacher",))
    compare, generate = (shlex.split(line)[3:] for line in next_commands(tmp_path, config, None))
    last = f"my.code:make@{tmp_path}/network-snapshot-000004.safetensors"
    assert compare[:3] == ["compare", "--before=my.code:make@/old.safetensors", f"--after={last}"]
    assert generate[1] == f"--network={last}"
    (tmp_path / "network-snapshot-best.safetensors").touch()
    assert next_commands(tmp_path, config, None)[-1].split()[4].endswith("network-snapshot-best.safetensors")


def test_a_run_without_metrics_is_compared_in_the_eyes_of_its_teacher(tmp_path):
    (compare, *_) = next_commands(tmp_path, RefineConfig("/g.pkl", "/t.pkl", metrics=()), None)
    assert {"--ref=/t.pkl", "--detector=/t.pkl"} <= set(shlex.split(compare))
