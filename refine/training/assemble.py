"""From checked options to a run: networks are loaded and compared, the run folder is made, the training begins."""

import dataclasses
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import refine
from refine.checkpoints.sources import custom
from refine.checkpoints.sources.fetch import is_url
from refine.config import CHANGEABLE, OPTIONS, TEACHER, RefineConfig
from refine.config.needs import ONE_STEP
from refine.config.option import flag
from refine.device import choose_device, choose_ops
from refine.dnnlib import check_outdir, naming
from refine.errors import option
from refine.guidance import Guided
from refine.metrics.image_sets import ImageSet
from refine.metrics.named import NamedMetric
from refine.metrics.own import OwnMetric
from refine.metrics.pipeline import sharing
from refine.metrics.sampling import sensible_batch
from refine.networks.bases import Generator
from refine.pair import check_label_dist, check_pair
from refine.processes import one_voice, together
from refine.torch_utils import distributed
from refine.torch_utils.threads import set_threads
from refine.training.adversary import Others
from refine.training.alike import check_options_alike, check_origins_alike
from refine.training.best import mend_best
from refine.training.callbacks import CallbackMonitor
from refine.training.estimate import Estimate, counted, estimate, is_too_long, outlined, stand_ins
from refine.training.loading import Brought, Pair, load_pair, no_container
from refine.training.loop import TrainingRun
from refine.training.monitor import Monitor, Monitors
from refine.training.others import images_of_data, images_of_teacher
from refine.training.regularise import set_dropout
from refine.training.report import next_commands, outcome, result_line
from refine.training.resuming import Resumed, absolute_place, check_reach, how_to_go_on, resumed_config
from refine.training.run_dir import RunDir, create_run_dir, next_run_dir
from refine.training.stopping import StopRequests
from refine.training.streams import lasting_streams
from refine.training.tensorboard import TensorBoard
from refine.training.trainer import Trainer, select_parameters
from refine.training.weights_and_biases import WeightsAndBiases, check_available


@dataclass(frozen=True)
class Run:
    """A run that has ended or, after a dry run, that would begin.

    Attributes:
        config: All options, with absolute paths.
        device: Where it ran.
        folder: The run folder.
        stopped: None if it came to its end, else what `TrainingRun.run` says.
        estimate: What it would cost, after a dry run.
        bridge: How images and classes of student and teacher are joined, a line for each difference.
        notes: After a dry run, a line for each option that has no part in it or does not do here what it says.
        training: With the networks as they are in the end; None after a dry run.
        student: The generator as it came.
        verdict: What was gained, in a line; empty where nothing was measured or the run did not come to its end.
    """

    config: RefineConfig
    device: str
    folder: Path
    stopped: int | None = None
    estimate: Estimate | None = None
    bridge: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    training: TrainingRun | None = None
    student: Generator | None = None
    verdict: str = ""

    @property
    def exit_code(self) -> int:
        """For the shell: 0 also when the time was up, which was asked for; signals as a shell counts them."""
        return 128 + self.stopped if self.stopped else 0


def run(
    config: RefineConfig,
    dry_run: bool = False,
    given: Mapping[str, Any] | None = None,
    brought: Brought = Brought(),  # noqa: B008 - frozen
) -> Run:
    """Refine by `config`; everything is checked before anything is written.

    Args:
        config: All options.
        dry_run: Check, and write nothing.
        given: Where the options come from a file, those that the command line gave: what would be imported or
            downloaded has to be among them.
        brought: What a caller in Python brings.

    Raises:
        ValueError, OSError: Something the user can put right; the message names the option.
        SystemExit: Another process failed, or complains about the same.
    """
    with one_voice(), option("--outdir"):
        _check_is_text(check_outdir(config.outdir))
    if given is not None:
        with one_voice(), option("--config"):
            check_reach(given, config, "the file")
    return _run(config, None, dry_run, brought)


