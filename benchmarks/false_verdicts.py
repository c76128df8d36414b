"""How often are two equal generators called different? Verdicts of comparisons in which nothing differs.

    python benchmarks/false_verdicts.py [--nums=2,10,100,2000] [--dims=32] [--trials=200] [--shift=0]

Two sets of synthetic features, of one distribution (ten Gaussian clusters), are compared on three ranges as
`compare_fid.py` compares two networks, and the verdict is asked for. Whatever it says but "not distinguishable" is
wrong. In `near` both sets are of the reference's own distribution, in `far` both are shifted and narrower. Prints how
many of the verdicts are false, in percent, for each metric: with the bootstrap alone, and as comparisons decide. With
`--shift` the second set is shifted by so many standard deviations, and the numbers say how often that is seen.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refine.evaluation.paired import bootstrap_interval, paired_difference
from refine.metrics.measures.frechet import frechet_contributions, frechet_distance
from refine.metrics.measures.kernel import kernel_distance
from refine.metrics.statistics import FeatureStatistics

RANGES = 3
REFERENCE = 1000  # real images
METRICS = ("fd", "kid")


class Population:
    """Ten Gaussian clusters in `dim` dimensions, of which the later ones vary less, as those of real features do."""

    def __init__(self, dim: int, seed: int = 0):
        rng = np.random.RandomState(seed)
        self.centres = rng.standard_normal([10, dim])
        self.scale = 1 / np.sqrt(1 + np.arange(dim) / 8)

    def draw(self, rng: np.random.RandomState, num: int) -> np.ndarray:
        """Features [N, dim]."""
        inside = rng.standard_normal([num, len(self.scale)])
        return (self.centres[rng.randint(10, size=num)] + inside) * self.scale


def measured(features: np.ndarray, real: FeatureStatistics) -> dict[str, tuple[float, torch.Tensor]]:
    """Metric → (number, what each image contributes)."""
    fake = FeatureStatistics(keep_features=True).update(torch.from_numpy(features))
    moments = (fake.mean, fake.covariance, real.mean, real.covariance)
    return {
        "fd": (frechet_distance(*moments), frechet_contributions(fake.features, *moments)),
        "kid": kernel_distance(fake.features, real.features),
    }


def differs(values: list[list[float]], pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[bool, bool]:
    """Whether two sets are called different: by the bootstrap alone, and as comparisons decide."""
    found = paired_difference(values[0], values[1], "lower", pairs)
    low, high = (found["mean"] + end for end in bootstrap_interval(pairs))
    agree = len({value > 0 for value in found["values"]}) == 1
    return agree and (low > 0 or high < 0), found["verdict"] != "not distinguishable"


def compared(population: Population, num: int, far: bool, shift: float, trial: int) -> dict[str, tuple[bool, bool]]:
    """Metric → see `differs`, of one comparison of two sets that differ by `shift` only."""
    rng = np.random.RandomState([trial, num])
    real = FeatureStatistics(keep_features=True).update(torch.from_numpy(population.draw(rng, REFERENCE)))
    sides: list[dict[str, list]] = [{name: [] for name in METRICS} for _ in range(2)]
    for _ in range(RANGES):
        for side, more in zip(sides, (0.0, shift), strict=True):
            features = population.draw(rng, num)
            features = (0.8 * features + 0.5 if far else features) + more * population.scale
            for name, found in measured(features, real).items():
                side[name].append(found)
    answers = {}
    for name in METRICS:
        pairs = [(a[1], b[1]) for a, b in zip(sides[0][name], sides[1][name], strict=True)]
        answers[name] = differs([[value for value, _ in side[name]] for side in sides], pairs)
    return answers


def rates(dim: int, num: int, far: bool, shift: float, trials: int) -> dict[str, tuple[float, float]]:
    """Metric → percentages of comparisons in which two sets are called different, see `differs`."""
    population = Population(dim)
    answers = [compared(population, num, far, shift, trial) for trial in range(trials)]
    counts = {name: np.sum([answer[name] for answer in answers], axis=0) for name in METRICS}
    return {name: (100 * float(count[0]) / trials, 100 * float(count[1]) / trials) for name, count in counts.items()}


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nums", type=numbers, default=[2, 10, 100, 2000], help="images per range")
    parser.add_argument("--dims", type=numbers, default=[32], help="features")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--shift", type=float, default=0.0, help="standard deviations between the two sets")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"| D | N | case | fd, bootstrap alone | fd | kid, bootstrap alone | kid |\n|{'---|' * 7}", flush=True)
    for dim, num, far in itertools.product(options.dims, options.nums, (False, True)):
        found = rates(dim, num, far, options.shift, options.trials)
        cells = [f"{rate:.1f}" for name in METRICS for rate in found[name]]
        print(f"| {dim} | {num} | {'far' if far else 'near'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
