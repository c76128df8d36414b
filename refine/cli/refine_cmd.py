"""`python refine.py --gan=… --teacher=…`: refine a generator with a diffusion model."""

import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from refine.cli.main import option
from refine.cli.options import OPS_HELP, check_outdir, choose_device, choose_ops
from refine.config import (
    CHANGEABLE,
    NOISE_MODES,
    OBJECTIVES,
    OPS_MODES,
    PRECISIONS,
    PRESETS,
    SCHEDULES,
    TRAINABLE,
    RefineConfig,
    SigmaOptions,
)

ONE_STEP = "one-step"  # of --gan: the teacher's own U-Net as the generator


def _numbers(text: str, names: str, count: int) -> list[float]:
    """'a,b' → [a, b]."""
    try:
        values = [float(part) for part in text.split(",")]
        if len(values) != count:
            raise ValueError
    except ValueError:
        raise ValueError(f"found {text!r}; expected {names}") from None
    return values


def _betas(text: str) -> tuple[float, float]:
    first, second = _numbers(text, "two numbers, such as 0.0,0.999", 2)
    return first, second


def _law(text: str) -> dict[str, Any]:
    """'lognormal:-1.2,1.2', 'karras:7' or 'loguniform' → fields of SigmaOptions."""
    name, _, numbers = text.partition(":")
    if name == "lognormal":
        mean, std = _numbers(numbers, "lognormal:P_mean,P_std", 2) if numbers else (-1.2, 1.2)
        return {"name": name, "P_mean": mean, "P_std": std}
    if name == "karras":
        return {"name": name, "rho": _numbers(numbers, "karras:rho", 1)[0] if numbers else 7.0}
    if name == "loguniform" and not numbers:
        return {"name": name}
    raise ValueError(f"found {text!r}; expected lognormal:P_mean,P_std, karras:rho or loguniform")


def _range(text: str) -> dict[str, float]:
    low, high = _numbers(text, "sigma_min,sigma_max", 2)
    return {"sigma_min": low, "sigma_max": high}


