"""Who is told of the course of a run: TensorBoard, Weights & Biases, functions of a caller in Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch


class Monitor(Protocol):
    """What the loop tells. Times are in kimg, thousands of images through the student step."""

    def begin(self, options: dict[str, Any], leading: Mapping[str, str]) -> None:
        """A run begins: all options, as JSON has them; and the metrics by name, with the name of the leading number."""

    def scalars(self, values: Mapping[str, float], kimg: float) -> None:
        """Numbers by tag, 'Loss/aux'; those of metrics are 'Metrics/<metric>/<number>'."""

    def image(self, name: str, image: torch.Tensor, kimg: float) -> None:
        """A picture, uint8 (C, H, W)."""

    def class_histogram(self, counts: list[float], kimg: float) -> None:
        """Share of each class among the images of a metric."""

    def tick(self, kimg: float) -> None:
        """All that there is to tell of this moment has been told."""

    def outcome(self, numbers: Mapping[str, float]) -> None:
        """What the run came to by its first metric, see `report.outcome`."""

    def forget_after(self, kimg: float) -> None:
        """The run goes back to `kimg`: what was told of the time after it is void."""

    def flush(self) -> None:
        """What was told is to be seen."""

    def close(self) -> None:
        """Nothing more will be told."""


class Monitors:
    """Several as one; none at all in the processes of a run that do not speak."""

    def __init__(self, monitors: Sequence[Monitor] = ()):
        self._all = tuple(monitors)

    def begin(self, options: dict[str, Any], leading: Mapping[str, str]) -> None:
        for monitor in self._all:
            monitor.begin(options, leading)

    def scalars(self, values: Mapping[str, float], kimg: float) -> None:
        for monitor in self._all:
            monitor.scalars(values, kimg)

    def image(self, name: str, image: torch.Tensor, kimg: float) -> None:
        for monitor in self._all:
            monitor.image(name, image, kimg)

    def class_histogram(self, counts: list[float], kimg: float) -> None:
        for monitor in self._all:
            monitor.class_histogram(counts, kimg)

    def tick(self, kimg: float) -> None:
        for monitor in self._all:
            monitor.tick(kimg)

    def outcome(self, numbers: Mapping[str, float]) -> None:
        for monitor in self._all:
            monitor.outcome(numbers)

    def forget_after(self, kimg: float) -> None:
        for monitor in self._all:
            monitor.forget_after(kimg)

    def flush(self) -> None:
        for monitor in self._all:
            monitor.flush()

    def close(self) -> None:
        for monitor in self._all:
            monitor.close()
