"""What is logged of gradients: how much of them is signal."""

import pytest
import torch

from refine.config import RefineConfig
from refine.training.optimise import SIGNAL_EVERY, GuardedAdam
from refine.training.trainer import Trainer
from tests.training.test_trainer import make_student, make_teacher


@pytest.mark.parametrize("noise", [0.0, 1.0, 3.0])
def test_the_signal_of_a_gradient_is_the_part_that_two_batches_share(noise):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.zeros(300)), torch.nn.Parameter(torch.zeros(20, 10))]
    optimizer, found = GuardedAdam(weights, (0.0, 0.999), None, "fp32", torch.device("cpu")), []
    for _ in range(60 * SIGNAL_EVERY):
        for weight in weights:
            weight.grad = torch.ones_like(weight) + noise * torch.randn_like(weight)
        optimizer.step(1e-3)
        if optimizer.signal is not None:
            found.append(optimizer.signal.item())
    assert len(found) == 60
    assert sum(found) / len(found) == pytest.approx(1 / (1 + noise**2), abs=0.02)


def test_parameters_without_gradients_are_left_out():
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = GuardedAdam(weights, (0.0, 0.999), None, "fp32", torch.device("cpu"))
    for _ in range(SIGNAL_EVERY):
        weights[0].grad = torch.ones(2)
        optimizer.step(0.0)
    assert optimizer.signal.item() == pytest.approx(1)


def test_a_resumed_run_measures_in_the_same_steps():
    whole = Trainer(RefineConfig("g", "t", batch=4, adversarial=0.0, metrics=()), make_student(), make_teacher())
    whole.step()
    resumed = Trainer(whole.config, make_student(), make_teacher())
    state = whole.state_dict()
    resumed.load_state_dict(state)
    assert {name: optimizer.steps for name, optimizer in resumed.optimizers.items()} == {"student": 1, "aux": 2}
    del state["steps"]  # of an older version
    resumed.load_state_dict(state)