def _seconds(text: str) -> float:
    """SLURM's ways to write a time: minutes, minutes:seconds, hours:minutes:seconds, days-hours:minutes:seconds."""
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    try:
        numbers = [float(part) for part in parts]
        if len(parts) > 3 or (dash and len(parts) != 3) or min(numbers) < 0:
            raise ValueError
        hours, minutes, seconds = {1: (0, *numbers, 0), 2: (0, *numbers), 3: tuple(numbers)}[len(parts)]
        return float(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds
    except ValueError:
        raise ValueError(
            f"found {text!r}; expected minutes, hours:minutes:seconds or days-hours:minutes:seconds"
        ) from None


def _label_dist(text: str) -> tuple[float, ...] | None:
    """'uniform', a JSON list of numbers, or the path of a file with one."""
    if text == "uniform":
        return None
    try:
        numbers = json.loads(text if text.lstrip().startswith("[") else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"found {text!r}; expected uniform, a JSON list, or a file with one ({error})") from None
    if not isinstance(numbers, list) or not all(type(n) in (int, float) for n in numbers):
        raise ValueError(f"found {text!r}; expected a JSON list of one number per class")
    return tuple(float(n) for n in numbers)


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
@_opt("--objective", "objective", "What the student follows; see docs/objectives.md.", type=click.Choice(OBJECTIVES))
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
    python refine.py --gan=one-step --teacher=digits-teacher --preset=one-step
    python refine.py --resume=latest
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # before torch is imported: not its page about a closed connection
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with _one_voice():
        config = None if resume else make_config(given)
        states, changes = _find_states(resume, given) if resume else ([], {})
    run(config, states, changes, dry_run)


@contextlib.contextmanager
def _one_voice():
    """Of several processes that were given the same wrong options, the first one complains."""
    try:
        yield
    except (ValueError, OSError):
        if os.environ.get("RANK", "0") != "0":
            raise click.exceptions.Exit(2) from None
        raise


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
            law = dataclasses.replace(law, **_law(given[name])) if name in given else law
        with option(f"{flag}-range"):
            text = parsed.pop(f"{name}_range", None)
            law = dataclasses.replace(law, **_range(text)) if text else law
        parsed[name] = law
    parsed["ema_rampup"] = parsed.get("ema_rampup", RefineConfig.ema_rampup) or None
    return RefineConfig(**parsed)


_READERS = {"betas": _betas, "aux_betas": _betas, "time_limit": _seconds, "label_dist": _label_dist}


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
    from refine.run_dir import find_training_states

    with option("--resume"):
        return find_training_states(outdir if resume == "latest" else resume), {**given, **_parse(given)}


def run(
    config: RefineConfig | None,
    state_paths: list[Path] | None = None,
    changes: dict[str, Any] | None = None,
    dry_run: bool = False,
) -> Path | None:
    """Refine by `config`, or go on from a training state; everything is checked before anything is written.

    Args:
        config: All options of a new run, None to go on.
        state_paths: Training states to go on from: the first one that can be read.
        changes: Options of that run to be changed.
        dry_run: Print what would be done.

    Returns:
        The run folder, or None for a dry run.

    Raises:
        ValueError, OSError: Something the user can put right; the message names the option.
        click.exceptions.Exit: The run was stopped before its end, its state is saved; or another process failed.
    """
    if config is not None:
        with _one_voice(), option("--outdir"):
            check_outdir(config.outdir)
    from refine.training_state import load_newest  # torch, from here on: the options are valid
    from torch_utils import distributed
    from torch_utils.threads import set_threads

    set_threads()
    state, state_path, notes = None, None, []
    if state_paths:
        with _one_voice(), option("--resume"):
            state_path, state, notes = load_newest(state_paths)
            config = RefineConfig.from_dict({**json.loads(state["config"]), "time_limit": None, **(changes or {})})
    with _one_voice(), option("--batch"):
        if config.batch % distributed.world_size():
            raise ValueError(f"{config.batch} images for {distributed.world_size()} processes; expected a multiple")
    with _one_voice(), option("--device"):
        device_name = choose_device(config.device)
    with _one_voice():
        choose_ops(config.ops, device_name.partition(":")[0])
    resumed = None if state is None else (state_path, state, notes)
    try:
        with distributed.session(cuda=device_name.startswith("cuda")):
            path, stopped = _run(config, resumed, device_name, dry_run)
    except distributed.LostProcess as error:
        if error.told and not distributed.is_main():
            raise click.exceptions.Exit(1) from None
        raise
    if stopped is not None:  # 0: the time was up, which was asked for; else as a shell counts signals
        raise click.exceptions.Exit(128 + stopped if stopped else 0)
    return path


def _run(
    config: RefineConfig, resumed: tuple | None, device_name: str, dry_run: bool
) -> tuple[Path | None, int | None]:
    """The part of `run` that all processes do together; the run folder, and what `TrainingRun.run` returns."""
    import torch

    from refine.run_dir import next_run_dir
    from torch_utils import distributed

    with option("--device"):
        device = torch.device(distributed.local_device(device_name))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if distributed.is_main():  # which may download files; the others find them afterwards
        inputs = _load_inputs(config)
    distributed.wait_for_main()
    if not distributed.is_main():
        inputs = _load_inputs(config)
    config = _with_absolute_paths(config)
    student_name = ONE_STEP if config.gan == ONE_STEP else inputs["student_path"].stem
    desc = config.desc or f"{student_name}-{inputs['teacher_path'].stem}-batch{config.batch}"
    if dry_run:
        place = {"run_dir": str(next_run_dir(config.outdir, desc)), "device": str(device)}
        if distributed.is_main():
            click.echo(json.dumps({**config.as_dict(), **place}, indent=2))
        return None, None
    return _start(config, inputs, device, desc, resumed)


def _load_inputs(config: RefineConfig) -> dict[str, Any]:
    """Student, teacher, their files and the metrics, checked against each other and the options."""
    from refine.metrics.named import NamedMetric
    from refine.noise import SigmaLaw, make_weighting
    from refine.trainer import check_label_dist, guided, select_parameters

    for flag, law in (("--sigma", config.sigma), ("--aux-sigma", config.aux_sigma)):
        with option(flag):
            SigmaLaw(**vars(law)).sample(1)
    with option("--weighting"):
        make_weighting(config.weighting)
    inputs = _load_pair(config)
    check_label_dist(config.label_dist, inputs["student"], inputs["teacher"])
    if config.guidance != 1:
        guided(inputs["teacher"], config.guidance)
    with option("--train"):
        select_parameters(inputs["student"], config.train)
    with option("--metrics"):
        metrics = [NamedMetric(name, config.ref) for name in config.metrics]
    return {**inputs, "metrics": metrics}


def _load_pair(config: RefineConfig) -> dict[str, Any]:
    """Student and teacher, and their files; a pair that does not fit is refused before either is built."""
    from refine.checkpoints import load_generator, load_teacher, peek, source_file
    from refine.networks.one_step import OneStepGenerator
    from refine.trainer import check_pair

    one_step = config.gan == ONE_STEP
    with option("--gan"):
        student_path = None if one_step else source_file(config.gan, "generator")
        student_info = None if one_step else peek(config.gan, "generator")
    with option("--teacher"):
        teacher_path = source_file(config.teacher, "teacher")
        teacher_info = peek(teacher_path, "teacher")
    if not one_step:
        check_pair(student_info, teacher_info)
    with option("--gan"):
        student = None if one_step else load_generator(config.gan)
    with option("--teacher"):
        teacher = load_teacher(teacher_path)
    if one_step:
        with option("--sigma-init"):
            student, student_path = OneStepGenerator.from_teacher(teacher, config.sigma_init), teacher_path
    return {"student_path": student_path, "teacher_path": teacher_path, "student": student, "teacher": teacher}


def _with_absolute_paths(config: RefineConfig) -> RefineConfig:
    """For --resume from any folder; names stay names. A URL, which may hold a password, becomes its file."""
    from refine.checkpoints import custom, resolve
    from refine.checkpoints.fetch import is_url

    given = {k: v for k in ("gan", "teacher", "ref") if (v := getattr(config, k))}
    absolute = {k: os.path.abspath(resolve(v)) for k, v in given.items() if is_url(v) or os.path.exists(v)}
    if (reference := custom.parse(config.gan)) and reference.file:
        absolute["gan"] = f"{reference}@{os.path.abspath(reference.file)}"
    return dataclasses.replace(config, **absolute)


def _start(config, inputs, device, desc: str, resumed: tuple | None) -> tuple[Path, int | None]:
    """Make or reopen the run folder and train in it."""
    from refine.run_dir import RunDir, create_run_dir
    from refine.snapshots import file_provenance
    from refine.trainer import Trainer
    from refine.training_run import TrainingRun
    from torch_utils import distributed

    files = {name: file_provenance(inputs[f"{name}_path"]) for name in ("student", "teacher")}
    state_path, state, notes = resumed or (None, None, [])
    with option("--outdir"):
        if state is not None:
            folder = state_path.parent
        else:  # made by the first process; the others need its name only
            folder = create_run_dir(config.outdir, desc) if distributed.is_main() else None
            folder = Path(distributed.text_of_main(str(folder)))
    run_dir = RunDir(folder, writes=distributed.is_main())
    reason = _no_container(config.gan, inputs["student_path"])
    training = TrainingRun(
        Trainer(config, inputs["student"], inputs["teacher"], device),
        run_dir,
        metrics=inputs["metrics"],
        provenance=files,
        container=None if reason else inputs["student_path"],
    )
    machine = {"device": str(device), "processes": distributed.world_size(), "versions": _versions()}
    if state is not None:
        with option("--resume"):
            training.load_state_dict(state)
        run_dir.trim_after(training.trainer.nimg / 1000)
    options = {**config.as_dict(), **machine, "run_dir": str(run_dir.path), "files": files}
    run_dir.write_json("training_options.json", options)
    run_dir.log(f"run folder  {run_dir.path}")
    for note in notes:
        run_dir.log(f"damaged     {note}; going on from the state before it")
    if distributed.world_size() > 1:
        run_dir.log(f"processes   {distributed.world_size()}, {config.batch // distributed.world_size()} images each")
    run_dir.log(
        f"snapshots   .safetensors{f' only: {reason}' if reason else ' and .pkl, the container that the GAN came in'}"
    )
    if state is not None:
        run_dir.log(f"going on at {training.trainer.nimg / 1000:.1f} of {config.kimg:g} kimg, from {state_path.name}")
        for name, before in json.loads(state["config"]).items():
            if name in CHANGEABLE - {"time_limit"} and (now := config.as_dict()[name]) != before:
                run_dir.log(f"changed     --{name.replace('_', '-')} from {before} to {now}")
    return run_dir.path, _train(training, run_dir, resumed=state is not None)


def _no_container(gan: str, path: Path) -> str | None:
    """Why snapshots are not written into copies of the file that the GAN came in; None = they are."""
    from refine.checkpoints import custom
    from refine.checkpoints.export import can_write_like

    if gan == ONE_STEP:
        return "the one-step generator is made here, from the teacher"
    if reference := custom.parse(gan):
        return f"use them as {reference}@FILE"
    return can_write_like(path)


def _versions() -> dict[str, str]:
    import torch

    import refine as package

    return {"gan-refine": package.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}


def _train(training, run_dir, resumed: bool) -> int | None:
    import torch

    from refine.stopping import StopRequests
    from torch_utils import distributed

    trainer = training.trainer
    count = sum(p.numel() for p in trainer.student_parameters)
    run_dir.log(f"student     {trainer.config.gan}, {count:,} parameters to train, on {trainer.device}")
    run_dir.log(
        f"teacher     {trainer.config.teacher}, {sum(p.numel() for p in trainer.teacher.parameters()):,} parameters"
    )
    for line in trainer.bridge.messages(trainer.null_label):
        run_dir.log(f"bridge      {line}")
    threads = f", threads: {torch.get_num_threads()}" if trainer.device.type == "cpu" else ""
    run_dir.log(f"computing   {trainer.config.precision}{threads}")
    for remark in trainer.remarks:
        run_dir.log(f"            {remark}")
    monitor = None
    if distributed.is_main():
        from refine.monitor import Monitor

        monitor = Monitor(run_dir.path, trainer.config.kimg, trainer.nimg / 1000 if resumed else None)
    try:
        with StopRequests(trainer.config.time_limit) as stop:
            stopped = training.run(monitor, stop)
    finally:
        if monitor is not None:
            monitor.close()
    if stopped is not None:
        return stopped
    if (best := training.snapshots.best) is not None:
        run_dir.log(f"best        {best['snapshot']}: {best['metric']} {best['value']:.4g} at {best['kimg']:.1f} kimg")
    run_dir.log(f"done; watch it with  tensorboard --logdir={run_dir.path}")
    return None
