"""Kernel distance of random subsets, the protocol in which KID is published (Bińkowski et al. 2018).

The mean of the unbiased kernel distance over 100 pairs of subsets of 1000 vectors, and its standard deviation over the
subsets. It estimates what `kernel.py` computes of all pairs, less exactly and, for 50,000 images, with a 25th of the
work. The subsets are those that torch-fidelity draws by default, so that the same features give the same number.
"""

from __future__ import annotations

import numpy as np
import torch

from refine.metrics.blocks import check_pair, squared_mmd
from refine.metrics.measures.kernel import polynomial
from refine.metrics.metric import Metric, Numbers, Row, Sample

SUBSETS = 100
SIZE = 1000
SEED = 2020  # of torch-fidelity


def kernel_distance_of_subsets(
    fake: torch.Tensor, real: torch.Tensor, subsets: int = SUBSETS, size: int = SIZE, seed: int = SEED
) -> tuple[float, float, torch.Tensor]:
    """Mean and standard deviation of the kernel distance over pairs of random subsets, each without repetition.

    Args:
        fake: [N, D], N ≥ 2.
        real: [M, D], M ≥ 2, on the same device.
        subsets: Number of pairs of subsets.
        size: Vectors in a subset; where a set has fewer, all subsets are of that many.
        seed: Seed of the draws.

    Returns:
        Mean, standard deviation (divided by the number of subsets, as in the literature), and the influence of each of
        `fake` on the mean, float64 [N]: who is in more subsets has more, so it tells of the draws' noise as well.

    Raises:
        ValueError: If there are fewer than two vectors in a set, or their dimensions differ.
    """
    check_pair(fake, real, (2, 2))
    size = min(size, len(fake), len(real))
    rng = np.random.RandomState(seed)
    influence = torch.zeros(len(fake), dtype=torch.float64, device=fake.device)
    distances = []
    for _ in range(subsets):
        mine, theirs = (
            torch.from_numpy(rng.choice(len(part), size, replace=False)).to(part.device) for part in (fake, real)
        )
        distance, of_subset = squared_mmd(fake[mine], real[theirs], polynomial)
        distances.append(distance)
        influence[mine] += of_subset * (len(fake) / size / subsets)
    return float(np.mean(distances)), float(np.std(distances)), influence


def _compute(sample: Sample) -> Numbers:
    real, fake = sample.both_features
    mean, std, influence = kernel_distance_of_subsets(fake, real)
    return Numbers({"kidsub": mean, "kidsub_std": std}, {"kidsub": influence.cpu()})


METRIC = Metric(
    name="kidsub",
    place=32,
    rows=(
        Row("kidsub", "lower", "kernel distance, mean of 100 subsets of at most 1000", in_space=True),
        Row("kidsub_std", "information", "its standard deviation over the subsets", in_space=True, beside="kidsub"),
    ),
    compute=_compute,
    reference="features",
    keeps_features=True,
    named_like="kidsub50k_full",
    measured_with=("classes", "spread"),
)
