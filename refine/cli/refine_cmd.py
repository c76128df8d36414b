"""`python refine.py --gan=… --teacher=…`: refine a generator with a diffusion model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from refine.cli.config_command import ConfigCommand, GroupedOption, read_options, show_preset
from refine.config import OPTIONS, RefineConfig
from refine.config.option import flag
from refine.dnnlib import read_text
from refine.errors import option
from refine.processes import is_first, one_voice

_NOTED = (
    "processes",
    "versions",
    "run_dir",
    "files",
)  # by runs, in training_options.json, beside the device that it was
_MAX_CONFIG_BYTES = 1 << 20


@click.command(
    cls=ConfigCommand,
    short_help="Refine a generator with a diffusion model.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.option(
    "--resume",
    cls=GroupedOption,
    group=OPTIONS["keep"].group,
    metavar="PATH|latest|auto",
    help="Go on from a training state, a snapshot, a run folder, or the latest run of --outdir; auto = the latest, or "
    "a new run where there is none. May be given with another --kimg, --lr, --aux-lr, --batch-gpu, --device, "
    "--metrics, … of the run, and with --gan and --teacher in another place.",
)
@click.option(
    "--config",
    "config_file",
    cls=GroupedOption,
    group=OPTIONS["preset"].group,
    metavar="FILE",
    help="Options as JSON, such as a training_options.json; those of the command line take precedence.",
)
@click.option("--show", is_flag=True, help="Print the options of --preset, and stop.")
@click.option("-n", "--dry-run", is_flag=True, help="Check everything, measure an iteration, say what the run costs.")
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: all options and the costs as JSON.")
def refine(
    resume: str | None, config_file: str | None, show: bool, dry_run: bool, as_json: bool, **texts: str | None
) -> None:
    """Refine a pretrained GAN with a pretrained diffusion model, data-free, by Diff-Instruct.

    \b
    python refine.py --gan=my-gan.pkl --teacher=my-edm.pkl --dry-run    what it would cost
    python refine.py --gan=my-gan.pkl --teacher=my-edm.pkl              a run, which ends by itself
    python refine.py --resume=latest                                    goes on after a stop
    python refine.py --gan=one-step --teacher=my-edm.pkl --preset=one-step
    python refine.py --gan=digits-gan --teacher=digits-teacher-2 --preset=demo
    """
    with one_voice():
        if as_json and not dry_run:
            raise ValueError("--json says what --dry-run finds: add --dry-run")
        given = read_options(texts)
        if show:
            others = {**given, "resume": resume, "config": config_file, "dry_run": dry_run or None}
            if other := next((name for name, value in others.items() if name != "preset" and value is not None), None):
                raise ValueError(f"--show prints what --preset says; expected no {flag(other)} beside it")
            click.echo(show_preset(given.get("preset", OPTIONS["preset"].default)))
            return
        if resume is not None and config_file is not None:
            raise ValueError("--config is for runs that begin; a run that goes on has its options in its state")
        states = [] if resume is None else _states_of(resume, given.get("outdir", OPTIONS["outdir"].default))
        if states and resume not in ("latest", "auto") and "outdir" in given and is_first():
            click.echo("note: --outdir has no part in this run, which goes on in its folder", err=True)
        filed = {} if config_file is None else _read_config(config_file)
        config = None if states else RefineConfig(**{**filed, **given})
    from refine.training import assemble  # torch, from here on: the options are valid

    if config is not None:
        run = assemble.run(config, dry_run, given if filed else None)
    else:
        run = assemble.resume(states, {k: v for k, v in given.items() if k != "outdir"}, dry_run)
    if run.estimate is not None and is_first():
        from refine.training.estimate import differing, in_words

        place = {"run_dir": str(run.folder), "device": run.device, "bridge": run.bridge, "notes": run.notes}
        place["differs"] = differing(run.config)
        told = {**run.config.as_dict(), **place, "estimate": run.estimate.as_dict()}
        words = in_words(run.estimate, run.config, run.device, str(run.folder), run.bridge)
        click.echo(json.dumps(told, indent=2) if as_json else words)
    if run.stopped is not None:
        raise click.exceptions.Exit(run.exit_code)


def make_config(texts: Mapping[str, str | None]) -> RefineConfig:
    """Options of the command line (None = not given) over the preset's over the defaults.

    Raises:
        ValueError: A missing or impossible option; one line that names it.
    """
    return RefineConfig(**read_options(texts))


def _read_config(path: str) -> dict[str, Any]:
    """Options of a JSON file by name; of a training_options.json without what it notes of machine and folder."""
    from refine.checkpoints.pickles.inert import shown

    with option("--config"):
        expected = "expected options, as in a training_options.json"
        try:
            text = read_text(path, _MAX_CONFIG_BYTES)
        except ValueError as error:
            raise ValueError(f"{error}; {expected}") from None
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise ValueError(f"{path} is not an object in JSON; {expected}")
        noted = {"device", *_NOTED} if "versions" in values else set()
        # A program that a file names is trusted on the command line only.
        values = {name: value for name, value in values.items() if name not in noted and name != "trust_detector"}
        if unknown := sorted(values.keys() - OPTIONS.keys()):
            raise ValueError(f"{path} holds {', '.join(map(shown, unknown[:5]))}, which is no option")
        return values


def _states_of(resume: str, outdir: str) -> list[Path]:
    """The training states that --resume means, the first one first; none only where `auto` finds none."""
    from refine.training.finding import find_training_states, newest_states

    with option("--resume"):
        if resume == "auto":
            return newest_states(Path(outdir))
        return find_training_states(outdir if resume == "latest" else resume)
