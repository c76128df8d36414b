"""All metrics: the `METRIC` of every file in `refine.metrics.measures`, in the order of their places."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterable

from refine.metrics import measures
from refine.metrics.detectors import FeatureSpace
from refine.metrics.metric import Metric, Row


def ordered(metrics: Iterable[Metric]) -> tuple[Metric, ...]:
    """Metrics in the order of their places.

    Raises:
        ValueError: Two of them, or two of their rows, have the same name or place.
    """
    found = tuple(sorted(metrics, key=lambda metric: metric.place))
    names = {
        "name": [metric.name for metric in found],
        "place": [str(metric.place) for metric in found],
        "row": [row.name for metric in found for row in metric.rows],
    }
    for what, values in names.items():
        if twice := {value for value in values if values.count(value) > 1}:
            raise ValueError(f"two metrics have the {what} {', '.join(sorted(twice))}")
    return found


def _found() -> Iterable[Metric]:
    for module in pkgutil.iter_modules(measures.__path__, f"{measures.__name__}."):
        yield importlib.import_module(module.name).METRIC


#: In the order of tables; the first one leads comparisons.
METRICS = ordered(_found())
#: Names of those that cost next to nothing beside the images.
USUAL = tuple(metric.name for metric in METRICS if metric.occasion == "always")
#: Names of those that take longer.
ON_REQUEST = tuple(metric.name for metric in METRICS if metric.occasion == "asked")
#: Names of those that are measured where both networks of a comparison have classes.
WITH_CLASSES = tuple(metric.name for metric in METRICS if metric.occasion == "classes")


def chosen(names: Iterable[str]) -> tuple[Metric, ...]:
    """The metrics of these names, in the order of tables.

    Raises:
        ValueError: There is no metric of a name.
    """
    names, known = set(names), [metric.name for metric in METRICS]
    if unknown := names - set(known):
        raise ValueError(f"{', '.join(sorted(unknown))} is unknown; expected metrics among {', '.join(known)}")
    return tuple(metric for metric in METRICS if metric.name in names)


def near_to(name: str) -> tuple[Metric, str] | None:
    """The metric that is near to what a name asks for and is not called that, and the published name; None if none."""
    found = [(metric, other) for metric in METRICS for other in metric.resembles]
    return next(((metric, other) for metric, other in found if re.match(rf"{other}(?![a-z])", name.lower())), None)


def rows_in(space: FeatureSpace, beside: bool = False) -> dict[str, Row]:
    """What results of this space call their numbers → rows of tables, in their order.

    Args:
        space: The feature space.
        beside: Also the numbers that accompany others.
    """
    return {row.key(space): row for metric in METRICS for row in metric.rows if beside or row.beside is None}
