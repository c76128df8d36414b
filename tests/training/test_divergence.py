"""Runs whose numbers diverge: nothing good is overwritten, and --rollback goes back by itself."""

import json

import pytest
import torch

from refine.training.finding import find_training_states, training_states
from refine.training.state import load_newest, load_training_state
from tests.training.test_survival import Numbers
from tests.training.test_trainer import make_run, run


def spoil(training, at, value, where="G", times=1):
    """A weight takes that value at so many images, as often as `times`."""
    trainer, left = training.trainer, [times]
    step = trainer.step

    def spoiled():
        step()
        if trainer.nimg == at and left[0]:
            left[0] -= 1
            with torch.no_grad():
                next(getattr(trainer, where).parameters()).view(-1)[0] = value

    trainer.step = spoiled
    return training


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["G", "G_ema", "aux"])
def test_weights_that_are_not_finite_replace_no_state_and_make_no_snapshot(tmp_path, value, where):
    training = spoil(make_run(tmp_path, kimg=0.064, aux_warmup_kimg=0, keep=1, state_minutes=0), 20, value, where)
    with pytest.raises(ValueError, match=r"NaN or infinite.*at 0\.0 kimg") as told:
        run(training)
    good = tmp_path / "training-state-000000.016.pt"
    assert training_states(tmp_path) == [good] and f"--resume={good} and a smaller --lr" in str(told.value)
    state = load_training_state(good)
    tensors = [x for values in state["networks"].values() for x in values.values()]
    assert all(x.isfinite().all() for x in tensors)
    assert not (tmp_path / "network-snapshot-000000.024.safetensors").exists()


def test_a_state_with_nan_is_no_state_to_go_on_from(tmp_path):
    run(make_run(tmp_path))
    newest = training_states(tmp_path)[0]
    state = load_training_state(newest)
    state["networks"]["aux"][next(iter(state["networks"]["aux"]))].view(-1)[0] = float("nan")
    torch.save(state, newest)
    found = load_newest(find_training_states(tmp_path))
    assert found.state["nimg"] == 16 and "holds NaN in aux." in found.damaged[0]


def test_rollback_goes_on_with_half_the_rates_and_reaches_the_end(tmp_path):
    training = spoil(make_run(tmp_path, kimg=0.032, rollback=2), 20, float("nan"), times=2)
    trainer = run(training)
    assert trainer.nimg == 32 and trainer.rate_factor == 0.25 and training.progress.rollbacks == 2
    log = (tmp_path / "log.txt").read_text()
    assert "rollback    2 of 2: going on from training-state-000000.016.pt with rates 0.25 times" in log
    stats = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert [line["kimg"] for line in stats] == [0.008, 0.016, 0.024, 0.032]
    assert (
        [line["Progress/lr"] for line in stats]
        == [1e-3, 1e-3, 2.5e-4, 2.5e-4]
        == [line["Progress/aux_lr"] for line in stats]
    )
    assert load_training_state(training_states(tmp_path)[0])["rollbacks"] == 2


def test_no_more_rollbacks_than_allowed_also_over_a_kill(tmp_path):
    with pytest.raises(ValueError, match=r"after 1 rollbacks; go on from before with --resume=.*000000\.016\.pt and"):
        run(spoil(make_run(tmp_path, rollback=1), 20, float("nan"), times=9))
    again = make_run(tmp_path, rollback=1)
    again.load_state_dict(load_newest(find_training_states(tmp_path)).state)
    assert again.trainer.rate_factor == 0.5
    with pytest.raises(ValueError, match="after 1 rollbacks"):
        run(spoil(again, 20, float("nan")))


def test_a_run_that_diverges_before_its_first_snapshot_goes_back_to_its_beginning(tmp_path):
    training = spoil(make_run(tmp_path, rollback=1), 4, float("nan"))
    assert (
        run(training).nimg == 24 and "going on from training-state-000000.000.pt" in (tmp_path / "log.txt").read_text()
    )


def test_rollback_prefers_the_best_state_which_is_kept(tmp_path):
    training = make_run(
        tmp_path, kimg=0.04, keep=1, rollback=1, metrics=[Numbers(9.0, 1.0, 5.0, 6.0, 4.0, 3.0, 2.0, 2.0)]
    )
    run(spoil(training, 28, float("nan")))
    log = (tmp_path / "log.txt").read_text()
    assert "going on from training-state-000000.008.pt" in log and training.trainer.nimg == 40
    names = [path.name for path in training_states(tmp_path)]
    assert names == ["training-state-000000.040.pt", "training-state-000000.008.pt"]


def test_steps_that_are_left_out_in_a_row_are_a_divergence(tmp_path):
    training = make_run(tmp_path, kimg=0.032, rollback=1, max_skips=2)
    usual, trainer = training.trainer.weighting, training.trainer
    step = trainer.step

    def diverging():
        trainer.weighting = (lambda *_: float("nan")) if trainer.nimg >= 16 and trainer.rate_factor == 1 else usual
        step()

    trainer.step = diverging
    assert run(training).nimg == 32 and trainer.rate_factor == 0.5
    assert trainer.optimizers["student"].skips.read() == (0, 0)
