"""What people look at after a comparison: a picture of both grids, a plain table, a one-page HTML report."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from refine.dnnlib import replaced_atomically
from refine.images import image_grid, png_bytes, to_pil

# Rows of the tables, in this order: how the name begins, what it says, which direction is good.
_ROWS = {
    "fid": ("Fréchet Inception distance", "lower is better"),
    "fd_": ("Fréchet distance", "lower is better"),
    "fidinf": ("Fréchet Inception distance for infinitely many images", "lower is better"),
    "fdinf_": ("Fréchet distance for infinitely many images", "lower is better"),
    "kid": ("kernel distance", "lower is better"),
    "is": ("Inception Score: clear images, many classes", "higher is better"),
    "precision": ("part of the images that look real", "higher is better"),
    "recall": ("part of the real images that are covered", "higher is better"),
    "label_accuracy": ("class asked for = class seen", "higher is better"),
    "confidence": ("classifier's mean confidence", ""),
    "spread": ("rms pixel difference within a class", ""),
}


def metric_rows(results: dict[str, Any]) -> list[str]:
    """Names of the numbers in a comparison, in reading order."""
    return sorted(filter(_prefix, results["difference"]), key=lambda name: list(_ROWS).index(_prefix(name)))


def text_table(results: dict[str, Any]) -> str:
    """The comparison as an aligned plain-text table: mean ± standard deviation over the seed ranges."""
    rows = [("", "before", "after", "difference", "")]
    for name in metric_rows(results):
        before, after, difference = (results[side][name] for side in ("before", "after", "difference"))
        rows.append((name, _plus_minus(before), _plus_minus(after), _plus_minus(difference, "+"), _explain(name)[1]))
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

    leading, histograms = results["metric"], [results[side].get("class_histogram") for side in ("before", "after")]
    figure = Figure(figsize=(9, 3), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2 if all(histograms) else 1, squeeze=False)[0]
    pairs = zip(results["before"][leading]["values"], results["after"][leading]["values"], strict=True)
    for (low, high), label in zip(pairs, results["seeds"], strict=True):
        panels[0].plot(["before", "after"], [low, high], marker="o", label=f"seeds {label}")
    panels[0].set(ylabel=leading, ylim=(0, None), xlim=(-0.3, 1.3))
    panels[0].legend(frameon=False, fontsize="small")
    if all(histograms):
        for offset, side, histogram in zip((-0.2, 0.2), ("before", "after"), histograms, strict=True):
            panels[1].bar([k + offset for k in range(len(histogram))], histogram, width=0.4, label=side)
        panels[1].axhline(1 / len(histograms[0]), color="black", linewidth=0.8, linestyle=":", label="uniform")
        panels[1].set(xlabel="class seen by the classifier", ylabel="part of the images")
        panels[1].legend(frameon=False, fontsize="small")
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def write_html(path: str | os.PathLike, results: dict[str, Any], figures: Mapping[str, Image.Image]) -> None:
    """Writes the one-page report; it holds its pictures itself and needs no network.

    Args:
        path: The file, replaced as a whole.
        results: Of `refine.cli.compare.compare`.
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
        classes=_html_classes(results),
        figure=_data_uri(metrics_figure(results)),
        metrics=_html_metrics(results),
        facts=_html_facts(results),
    )
    with replaced_atomically(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def feature_space_note(results: dict[str, Any]) -> str:
    """One sentence: in which space distances were measured, and whether they are FID."""
    detector = results["detector"]
    if results["metric"] == "fid":
        return (
            "Distances are measured in the features of Inception-2015-12-05: this is the FID of the literature "
            f"({detector['fid_basis']})."
        )
    return (
        f"Distances are measured in the {detector['feature_dim']} features of the detector '{detector['name']}'. "
        "This is not FID: its numbers compare only with others from the same detector weights."
    )


def _explain(name: str) -> tuple[str, str] | None:
    return _ROWS.get(_prefix(name))


def _prefix(name: str) -> str | None:
    """The longest entry of `_ROWS` that the name of a metric begins with."""
    return max((prefix for prefix in _ROWS if name.startswith(prefix)), key=len, default=None)


def _plus_minus(value: dict[str, Any], sign: str = "") -> str:
    digits = 4 if abs(value["mean"]) < 0.1 else 3 if abs(value["mean"]) < 10 else 2
    return f"{value['mean']:{sign}.{digits}f} ± {value['std']:.{digits}f}"


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _html_metrics(results: dict[str, Any]) -> str:
    lines = []
    for name in metric_rows(results):
        meaning, direction = _explain(name)
        low, high = results["difference"][name]["interval"]
        cells = [
            _plus_minus(results[side][name], "+" if side == "difference" else "")
            for side in ("before", "after", "difference")
        ]
        cells.append(f"{low:+.3g} to {high:+.3g}")
        numbers = "".join(f"<td class=number>{cell}</td>" for cell in cells)
        note = html.escape("; ".join(filter(None, (meaning, direction))))
        lines.append(f"<tr><th>{html.escape(name)}</th>{numbers}<td>{note}</td></tr>")
    return "\n".join(lines)


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


def _html_classes(results: dict[str, Any]) -> str:
    """Fréchet distance of each class before and after, where both have it."""
    tables = [{row["class"]: row for row in results[side].get("per_class", [])} for side in ("before", "after")]
    shared = [index for index in tables[0] if index in tables[1]]
    if not shared:
        return ""
    rows = "\n".join(
        f"<tr><th>{index}</th>"
        + "".join(f"<td class=number>{_plus_minus(table[index])}</td>" for table in tables)
        + f"<td class=number>{tables[1][index]['mean'] - tables[0][index]['mean']:+.3g}</td></tr>"
        for index in shared
    )
    return (
        "<h2>Classes</h2>\n<table>\n<tr><th>class</th><th>before</th><th>after</th><th>difference</th></tr>\n"
        f'{rows}\n</table>\n<p class="note">Fréchet distance of each class by itself. Few images of a class bias it '
        "upwards: compare the columns, not a class with the whole.</p>"
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
    return f"{side['path']} (sha256 {side['sha256'][:16]}…), {side['sampling']}"


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
<p class="note">Mean ± standard deviation over the seed ranges. The interval is a paired bootstrap over the images, and
Student's over the seed ranges for recall and the classifier's numbers. {space}</p>
<img src="{figure}" alt="distance per seed range, and class histogram">
{classes}
{panels}
<h2>What was measured</h2>
<table class="facts">
{facts}
</table>
</body>
</html>
"""
