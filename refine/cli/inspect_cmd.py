"""`python -m refine inspect FILE`: what a checkpoint is and what is in it."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from refine.cli.models_cmd import describe_entry, entry_lines, index_lines
from refine.cli.options import kwargs_as_typed, kwargs_option, network_file


@click.command(short_help="Say what a file is, and which networks it holds.")
@click.argument("file")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@kwargs_option("--gan-kwargs", "FILE")
@kwargs_option("--teacher-kwargs", "FILE")
def inspect(file: str, as_json: bool, gan_kwargs: dict[str, Any] | None, teacher_kwargs: dict[str, Any] | None) -> None:
    """Says what FILE is, and which networks it holds. FILE is a path, or a name of pretrained/index.toml.

    Exit code: 0 = a command here can use it, 2 = none can.

    Of a run folder it is the best snapshot. Of a name whose file is not here yet, it says what the index knows, and
    downloads nothing.
    """
    from refine.checkpoints.sources.index import read_index, resolve

    kwargs, in_words_typed = kwargs_as_typed(gan_kwargs, teacher_kwargs)
    entry = None if os.path.lexists(file) else read_index().get(file)
    known = None if entry is None else describe_entry(entry)
    if known is not None and known["place"] in ("to be downloaded", "by hand"):
        click.echo(json.dumps({"index": known}, indent=2) if as_json else "\n".join(entry_lines(known)))
        return
    path = resolve(network_file(file, "FILE"))
    from refine.checkpoints import describe  # imports torch

    report = describe.inspect_file(path, kwargs)
    for part in (report, *report.get("networks", {}).values()):
        if "problem" in part:
            part["problem"] = in_words_typed(part["problem"])
    if known is not None:
        report["index"] = known
    use = _use(path, report)
    if use is not None:
        report |= {"use": use}
        report.pop("problem", None)
    text = describe.as_json(report) if as_json else describe.as_text(report)
    click.echo(text if as_json or known is None else "\n".join([text, *index_lines(known)]))
    if use is None:
        raise ValueError(f"{path}: nothing in it can be used; it is {report['description']}")


def _use(path: Path, report: Mapping[str, Any]) -> str | None:
    """What a file can serve as, beside what `describe` says of its networks; None if nothing."""
    from refine.metrics.image_sets import ImageSet
    from refine.metrics.references import load_reference

    if any("problem" not in network for network in report.get("networks", {}).values()):
        return "networks"
    if report["kind"] == "torchscript":
        return "a detector, with --trust-detector"
    with contextlib.suppress(ValueError):
        if report["kind"] == "zip":
            return f"a set of {len(ImageSet(path))} images, as --data or --ref"
        if report["kind"] in ("npz", "pickle"):
            reference = load_reference(path)
            return f"statistics of images, as --ref{_of(reference)}"
    return None


def _of(reference: Any) -> str:
    """Number and detector of a reference, where it says them."""
    from refine.checkpoints.pickles.inert import shown

    number = "" if reference.num is None else f", {reference.num:,} of them"
    return number + ("" if reference.detector is None else f", seen by the detector {shown(reference.detector)}")
