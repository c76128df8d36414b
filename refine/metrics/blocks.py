"""All pairs of two large sets of features, a block at a time, on the device that they are on.

50,000 × 50,000 distances would take 20 GB in float64. Here a block of them is held: at D features a CPU needs about
(24·D + 32·SIDE)·SIDE bytes beside the features themselves, 84 MB for D = 2048, and a GPU 0.7 GB. Everything is float64;
features may be float32 and are converted block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

SIDE = 1024  # of a block on a CPU
_GPU_TIMES = 4  # a GPU takes larger ones, or it would wait for the next

#: Blocks [n, D] and [m, D] of two sets, float64 → the kernel of all their pairs [n, m].
Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def check_pair(first: torch.Tensor, second: torch.Tensor, least: tuple[int, int]) -> None:
    """Raises ValueError if two sets [N, D] and [M, D] have fewer features than `least`, or dimensions differ."""
    if len(first) < least[0] or len(second) < least[1] or first.shape[1] != second.shape[1]:
        raise ValueError(
            f"features have shapes {list(first.shape)} and {list(second.shape)}, "
            f"expected [N, D] and [M, D] with N at least {least[0]} and M at least {least[1]}"
        )


def pairs(
    x: torch.Tensor, y: torch.Tensor | None = None, centre: torch.Tensor | None = None
) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor]]:
    """Blocks of x and y that together are all pairs of their vectors.

    Args:
        x: [N, D].
        y: [M, D] on the same device. None = pairs of x with itself, each block with those that do not come before it,
            since distances and kernels are symmetric: the other half is to be had by transposing.
        centre: [D], subtracted from both.

    Yields:
        Which of x, which of y, and these vectors: float64 [n, D] and [m, D].
    """
    side = SIDE * (1 if x.device.type == "cpu" else _GPU_TIMES)
    for first in range(0, len(x), side):
        rows, block = _block(x, first, side, centre)
        for second in range(0 if y is not None else first, len(x if y is None else y), side):
            columns, other = _block(x if y is None else y, second, side, centre)
            yield rows, columns, block, other


def _block(x: torch.Tensor, first: int, side: int, centre: torch.Tensor | None) -> tuple[slice, torch.Tensor]:
    part = slice(first, min(first + side, len(x)))
    block = x[part].to(torch.float64)
    return part, block if centre is None else block - centre


def squared_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """|x|² + |y|² − 2x·y of all pairs of float64 [n, D] and [m, D]. Rounding leaves about 1e-16·|x|²: with vectors near
    the origin least, and coinciding ones may be that far from 0, on either side."""
    products = torch.addmm(y.square().sum(dim=1), x, y.T, alpha=-2)
    return products.add_(x.square().sum(dim=1, keepdim=True))


def squared_radii(points: torch.Tensor, k: int, centre: torch.Tensor) -> torch.Tensor:
    """Squared radii of balls around `points` [N, D] that reach to the k-th nearest other point, float64 [N]; N > k.

    They are larger by what rounding may leave of a distance, so that the k-th neighbour itself is in the ball, and
    whatever coincides with the centre of a ball of radius 0.

    Args:
        points: The centres of the balls, any floating-point type.
        k: The neighbour that a ball reaches to.
        centre: [D], near the middle of the points.
    """
    nearest = torch.full([len(points), k + 1], torch.inf, dtype=torch.float64, device=points.device)
    farthest = torch.zeros([], dtype=torch.float64, device=points.device)

    def see(part: slice, distances: torch.Tensor) -> None:
        found = distances.topk(min(k + 1, distances.shape[1]), dim=1, largest=False).values
        nearest[part] = torch.cat([nearest[part], found], dim=1).topk(k + 1, dim=1, largest=False).values

    for rows, columns, x, y in pairs(points, centre=centre):
        distances = squared_distances(x, y)
        see(rows, distances)
        if columns == rows:
            farthest = torch.maximum(farthest, x.square().sum(dim=1).max())
        else:
            see(columns, distances.T)
    return nearest[:, -1].clamp(min=0) + 1e-12 * farthest  # the nearest of all is the point itself


def squared_mmd(x: torch.Tensor, y: torch.Tensor, kernel: Kernel) -> tuple[float, torch.Tensor]:
    """Squared maximum mean discrepancy of two samples, and the influence of each of `x` on it.

    The estimate is the unbiased one of Gretton et al. 2012 ("A kernel two-sample test", eq. 3): all pairs, none of a
    vector with itself. For equal distributions it scatters about 0, so it can be slightly negative.

    Args:
        x: [N, D], N ≥ 2.
        y: [M, D], M ≥ 2, on the same device.
        kernel: Symmetric.

    Returns:
        The estimate, and Hájek's projection of it on the vectors of `x`, float64 [N] of mean 0.

    Raises:
        ValueError: There are fewer than two vectors in a set, or their dimensions differ.
    """
    check_pair(x, y, (2, 2))
    within_x = _sums_within(x, kernel) / (len(x) - 1)
    within_y = _sums_within(y, kernel) / (len(y) - 1)
    across = torch.zeros_like(within_x)
    for rows, _, block, other in pairs(x, y):
        across[rows] += kernel(block, other).sum(dim=1)
    across /= len(y)
    influence = 2 * (within_x - across)
    return (within_x.mean() + within_y.mean() - 2 * across.mean()).item(), influence - influence.mean()


def _sums_within(x: torch.Tensor, kernel: Kernel) -> torch.Tensor:
    """Sum of the kernel of each vector with all others, float64 [N]."""
    sums = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for rows, columns, block, other in pairs(x):
        values = kernel(block, other)
        if columns == rows:
            values.diagonal().zero_()
        else:
            sums[columns] += values.sum(dim=0)
        sums[rows] += values.sum(dim=1)
    return sums
