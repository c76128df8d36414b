"""A comparison as plain text: the table of numbers, the curve of a run, and what the numbers mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from refine.evaluation.comparison import one_line
from refine.metrics.detectors import space_of_results
from refine.metrics.metric import plus_minus
from refine.metrics.registry import rows_in

BETTER = {"lower": "lower is better", "higher": "higher is better", "information": ""}
BESIDE = ("teacher", "real")  # further columns, where they were asked for
_BLOCKS = "▁▂▃▄▅▆▇█"


def text_table(results: Mapping[str, Any]) -> str:
    """The comparison as an aligned plain-text table: mean ± standard deviation over the seed ranges."""
    further = [name for name in BESIDE if name in results]
    rows = [("", "before", "after", "difference", *further, "")]
    for key, (_, direction) in shown_rows(results).items():
        cells = [plus_minus(results[side][key]) for side in ("before", "after")]
        cells.append(plus_minus(results["difference"][key], "+"))
        cells += [plus_minus(results[name][key]) if key in results[name] else "" for name in further]
        rows.append((key, *cells, direction))
    return _aligned(rows)


def curve_text(results: Mapping[str, Any]) -> str:
    """The curve of a run: a sparkline of the leading distance, and a line for each snapshot."""
    metric, curve = results["metric"], results["curve"]
    shares = [
        key for key, row in rows_in(space_of_results(results)).items() if row.in_curve and key in results["before"]
    ]
    rows = [("kimg", metric, *shares, "")]
    rows.append(("before", *(plus_minus(results["before"][key]) for key in (metric, *shares)), ""))
    for point in curve:
        mark = "judged" if point["judged"] else ""
        when = " ".join(filter(None, (f"{point['kimg']:g}", point.get("average"))))
        rows.append((when, *(plus_minus(point[key]) for key in (metric, *shares)), mark))
    values = [results["before"][metric]["mean"], *(point[metric]["mean"] for point in one_line(curve))]
    return f"{metric} of the run: {sparkline(values)}\n{_aligned(rows)}"


def sparkline(values: Sequence[float]) -> str:
    """A block for each value, from 0, or the smallest if that is below, to the largest."""
    low, high = min(0.0, *values), max(values)
    span = high - low or 1.0
    return "".join(_BLOCKS[round((value - low) / span * (len(_BLOCKS) - 1))] for value in values)


def shown_rows(results: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Names of the numbers in a comparison → what each says, and which values are better; in reading order."""
    rows = rows_in(space_of_results(results)).items()
    return {key: (row.explanation, BETTER[row.direction]) for key, row in rows if key in results["difference"]}


def feature_space_note(results: Mapping[str, Any]) -> str:
    """One sentence: in which space distances were measured, and whether they are FID."""
    detector, reference = results["detector"], results.get("reference") or {}
    if reference.get("teacher"):
        return (
            f"Distances are measured in the features of the detector '{detector['name']}', against images of the "
            f"teacher {reference['name']}. This is not FID: it says nothing of what the teacher itself gets wrong."
        )
    if detector["fid_basis"]:
        return (
            "Distances are measured in the features of Inception-2015-12-05: this is the FID of the literature "
            f"({detector['fid_basis']})."
        )
    if "note" in detector:
        return str(detector["note"])
    return (
        f"Distances are measured in the {detector['feature_dim']} features of the detector '{detector['name']}'. "
        "This is not FID: its numbers can only be compared with others from the same detector weights."
    )


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """The first and the last column to the left, the numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        numbers = [cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers, row[-1]]).rstrip())
    return "\n".join(lines)
