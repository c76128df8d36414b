"""What people look at after a comparison: a picture of both grids, a plain table, a one-page HTML report."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from refine.dnnlib import replaced_atomically
from refine.evaluation.panels import drawn
from refine.images import image_grid, png_bytes, to_pil
from refine.metrics.detectors import space_of_results
from refine.metrics.metric import Table, plus_minus
from refine.metrics.registry import METRICS, rows_in

_BETTER = {"lower": "lower is better", "higher": "higher is better", "information": ""}


def text_table(results: dict[str, Any]) -> str:
    """The comparison as an aligned plain-text table: mean ± standard deviation over the seed ranges."""
    rows = [("", "before", "after", "difference", "")]
    for name, (_, direction) in _rows(results).items():
        before, after, difference = (results[side][name] for side in ("before", "after", "difference"))
        rows.append((name, plus_minus(before), plus_minus(after), plus_minus(difference, "+"), direction))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = [
        [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:4], widths[1:4], strict=True)), row[4]]
        for row in rows
    ]
    return "\n".join("  ".join(line).rstrip() for line in cells)


def side_by_side(before: torch.Tensor, after: torch.Tensor, captions: Sequence[str], columns: int) -> Image.Image:
    """Two grids beside each other under their captions.

    Args:
        before, after: Images [N, C, H, W], uint8 or floats in [-1, 1]; the same latents at the same place.
        captions: One line for each.
        columns: Images per row of each grid.
    """
    grids = [to_pil(image_grid(images, columns)).convert("RGB") for images in (before, after)]
    scale = max(640 // grids[0].width, 1)  # whole pixels: small images are enlarged without blurring
    grids = [grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST) for grid in grids]
    gap, head = 16, 36
    width, height = grids[0].width, max(grid.height for grid in grids)
    page = Image.new("RGB", (2 * width + 3 * gap, height + head + gap), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=18)
    for index, (grid, caption) in enumerate(zip(grids, captions, strict=True)):
        left = gap + index * (width + gap)
        draw.text((left, head / 2), caption, fill="black", font=font, anchor="lm")
        page.paste(grid, (left, head))
    return page


def metrics_figure(results: dict[str, Any]) -> bytes:
    """PNG: the leading distance in each seed range, and the classes of the images where a classifier saw them."""
    from matplotlib.figure import Figure  # a second to import, and only needed here

    leading, bars = results["metric"], _of_metrics("bars", results)
    figure = Figure(figsize=(9, 3), dpi=110, layout="constrained")
    panels = figure.subplots(1, 1 + len(bars), squeeze=False)[0]
    pairs = zip(results["before"][leading]["values"], results["after"][leading]["values"], strict=True)
    for (low, high), label in zip(pairs, results["seeds"], strict=True):
        panels[0].plot(["before", "after"], [low, high], marker="o", label=f"seeds {label}")
    panels[0].set(ylabel=leading, ylim=(0, None), xlim=(-0.3, 1.3))
    for panel, shown in zip(panels[1:], bars, strict=True):
        for offset, side, heights in ((-0.2, "before", shown.before), (0.2, "after", shown.after)):
            panel.bar([k + offset for k in range(len(heights))], heights, width=0.4, label=side)
        panel.axhline(shown.level, color="black", linewidth=0.8, linestyle=":", label=shown.level_label)
        panel.set(xlabel=shown.xlabel, ylabel=shown.ylabel)
    return drawn(figure)


def write_html(path: str | os.PathLike, results: dict[str, Any], figures: Mapping[str, Image.Image]) -> None:
    """Writes the one-page report; it holds its pictures itself and needs no network.

    Args:
        path: The file, replaced as a whole.
        results: What `refine.evaluation.compare.compare` returned.
        figures: 'comparison' (the grids, from `side_by_side`), and those of `refine.evaluation.panels` by their names.
    """
    page = _PAGE.format(
        title=html.escape(f"{results['before']['name']} → {results['after']['name']}"),
        verdict=html.escape(results["verdict"]),
        colour={"better": "#1a7f37", "worse": "#b42318"}.get(results["verdict"], "#57606a"),
        summary=html.escape(results["summary"]),
        space=html.escape(feature_space_note(results)),
        picture=_data_uri(png_bytes(figures["comparison"])),
        panels=_html_panels(figures),
        intervals=html.escape(_interval_note(results)),
        tables="\n".join(map(_html_table, _of_metrics("table", results))),
        figure=_data_uri(metrics_figure(results)),
        metrics=_html_metrics(results),
        facts=_html_facts(results),
    )
    with replaced_atomically(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def feature_space_note(results: dict[str, Any]) -> str:
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
        return detector["note"]
    return (
        f"Distances are measured in the {detector['feature_dim']} features of the detector '{detector['name']}'. "
        "This is not FID: its numbers can only be compared with others from the same detector weights."
    )


def _rows(results: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Names of the numbers in a comparison → what each says, and which values are better; in reading order."""
    rows = rows_in(space_of_results(results)).items()
    return {key: (row.explanation, _BETTER[row.direction]) for key, row in rows if key in results["difference"]}


