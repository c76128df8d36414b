"""From checked options to a run: networks are loaded and compared, the run folder is made, the training begins."""

import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import refine
from refine.checkpoints import load_generator, load_teacher, peek, resolve, source_file
from refine.checkpoints.export import can_write_like
from refine.checkpoints.sources import custom
from refine.checkpoints.sources.fetch import is_url
from refine.config import CHANGEABLE, OPTIONS, RefineConfig
from refine.config.option import flag
from refine.device import choose_device, choose_ops
from refine.dnnlib import check_outdir
from refine.errors import option
from refine.guidance import guided
from refine.metrics.named import NamedMetric
from refine.metrics.pipeline import sharing
from refine.networks.one_step import OneStepGenerator
from refine.noise import SigmaLaw, make_weighting
from refine.objectives import make_objective
from refine.pair import check_label_dist, check_pair
from refine.processes import one_voice, together
from refine.torch_utils import distributed
from refine.torch_utils.threads import set_threads
from refine.training.loop import TrainingRun
from refine.training.monitor import Monitor
from refine.training.regularise import set_dropout
from refine.training.run_dir import RunDir, create_run_dir, next_run_dir
from refine.training.snapshots import Origin, Provenance
from refine.training.state import FoundState, load_newest
from refine.training.stopping import StopRequests
from refine.training.trainer import Trainer, select_parameters

ONE_STEP = "one-step"  # of --gan: the teacher's own U-Net as the generator


@dataclass(frozen=True)
class Run:
    """A run that has ended or, after a dry run, that would begin.

    Attributes:
        config: All options, with absolute paths.
        device: Where it ran.
        folder: The run folder.
        stopped: None if it came to its end, else what `TrainingRun.run` says.
    """

    config: RefineConfig
    device: str
    folder: Path
    stopped: int | None = None

    @property
    def exit_code(self) -> int:
        """For the shell: 0 also when the time was up, which was asked for; signals as a shell counts them."""
        return 128 + self.stopped if self.stopped else 0


@dataclass(frozen=True)
class _Resumed:
    """The state that a run goes on from, and the options it was saved with."""

    found: FoundState
    config: RefineConfig


@dataclass(frozen=True)
class _Pair:
    """The networks, and the files that they came from."""

    student: Any
    teacher: Any
    student_path: Path
    teacher_path: Path


def run(config: RefineConfig, dry_run: bool = False) -> Run:
    """Refine by `config`; everything is checked before anything is written.

    Args:
        config: All options.
        dry_run: Check, and write nothing.

    Raises:
        ValueError, OSError: Something the user can put right; the message names the option.
        SystemExit: Another process failed, or complains about the same.
    """
    with one_voice(), option("--outdir"):
        check_outdir(config.outdir)
    return _run(config, None, dry_run)


def resume(state_paths: list[Path], changes: dict[str, Any], dry_run: bool = False) -> Run:
    """Go on from a training state, with other options where `changes` holds some.

    Args:
        state_paths: The first one that can be read is taken.
        changes: Fields of RefineConfig, of those that are CHANGEABLE.
        dry_run: Check, and write nothing.

    Raises:
        ValueError, OSError, SystemExit: As for `run`.
    """
    with one_voice(), option("--resume"):
        found = load_newest(state_paths)
        saved = RefineConfig.from_dict({**json.loads(found.state["config"]), "time_limit": None})
        config = dataclasses.replace(saved, **changes)
    return _run(config, _Resumed(found, saved), dry_run)


def _run(config: RefineConfig, resumed: _Resumed | None, dry_run: bool) -> Run:
    set_threads()
    with one_voice(), option("--batch"):
        if config.batch % distributed.world_size():
            raise ValueError(f"{config.batch} images for {distributed.world_size()} processes; expected a multiple")
    with one_voice(), option("--device"):
        device_name = choose_device(config.device)
    with one_voice():
        choose_ops(config.ops, device_name.partition(":")[0])
    with together(cuda=device_name.startswith("cuda")):
        return _run_together(config, resumed, device_name, dry_run)


