"""The moving average against EDM's table, and what it does to parameters and buffers."""

import pytest
import torch
from torch import nn

from refine.training.ema import ema_beta, update_emas
from tests.golden import read_arrays


def test_beta_agrees_with_the_golden_table():
    table = read_arrays("edm/loss_and_schedules")["ema_beta_table"]
    assert len(table) > 0
    for halflife_kimg, rampup, batch, nimg, beta in table.tolist():
        assert ema_beta(batch, nimg, halflife_kimg, None if rampup < 0 else rampup) == pytest.approx(beta, abs=1e-12)


def test_first_update_copies_and_half_life_holds():
    assert ema_beta(64, 0, 500, 0.05) == 0.0
    assert ema_beta(100, 10**9, 0.1, None) == 0.5
    assert ema_beta(64, 1000, 0.0, None) == 0.0


def test_parameters_are_averaged_and_buffers_copied():
    def network(value):
        net = nn.BatchNorm1d(2)
        nn.init.constant_(net.weight, value)
        net.running_mean.fill_(value)
        return net

    ema, net = network(0.0), network(1.0)
    update_emas([(ema, 0.75)], net)
    assert torch.allclose(ema.weight, torch.tensor([0.25, 0.25]))
    assert torch.equal(ema.running_mean, torch.tensor([1.0, 1.0]))
    assert torch.equal(net.weight, torch.ones(2))
