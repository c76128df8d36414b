"""Writes digits-reference.npz: `python pretrained/recipes/make_reference.py` (seconds).

The reference of `fd_digits`: mean, covariance and features of all 5,000 real digits in the space of
digits-classifier.safetensors. Also prints how two disjoint sets of 2,000 real digits compare with each other: the best
that any generator can be expected to reach at N = 2000.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from digits import load_digits  # noqa: E402

from refine.metrics.detectors import load_detector  # noqa: E402
from refine.metrics.measures.frechet import frechet_distance  # noqa: E402
from refine.metrics.measures.kernel import kernel_distance  # noqa: E402
from refine.metrics.measures.precision_recall import precision_recall  # noqa: E402
from refine.metrics.references import save_reference  # noqa: E402
from refine.metrics.statistics import FeatureStatistics  # noqa: E402

PRETRAINED = Path(__file__).parents[1]


def statistics_of(features: torch.Tensor) -> FeatureStatistics:
    return FeatureStatistics(keep_features=True).update(features)


@click.command(help=__doc__)
@click.option(
    "--detector", "detector_path", default=str(PRETRAINED / "digits-classifier.safetensors"), show_default=True
)
@click.option("--out", default=str(PRETRAINED / "digits-reference.npz"), show_default=True)
@click.option("--num", default=2000, show_default=True, help="Size of the two sets that are compared.")
def main(detector_path: str, out: str, num: int) -> None:
    detector = load_detector(detector_path)
    images, _ = load_digits()
    order = np.random.RandomState(0).permutation(len(images))  # they come sorted by class
    features = torch.cat([detector(batch) for batch in torch.from_numpy(images[order]).split(500)])
    save_reference(out, statistics_of(features), detector)
    click.echo(f"{out}: {len(features)} images, {Path(out).stat().st_size / 1e6:.2f} MB")
    one, other = statistics_of(features[:num]), statistics_of(features[num : 2 * num])
    distance = frechet_distance(one.mean, one.covariance, other.mean, other.covariance)
    kernel, _ = kernel_distance(one.features, other.features)
    precision, recall = precision_recall(one.features, other.features)
    click.echo(
        f"real vs real, {num} and {num} disjoint: fd_digits {distance:.3f}, kid_digits {kernel:.5f}, "
        f"precision {precision:.3f}, recall {recall:.3f}"
    )


if __name__ == "__main__":
    main()
