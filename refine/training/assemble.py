"""From checked options to a run: networks are loaded and compared, the run folder is made, the training begins."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from refine.config import CHANGEABLE, RefineConfig
from refine.device import choose_device, choose_ops
from refine.dnnlib import check_outdir
from refine.errors import option
from refine.processes import one_voice, together

if TYPE_CHECKING:
    from refine.training.state import FoundState

ONE_STEP = "one-step"  # of --gan: the teacher's own U-Net as the generator


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
        with one_voice(), option("--outdir"):
            check_outdir(config.outdir)
    from refine.torch_utils import distributed
    from refine.torch_utils.threads import set_threads
    from refine.training.state import load_newest  # torch, from here on: the options are valid

    set_threads()
    found = None
    if state_paths:
        with one_voice(), option("--resume"):
            found = load_newest(state_paths)
            before = json.loads(found.state["config"])
            config = RefineConfig.from_dict({**before, "time_limit": None, **(changes or {})})
    assert config is not None, "either a config or states"
    with one_voice(), option("--batch"):
        if config.batch % distributed.world_size():
            raise ValueError(f"{config.batch} images for {distributed.world_size()} processes; expected a multiple")
    with one_voice(), option("--device"):
        device_name = choose_device(config.device)
    with one_voice():
        choose_ops(config.ops, device_name.partition(":")[0])
    with together(cuda=device_name.startswith("cuda")):
        path, stopped = _run(config, found, device_name, dry_run)
    if stopped is not None:  # 0: the time was up, which was asked for; else as a shell counts signals
        raise click.exceptions.Exit(128 + stopped if stopped else 0)
    return path


def _run(
    config: RefineConfig, resumed: "FoundState | None", device_name: str, dry_run: bool
) -> tuple[Path | None, int | None]:
    """The part of `run` that all processes do together; the run folder, and what `TrainingRun.run` returns."""
    import torch

    from refine.metrics.named import NamedMetric
    from refine.metrics.pipeline import sharing
    from refine.torch_utils import distributed
    from refine.training.run_dir import next_run_dir

    with option("--device"):
        device = torch.device(distributed.local_device(device_name))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if distributed.is_main():  # which may download files; the others find them afterwards
        inputs = _load_inputs(config)
    distributed.wait_for_main()
    if not distributed.is_main():
        inputs = _load_inputs(config)
    with option("--metrics"), sharing():  # all processes look at the images of --ref
        metrics = [NamedMetric(name, config.ref, device=device) for name in config.metrics]
    distributed.wait_for_main()
    config = _with_absolute_paths(config)
    student_name = ONE_STEP if config.gan == ONE_STEP else inputs["student_path"].stem
    desc = config.desc or f"{student_name}-{inputs['teacher_path'].stem}-batch{config.batch}"
    if dry_run:
        place = {"run_dir": str(next_run_dir(config.outdir, desc)), "device": str(device)}
        if distributed.is_main():
            click.echo(json.dumps({**config.as_dict(), **place}, indent=2))
        return None, None
    return _start(config, {**inputs, "metrics": metrics}, device, desc, resumed)


def _load_inputs(config: RefineConfig) -> dict[str, Any]:
    """Student, teacher and their files, checked against each other and the options."""
    from refine.guidance import guided
    from refine.noise import SigmaLaw, make_weighting
    from refine.objectives import make_objective
    from refine.pair import check_label_dist
    from refine.training.regularise import set_dropout
    from refine.training.trainer import select_parameters

    for flag, law in (("--sigma", config.sigma), ("--aux-sigma", config.aux_sigma)):
        with option(flag):
            SigmaLaw(**vars(law)).sample(1)
    with option("--weighting"):
        make_weighting(config.weighting)
    with option("--objective"):
        make_objective(config.objective)
    inputs = _load_pair(config)
    check_label_dist(config.label_dist, inputs["student"], inputs["teacher"])
    if config.guidance != 1:
        guided(inputs["teacher"], config.guidance)
    if config.aux_dropout is not None:
        set_dropout(inputs["teacher"], config.aux_dropout)
    with option("--train"):
        select_parameters(inputs["student"], config.train)
    return inputs


def _load_pair(config: RefineConfig) -> dict[str, Any]:
    """Student and teacher, and their files; a pair that does not fit is refused before either is built."""
    from refine.checkpoints import load_generator, load_teacher, peek, source_file
    from refine.networks.one_step import OneStepGenerator
    from refine.pair import check_pair

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
    from refine.checkpoints import resolve
    from refine.checkpoints.sources import custom
    from refine.checkpoints.sources.fetch import is_url

    given = {k: v for k in ("gan", "teacher", "ref") if (v := getattr(config, k))}
    absolute: dict[str, Any] = {
        k: os.path.abspath(resolve(v)) for k, v in given.items() if is_url(v) or os.path.exists(v)
    }
    if (reference := custom.parse(config.gan)) and reference.file:
        absolute["gan"] = f"{reference}@{os.path.abspath(reference.file)}"
    return dataclasses.replace(config, **absolute)


def _start(config, inputs, device, desc: str, resumed: "FoundState | None") -> tuple[Path, int | None]:
    """Make or reopen the run folder and train in it."""
    from refine.torch_utils import distributed
    from refine.training.loop import TrainingRun
    from refine.training.run_dir import RunDir, create_run_dir
    from refine.training.snapshots import Origin, Provenance
    from refine.training.trainer import Trainer

    provenance = Provenance(Origin.of(inputs["student_path"]), Origin.of(inputs["teacher_path"]))
    with option("--outdir"):
        if resumed is not None:
            folder = resumed.path.parent
        else:  # made by the first process; the others need its name only
            made = create_run_dir(config.outdir, desc) if distributed.is_main() else None
            folder = Path(distributed.text_of_main(str(made)))
    run_dir = RunDir(folder, writes=distributed.is_main())
    reason = _no_container(config.gan, inputs["student_path"])
    training = TrainingRun(
        Trainer(config, inputs["student"], inputs["teacher"], device),
        run_dir,
        metrics=inputs["metrics"],
        provenance=provenance,
        container=None if reason else inputs["student_path"],
    )
    machine = {"device": str(device), "processes": distributed.world_size(), "versions": _versions()}
    if resumed is not None:
        with option("--resume"):
            training.load_state_dict(resumed.state)
        run_dir.trim_after(training.trainer.nimg / 1000)
    options = {**config.as_dict(), **machine, "run_dir": str(run_dir.path)}
    options["files"] = dataclasses.asdict(provenance)
    run_dir.write_json("training_options.json", options)
    run_dir.log(f"run folder  {run_dir.path}")
    for note in resumed.damaged if resumed is not None else ():
        run_dir.log(f"damaged     {note}; going on from the state before it")
    if distributed.world_size() > 1:
        run_dir.log(f"processes   {distributed.world_size()}, {config.batch // distributed.world_size()} images each")
    run_dir.log(
        f"snapshots   .safetensors{f' only: {reason}' if reason else ' and .pkl, the container that the GAN came in'}"
    )
    if resumed is not None:
        run_dir.log(f"going on at {training.trainer.nimg / 1000:.1f} of {config.kimg:g} kimg, from {resumed.path.name}")
        for name, before in json.loads(resumed.state["config"]).items():
            if name in CHANGEABLE - {"time_limit"} and (now := config.as_dict()[name]) != before:
                run_dir.log(f"changed     --{name.replace('_', '-')} from {before} to {now}")
    return run_dir.path, _train(training, run_dir, resumed=resumed is not None)


def _no_container(gan: str, path: Path) -> str | None:
    """Why snapshots are not written into copies of the file that the GAN came in; None = they are."""
    from refine.checkpoints.export import can_write_like
    from refine.checkpoints.sources import custom

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

    from refine.torch_utils import distributed
    from refine.training.monitor import Monitor
    from refine.training.stopping import StopRequests

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
    start_kimg = trainer.nimg / 1000 if resumed else None
    monitor = Monitor(run_dir.path, trainer.config.kimg, start_kimg, writes=distributed.is_main())
    try:
        with StopRequests(trainer.config.time_limit) as stop:
            stopped = training.run(monitor, stop)
    finally:
        monitor.close()
    if stopped is not None:
        return stopped
    if (best := training.snapshots.standing.best) is not None:
        run_dir.log(f"best        {best.snapshot}: {best.metric} {best.value:.4g} at {best.kimg:.1f} kimg")
    run_dir.log(f"done; watch it with  tensorboard --logdir={run_dir.path}")
    return None
