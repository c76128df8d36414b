"""`make demo`: refine the shipped digits GAN with the shipped teacher on this machine, and show before and after."""

import time
from typing import Any

import click

from refine.cli.main import run_command
from refine.cli.options import Finite
from refine.errors import option

STUDENT, TEACHER, REFERENCE = "digits-gan", "digits-teacher-2", "digits-reference"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--outdir", default="demo-out", show_default=True, metavar="DIR", help="Run folder and report go here.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Random seed of the refinement.")
@click.option("--gan", default=STUDENT, show_default=True, metavar="FILE|NAME", help="Another digits generator.")
@click.option("--teacher", default=TEACHER, show_default=True, metavar="FILE|NAME", help="Another digits teacher.")
@click.option("--kimg", type=Finite(min=0, min_open=True), help="Length of the refinement.  [default: preset demo]")
@click.option("--lr", type=Finite(min=0), help="Learning rate of the student.  [default: preset demo]")
@click.option("--aux-lr", type=Finite(min=0), help="Learning rate of the auxiliary network.  [default: preset demo]")
@click.option("--num", type=click.IntRange(min=100), default=2000, show_default=True, help="Images per seed range.")
def demo(outdir: str, gan: str, num: int, seed: int, **given: str | float | None) -> None:
    """Refine the shipped digits GAN, compare it with what it was, and write a report.

    Controls: --lr=0 (the student is frozen), --aux-lr=0 (aux stays the teacher, so there is no gradient).
    """
    from refine.config import RefineConfig
    from refine.evaluation.compare import compare
    from refine.evaluation.run_folder import read_run_folder
    from refine.evaluation.tables import text_table
    from refine.training.assemble import run

    start = time.monotonic()
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    config = RefineConfig(gan, preset="demo", outdir=outdir, seed=seed, desc=f"demo-seed{seed}", **options)
    refinement = run(config)
    if refinement.stopped is not None:
        raise click.exceptions.Exit(refinement.exit_code)
    refine_seconds = time.monotonic() - start
    with option("--outdir"):
        snapshots = read_run_folder(refinement.folder)
        assert snapshots is not None, "it is a folder"
        after, report_dir = snapshots.judged.path, refinement.folder / "report"
        results = compare(gan, refinement.folder, REFERENCE, num=num, outdir=report_dir, curve=False)
    seconds = time.monotonic() - start
    before, now = results["before"], results["after"]
    click.echo(f"report: {report_dir / 'report.html'}")
    click.echo(f"refined generator: {after} (refinement {refine_seconds:.0f} s, all {seconds:.0f} s)")
    click.echo(snapshots.describe())
    click.echo(text_table(results))
    click.echo(demo_line(before, now))


def demo_line(before: dict, after: dict) -> str:
    """The last line of the demo, for scripts."""
    fd = [result["fd_digits"]["mean"] for result in (before, after)]
    recall = [result["recall"]["mean"] for result in (before, after)]
    return (
        f"demo: fd_digits before={fd[0]:.2f} after={fd[1]:.2f} ratio={fd[1] / fd[0]:.3f} "
        f"recall_before={recall[0]:.3f} recall_after={recall[1]:.3f}"
    )


if __name__ == "__main__":
    run_command(demo)
