"""All pairs in blocks: each pair once, memory bounded, the same numbers on a GPU."""

import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from refine.metrics import blocks
from refine.metrics.blocks import pairs, squared_radii
from refine.metrics.measures.density_coverage import density_coverage
from refine.metrics.measures.gaussian_kernel import gaussian_mmd
from refine.metrics.measures.kernel import kernel_distance
from refine.metrics.measures.kernel_subsets import kernel_distance_of_subsets
from refine.metrics.measures.precision_recall import precision_recall
from refine.metrics.measures.sliced_wasserstein import directions, sliced_wasserstein

OF_PAIRS = {
    "kid": kernel_distance,
    "kidsub": lambda fake, real: kernel_distance_of_subsets(fake, real, subsets=3, size=100),
    "mmd": lambda fake, real: gaussian_mmd(fake, real, 2.0),
    "pr": lambda fake, real: precision_recall(real, fake),
    "dc": lambda fake, real: density_coverage(real, fake),
    "sliced": lambda fake, real: sliced_wasserstein(fake, real, directions(fake.shape[1])[:9].to(fake.device)),
}


@pytest.fixture
def sets():
    rng = np.random.RandomState(0)
    shapes = ((130, 5), (140, 5))
    return tuple(torch.from_numpy(rng.standard_normal(shape)).float() for shape in shapes)


@pytest.mark.parametrize("side", [1, 7, 20, 64])
def test_each_pair_is_seen_once(monkeypatch, side):
    monkeypatch.setattr(blocks, "SIDE", side)
    x, y = torch.arange(20.0)[:, None], 100 * torch.arange(30.0)[:, None]
    seen = torch.zeros(20, 30)
    for rows, columns, block, other in pairs(x, y, torch.ones(1)):
        assert max(len(block), len(other)) <= side and block.dtype == other.dtype == torch.float64
        assert torch.equal(block, x[rows].double() - 1) and torch.equal(other, y[columns].double() - 1)
        seen[rows, columns] += 1
    assert (seen == 1).all()
    seen = torch.zeros(20, 20)
    for rows, columns, block, other in pairs(x):
        assert torch.equal(block, x[rows].double()) and torch.equal(other, x[columns].double())
        seen[rows, columns] += 1
        if rows != columns:
            seen[columns, rows] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("side", [3, 16, 64])
def test_radii_equal_brute_force(monkeypatch, sets, side):
    monkeypatch.setattr(blocks, "SIDE", side)
    points = sets[0].double()
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").square().sort(dim=1).values
    for k in (1, 3, 5):
        assert torch.allclose(squared_radii(points, k, points.mean(dim=0)), distances[:, k], rtol=1e-10)
    copies = points[:1].expand(9, -1)
    assert (squared_radii(copies, 3, torch.zeros(5)) > 0).all(), "balls of radius 0 hold what coincides with them"


@pytest.mark.parametrize("name", OF_PAIRS)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_gpu_gives_the_same_numbers(monkeypatch, sets, name, device):
    monkeypatch.setattr(blocks, "SIDE", 16)
    expected = OF_PAIRS[name](*sets)
    for found, number in zip(OF_PAIRS[name](*(part.to(device) for part in sets)), expected, strict=True):
        assert not isinstance(found, torch.Tensor) or found.device.type == device
        torch.testing.assert_close(torch.as_tensor(found).cpu(), torch.as_tensor(number), rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limit is on the address space that Linux tells")
@pytest.mark.parametrize("side", [1024, 5000])
def test_no_matrix_of_all_pairs_is_held(monkeypatch, side):
    monkeypatch.setattr(blocks, "SIDE", side)
    rng = np.random.RandomState(0)
    fake, real = (torch.from_numpy(rng.standard_normal([5000, 2])) for _ in range(2))  # all pairs take 200 MB
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (own + 180_000_000,) * 2)
            for function in OF_PAIRS.values():
                function(fake, real)
            status = 0
        finally:
            os._exit(status)
    assert (os.waitpid(child, 0)[1] == 0) == (side == 1024), "with one block for all it does not fit"
