"""`python refine.py --gan=… --teacher=…`: refine a generator with a diffusion model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from refine.cli.config_command import ConfigCommand, GroupedOption, read_options, show_preset
from refine.config import CHANGEABLE, OPTIONS, RefineConfig
from refine.config.option import flag
from refine.errors import option
from refine.processes import is_first, one_voice


@click.command(cls=ConfigCommand, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option(
    "--resume",
    cls=GroupedOption,
    group=OPTIONS["keep"].group,
    metavar="PATH|latest",
    help="Go on from a training state, a snapshot, a run folder, or the latest run of --outdir. May be given with "
    "another --kimg, --lr, --aux-lr, --batch-gpu, --device, --metrics, … of the run.",
)
@click.option("--show", is_flag=True, help="Print the options of --preset, and stop.")
@click.option("-n", "--dry-run", is_flag=True, help="Check everything, print the options, and stop.")
def refine(resume: str | None, show: bool, dry_run: bool, **texts: str | None) -> None:
    """Refine a pretrained GAN with a pretrained diffusion model, data-free, by Diff-Instruct.

    \b
    python refine.py --gan=digits-gan --teacher=digits-teacher --preset=demo
    python refine.py --gan=one-step --teacher=digits-teacher --preset=one-step-demo
    python refine.py --resume=latest
    """
    with one_voice():
        if show:
            click.echo(show_preset(read_options(texts).get("preset", OPTIONS["preset"].default)))
            return
        if resume is None:
            config = make_config(texts)
        else:
            states, changes = _what_to_resume(resume, texts)
    from refine.training import assemble  # torch, from here on: the options are valid

    run = assemble.resume(states, changes, dry_run) if resume is not None else assemble.run(config, dry_run)
    if dry_run and is_first():
        place = {"run_dir": str(run.folder), "device": run.device}
        click.echo(json.dumps({**run.config.as_dict(), **place}, indent=2))
    if run.stopped is not None:
        raise click.exceptions.Exit(run.exit_code)


def make_config(texts: Mapping[str, str | None]) -> RefineConfig:
    """Options of the command line (None = not given) over the preset's over the defaults.

    Raises:
        ValueError: A missing or impossible option; one line that names it.
    """
    return RefineConfig(**read_options(texts))


def _what_to_resume(resume: str, texts: Mapping[str, str | None]) -> tuple[list[Path], dict[str, Any]]:
    """The training states that --resume means, the first one first, and the options to change."""
    given = [name for name, text in texts.items() if text is not None and name != "outdir"]
    if fixed := [flag(name) for name in given if name not in CHANGEABLE]:
        names = ", ".join(sorted(map(flag, CHANGEABLE)))
        raise ValueError(f"--resume goes on with the options of the run; {fixed[0]} cannot be changed, only {names}")
    from refine.training.run_dir import find_training_states

    changes = read_options(texts)
    outdir = changes.pop("outdir", OPTIONS["outdir"].default)
    with option("--resume"):
        return find_training_states(outdir if resume == "latest" else resume), changes
