"""Run folders: every name that runs write, kimg from the files themselves, and the snapshot that is judged."""

import math

import pytest

from refine.checkpoints.native import save_networks
from refine.evaluation.run_folder import network_in, read_run_folder
from refine.metrics.digits import DigitsDetector


def snapshot(folder, number, kimg=None, suffix=".safetensors"):
    """A file of a run; what is no native file holds its number only."""
    path = folder / f"network-snapshot-{number}{suffix}"
    if kimg is None:
        path.write_text(str(number))
    else:
        network = DigitsDetector(channels=(1, 1, 1), feature_dim=1)  # any that can be saved
        save_networks(path, {"G_ema": network}, provenance={"kimg": kimg})
    return path


def test_every_name_that_runs_write(tmp_path):
    for number in ("000002", "000000.320", "000000", "000001.600", "001000"):
        snapshot(tmp_path, number)
    snapshot(tmp_path, "000001.600", suffix=".pkl")  # of the same networks
    snapshot(tmp_path, "000003", suffix=".pkl")
    for other in ("network-snapshot-x.safetensors", "fakes000001.png", "training-state-000002.pt"):
        (tmp_path / other).write_text("")
    run = read_run_folder(tmp_path)
    assert [one.kimg for one in run.snapshots] == [0, 0.32, 1.6, 2, 3, 1000]
    assert [one.path.suffix for one in run.snapshots] == [".safetensors"] * 4 + [".pkl", ".safetensors"]
    assert run.judged.kimg == 1000 and "the last, as the run kept no best one" in run.describe()
    assert len(run.others) == 5 and run.judged not in run.others


def test_files_say_when_they_were_saved(tmp_path):
    for number, kimg in (("000004", 4.5), ("000009", 9.0)):  # names carry whole kimg
        snapshot(tmp_path, number, kimg)
    assert [one.kimg for one in read_run_folder(tmp_path).snapshots] == [4.5, 9.0]


def test_the_best_is_the_one_that_it_is_a_copy_of(tmp_path):
    for number in ("000000", "000004", "000008"):
        snapshot(tmp_path, number)
    (tmp_path / "network-snapshot-best.safetensors").write_text("000004")
    run = read_run_folder(tmp_path)
    assert run.judged.path.name == "network-snapshot-000004.safetensors" and len(run.snapshots) == 3
    assert "network-snapshot-000004.safetensors (4 kimg), the best" in run.describe()


def test_the_best_is_judged_where_its_original_is_gone(tmp_path):
    snapshot(tmp_path, "000000")
    best = snapshot(tmp_path, "best", kimg=4.0)
    snapshot(tmp_path, "000008")
    run = read_run_folder(tmp_path)
    assert run.judged == (4.0, best, "") and [one.kimg for one in run.snapshots] == [0, 4, 8]
    best.unlink()
    pickled = snapshot(tmp_path, "best", suffix=".pkl")
    run = read_run_folder(tmp_path)
    assert run.judged.path == pickled and math.isnan(run.judged.kimg) and len(run.snapshots) == 2
    assert "kimg)" not in run.describe()


def test_what_is_no_run_folder(tmp_path):
    (tmp_path / "a.txt").write_text("")
    assert read_run_folder(tmp_path / "a.txt") is None
    with pytest.raises(ValueError, match="holds no network-snapshot"):
        read_run_folder(tmp_path)


def test_averages_of_one_time_are_snapshots_of_their_own(tmp_path):
    for number in ("0000524-0.050", "0000524-0.100", "0001048-0.050"):
        snapshot(tmp_path, number, suffix=".pkl")
    run = read_run_folder(tmp_path)
    found = [(one.kimg, one.average) for one in run.snapshots]
    assert found == [(524, "0.050"), (524, "0.100"), (1048, "0.050")] and run.judged.kimg == 1048


def test_the_final_network_of_other_programs(tmp_path):
    for number in ("000004", "000008"):
        snapshot(tmp_path, number, suffix=".pkl")
    final = tmp_path / "network-final.pkl"
    final.write_text("another")
    run = read_run_folder(tmp_path)
    assert run.judged.path == final and [one.kimg for one in run.others] == [4, 8] and "the last" in run.describe()
    final.write_text("000008")  # a copy of the last one: no point of its own
    run = read_run_folder(tmp_path)
    assert run.judged.path.name == "network-snapshot-000008.pkl" and len(run.snapshots) == 2
    (tmp_path / "network-snapshot-best.pkl").write_text("000004")
    assert read_run_folder(tmp_path).judged.kimg == 4


def test_commands_take_the_judged_network_of_a_folder(tmp_path):
    snapshot(tmp_path, "000004")
    best = snapshot(tmp_path, "000008")
    path, said = network_in(str(tmp_path))
    assert path == str(best) and said.startswith(f"Taken from {tmp_path.name}: network-snapshot-000008.safetensors")
    assert network_in(str(best)) == (str(best), None) and network_in("digits-gan") == ("digits-gan", None)


def test_a_folder_of_a_diffusion_model_is_no_run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "diffusion_pytorch_model.safetensors").write_text("")
    assert read_run_folder(tmp_path) is None
