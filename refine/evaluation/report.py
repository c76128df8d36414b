"""The one-page HTML report of a comparison; it holds its pictures itself and asks for nothing from elsewhere."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from refine.evaluation import svg
from refine.evaluation.comparison import one_line
from refine.evaluation.page import PAGE
from refine.evaluation.pictures import Pictures
from refine.evaluation.tables import BESIDE, feature_space_note, shown_rows
from refine.images import png_bytes
from refine.metrics.detectors import space_of_results
from refine.metrics.metric import Table, plus_minus
from refine.metrics.registry import METRICS, rows_in

_COLUMNS = ("before", "after", *BESIDE)


def html_page(results: Mapping[str, Any], pictures: Pictures) -> str:
    """The report.

    Args:
        results: What `refine.evaluation.compare.compare` returned.
        pictures: See `refine.evaluation.pictures.make_pictures`.
    """
    return PAGE.format(
        title=html.escape(f"{results['before']['name']} → {results['after']['name']}"),
        verdict=html.escape(results["verdict"]),
        mood={"better": "good", "worse": "bad"}.get(results["verdict"], "even"),
        summary=html.escape(results["summary"]),
        notes="".join(f'<p class="note">Note: {_with_options(note)}</p>' for note in results["notes"]),
        pixels="pixels" if pictures.is_small else "",
        **{name: _image(*pictures.grids[name], name) for name in ("before", "after")},
        captions=" ".join(
            f"<span class={name}>{html.escape(pictures.grids[name][1])}</span>" for name in pictures.grids
        ),
        rows="\n".join(_figure(*row) for row in pictures.rows.values()),
        head="".join(f"<th>{name}</th>" for name in _table_columns(results)),
        metrics=_metrics(results),
        intervals=html.escape(_interval_note(results)),
        space=html.escape(feature_space_note(results)),
        plots="\n".join(_plots(results)),
        curve=_curve(results),
        tables="\n".join(map(_table, _of_metrics("table", results))),
        panels=_panels(pictures),
        run=_run(results.get("run")),
        facts=_facts(_what_was_measured(results)),
    )


def _of_metrics(what: str, results: Mapping[str, Any]) -> list[Any]:
    """The tables, or the bars, that the metrics have for a comparison."""
    makers = [getattr(metric, what) for metric in METRICS]
    found = [make(results["before"], results["after"]) for make in makers if make is not None]
    return [one for one in found if one is not None]


# Pictures.


def _image(picture: Image.Image, text: str, name: str = "") -> str:
    source = "data:image/png;base64," + base64.b64encode(png_bytes(picture)).decode("ascii")
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img class="{name}" src="{source}" {size} alt="{html.escape(text)}">'


def _figure(picture: Image.Image, caption: str) -> str:
    return f"<figure><figcaption>{html.escape(caption)}</figcaption>{_image(picture, caption)}</figure>"


_PANELS = {  # figure → heading, what it shows
    "diversity": ("Look-alikes", "Pairs of images, one above the other, of one class where there are classes."),
    "nearest": ("Nearest real images", "Nearest in feature space, which is not always what looks nearest."),
}


def _panels(pictures: Pictures) -> str:
    parts = []
    for name, (heading, text) in _PANELS.items():
        if name in pictures.panels:
            figures = "\n".join(_figure(strip, caption) for caption, strip in pictures.panels[name].items())
            parts.append(f'<h2>{heading}</h2>\n<div class="strips">{figures}</div>\n<p class="note">{text}</p>')
    return "\n".join(parts)


# Numbers.


def _table_columns(results: Mapping[str, Any]) -> list[str]:
    return ["before", "after", "difference", "95 % interval", *(name for name in BESIDE if name in results)]


def _metrics(results: Mapping[str, Any]) -> str:
    lines = []
    for key, explanation in shown_rows(results).items():
        difference = results["difference"][key]
        low, high = difference["interval"]
        cells = {
            "before": plus_minus(results["before"][key]),
            "after": plus_minus(results["after"][key]),
            "difference": plus_minus(difference, "+"),
            "95 % interval": f"{low:+.3g} to {high:+.3g}",
        }
        cells |= {name: plus_minus(results[name][key]) if key in results[name] else "–"
                  for name in BESIDE if name in results}  # fmt: skip
        numbers = "".join(f'<td class=number data-label="{name}">{cell}</td>' for name, cell in cells.items())
        note = html.escape("; ".join(filter(None, explanation)))
        lines.append(f"<tr><th>{html.escape(key)}<small>{note}</small></th>{numbers}</tr>")
    return "\n".join(lines)


def _interval_note(results: Mapping[str, Any]) -> str:
    """How the intervals were made."""
    methods: dict[str, list[str]] = {}
    for name, found in results["difference"].items():
        methods.setdefault(found["method"], []).append(name)
    words = {
        "paired bootstrap": "a paired bootstrap over the images",
        "Student": "Student's over the seed ranges",
        "the wider of both": "the wider of a paired bootstrap over the images and Student's over the seed ranges",
    }
    parts = [f"for {', '.join(names)} {words[method]}" for method, names in methods.items()]
    only = words[next(iter(methods))] if len(methods) == 1 else ""
    return f"The interval is {only or '; '.join(parts)}."


def _plots(results: Mapping[str, Any]) -> list[str]:
    """Dots and intervals of every metric, all differences, and the bars that metrics have."""
    plots = []
    columns = [name for name in _COLUMNS if name in results]
    for key, (explanation, direction) in shown_rows(results).items():
        rows = []
        for name in columns:
            if key in results[name]:
                found = results[name][key]
                ends = found["mean"] - found["std"], found["mean"] + found["std"]
                rows.append(svg.Dot(name, name, found["mean"], *ends, found["values"]))
        difference = results["difference"][key]
        change = svg.Dot("change", "difference", difference["mean"], *difference["interval"])
        parts = svg.dots(key, rows) + svg.dots(f"difference of {key}", [change], zero=True)
        plots.append(_plot(key, "; ".join(filter(None, (explanation, direction))), parts))
    for bars in _of_metrics("bars", results):
        plot = svg.bars(bars.ylabel, bars.before, bars.after, bars.level, bars.xlabel)
        plots.append(_plot(bars.ylabel, f"before and after; dotted: {bars.level_label}", plot))
    return plots


def _plot(title: str, note: str, plot: str) -> str:
    return f"<figure><figcaption><b>{html.escape(title)}</b> {html.escape(note)}</figcaption>{plot}</figure>"


def _curve(results: Mapping[str, Any]) -> str:
    """The snapshots of a run: the leading distance, and the shares, over kimg."""
    curve, metric = results.get("curve"), results["metric"]
    if not curve:
        return ""
    shares = [
        key for key, row in rows_in(space_of_results(results)).items() if row.in_curve and key in results["before"]
    ]
    curve = one_line(curve)
    marked = [point["kimg"] for point in curve if point["judged"]]
    panels = []
    for keys in ([metric], shares):
        rows = [
            svg.Line(
                key,
                f"line{index}",
                [(point["kimg"], point[key]["mean"], point[key]["std"]) for point in curve],
                results["before"][key]["mean"],
            )
            for index, key in enumerate(keys)
        ]
        if rows:
            names = " ".join(f'<span class="line{index}">{html.escape(key)}</span>' for index, key in enumerate(keys))
            plot = svg.lines(", ".join(keys), rows, marked, "kimg")
            panels.append(f'<figure><figcaption class="legend">{names}</figcaption>{plot}</figure>')
    note = "Every snapshot on the same seeds; the band is the standard deviation over the seed ranges, dotted is the "
    note += "network before, and the vertical line is the snapshot that is judged."
    return f'<h2>The run</h2>\n<div class="plots">{"".join(panels)}</div>\n<p class="note">{note}</p>'


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    rows = "\n".join(
        f"<tr><th>{html.escape(name)}</th>"
        + "".join(f"<td class=number>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, *cells in table.rows
    )
    return (
        f'<h2>{html.escape(table.heading)}</h2>\n<div class="scroll"><table>\n<tr>{head}</tr>\n{rows}\n</table></div>\n'
        f'<p class="note">{html.escape(table.note)}</p>'
    )


# What it is based on.


def _run(run: Mapping[str, Any] | None) -> str:
    """The command and the options of the run that the network comes from."""
    if run is None:
        return ""
    options = {name: _shown(value) for name, value in run["options"].items()}
    facts = {name: str(run[name]) for name in ("folder", "kimg") if name in run}
    return "\n".join(
        [
            "<h2>How it was refined</h2>",
            f'<pre class="command">{_with_options(run["command"])}</pre>',
            f'<table class="facts">{_facts(facts)}</table>',
            f"<details><summary>All {len(options)} options</summary>",
            f'<table class="facts">{_facts(options)}</table></details>',
        ]
    )


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _what_was_measured(results: Mapping[str, Any]) -> dict[str, str]:
    detector, reference = results["detector"], results["reference"]
    facts = {name: _network(results[name]) for name in ("before", "after", "teacher") if name in results}
    if real := results.get("real"):
        facts["real"] = f"{real['name']} (sha256 {real['sha256'][:16]}…), {real['images']} images; {real['how']}"
    return facts | {
        "images": f"{results['num']} per seed range, seeds {', '.join(results['seeds'])}; the same for both networks",
        "detector": f"{detector['name']} (sha256 {detector['sha256'][:16]}…)",
        "reference": f"{reference['name']} (sha256 {reference['sha256'][:16]}…), {reference['num'] or '?'} images, "
        f"{reference['form']}",
        "resize": str(detector.get("image_note") or detector["resize"]),
        "quantisation": results["quantisation"],
        "covariance": results["covariance"],
        "versions": ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        "time": f"{results['seconds']:.0f} s on {results['device']}",
    }


def _facts(facts: Mapping[str, str]) -> str:
    rows: Sequence[str] = [f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items()]
    return "\n".join(rows)


def _network(side: Mapping[str, Any]) -> str:
    """By its name alone: where a file lies is nobody's business who gets the page."""
    learnt = f", refined with {side['refined_with']}" if "refined_with" in side else ""
    reason = f" ({side['sampling_reason']})" if "sampling_reason" in side else ""
    which = f", images {side['images']}" if "images" in side else ""
    return f"{side['name']} (sha256 {side['sha256'][:16]}…), {side['sampling']}{reason}{which}{learnt}"


def _with_options(text: str) -> str:
    """HTML of a text in which lines do not break within the names of options."""
    return re.sub(r"--[a-z][a-z-]*", r'<span class="option">\g<0></span>', html.escape(text))
