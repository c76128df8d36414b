"""Running means, which are counted on the device and read once."""

import math

import pytest
import torch

from refine.torch_utils.misc import RunningMeans


def add_some(means: RunningMeans) -> None:
    means.add("loss", torch.tensor([[1.0, 2.0], [math.nan, 3.0]], dtype=torch.bfloat16))
    means.add_binned(["low", "middle", "high"], torch.tensor([0, 2, 2, 0]), torch.tensor([1.0, 5.0, math.inf, 3.0]))
    means.add("scalar", torch.tensor(4.0))
    means.add("steps", 2.0)
    means.add("steps", math.nan)


EXPECTED = {"loss": 2.0, "low": 2.0, "high": 5.0, "scalar": 4.0, "steps": 2.0}


@pytest.mark.parametrize("together", [False, True])
def test_what_is_not_finite_does_not_count(together):
    means = RunningMeans("cpu")
    for _ in range(2):
        if together:
            with means.together():
                add_some(means)
        else:
            add_some(means)
    assert means.drain() == EXPECTED
    assert means.drain() == {}
    add_some(means)
    assert means.drain() == EXPECTED


def test_they_go_on_where_they_were():
    means, resumed = RunningMeans("cpu"), RunningMeans("cpu")
    add_some(means)
    resumed.load_state_dict(means.state_dict())
    for other in (means, resumed):
        other.add("loss", torch.tensor([6.0]))
        other.add("steps", 4.0)
    assert means.drain() == resumed.drain() == EXPECTED | {"loss": 3.0, "steps": 3.0}


def test_what_was_added_before_an_error_is_dropped():
    """It may lie in the memory of a graph that was never recorded."""
    means = RunningMeans("cpu")
    with pytest.raises(KeyError), means.together():
        means.add("loss", torch.tensor([1.0]))
        raise KeyError
    with means.together():
        means.add("loss", torch.tensor([3.0]))
    assert means.drain() == {"loss": 3.0}
