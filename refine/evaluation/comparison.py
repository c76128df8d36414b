"""Two networks beside each other: their numbers over seed ranges, the paired differences, and the verdict in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from refine.evaluation.paired import VERDICTS, paired_difference
from refine.metrics.detectors import space_of_results
from refine.metrics.evaluate import Measurement
from refine.metrics.metric import mean_and_std
from refine.metrics.registry import METRICS, rows_in


def compared(before: Sequence[Measurement], after: Sequence[Measurement]) -> dict[str, Any]:
    """The numbers of two networks, each measured on the same seed ranges.

    Returns:
        JSON-able: `before` and `after`, see `summarise`; `difference`, see `differences`; `metric`, the leading
        distance; its `ratio` and `verdict`; and what the numbers are based on.
    """
    first = before[0].results
    space = space_of_results(first)
    metric = METRICS[0].rows[0].key(space)
    results: dict[str, Any] = {"before": summarise(before), "after": summarise(after)}
    results["difference"] = differences(before, after)
    results["metric"] = metric
    results["ratio"] = results["after"][metric]["mean"] / max(results["before"][metric]["mean"], 1e-12)
    results["verdict"] = results["difference"][metric]["verdict"]
    return results | {key: first[key] for key in ("detector", "reference", "quantisation", "covariance", "versions")}


def summarise(runs: Sequence[Measurement]) -> dict[str, Any]:
    """Mean, std and values of each number over the seed ranges, and what else the metrics say of all ranges."""
    results = [run.results for run in runs]
    summary: dict[str, Any] = {}
    for key in rows_in(space_of_results(results[0]), beside=True):
        if all(key in result for result in results):
            summary[key] = mean_and_std([result[key] for result in results])
    for metric in METRICS:
        if metric.combine is not None:
            summary |= metric.combine(results)
    summary["seconds"] = round(sum(result["seconds"] for result in results), 2)
    return summary


def differences(before: Sequence[Measurement], after: Sequence[Measurement]) -> dict[str, Any]:
    """Key → `paired_difference`, of every row that both networks have in all seed ranges."""
    found, runs = {}, [*before, *after]
    for key, row in rows_in(space_of_results(before[0].results)).items():
        if not all(key in run.results for run in runs):
            continue
        values = [[run.results[key] for run in side] for side in (before, after)]
        pairs = None
        if all(key in run.contributions for run in runs):
            pairs = [(a.contributions[key], b.contributions[key]) for a, b in zip(before, after, strict=True)]
        found[key] = paired_difference(values[0], values[1], row.direction, pairs)
    return found


def one_line(curve: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of a curve that a line can join: where there are averages of several lengths, those of one of them."""
    chosen = next((row for row in curve if row["judged"]), curve[-1])
    return [row for row in curve if row.get("average") == chosen.get("average")]


def in_words(results: Mapping[str, Any]) -> str:
    """The verdict in plain words, with what quality and diversity did meanwhile."""
    metric, difference = results["metric"], results["difference"]
    before, after = (results[side][metric]["mean"] for side in ("before", "after"))
    low, high = difference[metric]["interval"]
    opening = {
        "better": f"The second network is better: {metric} fell from {before:.3g} to {after:.3g}",
        "worse": f"The second network is worse: {metric} rose from {before:.3g} to {after:.3g}",
        "not distinguishable": f"They are not distinguishable: {metric} is {before:.3g} before and {after:.3g} after",
    }[results["verdict"]]
    parts = [f"{opening} (difference {difference[metric]['mean']:+.3g}, 95 % interval {low:+.3g} to {high:+.3g})."]
    for key, row in rows_in(space_of_results(results)).items():
        if row.aspect and key in difference:
            fell, rose = VERDICTS[row.direction]
            verb = {rose: "rose", fell: "fell"}.get(difference[key]["verdict"], "did not change measurably")
            a, b = (results[side][key]["mean"] for side in ("before", "after"))
            parts.append(f"{key.replace('_', ' ').capitalize()} ({row.aspect}) {verb}: {a:.3f} → {b:.3f}.")
    return " ".join(parts)
