"""How many steps aux takes for one of the student's: a fixed number, or by how far it lags (`--aux-steps=auto`).

Aux is to know the student as it is now. How far it is behind does not show in its loss, whose minimum nobody knows, but
in what one more step still gains. So the loss on fresh images of the student, with the same noise before and after, is
measured around the last auxiliary step of an iteration: L before, L' after. Where (L − L') / L stays above `WORTH`, aux
lags, and takes more steps; where it is below, the step was not worth its time.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from refine.torch_utils import distributed

WORTH = 0.01  # of the loss: what a step has to gain
FIRST, LOWEST, HIGHEST = 2, 1, 8  # steps at the beginning, and limits
GAIN = 20.0  # steps per unit of (L − L') / L beyond WORTH; one measurement has a standard deviation of about 0.03
MEASURED_EVERY, READ_EVERY = 4, 16  # iterations; reading waits for the device
WATCHED_EVERY = 16  # where the number is fixed, and the lag only logged


class Pace:
    """The number of auxiliary steps in an iteration.

    Args:
        steps: The number, or 'auto'.
        device: Where losses are.
    """

    def __init__(self, steps: int | str, device: torch.device):
        self._fixed = None if steps == "auto" else int(steps)
        self._level = float(FIRST)
        self._sums = torch.zeros(2, device=device)  # of L − L' and L since the last reading

    @property
    def steps(self) -> int:
        """Auxiliary steps of this iteration."""
        return round(self._level) if self._fixed is None else self._fixed

    def measures(self, iteration: int) -> bool:
        """Whether the lag is measured in this iteration."""
        return (iteration + 1) % (MEASURED_EVERY if self._fixed is None else WATCHED_EVERY) == 0

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Losses (N,) of the same fresh images and noise before and after the last auxiliary step."""
        if self._fixed is None:
            self._sums += torch.stack([(before - after).sum(), before.sum()])

    def end(self, iteration: int) -> None:
        """At the end of every iteration: adapts the number now and then, alike in all processes."""
        if self._fixed is not None or (iteration + 1) % READ_EVERY:
            return
        drop, loss = distributed.sum_tensor(self._sums).tolist()
        self._sums = torch.zeros_like(self._sums)
        if loss > 0 and math.isfinite(drop):
            self._level = min(max(self._level + GAIN * (drop / loss - WORTH), LOWEST), HIGHEST)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from; every process must come here."""
        return {"level": self._level, "sums": distributed.sum_tensor(self._sums.clone())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there: the first process holds what was gathered, the others begin at nothing."""
        self._level = float(state["level"])
        self._sums = state["sums"].to(self._sums.device) * float(distributed.is_main())
