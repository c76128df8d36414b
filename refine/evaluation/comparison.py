"""Two networks beside each other: their numbers over seed ranges, and the paired differences between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from refine.evaluation.paired import mean_and_std, paired_difference
from refine.metrics.evaluate import Measurement

_LOWER_IS_BETTER = ("fid", "fd", "kid")  # how such names begin; everything else that is judged is better when higher


def summarise(runs: Sequence[Measurement]) -> dict[str, Any]:
    """Mean, std and values of each number over the seed ranges, and the mean class histogram and class distances."""
    results = [run.results for run in runs]
    numbers = [key for key, value in results[0].items() if isinstance(value, float) and key != "seconds"]
    summary: dict[str, Any] = {key: mean_and_std([result[key] for result in results]) for key in numbers}
    if "class_histogram" in results[0]:
        columns = zip(*(result["class_histogram"] for result in results), strict=True)
        summary["class_histogram"] = [sum(column) / len(runs) for column in columns]
    if all("per_class" in result for result in results):
        summary["per_class"] = _class_means([result["per_class"] for result in results])
    summary["seconds"] = round(sum(result["seconds"] for result in results), 2)
    return summary


def differences(before: Sequence[Measurement], after: Sequence[Measurement]) -> dict[str, Any]:
    """Metric → `paired_difference`, of every number that both networks have in all seed ranges."""
    found = {}
    for key, value in before[0].results.items():
        runs = [*before, *after]
        if not isinstance(value, float) or key == "seconds" or key.endswith("_std"):
            continue
        if not all(isinstance(run.results.get(key), float) for run in runs):
            continue
        values = [[run.results[key] for run in side] for side in (before, after)]
        pairs = None
        if all(key in run.contributions for run in runs):
            pairs = [(a.contributions[key], b.contributions[key]) for a, b in zip(before, after, strict=True)]
        found[key] = paired_difference(*values, lower_is_better(key), pairs)
    return found


def lower_is_better(key: str) -> bool:
    """Whether smaller values of a metric are better."""
    return key.startswith(_LOWER_IS_BETTER)


def _class_means(tables: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Class → mean and std of its Fréchet distance, for the classes that all ranges measured."""
    by_class: dict[int, list[dict[str, Any]]] = {}
    for table in tables:
        for row in table:
            by_class.setdefault(row["class"], []).append(row)
    whole = {index: rows for index, rows in sorted(by_class.items()) if len(rows) == len(tables)}
    return [
        {"class": index, "num": sum(row["num"] for row in rows), **mean_and_std([row["fd"] for row in rows])}
        for index, rows in whole.items()
    ]
