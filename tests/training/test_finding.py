"""Which state is the newest, and what snapshots and states are called."""

import os

import pytest
import torch

from refine.checkpoints.native import save_networks
from refine.training.finding import find_training_states, newest_states, training_states
from refine.training.state import load_training_state
from tests.training.test_trainer import make_run, make_student, run


def touch(folder, *numbers):
    for index, number in enumerate(numbers):
        path = folder / f"training-state-{number}.pt"
        path.touch()
        os.utime(path, (index, index))


def names(folder):
    return [path.name.removeprefix("training-state-").removesuffix(".pt") for path in training_states(folder)]


def test_the_newest_state_has_the_most_images_whenever_it_was_written(tmp_path):
    touch(tmp_path, "000000.064", "000000.016", "1000000", "999999", "000000.032", "x", "000001-copy")
    assert names(tmp_path) == ["1000000", "999999", "000000.064", "000000.032", "000000.016"]


def test_whole_kimg_in_a_name_stand_for_the_images_inside(tmp_path):
    for number, nimg in (("000001", 1500), ("000001.200", 1200), ("000001.700", 1700)):
        torch.save({"nimg": nimg}, tmp_path / f"training-state-{number}.pt")
    assert names(tmp_path) == ["000001.700", "000001", "000001.200"]
    (tmp_path / "training-state-000001.pt").write_bytes(b"damaged")
    assert names(tmp_path) == ["000001.700", "000001.200", "000001"]


def test_a_state_that_goes_while_one_looks_is_no_failure(tmp_path, monkeypatch):
    touch(tmp_path, "000001", "000001.200")
    load = torch.load

    def gone(path, **options):
        path.unlink(missing_ok=True)
        return load(path, **options)

    monkeypatch.setattr(torch, "load", gone)
    assert names(tmp_path) == ["000001.200", "000001"]


def test_the_last_snapshot_does_not_take_the_name_of_the_one_before(tmp_path):
    trainer = run(make_run(tmp_path, kimg=1.5, batch=500, tick=1.0, snap=1, aux_warmup_kimg=0))
    assert trainer.nimg == 1500
    assert sorted(path.name for path in tmp_path.glob("network-*")) == [
        "network-snapshot-000001.500.safetensors",
        "network-snapshot-000001.safetensors",
    ]
    assert names(tmp_path) == ["000001.500", "000001"]
    assert [load_training_state(path)["nimg"] for path in training_states(tmp_path)] == [1500, 1000]
    (found,) = find_training_states(tmp_path / "network-snapshot-000001.500.safetensors")
    assert found.name == "training-state-000001.500.pt"


def test_a_run_that_is_extended_within_a_kimg_overwrites_no_end(tmp_path):
    options = {"batch": 300, "tick": 4.0, "snap": 1, "aux_warmup_kimg": 0}
    run(make_run(tmp_path, kimg=1.5, **options))
    longer = make_run(tmp_path, kimg=1.8, **options)
    longer.load_state_dict(load_training_state(training_states(tmp_path)[0]))
    run(longer)
    assert names(tmp_path) == ["000001.800", "000001"]
    again = make_run(tmp_path, kimg=1.5, **options)  # from the beginning, as after a kill: the same name again
    run(again)
    assert names(tmp_path) == ["000001.800", "000001"]


@pytest.mark.parametrize("name", ["gan.safetensors", "gan.pkl"])
def test_a_network_is_told_from_a_state(tmp_path, root, name):
    if name == "gan.pkl":
        path = root / "tests" / "golden" / "pickles" / "plain_t213_p4.pkl"
    else:
        path = tmp_path / name
        save_networks(path, {"G_ema": make_student()}, provenance={})
    with pytest.raises(ValueError, match="no training state; to begin a new run with this network, give it as --gan="):
        find_training_states(path)


def test_the_newest_run_with_a_state_is_found_or_none(tmp_path):
    assert newest_states(tmp_path) == [] == newest_states(tmp_path / "nowhere")
    for run_name in ("00000-a", "00002-b", "00003-c"):
        (tmp_path / run_name).mkdir()
    touch(tmp_path / "00000-a", "000009")
    touch(tmp_path / "00002-b", "000001")
    assert newest_states(tmp_path)[0].parent.name == "00002-b"
