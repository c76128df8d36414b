"""`python -m refine inspect FILE`: what a checkpoint is and what is in it."""

import click

from refine.cli.options import network_file


@click.command()
@click.argument("file")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def inspect(file: str, as_json: bool) -> None:
    """Says what FILE is, and which networks it holds. FILE is a path, or a name of pretrained/index.toml.

    Of a run folder it is the best snapshot.
    """
    from refine.checkpoints import resolve

    path = resolve(network_file(file, "FILE"))
    from refine.checkpoints import describe  # imports torch

    report = describe.inspect_file(path)
    click.echo(describe.as_json(report) if as_json else describe.as_text(report))
