"""`python -m refine models`: the networks that have a name in pretrained/index.toml."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import click


@click.command(short_help="List the networks that have a name.")
@click.option(
    "--kind",
    type=click.Choice(["generator", "teacher", "classifier", "reference"], case_sensitive=False),
    help="Only these.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def models(kind: str | None, as_json: bool) -> None:
    """Lists the names of pretrained/index.toml: what --gan, --teacher, --guide, --ref and --detector take."""
    from refine.checkpoints.sources.index import read_index

    entries = [describe_entry(entry) for entry in read_index().values() if kind in (None, entry.kind)]
    entries.sort(key=lambda entry: entry["place"] != "shipped")  # these first: they are here, and are what a try takes
    click.echo(json.dumps(entries, indent=2) if as_json else as_table(entries))


def describe_entry(entry: Any) -> dict[str, Any]:
    """What the index knows of a name; 'published', its FID in words; and 'place': 'shipped', 'cached', 'to be
    downloaded' or 'by hand'."""
    known = {key: value for key, value in dataclasses.asdict(entry).items() if value not in (None, "")}
    if not hasattr(entry, "url"):
        return {**known, "place": "shipped"}
    known |= {"published": entry.published} if entry.published else {}
    place = "by hand" if not entry.url else "cached" if entry.is_cached else "to be downloaded"
    return {**known, "place": place}


def as_table(entries: list[dict[str, Any]]) -> str:
    """Aligned columns."""
    rows: list[tuple[str, ...]] = [("name", "kind", "size", "classes", "published FID", "licence", "file")]
    for entry in entries:
        size, classes = entry.get("resolution"), entry.get("classes")
        cells = (
            *(entry["name"], entry["kind"], f"{size}×{size}" if size else ""),
            *("none" if classes == 0 else classes or "", entry.get("published", ""), entry["licence"], entry["place"]),
        )
        rows.append(tuple(str(cell) for cell in cells))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def entry_lines(entry: dict[str, Any]) -> list[str]:
    """The entry as the lines of `python -m refine inspect`."""
    keys = {"name": "name", "kind": "kind", "what": "what", "resolution": "size", "classes": "classes"}
    keys |= {"licence": "licence", "url": "from", "where": "get it", "sha256": "sha256", "made_by": "made by"}
    shown = {**entry, "classes": entry.get("classes") or "none"} if "classes" in entry else dict(entry)
    if "resolution" in entry:
        shown["resolution"] = f"{entry['resolution']}×{entry['resolution']}"
    lines = [f"{label:<11} {shown[key]}" for key, label in keys.items() if key in shown]
    lines += [f"{'FID':<11} {entry['published']}, as published"] if "published" in entry else []
    if "guide" in entry:
        lines.append(f"{'meant with':<11} --guide={entry['guide']} --guidance={entry['guidance']:g}")
    return [*lines, f"{'file':<11} {entry['place']}"]


def index_lines(entry: dict[str, Any]) -> list[str]:
    """What only the index knows of a file that is here and was looked at."""
    known = ("name", "licence", "FID", "meant with", "file")
    lines = [line for line in entry_lines(entry) if line[:11].strip() in known]
    return [line if not line.startswith("file") else f"{'place':<11} {entry['place']}" for line in lines]