def _of_metrics(what: str, results: Mapping[str, Any]) -> list[Any]:
    """The tables, or the bars, that the metrics have for a comparison."""
    makers = [getattr(metric, what) for metric in METRICS]
    found = [make(results["before"], results["after"]) for make in makers if make is not None]
    return [one for one in found if one is not None]


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _html_metrics(results: dict[str, Any]) -> str:
    lines = []
    for name, explanation in _rows(results).items():
        before, after, difference = (results[side][name] for side in ("before", "after", "difference"))
        low, high = difference["interval"]
        cells = [plus_minus(before), plus_minus(after), plus_minus(difference, "+"), f"{low:+.3g} to {high:+.3g}"]
        numbers = "".join(f"<td class=number>{cell}</td>" for cell in cells)
        note = html.escape("; ".join(filter(None, explanation)))
        lines.append(f"<tr><th>{html.escape(name)}</th>{numbers}<td>{note}</td></tr>")
    return "\n".join(lines)


def _interval_note(results: dict[str, Any]) -> str:
    """How the intervals were made."""
    by_ranges = [name for name, found in results["difference"].items() if found["method"] == "Student"]
    text = "The interval is a paired bootstrap over the images"
    return f"{text}; for {', '.join(by_ranges)} it is Student's over the seed ranges." if by_ranges else f"{text}."


_PANELS = {  # figure → heading, what it shows
    "curve": ("The run", "Every snapshot on the same seeds; the band is the standard deviation over the seed ranges."),
    "diversity": ("Look-alikes", "Pairs of images, one above the other, of one class where there are classes."),
    "nearest": ("Nearest real images", "Nearest in feature space, which is not always what looks nearest."),
}


def _html_panels(figures: Mapping[str, Image.Image]) -> str:
    parts = []
    for name, (heading, text) in _PANELS.items():
        if name in figures:
            source = _data_uri(png_bytes(figures[name]))
            parts.append(f'<h2>{heading}</h2>\n<img src="{source}" alt="{heading}">\n<p class="note">{text}</p>')
    return "\n".join(parts)


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    rows = "\n".join(
        f"<tr><th>{html.escape(name)}</th>"
        + "".join(f"<td class=number>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, *cells in table.rows
    )
    return (
        f"<h2>{html.escape(table.heading)}</h2>\n<table>\n<tr>{head}</tr>\n{rows}\n</table>\n"
        f'<p class="note">{html.escape(table.note)}</p>'
    )


def _html_facts(results: dict[str, Any]) -> str:
    detector, reference = results["detector"], results["reference"]
    facts = {
        "before": _html_network(results["before"]),
        "after": _html_network(results["after"]),
        "images": f"{results['num']} per seed range, seeds {', '.join(results['seeds'])}; the same for both networks",
        "detector": f"{detector['name']} (sha256 {detector['sha256'][:16]}…)",
        "reference": f"{reference['name']} (sha256 {reference['sha256'][:16]}…), {reference['num'] or '?'} images",
        "resize": str(detector["resize"]),
        "quantisation": results["quantisation"],
        "covariance": results["covariance"],
        "versions": ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        "time": f"{results['seconds']:.0f} s on {results['device']}",
    }
    return "\n".join(f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in facts.items())


def _html_network(side: dict[str, Any]) -> str:
    learnt = f", refined with {side['refined_with']}" if "refined_with" in side else ""
    return f"{side['path']} (sha256 {side['sha256'][:16]}…), {side['sampling']}{learnt}"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1f2328; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.4rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
.verdict {{ border-left: 6px solid {colour}; padding: .4rem 1rem; background: #f6f8fa; }}
.verdict strong {{ color: {colour}; font-size: 1.2rem; }}
img {{ max-width: 100%; height: auto; display: block; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .9rem; }}
th, td {{ text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #d1d9e0; vertical-align: top; }}
td.number {{ font-variant-numeric: tabular-nums; white-space: nowrap; }}
.facts td {{ overflow-wrap: anywhere; }}
.note {{ color: #57606a; font-size: .9rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
<div class="verdict"><strong>{verdict}</strong><br>{summary}</div>
<h2>The same latents before and after</h2>
<img src="{picture}" alt="grids of images before and after, from the same latents">
<h2>Numbers</h2>
<div class="scroll"><table>
<tr><th></th><th>before</th><th>after</th><th>difference</th><th>95 % interval</th><th></th></tr>
{metrics}
</table></div>
<p class="note">Mean ± standard deviation over the seed ranges. {intervals}
{space}</p>
<img src="{figure}" alt="distance per seed range, and class histogram">
{tables}
{panels}
<h2>What was measured</h2>
<table class="facts">
{facts}
</table>
</body>
</html>
"""
