"""`python refine.py --gan=… --teacher=…`: refine a generator with a diffusion model."""

import json
from collections.abc import Mapping
from pathlib import Path

import click

from refine.cli.config_command import ConfigCommand, GroupedOption, read_options, show_preset
from refine.config import OPTIONS, RefineConfig
from refine.errors import option
from refine.processes import is_first, one_voice


@click.command(cls=ConfigCommand, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option(
    "--resume",
    cls=GroupedOption,
    group=OPTIONS["keep"].group,
    metavar="PATH|latest|auto",
    help="Go on from a training state, a snapshot, a run folder, or the latest run of --outdir; auto = the latest, or "
    "a new run where there is none. May be given with another --kimg, --lr, --aux-lr, --batch-gpu, --device, "
    "--metrics, … of the run, and with --gan and --teacher in another place.",
)
@click.option("--show", is_flag=True, help="Print the options of --preset, and stop.")
@click.option("-n", "--dry-run", is_flag=True, help="Check everything, measure an iteration, say what the run costs.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: all options and the costs as JSON.")
def refine(resume: str | None, show: bool, dry_run: bool, as_json: bool, **texts: str | None) -> None:
    """Refine a pretrained GAN with a pretrained diffusion model, data-free, by Diff-Instruct.

    \b
    python refine.py --gan=digits-gan --teacher=digits-teacher-2 --preset=demo
    python refine.py --gan=one-step --teacher=digits-teacher-2 --preset=one-step-demo
    python refine.py --resume=latest
    """
    with one_voice():
        if as_json and not dry_run:
            raise ValueError("--json says what --dry-run finds: add --dry-run")
        if show:
            click.echo(show_preset(read_options(texts).get("preset", OPTIONS["preset"].default)))
            return
        given = read_options(texts)
        states = [] if resume is None else _states_of(resume, given.get("outdir", OPTIONS["outdir"].default))
        config = None if states else make_config(texts)
    from refine.training import assemble  # torch, from here on: the options are valid

    if config is not None:
        run = assemble.run(config, dry_run)
    else:
        run = assemble.resume(states, {k: v for k, v in given.items() if k != "outdir"}, dry_run)
    if run.estimate is not None and is_first():
        from refine.training.estimate import in_words

        place = {"run_dir": str(run.folder), "device": run.device, "bridge": run.bridge}
        told = {**run.config.as_dict(), **place, "estimate": run.estimate.as_dict()}
        words = in_words(run.estimate, run.config, run.device, str(run.folder), list(run.bridge))
        click.echo(json.dumps(told, indent=2) if as_json else words)
    if run.stopped is not None:
        raise click.exceptions.Exit(run.exit_code)


def make_config(texts: Mapping[str, str | None]) -> RefineConfig:
    """Options of the command line (None = not given) over the preset's over the defaults.

    Raises:
        ValueError: A missing or impossible option; one line that names it.
    """
    return RefineConfig(**read_options(texts))


def _states_of(resume: str, outdir: str) -> list[Path]:
    """The training states that --resume means, the first one first; none only where `auto` finds none."""
    from refine.training.finding import find_training_states, newest_states

    with option("--resume"):
        if resume == "auto":
            return newest_states(Path(outdir))
        return find_training_states(outdir if resume == "latest" else resume)
