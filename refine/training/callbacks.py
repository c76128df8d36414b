"""Functions of a caller in Python that are told of the course of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

_METRICS = "Metrics/"  # how the tags of metrics begin


@dataclass(frozen=True)
class Event:
    """A moment of a run: before its first step, and at the end of every tick, after what it saves and measures.

    Attributes:
        kimg: Thousands of images through the student step so far.
        scalars: What TensorBoard shows of this tick, by tag: 'Loss/aux', 'Timing/img_per_sec', …
        metrics: What was measured now, as '<metric>/<number>': 'fd2k-digits/fd_digits', …; empty between snapshots.
    """

    kimg: float
    scalars: Mapping[str, float]
    metrics: Mapping[str, float]
    _draw: Callable[[Sequence[int]], torch.Tensor] = field(repr=False)
    _stop: Callable[[], None] = field(repr=False)

    def images(self, seeds: Sequence[int] = range(16)) -> torch.Tensor:
        """Images of the student's average as it is now, uint8 [N, C, H, W] on the CPU; drawn when this is called.

        Seeds give the same latents and classes as in `generate.py`.
        """
        return self._draw(seeds)

    def stop(self) -> None:
        """Ends the run after this moment; its state is saved, and its result is that of a run that came to its end."""
        self._stop()


class CallbackMonitor:
    """A `Monitor` that gathers what it is told, and calls functions with it.

    Args:
        callbacks: Called one after the other with each `Event`; what they return does not matter, what they raise ends
            the run.
        draw, stop: Of `Event`.
    """

    def __init__(
        self,
        callbacks: Sequence[Callable[[Event], object]],
        draw: Callable[[Sequence[int]], torch.Tensor],
        stop: Callable[[], None],
    ):
        self._callbacks, self._draw, self._stop = callbacks, draw, stop
        self._scalars: dict[str, float] = {}

    def scalars(self, values: Mapping[str, float], kimg: float) -> None:
        self._scalars |= values

    def tick(self, kimg: float) -> None:
        told, self._scalars = self._scalars, {}
        metrics = {name.removeprefix(_METRICS): value for name, value in told.items() if name.startswith(_METRICS)}
        scalars = {name: value for name, value in told.items() if not name.startswith(_METRICS)}
        for callback in self._callbacks:
            callback(Event(kimg, scalars, metrics, self._draw, self._stop))

    def begin(self, options: dict[str, Any], leading: Mapping[str, str]) -> None:
        """The caller knows."""

    def image(self, name: str, image: torch.Tensor, kimg: float) -> None:
        """Those of an event are drawn when they are asked for."""

    def class_histogram(self, counts: list[float], kimg: float) -> None:
        """Not told."""

    def outcome(self, numbers: Mapping[str, float]) -> None:
        """The caller gets a result."""

    def forget_after(self, kimg: float) -> None:
        self._scalars = {}

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing is open."""
