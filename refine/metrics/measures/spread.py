"""Within-class spread: how different the images of a class are, in pixels."""

from __future__ import annotations

import math

import torch

from refine.metrics.metric import Metric, Numbers, Observed, Row, Sample


class ClassSpread:
    """Within-class spread of images: root mean square difference per pixel between two images of one class.

    In units of [-1, 1] images; averaged over the classes that have at least two images. The mean over all pairs
    follows exactly from each class's sums, so neither images nor pairs are kept. It falls when a generator draws
    the same few images of a class again and again. Images without a class are one class.
    """

    def __init__(self) -> None:
        self._sums: dict[int, tuple[int, torch.Tensor, torch.Tensor]] = {}  # class → num; per pixel sum, sum of squares

    def update(self, batch: Observed) -> None:
        """Adds images by the classes asked for, or else by those that the classifier sees."""
        pixels = batch.images.flatten(1).to(torch.float64)  # sums of integers: exact in any order
        classes = batch.classes
        if classes is None and batch.judgement is not None:
            classes = batch.judgement.argmax(dim=1)
        classes = torch.zeros(len(pixels), dtype=torch.int64) if classes is None else classes.cpu()
        for index in classes.unique().tolist():
            mine = pixels[(classes == index).to(pixels.device)]
            num, total, squares = self._sums.get(index, (0, 0, 0))
            self._sums[index] = (num + len(mine), total + mine.sum(dim=0), squares + mine.square().sum(dim=0))

    def merge(self, other: ClassSpread) -> None:
        """Adds what another process has seen."""
        for index, (num, total, squares) in other._sums.items():
            mine = self._sums.get(index, (0, 0, 0))
            self._sums[index] = (mine[0] + num, mine[1] + total, mine[2] + squares)

    def result(self) -> float:
        """The spread; 0 if no class has two images."""
        spreads = []
        for num, total, squares in self._sums.values():
            if num >= 2:
                variance = (squares - total.square() / num) / (num - 1)
                spreads.append(math.sqrt(2 * max(variance.mean().item(), 0.0)) / 127.5)
        return sum(spreads) / len(spreads) if spreads else 0.0


def _compute(sample: Sample) -> Numbers:
    return Numbers({"spread": sample.collected["spread"].result()})


METRIC = Metric(
    name="spread",
    place=80,
    rows=(Row("spread", "information", "rms pixel difference within a class"),),
    compute=_compute,
    detector="judgement",
    occasion="always",
    collector=ClassSpread,
)
