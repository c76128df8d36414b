"""What two GPUs would refuse, with tensors that have a device and no memory."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from refine.metrics.measures.spread import ClassSpread
from refine.metrics.statistics import FeatureStatistics


def spread(device):
    found = ClassSpread()
    found._sums = {0: (5, *torch.zeros(2, 12, dtype=torch.float64, device=device))}
    return found


def statistics(device):
    found = FeatureStatistics()
    found._begin(4, device)
    found.num = 5
    return found


@pytest.mark.parametrize("make", [spread, statistics])
@pytest.mark.parametrize("other", ["cpu", "cuda:1"])
def test_what_processes_have_seen_is_merged_across_devices(make, other):
    with FakeTensorMode():
        with pytest.raises(RuntimeError, match="same device"):  # this is what would happen
            torch.zeros(2, device="cuda:0") + torch.zeros(2, device="cuda:1")
        mine = make("cuda:0")
        mine.merge(make(other))
        sums = [mine._sums[0][1]] if isinstance(mine, ClassSpread) else [mine._mean, mine._scatter]
        assert {str(total.device) for total in sums} == {"cuda:0"}
