"""`python -m refine inspect FILE`: what a checkpoint is and what is in it."""

from typing import Any

import click

from refine.cli.options import kwargs_option


@click.command()
@click.argument("file")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@kwargs_option("--gan-kwargs", "FILE")
def inspect(file: str, as_json: bool, gan_kwargs: dict[str, Any] | None) -> None:
    """Says what FILE is, and which networks it holds. FILE is a path, or a name of pretrained/index.toml."""
    from refine.checkpoints import resolve

    path = resolve(file)
    from refine.checkpoints import describe  # imports torch

    report = describe.inspect_file(path, gan_kwargs)
    click.echo(describe.as_json(report) if as_json else describe.as_text(report))