def _run_together(config: RefineConfig, resumed: _Resumed | None, device_name: str, dry_run: bool) -> Run:
    """The part of `run` that all processes do together."""
    with option("--device"):
        device = torch.device(distributed.local_device(device_name))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if distributed.is_main():  # which may download files; the others find them afterwards
        pair = _load_pair(config)
    distributed.wait_for_main()
    if not distributed.is_main():
        pair = _load_pair(config)
    _check_against_options(pair, config)
    with option("--metrics"), sharing():  # all processes look at the images of --ref
        metrics = [NamedMetric(name, config.ref, device=device, trust=config.trust_detector) for name in config.metrics]
    distributed.wait_for_main()
    config = _with_absolute_paths(config)
    student_name = ONE_STEP if config.gan == ONE_STEP else pair.student_path.stem
    desc = config.desc or f"{student_name}-{pair.teacher_path.stem}-batch{config.batch}"
    if dry_run:
        return Run(config, str(device), next_run_dir(config.outdir, desc))
    run_dir = _open_run_dir(config, desc, resumed)
    training = _make_training(config, pair, metrics, run_dir, device)
    if resumed is not None:
        with option("--resume"):
            training.load_state_dict(resumed.found.state)
        run_dir.trim_after(training.trainer.nimg / 1000)
    _write_options(run_dir, config, pair, device)
    _log_files(run_dir, config, pair, resumed)
    if resumed is not None:
        _log_changes(run_dir, config, resumed, training.trainer.nimg)
    _log_networks(run_dir, training.trainer)
    return Run(config, str(device), run_dir.path, _train(training, run_dir, resumed is not None))


def _load_pair(config: RefineConfig) -> _Pair:
    """Student and teacher, and their files; a pair that does not fit is refused before either is built."""
    one_step = config.gan == ONE_STEP
    _check_laws(config)
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
            student = OneStepGenerator.from_teacher(teacher, config.sigma_init)
    return _Pair(student, teacher, student_path or teacher_path, teacher_path)


def _check_laws(config: RefineConfig) -> None:
    """What only torch can tell of the options, before anything is loaded."""
    for name, law in (("--sigma", config.sigma), ("--aux-sigma", config.aux_sigma)):
        with option(name):
            SigmaLaw(**vars(law)).sample(1)
    with option("--weighting"):
        make_weighting(config.weighting)
    with option("--objective"):
        make_objective(config.objective)


def _check_against_options(pair: _Pair, config: RefineConfig) -> None:
    check_label_dist(config.label_dist, pair.student, pair.teacher)
    if config.guidance != 1:
        guided(pair.teacher, config.guidance)
    if config.aux_dropout is not None:
        set_dropout(pair.teacher, config.aux_dropout)
    with option("--train"):
        select_parameters(pair.student, config.train)


def _with_absolute_paths(config: RefineConfig) -> RefineConfig:
    """For --resume from any folder; names stay names. A URL, which may hold a password, becomes its file."""
    given = {k: v for k in ("gan", "teacher", "ref") if (v := getattr(config, k))}
    absolute: dict[str, Any] = {
        k: os.path.abspath(resolve(v)) for k, v in given.items() if is_url(v) or os.path.exists(v)
    }
    if (reference := custom.parse(config.gan)) and reference.file:
        absolute["gan"] = f"{reference}@{os.path.abspath(reference.file)}"
    return dataclasses.replace(config, **absolute)


def _open_run_dir(config: RefineConfig, desc: str, resumed: _Resumed | None) -> RunDir:
    """A new run folder, or the one of the state that the run goes on from."""
    with option("--outdir"):
        if resumed is not None:
            folder = resumed.found.path.parent
        else:  # made by the first process; the others need its name only
            made = create_run_dir(config.outdir, desc) if distributed.is_main() else None
            folder = Path(distributed.text_of_main(str(made)))
    return RunDir(folder, writes=distributed.is_main())


