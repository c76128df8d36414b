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
        found, row, counts = classes.unique(return_inverse=True, return_counts=True)
        row = row.to(pixels.device)
        totals = pixels.new_zeros(len(found), pixels.shape[1]).index_add_(0, row, pixels)
        squares = torch.zeros_like(totals).index_add_(0, row, pixels.square_())
        for index, num, *sums in zip(found.tolist(), counts.tolist(), totals, squares, strict=True):
            self._add(index, num, *(one.clone() for one in sums))  # a view would keep those of all classes

    def merge(self, other: ClassSpread) -> None:
        """Adds what another process has seen, perhaps on another device."""
        for index, sums in other._sums.items():
            self._add(index, *sums)

    def _add(self, index: int, num: int, total: torch.Tensor, squares: torch.Tensor) -> None:
        if index in self._sums:
            before, *mine = self._sums[index]
            total, squares = (a + b.to(a.device) for a, b in zip(mine, (total, squares), strict=True))
            num += before
        self._sums[index] = (num, total, squares)

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
