"""Paired differences: the same seeds for two networks, several seed ranges, one number of each per range."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from scipy.special import stdtrit  # the quantiles of Student's t; scipy.stats would take a second to import


def paired_difference(before: Sequence[float], after: Sequence[float], lower_is_better: bool) -> dict[str, Any]:
    """Mean, standard deviation, values, 95 % interval (Student, paired) and verdict of after − before.

    The verdict is 'not distinguishable' unless the interval leaves out 0.
    """
    result = mean_and_std([b - a for a, b in zip(before, after, strict=True)])
    count = len(result["values"])
    half_width = float(stdtrit(count - 1, 0.975)) * result["std"] / math.sqrt(count)
    low, high = result["mean"] - half_width, result["mean"] + half_width
    better, worse = (high < 0, low > 0) if lower_is_better else (low > 0, high < 0)
    verdict = "better" if better else "worse" if worse else "not distinguishable"
    return {**result, "interval": [low, high], "verdict": verdict}


def mean_and_std(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (N − 1) and the values themselves."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return {"mean": mean, "std": math.sqrt(variance), "values": list(values)}