def _make_training(
    config: RefineConfig, pair: _Pair, metrics: list[NamedMetric], run_dir: RunDir, device: torch.device
) -> TrainingRun:
    return TrainingRun(
        Trainer(config, pair.student, pair.teacher, device),
        run_dir,
        metrics=metrics,
        provenance=_provenance(pair),
        container=None if _no_container(config.gan, pair.student_path) else pair.student_path,
    )


def _provenance(pair: _Pair) -> Provenance:
    return Provenance(Origin.of(pair.student_path), Origin.of(pair.teacher_path))


def _no_container(gan: str, path: Path) -> str | None:
    """Why snapshots are not written into copies of the file that the GAN came in; None = they are."""
    if gan == ONE_STEP:
        return "the one-step generator is made here, from the teacher"
    if reference := custom.parse(gan):
        return f"use them as {reference}@FILE"
    return can_write_like(path)


def _write_options(run_dir: RunDir, config: RefineConfig, pair: _Pair, device: torch.device) -> None:
    versions = {"gan-refine": refine.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    machine = {"device": str(device), "processes": distributed.world_size(), "versions": versions}
    place = {"run_dir": str(run_dir.path), "files": dataclasses.asdict(_provenance(pair))}
    run_dir.write_json("training_options.json", {**config.as_dict(), **machine, **place})


def _log_files(run_dir: RunDir, config: RefineConfig, pair: _Pair, resumed: _Resumed | None) -> None:
    run_dir.log(f"run folder  {run_dir.path}")
    for message in resumed.found.damaged if resumed is not None else ():
        run_dir.log(f"damaged     {message}; going on from the state before it")
    if distributed.world_size() > 1:
        run_dir.log(f"processes   {distributed.world_size()}, {config.batch // distributed.world_size()} images each")
    reason = _no_container(config.gan, pair.student_path)
    run_dir.log(
        f"snapshots   .safetensors{f' only: {reason}' if reason else ' and .pkl, the container that the GAN came in'}"
    )


def _log_changes(run_dir: RunDir, config: RefineConfig, resumed: _Resumed, nimg: int) -> None:
    run_dir.log(f"going on at {nimg / 1000:.1f} of {config.kimg:g} kimg, from {resumed.found.path.name}")
    for name, known in OPTIONS.items():
        before, now = getattr(resumed.config, name), getattr(config, name)
        if name in CHANGEABLE - {"time_limit"} and now != before:
            run_dir.log(f"changed     {flag(name)} from {known.kind.format(before)} to {known.kind.format(now)}")


def _log_networks(run_dir: RunDir, trainer: Trainer) -> None:
    config, device = trainer.config, trainer.device
    student, teacher = (
        sum(p.numel() for p in parameters) for parameters in (trainer.student_parameters, trainer.teacher.parameters())
    )
    run_dir.log(f"student     {config.gan}, {student:,} parameters to train, on {device}")
    run_dir.log(f"teacher     {config.teacher}, {teacher:,} parameters")
    for line in trainer.bridge.messages(trainer.null_label):
        run_dir.log(f"bridge      {line}")
    threads = f", threads: {torch.get_num_threads()}" if device.type == "cpu" else ""
    run_dir.log(f"computing   {config.precision}{threads}")
    for remark in trainer.remarks:
        run_dir.log(f"            {remark}")


def _train(training: TrainingRun, run_dir: RunDir, resumed: bool) -> int | None:
    """Train to the end, or to a reason to stop, as `TrainingRun.run` says."""
    config = training.config
    start_kimg = training.trainer.nimg / 1000 if resumed else None
    monitor = Monitor(run_dir.path, config.kimg, start_kimg, writes=distributed.is_main())
    try:
        with StopRequests(config.time_limit) as stop:
            stopped = training.run(monitor, stop)
    finally:
        monitor.close()
    if stopped is not None:
        return stopped
    if (best := training.snapshots.standing.best) is not None:
        run_dir.log(f"best        {best.snapshot}: {best.metric} {best.value:.4g} at {best.kimg:.1f} kimg")
    run_dir.log(f"done; watch it with  tensorboard --logdir={run_dir.path}")
    return None
