"""How often are two equal generators called different? Verdicts of comparisons in which nothing differs.

    python benchmarks/false_verdicts.py [--nums=2,10,100,2000] [--dims=32] [--trials=400]

Two sets of synthetic features, of one distribution (ten Gaussian clusters), are compared on three ranges as
`compare_fid.py` compares two networks, and the verdict is asked for. Whatever it says but "not distinguishable" is
wrong. In `near` both sets are of the reference's own distribution, in `far` both are shifted and narrower; `shared`
is the part of an image that its latent decides in both networks alike. Prints a row for each: how many of the verdicts
are false, in percent, for each metric; and how often a true difference is seen, where the second set is shifted by
0.2 standard deviations more (`power`).
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

from refine.evaluation.paired import paired_difference
from refine.metrics.measures.frechet import frechet_contributions, frechet_distance
from refine.metrics.measures.kernel import kernel_contributions, kernel_distance
from refine.metrics.statistics import FeatureStatistics

RANGES = 3
REFERENCE = 1000  # real images
METRICS = ("fd", "kid")
SEEN = 0.2  # standard deviations that the second set is shifted by, for the power


class Population:
    """Ten Gaussian clusters in `dim` dimensions, of which the later ones vary less, as those of real features do."""

    def __init__(self, dim: int, seed: int = 0):
        rng = np.random.RandomState(seed)
        self.centres = rng.standard_normal([10, dim])
        self.scale = 1 / np.sqrt(1 + np.arange(dim) / 8)

    def draw(self, rng: np.random.RandomState, latents: np.ndarray, clusters: np.ndarray, shared: float) -> np.ndarray:
        """Features [N, dim] of which the share `shared` of the variance within clusters is that of the latents."""
        own = rng.standard_normal(latents.shape)
        inside = np.sqrt(shared) * latents + np.sqrt(1 - shared) * own
        return (self.centres[clusters] + inside) * self.scale

    def latents(self, rng: np.random.RandomState, num: int) -> tuple[np.ndarray, np.ndarray]:
        return rng.standard_normal([num, len(self.scale)]), rng.randint(10, size=num)


def measured(features: np.ndarray, real: FeatureStatistics) -> dict[str, tuple[float, torch.Tensor]]:
    """Metric → (number, what each image contributes)."""
    fake = FeatureStatistics(keep_features=True).update(torch.from_numpy(features))
    moments = (fake.mean, fake.covariance, real.mean, real.covariance)
    return {
        "fd": (frechet_distance(*moments), frechet_contributions(fake.features, *moments)),
        "kid": (kernel_distance(real.features, fake.features), kernel_contributions(fake.features, real.features)),
    }


def verdicts(population: Population, num: int, far: bool, shared: float, shift: float, trial: int) -> dict[str, str]:
    """Metric → verdict of one comparison, whose two sets differ by `shift` only."""
    rng = np.random.RandomState([trial, num])
    real = FeatureStatistics(keep_features=True)
    real.update(torch.from_numpy(population.draw(rng, *population.latents(rng, REFERENCE), 0.0)))
    sides: list[dict[str, list]] = [{name: [] for name in METRICS} for _ in range(2)]
    for _ in range(RANGES):
        latents, clusters = population.latents(rng, num)
        for side, more in zip(sides, (0.0, shift), strict=True):
            if shared < 1e-9:
                latents, clusters = population.latents(rng, num)
            features = population.draw(rng, latents, clusters, shared)
            features = (0.8 * features + 0.5 if far else features) + more * population.scale
            for name, found in measured(features, real).items():
                side[name].append(found)
    answers = {}
    for name in METRICS:
        values = [[value for value, _ in side[name]] for side in sides]
        pairs = [(a[1], b[1]) for a, b in zip(sides[0][name], sides[1][name], strict=True)]
        answers[name] = paired_difference(values[0], values[1], "lower", pairs)["verdict"]
    return answers


def rates(dim: int, num: int, far: bool, shared: float, shift: float, trials: int) -> dict[str, float]:
    """Metric → percentage of comparisons that say that the two sets differ."""
    population, counts = Population(dim), dict.fromkeys(METRICS, 0)
    for trial in range(trials):
        for name, verdict in verdicts(population, num, far, shared, shift, trial).items():
            counts[name] += verdict != "not distinguishable"
    return {name: 100 * count / trials for name, count in counts.items()}


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nums", type=numbers, default=[2, 10, 100, 2000], help="images per range")
    parser.add_argument("--dims", type=numbers, default=[32], help="features")
    parser.add_argument("--trials", type=int, default=400)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    columns = [f"{name} {what}" for what in ("false %", "power %") for name in METRICS]
    print(f"| D | N | case | shared | {' | '.join(columns)} |\n|{'---|' * (4 + len(columns))}", flush=True)
    for dim, num, far, shared in itertools.product(options.dims, options.nums, (False, True), (0.0, 0.7)):
        found = [rates(dim, num, far, shared, shift, options.trials) for shift in (0.0, SEEN)]
        cells = [f"{rate[name]:.1f}" for rate in found for name in METRICS]
        case = "far" if far else "near"
        print(f"| {dim} | {num} | {case} | {shared:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