def resume(
    state_paths: list[Path],
    given: Mapping[str, Any],
    dry_run: bool = False,
    brought: Brought = Brought(),  # noqa: B008 - frozen
) -> Run:
    """Go on from a training state, with other options where `given` holds some.

    Args:
        state_paths: The first one that can be read is taken.
        given: Fields of RefineConfig: those that are CHANGEABLE; `gan` and `teacher`, the same files in another place;
            and others as they are in the state.
        dry_run: Check, and write nothing.
        brought: What a caller in Python brings.

    Raises:
        ValueError, OSError, SystemExit: As for `run`.
    """
    with one_voice(), option("--resume"):
        _check_is_text(state_paths[0])
        resumed, config = resumed_config(state_paths, given, {metric.name for metric in brought.metrics})
    return _run(config, resumed, dry_run, brought)


def _check_is_text(path: Path) -> None:
    """Raises ValueError for a name in bytes that are no characters, which TensorBoard cannot open."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{str(path)!a} is no text in UTF-8; expected a name that is, or PYTHONUTF8=1 if LANG says otherwise"
        ) from None


def _run(config: RefineConfig, resumed: Resumed | None, dry_run: bool, brought: Brought) -> Run:
    began = time.monotonic()  # what the teacher draws first is part of --time-limit
    set_threads()
    with one_voice(), option("--batch"):
        if config.batch % distributed.world_size():
            raise ValueError(f"{config.batch} images for {distributed.world_size()} processes; expected a multiple")
    if "wandb" in config.logger:
        with one_voice(), option("--logger"):
            check_available()
    with one_voice(), option("--device"):
        device_name = choose_device(config.device)
    with one_voice():
        choose_ops(config.ops, device_name.partition(":")[0])
    with lasting_streams(), together(cuda=device_name.startswith("cuda")):
        return _run_together(config, resumed, device_name, dry_run, began, brought)


def _run_together(
    config: RefineConfig, resumed: Resumed | None, device_name: str, dry_run: bool, began: float, brought: Brought
) -> Run:
    """The part of `run` that all processes do together."""
    with option("--device"):
        device = torch.device(distributed.local_device(device_name))
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)  # one without a number cannot be set
        torch.cuda.set_device(device)
    check_options_alike(config, None if resumed is None else resumed.found.state["nimg"], dry_run)
    if distributed.is_main():  # which may download files; the others find them afterwards
        pair = load_pair(config, brought)
    distributed.wait_for_main()
    if not distributed.is_main():
        pair = load_pair(config, brought)
    check_origins_alike(pair.origins)
    _check_against_options(pair, config)
    notes = config.without_part(pair.student, pair.teacher)
    _say(notes)
    if resumed is not None:
        resumed.check_files(_checksums(config, pair, []))  # before images of another teacher are drawn
    images = _open_data(config)
    # Before the teacher's are drawn, which takes its time: these may turn out to be of no use.
    others = None if images is None else _load_others(config, pair, images, device)
    metrics = _load_metrics(config, pair, device, dry_run, brought)
    distributed.wait_for_main()
    files = _checksums(config, pair, metrics)
    if images is not None:
        files["data"] = images.sha256()
    if resumed is not None:
        kept = {name: digest for name, digest in files.items() if name != "ref" or config.ref == resumed.config.ref}
        resumed.check_files(kept)
    config = _with_absolute_paths(config)
    student_name = ONE_STEP if config.gan == ONE_STEP else pair.student_path.stem
    desc = config.desc or f"{student_name}-{pair.source.stem}-batch{config.batch}"
    if others is None and not dry_run:
        others = _load_others(config, pair, None, device)
    if dry_run:
        place = next_run_dir(config.outdir, desc) if resumed is None else resumed.found.path.parent
        return _estimated(config, pair, device, others, metrics, place, notes)
    run_dir = _open_run_dir(config, desc, resumed, brought.quiet)
    trainer = Trainer(config, pair.student, pair.teacher, device, others, pair.guide)
    unwritten = no_container(config.gan, pair)
    container = None if unwritten else pair.student_path
    origins = dict(pair.origins)
    if images is not None:
        origins["data"] = {"file": images.path.name, "sha256": files["data"]}
    go_on = brought.how_to_go_on(run_dir.path) or how_to_go_on(config, run_dir.path)
    training = TrainingRun(trainer, run_dir, files, go_on, metrics=metrics, provenance=origins, container=container)
    if resumed is not None:
        with option("--resume"):
            training.load_state_dict(resumed.found.state)
        run_dir.trim_after(trainer.nimg / 1000)
        if (best := training.snapshots.standing.best) is not None:
            mend_best(run_dir, best.snapshot)
    _write_options(run_dir, config, pair, device)
    _log_files(run_dir, config, unwritten, resumed)
    if resumed is not None:
        _log_changes(run_dir, config, resumed, trainer.nimg)
    _log_networks(run_dir, trainer, pair)
    stopped, verdict = _train(training, run_dir, resumed is not None, began, brought)
    ended: dict[str, Any] = {"training": training, "student": pair.student, "verdict": verdict}
    return Run(config, str(device), run_dir.path, stopped, **ended)


def _estimated(
    config: RefineConfig,
    pair: Pair,
    device: torch.device,
    others: Others | None,
    metrics: list[NamedMetric | OwnMetric],
    place: Path,
    notes: list[str],
) -> Run:
    """A dry run: a trainer that makes a few iterations, and is thrown away."""
    bridge = check_pair(pair.student, pair.teacher)
    networks, critic = (pair.student, pair.teacher, pair.guide), bool(config.adversarial)
    counts = counted(config, *networks, critic)
    if is_too_long(config, device, counts):
        trainer = outlined(config, *networks, critic)
    else:
        if critic and others is None:
            others = stand_ins(bridge.student, bridge.teacher, device)
        trainer = Trainer(config, pair.student, pair.teacher, device, others, pair.guide)
    images = sum(metric.num for metric in metrics[:1])  # of every average; further metrics only of the best
    found = estimate(trainer, images, no_container(config.gan, pair) is None, counts)
    _say(trainer.remarks)
    notes = [*notes, *trainer.remarks]
    return Run(config, str(device), place, None, found, tuple(bridge.messages(trainer.null_label)), tuple(notes))


def _say(notes: Iterable[str]) -> None:
    """What a user should know, once, on stderr."""
    for line in notes if distributed.is_main() else ():
        print(f"note: {line}", file=sys.stderr)


def _load_metrics(
    config: RefineConfig, pair: Pair, device: torch.device, dry_run: bool, brought: Brought
) -> list[NamedMetric | OwnMetric]:
    """With what they compare with: all processes look at the images of --ref, and draw those of the teacher."""
    size = pair.student.img_resolution
    batch = config.metrics_batch or sensible_batch(max(size, pair.teacher.img_resolution))
    options: dict[str, Any] = {"device": device, "trust": config.trust_detector, "teacher": pair.source}
    options |= {"batch": batch, "image_shape": [pair.student.img_channels, size, size]}
    options |= {"draw": not dry_run, "progress": True}
    with option("--metrics"), sharing():
        own = {metric.name: metric for metric in brought.metrics}
        metrics = [own.get(name) or NamedMetric(name, config.ref, **options) for name in config.metrics]
    _say(dict.fromkeys(note for metric in metrics if (note := getattr(metric, "shortage", None)) is not None))
    return metrics


def _open_data(config: RefineConfig) -> ImageSet | None:
    if config.data is None:
        return None
    with one_voice(), option("--data"):
        if not config.data or is_url(config.data):
            raise ValueError(f"found {config.data!r}; expected a folder or a zip file of images")
        return ImageSet(Path(config.data))


def _load_others(config: RefineConfig, pair: Pair, images: ImageSet | None, device: torch.device) -> Others | None:
    """What the critic compares with, if there is one: real images, or the teacher's."""
    if not config.adversarial:
        return None
    bridge = check_pair(pair.student, pair.teacher)
    if images is not None:
        with option("--data"):
            return images_of_data(images, bridge, device)
    with option("--bank"), sharing():
        return images_of_teacher(pair.source, config.bank, bridge, device)


