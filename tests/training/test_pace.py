"""How many auxiliary steps an iteration has."""

import pytest
import torch

from refine.training.pace import FIRST, HIGHEST, LOWEST, READ_EVERY, WATCHED_EVERY, WORTH, Pace
from refine.training.state import load_training_state
from tests.training.test_trainer import equal_states, make_run, run, stop_after


def told(pace, share, iterations=range(READ_EVERY * 60)):
    """The pace after steps that gain a share of the loss."""
    losses = torch.tensor([1.0, 3.0])
    for iteration in iterations:
        if pace.measures(iteration):
            pace.add(losses, losses - torch.tensor([0.0, 4.0 * share]))
        pace.end(iteration)
    return pace


@pytest.mark.parametrize(("share", "steps"), [(3 * WORTH, HIGHEST), (0.0, LOWEST), (-WORTH, LOWEST), (WORTH, FIRST)])
def test_it_follows_what_a_step_gains(share, steps):
    assert told(Pace("auto", torch.device("cpu")), share).steps == steps


def test_it_settles_where_a_step_gains_just_enough():
    pace = Pace("auto", torch.device("cpu"))
    for iteration in range(READ_EVERY * 200):
        told(pace, 4 * WORTH / pace.steps**2, [iteration])  # the more steps, the less the last one gains: 2 are right
    assert pace.steps == 2


def test_a_fixed_number_stays_and_is_watched():
    pace = told(Pace(3, torch.device("cpu")), 5 * WORTH)
    assert pace.steps == 3
    assert sum(map(pace.measures, range(10 * WATCHED_EVERY))) == 10


def test_losses_that_are_no_numbers_change_nothing():
    for broken in (float("nan"), float("inf")):
        assert told(Pace("auto", torch.device("cpu")), broken).steps == FIRST


def test_a_run_that_measures_reports_its_steps_and_resumes(tmp_path):
    options = {"aux_steps": "auto", "kimg": 0.4, "tick": 0.2, "aux_lr": 1e-2}
    whole = make_run(tmp_path / "whole", **options)
    trainer = run(whole)
    assert trainer.pace.state_dict()["level"] != FIRST
    rows = [line for line in (tmp_path / "whole" / "stats.jsonl").read_text().splitlines() if "Aux/steps" in line]
    assert rows and all("Aux/lag" in row for row in rows)
    part = make_run(tmp_path / "part", **options)
    stop_after(part, 200)
    second = make_run(tmp_path / "again", **options)
    second.load_state_dict(load_training_state(tmp_path / "part" / "training-state-000000.200.pt"))
    assert run(second).pace.state_dict()["level"] == trainer.pace.state_dict()["level"]
    assert equal_states(second.trainer.G, trainer.G)
