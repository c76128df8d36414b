"""All pairs in blocks: each pair once, memory bounded, the same numbers on a GPU."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operator gave while this is entered."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("name", OF_PAIRS)
@pytest.mark.parametrize("side", [512, 3000])
def test_no_matrix_of_all_pairs_is_held(monkeypatch, name, side):
    monkeypatch.setattr(blocks, "SIDE", side)
    rng = np.random.RandomState(0)
    fake, real = (torch.from_numpy(rng.standard_normal([3000, 2])) for _ in range(2))  # all pairs take 72 MB
    with Largest() as largest:
        OF_PAIRS[name](fake, real)
    if side == 512:
        assert largest.bytes <= 512 * 3000 * 8, "at most the rows of one block against all"
    elif name not in ("kidsub", "sliced"):  # these never meet all pairs
        assert largest.bytes >= 3000 * 3000 * 8, "with one block for all the limit would be seen to be passed"