def _checksums(config: RefineConfig, pair: Pair, metrics: Sequence[NamedMetric | OwnMetric]) -> dict[str, str]:
    """SHA-256 of the files that a run which is resumed must find again, by option; code of the user's may change."""
    names = [name for name in pair.origins if name != "student"]
    files = {name: pair.origins[name]["sha256"] for name in names}
    reference = custom.parse(config.gan)
    if config.gan != ONE_STEP and (reference is None or reference.file):
        files["gan"] = pair.origins["student"]["sha256"]
    if config.ref == TEACHER:  # is among them already
        return files
    if digest := next((metric.reference_sha256 for metric in metrics if metric.reference_sha256), None):
        files["ref"] = digest
    return files


def _check_against_options(pair: Pair, config: RefineConfig) -> None:
    check_label_dist(config.label_dist, pair.student, pair.teacher)
    if config.guidance != 1 and pair.guide is None:
        Guided(pair.teacher, config.guidance)
    if config.aux_dropout is not None:
        set_dropout(pair.teacher, config.aux_dropout)
    with option("--train"):
        select_parameters(pair.student, config.train)


def _with_absolute_paths(config: RefineConfig) -> RefineConfig:
    """For --resume from any folder."""
    given = {name: getattr(config, name) for name in ("gan", "teacher", "guide", "ref", "data")}
    keeps = {"gan": ONE_STEP, "ref": TEACHER}  # words that mean no file, even where there is one of that name
    places: dict[str, Any] = {
        name: absolute_place(text) for name, text in given.items() if text is not None and text != keeps.get(name)
    }
    return dataclasses.replace(config, **places)


