"""A metric that is a function of the user's own, measured in a run beside those with names."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from refine.networks.bases import Generator


class MetricFunction(Protocol):
    """What a metric of the user's own is: a function of a generator.

    The generator is in eval mode, on the run's device, and called without gradients: `G(z, c)`, see
    `refine.networks.bases.Generator`. Neither its weights nor the state of random numbers are the function's to change;
    the latter is put back. A number leads; of a mapping, the first one does, and all of them are logged.
    """

    def __call__(self, G: Generator, /) -> float | Mapping[str, float]:
        """The number, or several by name."""


@dataclass(frozen=True)
class OwnMetric:
    """A function under a name, and which values are better.

    Attributes:
        name: Of files and tags: letters, digits, '_', '.' and '-'.
        function: See `MetricFunction`.
        direction: 'lower' or 'higher'.

    Raises:
        ValueError: The name cannot be one of a file, or there is no such direction.
    """

    name: str
    function: MetricFunction
    direction: Literal["lower", "higher"] = "lower"
    num: int = 0  # images that it draws, as far as is known

    def __post_init__(self) -> None:
        if not self.name or self.name.strip("-.") != self.name or not all(x.isalnum() or x in "_.-" for x in self.name):
            raise ValueError(f"--metrics: found a metric called {self.name!r}; expected letters, digits, _, . and -")
        if self.direction not in ("lower", "higher"):
            raise ValueError(f"--metrics: the direction of {self.name} is {self.direction!r}; expected lower or higher")

    @property
    def key(self) -> str:
        """Name of the leading number in the results."""
        return self.name

    @property
    def reference_sha256(self) -> None:
        """It is compared with nothing that this toolkit knows."""
        return None

    @torch.no_grad()
    def measure(self, G: Generator, device: torch.device | str, progress: bool = False) -> dict[str, Any]:
        """The numbers: the leading one under `key`, the others under their names.

        Raises:
            ValueError: The function gave something else, or would have ended the program.
            Exception: Whatever else it raises.
        """
        start = time.monotonic()
        try:
            found = self.function(G)
        except SystemExit as error:
            raise ValueError(f"{self.name} called sys.exit({'' if error.code is None else repr(error.code)})") from None
        numbers = {self.name: found} if not isinstance(found, Mapping) else dict(found)
        try:
            values = {str(name): float(value) for name, value in numbers.items()}
        except (TypeError, ValueError, RuntimeError):
            values = {}
        if not values:
            raise ValueError(f"{self.name} gave {type(found).__name__}; expected a number, or numbers by name")
        leading = next(iter(values))
        return {self.key: values.pop(leading), **values, "seconds": round(time.monotonic() - start, 2)}


def as_own_metric(function: OwnMetric | MetricFunction) -> OwnMetric:
    """A function under its own name, and its attribute `direction` where it has one."""
    if isinstance(function, OwnMetric):
        return function
    if not callable(function):
        raise ValueError(f"--metrics: found {type(function).__name__}; expected names, functions, or OwnMetric")
    name = getattr(function, "__name__", type(function).__name__)
    return OwnMetric(str(name).strip("<>_"), function, getattr(function, "direction", "lower"))
