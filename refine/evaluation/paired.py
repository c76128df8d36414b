"""Paired differences: the same seeds for two networks, several seed ranges, one number of each per range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit  # the quantiles of Student's t; scipy.stats would take a second to import

from refine.metrics.metric import mean_and_std

REPLICATES = 1000
#: Images per seed range from which on the bootstrap is relied on alone (benchmarks/false_verdicts.py).
ENOUGH_IMAGES = 200
#: Direction of a metric → verdicts for a value that has fallen, and for one that has risen.
VERDICTS = {"lower": ("better", "worse"), "higher": ("worse", "better"), "information": ("lower", "higher")}


def paired_difference(
    before: Sequence[float],
    after: Sequence[float],
    direction: str,
    contributions: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> dict[str, Any]:
    """Mean, standard deviation, values, 95 % interval and verdict of after − before.

    The interval is a paired bootstrap over the images where their contributions are known, otherwise Student's over
    the seed ranges, which is far wider. The bootstrap knows contributions to first order only, which is too little for
    few images: of less than `ENOUGH_IMAGES` the interval is the wider of both. The verdict is 'not distinguishable'
    unless the interval leaves out 0 and all ranges agree about the sign; then it is 'better' or 'worse', or, where
    neither is, 'lower' or 'higher'.

    Args:
        before, after: One number for each seed range.
        direction: Which values of the metric are better: 'lower', 'higher' or 'information'.
        contributions: For each range, what each image contributes before and after: float64 [N] each, the same seeds
            in the same order; see `refine.metrics.metric.Numbers`.

    Raises:
        ValueError: The direction is unknown.
    """
    if direction not in VERDICTS:
        raise ValueError(f"the direction is {direction!r}; expected one of {', '.join(VERDICTS)}")
    result = mean_and_std([b - a for a, b in zip(before, after, strict=True)])
    count = len(result["values"])
    half_width = float(stdtrit(count - 1, 0.975)) * result["std"] / math.sqrt(count)
    low, high, method = result["mean"] - half_width, result["mean"] + half_width, "Student"
    if contributions is not None:
        ends = [result["mean"] + bound for bound in bootstrap_interval(contributions)]
        if all(len(images) >= ENOUGH_IMAGES for images, _ in contributions):
            (low, high), method = ends, "paired bootstrap"
        else:
            low, high, method = min(low, ends[0]), max(high, ends[1]), "the wider of both"
    agree = all(value < 0 for value in result["values"]) or all(value > 0 for value in result["values"])
    fell, rose = VERDICTS[direction]
    verdict = "not distinguishable"
    if agree and (high < 0 or low > 0):
        verdict = fell if high < 0 else rose
    return {**result, "interval": [low, high], "method": method, "verdict": verdict}


def bootstrap_interval(
    contributions: Sequence[tuple[torch.Tensor, torch.Tensor]], replicates: int = REPLICATES, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of the error of the mean difference: images are drawn with replacement, both sides' together.

    Args:
        contributions: As for `paired_difference`.
        replicates: Draws.
        seed: Seed of the draws, so that the same images give the same interval.
    """
    rng = np.random.RandomState(seed)
    total = np.zeros(replicates)
    for before, after in contributions:
        difference = (after - before).numpy()
        difference = difference - difference.mean()
        if difference.any():  # a network against itself draws nothing
            for rows in np.array_split(np.arange(replicates), max(replicates * len(difference) >> 20, 1)):
                drawn = rng.randint(len(difference), size=[len(rows), len(difference)])  # at most some 8 MiB
                total[rows] += difference[drawn].mean(axis=1)
    low, high = np.quantile(total / len(contributions), [0.025, 0.975])
    return float(low), float(high)