def _open_run_dir(config: RefineConfig, desc: str, resumed: Resumed | None, quiet: bool) -> RunDir:
    """A new run folder, or the one of the state that the run goes on from."""
    with option("--outdir"):
        if resumed is not None:
            folder = resumed.found.path.parent
        else:  # made by the first process; the others need its name only
            made = create_run_dir(config.outdir, desc) if distributed.is_main() else None
            folder = Path(distributed.text_of_main(str(made)))
    return RunDir(folder, quiet, writes=distributed.is_main())


def _write_options(run_dir: RunDir, config: RefineConfig, pair: Pair, device: torch.device) -> None:
    versions = {"gan-refine": refine.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    machine = {"device": str(device), "processes": distributed.world_size(), "versions": versions}
    place = {"run_dir": str(run_dir.path), "files": pair.origins}
    run_dir.write_json("training_options.json", {**config.as_dict(), **machine, **place})


def _log_files(run_dir: RunDir, config: RefineConfig, unwritten: str | None, resumed: Resumed | None) -> None:
    run_dir.log(f"run folder  {run_dir.path}")
    for message in resumed.found.damaged if resumed is not None else ():
        run_dir.log(f"damaged     {message}; going on from the state before it")
    if distributed.world_size() > 1:
        run_dir.log(f"processes   {distributed.world_size()}, {config.batch // distributed.world_size()} images each")
    pickles = f" only: {unwritten}" if unwritten else " and .pkl, the container that the GAN came in"
    run_dir.log(f"snapshots   .safetensors{pickles}")


def _log_changes(run_dir: RunDir, config: RefineConfig, resumed: Resumed, nimg: int) -> None:
    run_dir.log(f"going on at {nimg / 1000:.1f} of {config.kimg:g} kimg, from {resumed.found.path.name}")
    if nimg >= config.num_steps * config.batch:
        run_dir.log(f"finished    all of its {config.kimg:g} kimg are done; a larger --kimg would go on")
    for name, known in OPTIONS.items():
        before, now = getattr(resumed.config, name), getattr(config, name)
        if name in CHANGEABLE - {"time_limit"} and now != before:
            run_dir.log(f"changed     {flag(name)} from {known.kind.format(before)} to {known.kind.format(now)}")


def _log_networks(run_dir: RunDir, trainer: Trainer, pair: Pair) -> None:
    config, device = trainer.config, trainer.device
    student, teacher = (
        sum(p.numel() for p in parameters) for parameters in (trainer.student_parameters, pair.teacher.parameters())
    )
    run_dir.log(f"student     {config.gan}, {student:,} parameters to train, on {device}")
    for note in trainer.G.notes:
        run_dir.log(f"            {note}")
    run_dir.log(f"teacher     {config.teacher}, {teacher:,} parameters{pair.source.guided_words}")
    for note in pair.teacher.notes:
        run_dir.log(f"            {note}")
    judged = config.metrics and config.ref not in (None, TEACHER)
    judge = f"; snapshots are judged against {config.ref}" if judged else ""
    if trainer.adversary is None:
        source = "data-free: the student learns from the teacher alone"
    elif config.data is None:
        source = f"data-free: a critic compares the student with {len(trainer.adversary.others)} images of the teacher"
    else:
        source = f"a critic compares the student with {len(trainer.adversary.others)} real images of {config.data}"
    run_dir.log(f"data        {source}{judge}")
    for line in trainer.bridge.messages(trainer.null_label):
        run_dir.log(f"bridge      {line}")
    run_dir.log(f"rates       student {trainer.lr:.3g}, auxiliary network {trainer.aux_lr:.3g}")
    threads = f", threads: {torch.get_num_threads()}" if device.type == "cpu" else ""
    run_dir.log(f"computing   {trainer.precision}{threads}")
    for remark in trainer.remarks:
        run_dir.log(f"            {remark}")
    if device.type == "cuda":
        without = trainer.graphs.reason
        run_dir.log(
            f"cuda graphs {f'none: {without}' if without else 'one for each kind of step, after its first runs'}"
        )


def _train(
    training: TrainingRun, run_dir: RunDir, resumed: bool, began: float, brought: Brought
) -> tuple[int | None, str]:
    """Train to the end, or to a reason to stop, as `TrainingRun.run` says; and what was gained."""
    config = training.config
    with StopRequests(config.time_limit, began) as stop, naming(run_dir.path):
        monitor = _open_monitors(training, run_dir, resumed, stop, brought)
        try:
            stopped, verdict = training.run(monitor, stop), ""
            snapshots = training.snapshots
            if stopped is None and snapshots.metrics and distributed.is_main():
                judged = snapshots.metrics[0], snapshots.standing.best, training.progress.elapsed
                monitor.outcome(outcome(run_dir.path, *judged))
                verdict = result_line(run_dir.path, *judged)
        finally:
            monitor.close()
    if stopped is not None:
        return stopped, ""
    if verdict:
        run_dir.log(verdict)
    if brought.student is None and brought.teacher is None:
        for line in next_commands(run_dir.path, config, training.snapshots.container):
            run_dir.log(f"next        {line}")
    place = f"; watch it (tab Custom Scalars) with  tensorboard --logdir={run_dir.path}"
    run_dir.log(f"done{place if 'tensorboard' in config.logger else ''}")
    return None, verdict.removeprefix("result").strip()


def _open_monitors(
    training: TrainingRun, run_dir: RunDir, resumed: bool, stop: StopRequests, brought: Brought
) -> Monitors:
    """Who is told; nobody in every process but one."""
    if not distributed.is_main():
        return Monitors()
    monitors: list[Monitor] = []
    with option("--logger"):
        if "wandb" in training.config.logger:
            monitors.append(WeightsAndBiases(run_dir.path, training.config.as_dict()))
    if "tensorboard" in training.config.logger:
        monitors.append(TensorBoard(run_dir.path, training.trainer.nimg / 1000 if resumed else None))
    if brought.callbacks:
        monitors.append(CallbackMonitor(brought.callbacks, training.snapshots.images, stop.ask))
    return Monitors(monitors)
