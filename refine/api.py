"""The toolkit from Python: what the commands do, with networks as they are in memory or in files.

    import refine

    result = refine.refine("digits-gan", "digits-teacher-2", preset="demo", callbacks=[lambda event: print(event.kimg)])
    print(result.verdict)
    images = refine.sample(result.best, range(16))                 # uint8 [16, C, H, W]
    print(refine.compare("digits-gan", result.best, ref="digits-reference"))

A network is a file, a URL, a name of pretrained/index.toml, `package.module:function`, or an nn.Module: one of the
toolkit's own, or a foreign one that keeps to docs/generators.md or docs/teachers.md. Modules are copied, and stay as
they are. Faults are ValueErrors of one line, which name options as the command line
does (`--kimg` is the argument `kimg`).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import operator
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from refine import checkpoints
from refine.checkpoints import native
from refine.checkpoints.given import given_generator, given_teacher, name_of
from refine.checkpoints.teachers import TeacherSource
from refine.config import OPTIONS, RefineConfig
from refine.config.option import flag
from refine.device import prepare_device
from refine.errors import option
from refine.metrics.own import MetricFunction, OwnMetric, as_own_metric
from refine.networks.bases import Denoiser, Generator
from refine.networks.own import OwnGenerator
from refine.pair import Bridge, check_pair
from refine.processes import together
from refine.training.callbacks import Event

__all__ = [
    *("Bridge", "Comparison", "Event", "Measured", "MetricFunction", "OwnMetric", "Result"),
    *("bridge", "compare", "load_generator", "load_teacher", "refine", "sample"),
]

P = ParamSpec("P")
R = TypeVar("R")

_running = threading.RLock()

#: A file, URL, name or `package.module:function`, or the network itself.
Network = str | os.PathLike[str] | nn.Module


@dataclass(frozen=True)
class Measured:
    """What one metric said of a run at one moment.

    Attributes:
        metric: Its name, 'fd2k-digits'.
        kimg: Thousands of images through the student step; 0 = the generator as it came.
        values: Its numbers by name, 'fd_digits', 'recall', …
        snapshot: Name of the file that holds the network; 'init' for the generator as it came.
    """

    metric: str
    kimg: float
    values: Mapping[str, float]
    snapshot: str


@dataclass(frozen=True)
class Result:
    """What a run leaves. Networks are as `load_generator` gives them: on the CPU, in eval mode, without gradients.

    Attributes:
        student: The student of the last step.
        average: Its longest average.
        best: The best snapshot by the first metric; None where none was measured.
        history: All that was measured, metric by metric.
        verdict: What was gained, in a line; empty where nothing was measured or the run did not come to its end.
        finished: Whether it came to its end; also an end that patience or a callback made. Otherwise a time limit or a
            signal ended it, and `resume` goes on.
        folder: The run folder. One that nobody asked for goes with this result.
        config: All options.
    """

    student: Generator = field(repr=False)
    average: Generator = field(repr=False)
    best: Generator | None = field(repr=False)
    history: tuple[Measured, ...] = field(repr=False)
    verdict: str
    finished: bool
    folder: Path
    config: RefineConfig = field(repr=False)


@dataclass(frozen=True)
class Comparison:
    """Two networks beside each other; as a text, the table of `compare_fid.py`.

    Attributes:
        verdict: Of the leading distance: 'better', 'not distinguishable' or 'worse'.
        metric: Its name.
        ratio: Its mean after by its mean before.
        summary: All that was found, in sentences.
        before, after: Number → its mean over the seed ranges.
        results: Everything, as `compare_fid.py --json` writes it.
    """

    verdict: str
    metric: str
    ratio: float
    summary: str
    before: Mapping[str, float]
    after: Mapping[str, float]
    results: Mapping[str, Any] = field(repr=False)

    def __str__(self) -> str:
        from refine.evaluation.tables import feature_space_note, text_table

        return f"{text_table(self.results)}\n\n{self.summary}\n{feature_space_note(self.results)}"


@contextlib.contextmanager
def _usual_torch() -> Iterator[None]:
    """torch as a new process has it: float32, on the CPU, with gradients; put back as the caller had it."""
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as modes:
        modes.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        if torch.empty(0).device.type != "cpu":  # otherwise not: under it every call of torch takes longer
            modes.enter_context(torch.device("cpu"))
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
            modes.enter_context(torch.autocast(device, enabled=False))
        yield


def _whatever_torch_is_told(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose result does not depend on the modes and defaults of torch that the caller has set."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        with _usual_torch():
            return function(*args, **kwargs)

    return called


@_whatever_torch_is_told
def load_generator(
    path_or_name: str | os.PathLike[str], kwargs: Mapping[str, Any] | None = None, sigma_init: float | None = None
) -> Generator:
    """The generator of a file, see `refine.checkpoints.load_generator`: on the CPU, in eval mode, without gradients."""
    return checkpoints.load_generator(path_or_name, kwargs, sigma_init)


@_whatever_torch_is_told
def load_teacher(path_or_name: str | os.PathLike[str], kwargs: Mapping[str, Any] | None = None) -> Denoiser:
    """The diffusion model of a file, see `refine.checkpoints.load_teacher`, in the same state as a generator."""
    return checkpoints.load_teacher(path_or_name, kwargs)


@_whatever_torch_is_told
def refine(
    G: Network | None = None,
    T: Network | None = None,
    *,
    preset: str | None = None,
    callbacks: Sequence[Callable[[Event], object]] = (),
    metrics: str | Sequence[str | MetricFunction | OwnMetric] | None = None,
    outdir: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | None = None,
    quiet: bool = False,
    **options: Any,
) -> Result:
    """Refines a generator with a diffusion model, as `refine.py` does.

    Args:
        G, T: The generator, and the diffusion model of the same kind of images. G may be 'one-step'.
        preset: Defaults for a kind of run, see `refine.py --help`.
        callbacks: Called before the first step and at the end of every tick; `event.stop()` ends the run.
        metrics: Names, and functions of one's own, which are given the generator; the first decides which snapshot is
            the best; or their names as in --metrics. None = what the preset says.
        outdir: Where the run folder is made; None = in a temporary place, which goes with the result.
        resume: A run folder or training state to go on from; options are then those that `--resume` may change, and G
            and T are needed only where they are modules.
        quiet: Nothing to stdout.
        **options: Fields of `refine.config.RefineConfig`, by their names: kimg=6.4, batch=32, lr=1e-4, …

    Raises:
        ValueError: An option or a network cannot be used, the numbers diverged, or another thread is in here: torch's
            random numbers are those of the whole process.
        OSError: A file could not be written.
    """
    if not _running.acquire(blocking=False):
        raise ValueError("another thread of this process refines; expected one run at a time, or a process for each")
    try:
        return _refine(G, T, preset, callbacks, metrics, outdir, resume, quiet, options)
    finally:
        _running.release()


def _refine(
    G: Network | None,
    T: Network | None,
    preset: str | None,
    callbacks: Sequence[Callable[[Event], object]],
    metrics: str | Sequence[str | MetricFunction | OwnMetric] | None,
    outdir: str | os.PathLike[str] | None,
    resume: str | os.PathLike[str] | None,
    quiet: bool,
    options: Mapping[str, Any],
) -> Result:
    from refine.training import assemble
    from refine.training.finding import find_training_states

    _check_names(options)
    given: dict[str, Any] = dict(options)
    student = teacher = None
    with option("--gan"):
        if isinstance(G, nn.Module):
            student = given_generator(G)
        elif G is not None:
            given["gan"] = G
    with option("--teacher"):
        if isinstance(T, nn.Module):
            teacher = TeacherSource.of(T, options.get("teacher_kwargs"))
        elif T is not None:
            given["teacher"] = T
    own: list[OwnMetric] = []
    if isinstance(metrics, str):
        given["metrics"] = OPTIONS["metrics"].kind.parse(metrics)
    elif metrics is not None:
        chosen = [metric if isinstance(metric, str) else as_own_metric(metric) for metric in metrics]
        own = [metric for metric in chosen if isinstance(metric, OwnMetric)]
        given["metrics"] = tuple(metric.name if isinstance(metric, OwnMetric) else metric for metric in chosen)
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise ValueError(f"callbacks: found {type(callbacks).__name__}; expected a list of functions of an event")
    brought = assemble.Brought(student, teacher, own, tuple(callbacks), quiet)
    if preset is not None:
        given["preset"] = preset
    temporary = None
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            if resume is not None:
                if outdir is not None:
                    raise ValueError("--outdir beside --resume: a run goes on in its folder")
                with option("--resume"):
                    states = find_training_states(_path(resume))
                run = assemble.resume(states, given, brought=brought)
            else:
                given |= {"gan": name_of(student)} if student is not None else {}
                given |= {"teacher": teacher.name} if teacher is not None else {}
                if outdir is None:
                    outdir = temporary = tempfile.mkdtemp(prefix="refine-")
                with option("--outdir"):
                    given["outdir"] = _path(outdir)
                run = assemble.run(RefineConfig(**given), brought=brought)
        result = _result(run)
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if temporary is not None:
        weakref.finalize(result, shutil.rmtree, temporary, ignore_errors=True)
    return result


@_whatever_torch_is_told
def sample(
    network: Network | Result,
    seeds: Sequence[int],
    *,
    classes: int | Sequence[int] | None = None,
    floats: bool = False,
    truncation_psi: float = 1.0,
    noise_mode: str | None = None,
    steps: int | None = None,
    guidance: float = 1.0,
    batch: int = 16,
    device: str | None = None,
) -> torch.Tensor:
    """Images by seed of a generator or a diffusion model, the same as those of `generate.py`.

    Args:
        network: A network, a run folder, or a result, of which the best snapshot is taken.
        seeds: One per image, 0 to 2³² − 1; a seed's latent is `RandomState(seed).randn(1, z_dim)`.
        classes: The class of all images, or one per seed; None = drawn by seed, where there are classes.
        floats: Images as the network gives them instead of uint8.
        truncation_psi, noise_mode: Of a StyleGAN2; None = 'const'.
        steps, guidance: Steps of a diffusion model's sampler (None = as published for such models), and the strength of
            its classifier-free guidance.
        batch: Images at once.
        device: 'cpu', 'cuda', 'cuda:N'; None = CUDA where there is one.

    Returns:
        uint8, or float32 in about [-1, 1], [N, C, H, W] on the CPU, in the order of the seeds.

    Raises:
        ValueError: The network cannot be used, or a class or seed does not exist.
    """
    from refine.evaluation.sides import Side, check_choice, check_reach
    from refine.evaluation.teachers import TeacherOptions
    from refine.networks.sampler_settings import SamplerChoice

    with option("--seeds"):
        seeds = _whole(seeds)
        if not seeds or min(seeds) < 0 or max(seeds) >= 2**32:
            raise ValueError(f"found {len(seeds)} seeds; expected at least one, within 0 to {2**32 - 1}")
    choice, teachers = SamplerChoice({} if steps is None else {"steps": steps}), TeacherOptions(guidance=guidance)
    name = prepare_device(device, None)
    with option("--network"):
        side = Side(_network(network), name, batch, noise_mode or "const", truncation_psi, teachers, choice)
        teachers.check_used([side.is_teacher])
        check_choice(choice, side.is_teacher)
        check_reach({"network": side}, truncation_psi, noise_mode)
        asked = classes if classes is None or isinstance(classes, int) else list(classes)
        if isinstance(asked, list) and len(asked) != len(seeds):
            raise ValueError(f"found {len(asked)} classes for {len(seeds)} seeds; expected one each")
        return torch.cat([part.images.cpu() for part in side.sample(seeds, asked, floats=floats)])


@_whatever_torch_is_told
def compare(
    before: Network,
    after: Network | Result,
    ref: str | os.PathLike[str],
    *,
    detector: str | os.PathLike[str] | None = None,
    num: int = 2000,
    seeds: Sequence[int] = (0, 1, 2),
    teacher: Network | None = None,
    data: str | os.PathLike[str] | None = None,
    also: Sequence[str] = (),
    outdir: str | os.PathLike[str] | None = None,
    batch: int = 100,
    device: str | None = None,
    quiet: bool = False,
) -> Comparison:
    """Compares two networks on the same seeds, as `compare_fid.py` does.

    Args:
        before, after: Networks, run folders, or a result. Of an `after` that is a run folder or a result, all snapshots
            are measured, and the verdict is about the best one.
        ref, detector: What images are compared with, and the feature space; see docs/metrics.md.
        num, seeds: Images per seed range, and at least three ranges: range k holds the seeds k·num … (k+1)·num − 1.
        teacher, data: A diffusion model, and real images, that are measured as well.
        also: Metrics that take longer: 'dc', 'fdinf', 'is', 'kidsub', 'mmd', 'sliced'.
        outdir: Where report.html, the figures and comparison.json go; None = nowhere.
        batch: Images at once.
        device: 'cpu', 'cuda', 'cuda:N'; None = CUDA where there is one.
        quiet: No bars and notes on stderr.

    Raises:
        ValueError: An input cannot be used; the message begins with its option.
    """
    from refine.evaluation.compare import compare as compare_networks
    from refine.metrics.pipeline import sharing

    with option("--ref"):
        ref = _path(ref)
    with option("--detector"):
        detector = None if detector is None else _path(detector)
    with option("--seeds"):
        seeds = _whole(seeds)
    name = prepare_device(device, None)
    judged = after.folder if isinstance(after, Result) else after
    with together(cuda=False), sharing():
        found = compare_networks(
            before, judged, ref, detector, num, seeds, outdir,
            teacher=teacher, data=data, also=also, batch=batch, device=name, progress=not quiet,
        )  # fmt: skip
    means = {side: {key: found[side][key]["mean"] for key in found["difference"]} for side in ("before", "after")}
    said: dict[str, Any] = {name: found[name] for name in ("verdict", "metric", "ratio", "summary")}
    return Comparison(**said, before=means["before"], after=means["after"], results=found)


@_whatever_torch_is_told
def bridge(G: Network, T: Network) -> Bridge:
    """How a generator's images and labels reach a diffusion model, where the two differ; files are not loaded.

    `bridge(G, T).messages(null_label)` has a line for every difference, `.images(x)` takes the images across.

    Raises:
        ValueError: They do not go together; the message says what both have and what was expected.
    """
    with option("--gan"):
        student = given_generator(G) if isinstance(G, nn.Module) else checkpoints.peek(G, "generator")
    with option("--teacher"):
        teacher = given_teacher(T) if isinstance(T, nn.Module) else checkpoints.peek(T, "teacher")
    return check_pair(student, teacher)


def _path(given: object) -> str:
    """Raises ValueError for what is neither a text nor a path."""
    if not isinstance(given, str | os.PathLike):
        raise ValueError(f"found {type(given).__name__}; expected a path or a name")
    return os.fspath(given)


def _whole(given: Any) -> list[int]:
    """Raises ValueError for what are not whole numbers; those of numpy and torch are."""
    try:
        return [operator.index(number) for number in given]
    except TypeError:
        raise ValueError(f"found {str(given)[:60]}; expected a sequence of whole numbers") from None


def _check_names(options: Mapping[str, Any]) -> None:
    """Raises ValueError for an argument that is no field of RefineConfig."""
    for name in options:
        if name not in OPTIONS:
            meant = next((other for other, known in OPTIONS.items() if name.replace("_", "-") in known.aliases), None)
            raise ValueError(f"{flag(name)} is no option" + (f"; did you mean {meant}?" if meant else ""))


def _network(network: Network | Result) -> Network:
    """What is to be loaded: of a run folder or a result its best snapshot."""
    if isinstance(network, Result):
        return network.average if network.best is None else network.best
    if isinstance(network, nn.Module) or not Path(network).is_dir():
        return network
    from refine.evaluation.run_folder import network_in

    return network_in(os.fspath(network))[0]


def _result(run: Any) -> Result:
    trainer, start = run.training.trainer, run.student
    best: Generator | None = None
    file = run.folder / "network-snapshot-best.safetensors"
    if file.is_file():
        if isinstance(start, OwnGenerator):
            best = copy.deepcopy(start).eval()
            native.load_into(file, "G_ema", best)
        else:
            best = checkpoints.load_generator(file)
    return Result(
        student=_filled(start, trainer.G),
        average=_filled(start, trainer.G_ema),
        best=best,
        history=tuple(_history(run)),
        verdict=run.verdict,
        finished=run.stopped is None,
        folder=run.folder,
        config=run.config,
    )


def _filled(start: Generator, trained: Generator) -> Generator:
    """A network like the one that the run began with, in its precision and place, with the weights of a trained one."""
    G = copy.deepcopy(start)
    G.load_state_dict(trained.state_dict())
    return G.cpu().float().eval().requires_grad_(False)


def _history(run: Any) -> list[Measured]:
    """The lines of the run folder's metric-*.jsonl."""
    found = []
    for metric in run.training.snapshots.metrics:
        path = run.folder / f"metric-{metric.name}.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            row = json.loads(line)
            values = {key: value for key, value in row["results"].items() if isinstance(value, float)}
            found.append(Measured(metric.name, row["kimg"], values, row["snapshot"]))
    return found
