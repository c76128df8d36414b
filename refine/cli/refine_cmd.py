"""`python refine.py --gan=… --teacher=…`: refine a generator with a diffusion model."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from refine.cli.option_values import betas, duration, label_dist, sigma_law, sigma_range
from refine.cli.options import OPS_HELP
from refine.config import (
    CHANGEABLE,
    NOISE_MODES,
    OPS_MODES,
    PRECISIONS,
    PRESETS,
    SCHEDULES,
    TRAINABLE,
    RefineConfig,
    SigmaOptions,
)
from refine.errors import option
from refine.processes import one_voice
from refine.training.assemble import run


def _default(name: str) -> str:
    """Default of an option, for --help, with the presets that differ."""

    def show(value: Any) -> str:
        if isinstance(value, SigmaOptions):
            return f"lognormal:{value.P_mean:g},{value.P_std:g}"
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

    default = next(f for f in dataclasses.fields(RefineConfig) if f.name == name)
    value = default.default if default.default is not dataclasses.MISSING else default.default_factory()
    others = [f"{preset} {show(values[name])}" for preset, values in PRESETS.items() if name in values]
    return f"[default: {show(value) or 'none'}{'; ' + '; '.join(others) if others else ''}]"


def _opt(flag: str, name: str, text: str, **kwargs: Any):
    return click.option(flag, name, default=None, help=f"{text}  {_default(name)}", **kwargs)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option(
    "--gan",
    metavar="FILE|URL|NAME|one-step|MODULE:FUNCTION",
    help="Generator to refine (the student): a file, one-step = the teacher's own U-Net, or one of your own code.",
)
@click.option("--teacher", metavar="FILE|URL|NAME", help="Diffusion model of the same data (the teacher).")
@click.option("--preset", type=click.Choice(list(PRESETS)), default=None, help="Defaults for a kind of run.")
@_opt("--outdir", "outdir", "Where run folders are made.", metavar="DIR", type=click.Path(file_okay=False))
@click.option("--desc", metavar="TEXT", help="Added to the run folder's name.")
@_opt("--kimg", "kimg", "Length of the run: thousands of images through the student step.", type=float)
@_opt("--batch", "batch", "Images per step.", type=int)
@_opt("--batch-gpu", "batch_gpu", "At most so many at once; gradients are accumulated.", type=int)
@_opt("--lr", "lr", "Learning rate of the student (Adam).", type=float)
@_opt("--aux-lr", "aux_lr", "Learning rate of the auxiliary network (Adam).", type=float)
@_opt("--betas", "betas", "Adam's betas, student.", metavar="B1,B2")
@_opt("--aux-betas", "aux_betas", "Adam's betas, auxiliary network.", metavar="B1,B2")
@_opt(
    "--lr-schedule",
    "lr_schedule",
    "Of the student's rate; the auxiliary network keeps its own.",
    type=click.Choice(SCHEDULES),
)
@_opt("--lr-rampup-kimg", "lr_rampup_kimg", "The student's rate rises from zero over so many kimg.", type=float)
@_opt(
    "--sigma",
    "sigma",
    "Noise levels of the student step: lognormal:P_mean,P_std | karras:rho | loguniform.",
    metavar="LAW",
)
@click.option("--sigma-range", metavar="MIN,MAX", help="Range of those noise levels.  [default: 0.002,80]")
@_opt("--aux-sigma", "aux_sigma", "Noise levels of the auxiliary step.", metavar="LAW")
@click.option("--aux-sigma-range", metavar="MIN,MAX", help="Range of those noise levels.  [default: 0.002,80]")
@_opt(
    "--objective",
    "objective",
    "What the student follows: ikl, dmd, sid, sim, or a sum such as ikl:0.7+sid:0.3; see docs/objectives.md.",
    metavar="NAME[+NAME]",
)
@_opt("--sid-alpha", "sid_alpha", "Alpha of the objective sid.", type=float)
@_opt("--weighting", "weighting", "Weight of the objective over noise levels: 1 | sigma^P.", metavar="W")
@_opt("--guidance", "guidance", "Classifier-free guidance of the teacher.", type=float)
@_opt("--label-dist", "label_dist", "How often each class is drawn: uniform, or a JSON list or file.", metavar="LIST")
@_opt("--keep-distances", "keep_distances", "Pull towards the student's own pairwise distances.", type=float)
@_opt("--keep-recall", "keep_recall", "Stop below this share of the recall at the start; 0 = never.", type=float)
@_opt("--sigma-init", "sigma_init", "Noise level of --gan=one-step.", type=float)
@_opt("--aux-steps", "aux_steps", "Auxiliary steps per student step.", type=int)
@_opt(
    "--aux-warmup-kimg",
    "aux_warmup_kimg",
    "Images that the auxiliary network follows before the student moves.",
    type=float,
)
@_opt("--ema-kimg", "ema_kimg", "Half-life of the student's moving average.", type=float)
@_opt("--ema-rampup", "ema_rampup", "Half-life at most this share of the images so far; 0 = no limit.", type=float)
@_opt("--noise-mode", "noise_mode", "Noise inputs of the student while training.", type=click.Choice(NOISE_MODES))
@_opt("--train", "train", "Which part of the student moves.", type=click.Choice(TRAINABLE))
@_opt("--dropout", "dropout", "Train the auxiliary network with the dropout of its file.", type=bool)
@_opt("--aux-dropout", "aux_dropout", "Train the auxiliary network with this rate of dropout.", type=float)
@_opt("--aux-augment", "aux_augment", "Augment what the auxiliary network learns from, this often.", type=float)
@_opt("--precision", "precision", "Compute in this format; weights stay float32.", type=click.Choice(PRECISIONS))
@click.option("--compile/--no-compile", "compile", default=None, help="Translate the networks with torch.compile.")
@click.option(
    "--reuse-batch/--no-reuse-batch",
    "reuse_batch",
    default=None,
    help="The student step takes the images of the auxiliary step: a forward pass less, but no longer independent.",
)
@_opt("--seed", "seed", "Random seed.", type=int)
@_opt("--tick", "tick", "Print progress every so many kimg.", type=float)
@_opt("--snap", "snap", "Save a snapshot every so many ticks; 0 = at the end.", type=int)
@_opt("--metrics", "metrics", "At every snapshot: fid50k_full, is50k, fd5k-<detector> …, or none.", metavar="LIST")
@_opt("--ref", "ref", "Reference statistics of the metrics (.npz).", metavar="FILE|NAME")
@_opt("--device", "device", "cpu, cuda or cuda:N; none = cuda where there is one.", metavar="DEVICE")
@_opt("--ops", "ops", f"{OPS_HELP} None = $REFINE_OPS, else auto.", type=click.Choice(OPS_MODES))
@click.option(
    "--resume",
    metavar="PATH|latest",
    help="Go on from a training state, a snapshot, a run folder, or the latest run of --outdir. May be given with "
    "another --kimg, --lr, --aux-lr, --batch-gpu, --device, --metrics, … of the run.",
)
@_opt("--keep", "keep", "Training states that are kept.", type=int)
@_opt("--state-minutes", "state_minutes", "Save a training state at least so often, beside snapshots.", type=float)
@click.option(
    "--time-limit",
    metavar="MINUTES|H:M:S",
    help="Stop in time for the state to be saved, as a batch queue wants it.  [default: none]",
)
@_opt("--patience", "patience", "Stop after so many snapshots without a better first metric; 0 = never.", type=int)
@_opt("--max-skips", "max_skips", "Stop after so many NaN or infinite gradients in a row.", type=int)
@click.option("-n", "--dry-run", is_flag=True, help="Check everything, print the options, and stop.")
def refine(resume, dry_run, **given):
    """Refine a pretrained GAN with a pretrained diffusion model, data-free, by Diff-Instruct.

    \b
    python refine.py --gan=digits-gan --teacher=digits-teacher --preset=demo
    python refine.py --gan=one-step --teacher=digits-teacher --preset=one-step-demo
    python refine.py --resume=latest
    """
    with one_voice():
        config = None if resume else make_config(given)
        states, changes = _find_states(resume, given) if resume else ([], {})
    run(config, states, changes, dry_run)


def make_config(given: dict[str, Any]) -> RefineConfig:
    """Options as click gives them (None = not given) over the preset's over the defaults.

    Raises:
        ValueError: A missing or impossible option; one line that names it.
    """
    given = {name: value for name, value in given.items() if value is not None}
    preset = PRESETS[given.get("preset", "default")]
    parsed = {**preset, **given}
    for name in ("gan", "teacher"):
        if name not in parsed:
            what = "the generator to refine" if name == "gan" else "the diffusion model to learn from"
            raise ValueError(f"--{name} is missing; expected {what}, a file or a name of pretrained/index.toml")
    parsed |= _parse(given)
    for name in ("sigma", "aux_sigma"):
        flag = f"--{name.replace('_', '-')}"
        law = preset.get(name, SigmaOptions())
        with option(flag):
            law = dataclasses.replace(law, **sigma_law(given[name])) if name in given else law
        with option(f"{flag}-range"):
            text = parsed.pop(f"{name}_range", None)
            law = dataclasses.replace(law, **sigma_range(text)) if text else law
        parsed[name] = law
    parsed["ema_rampup"] = parsed.get("ema_rampup", RefineConfig.ema_rampup) or None
    return RefineConfig(**parsed)


_READERS = {"betas": betas, "aux_betas": betas, "time_limit": duration, "label_dist": label_dist}


def _parse(given: dict[str, Any]) -> dict[str, Any]:
    """Values of the options that are written as texts of their own kind."""
    parsed: dict[str, Any] = {}
    for name, read in _READERS.items():
        if name in given:
            with option(f"--{name.replace('_', '-')}"):
                parsed[name] = read(given[name])
    if "metrics" in given:
        names = given["metrics"].split(",")
        parsed["metrics"] = () if names == ["none"] else tuple(names)
    return parsed


def _find_states(resume: str, given: dict[str, Any]) -> tuple[list[Path], dict[str, Any]]:
    """The training states that --resume means, the first one first, and the options to change."""
    given = {name: value for name, value in given.items() if value is not None}
    outdir = given.pop("outdir", RefineConfig.outdir)
    if fixed := [f"--{name.replace('_', '-')}" for name in given if name not in CHANGEABLE]:
        names = ", ".join(sorted(f"--{name.replace('_', '-')}" for name in CHANGEABLE))
        raise ValueError(f"--resume goes on with the options of the run; {fixed[0]} cannot be changed, only {names}")
    from refine.training.run_dir import find_training_states

    with option("--resume"):
        return find_training_states(outdir if resume == "latest" else resume), {**given, **_parse(given)}
