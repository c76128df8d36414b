"""The files of a comparison: comparison.json, pictures, report.html."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refine.dnnlib import replaced_atomically
from refine.errors import option
from refine.evaluation.panels import curve_figure, stacked
from refine.evaluation.pictures import make_pictures, side_by_side
from refine.evaluation.report import html_page
from refine.evaluation.scale import Column
from refine.evaluation.sides import Side
from refine.images import save_png
from refine.metrics.detectors import Detector
from refine.metrics.references import Reference


def write_comparison(
    folder: Path,
    sides: Mapping[str, Side],
    columns: Mapping[str, Column],
    results: Mapping[str, Any],
    detector: Detector,
    reference: Reference,
) -> None:
    """Draws the pictures, and writes everything into the folder, which is made if it is not there."""
    pictures = make_pictures(sides, columns, results, detector, reference)
    figures = {"comparison": side_by_side(pictures)}
    figures |= {name: stacked(strips) for name, strips in pictures.panels.items()}
    figures |= {"curve": curve_figure(dict(results))} if results.get("curve") else {}
    texts = {"report.html": html_page(results, pictures), "comparison.json": json.dumps(results, indent=2) + "\n"}
    with option("--outdir"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            save_png(folder / f"{name}.png", figure)
        for name, text in texts.items():
            with replaced_atomically(folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
