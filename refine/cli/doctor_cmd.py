"""`python -m refine doctor`: what this machine has, whether the compiled ops work on it, what to install otherwise."""

import json

import click


@click.command(short_help="Look at this machine, and try the compiled ops.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def doctor(as_json: bool) -> int:
    """Looks at this machine and tries the compiled ops: do they build, agree with the reference, and save time?

    Exit code: 0 = all work on every device here, 1 = something is missing; without it plain torch does the work.
    """
    from refine.torch_utils.build.doctor import as_text, examine

    report = examine()
    click.echo(json.dumps(report, indent=2) if as_json else as_text(report))
    return 0 if report["ok"] else 1
