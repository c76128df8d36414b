"""Run folders and their files."""

import json
import os
import threading

import pytest

from refine.training.finding import find_training_states
from refine.training.run_dir import RunDir, create_run_dir, next_run_dir


def test_numbers_go_up_and_words_become_names(tmp_path):
    out = tmp_path / "runs"
    assert next_run_dir(out, "x").name == "00000-x" and not out.exists()
    assert create_run_dir(out, "my run: a/b").name == "00000-my-run-a-b"
    (out / "00007-other").mkdir()
    (out / "notes").mkdir()
    assert create_run_dir(out, "").name == "00008-run"


def test_runs_that_start_at_once_get_folders_of_their_own(tmp_path):
    made = []
    threads = [threading.Thread(target=lambda: made.append(create_run_dir(tmp_path, "x"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 8


def test_log_stats_and_metrics_are_appended(tmp_path, capsys):
    run = RunDir(tmp_path)
    run.log("hello")
    run.append_stats({"kimg": 1.0, "Loss/aux": 2.0})
    run.append_metric("fd2k-digits", {"fd_digits": 3.0}, "network-snapshot-000001.safetensors", 1.0)
    assert capsys.readouterr().out == "hello\n" and (tmp_path / "log.txt").read_text() == "hello\n"
    assert json.loads((tmp_path / "stats.jsonl").read_text())["Loss/aux"] == 2.0
    metric = json.loads((tmp_path / "metric-fd2k-digits.jsonl").read_text())
    assert metric["results"] == {"fd_digits": 3.0} and metric["snapshot"].startswith("network-snapshot")


def test_a_resumed_run_drops_the_lines_that_it_writes_again(tmp_path):
    run = RunDir(tmp_path, quiet=True)
    for kimg in (1.0, 2.0, 3.0):
        run.append_stats({"kimg": kimg})
    with open(tmp_path / "stats.jsonl", "a") as file:
        file.write('{"kimg": 4.')  # a kill in the middle of a line
    run.trim_after(2.0)
    assert [json.loads(line)["kimg"] for line in (tmp_path / "stats.jsonl").read_text().splitlines()] == [1.0, 2.0]


def test_the_latest_state_is_found_in_a_run_and_in_a_folder_of_runs(tmp_path):
    with pytest.raises(ValueError, match="no training-state"):
        find_training_states(tmp_path)
    for name in (
        "00000-a/training-state-000009.pt",
        "00001-b/training-state-000002.pt",
        "00001-b/training-state-000001.pt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_training_states(tmp_path / "00000-a")[0].name == "training-state-000009.pt"
    assert find_training_states(tmp_path)[0] == tmp_path / "00001-b/training-state-000002.pt"


def test_runs_with_other_names_that_start_at_once_get_other_numbers(tmp_path):
    for round_ in range(20):
        out, barrier = tmp_path / str(round_), threading.Barrier(4)

        def start(index, out=out, barrier=barrier):
            barrier.wait()
            create_run_dir(out, f"s{index}")

        threads = [threading.Thread(target=start, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(path.name[:5] for path in out.iterdir()) == [f"{number:05d}" for number in range(4)]


def test_a_claim_that_a_kill_left_is_no_obstacle(tmp_path):
    (tmp_path / ".00000.claim").mkdir()
    os.utime(tmp_path / ".00000.claim", (0, 0))
    assert create_run_dir(tmp_path, "x").name == "00000-x"
    assert [path.name for path in tmp_path.iterdir()] == ["00000-x"]


@pytest.mark.parametrize("name", ["log.txt", "training_options.json", "stats.jsonl", "metric-fd.jsonl"])
@pytest.mark.parametrize("target", ["../mine.txt", "/dev/full"])
def test_a_run_folder_with_links_to_elsewhere_is_not_written_through(name, target, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "run" / name).symlink_to(target)
    run = RunDir(tmp_path / "run", quiet=True)
    write = {
        "log.txt": lambda: run.log("x"),
        "training_options.json": lambda: run.write_json(name, {}),
        "stats.jsonl": lambda: run.append_stats({}),
        "metric-fd.jsonl": lambda: run.append_metric("fd", {}, "s", 1.0),
    }
    with pytest.raises(OSError, match="is a link to another folder; nothing was written through it"):
        write[name]()
    assert (tmp_path / "mine.txt").read_text() == "mine" and os.listdir(tmp_path / "run") == [name]


def test_a_claim_is_given_up_where_no_folder_can_be_made(tmp_path, monkeypatch):
    def refuse(path, target):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(type(tmp_path), "rename", refuse)
    with pytest.raises(OSError, match="No space left"):
        create_run_dir(tmp_path, "x")
    assert list(tmp_path.iterdir()) == []


def test_a_long_description_is_cut(tmp_path):
    assert len(create_run_dir(tmp_path, "long-" * 100).name) == 206
