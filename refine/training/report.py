"""The progress line of a tick, what goes into TensorBoard and stats.jsonl, and the last lines of a run."""

import contextlib
import json
import math
import shlex
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refine.checkpoints.sources import custom
from refine.config import TEACHER, RefineConfig
from refine.config.needs import ONE_STEP
from refine.dnnlib import format_time
from refine.metrics.metric import is_better
from refine.metrics.named import NamedMetric, detector_of
from refine.metrics.own import OwnMetric
from refine.metrics.registry import METRICS
from refine.training.snapshots import Best
from refine.training.stopping import StopReason

_SHARES = [row.name for one in METRICS for row in one.rows if row.in_curve]  # precision, recall, …


@dataclass(frozen=True)
class Clocks:
    """When a tick began, in seconds: on the wall, by a clock that nobody can set back, and of this process's threads,
    which others on a CPU disturb less."""

    wall: float = field(default_factory=time.monotonic)
    processor: float = field(default_factory=time.process_time)


@dataclass(frozen=True)
class TickReport:
    """What happened between two progress lines.

    Attributes:
        tick: Its number.
        nimg, images: Images so far, and in this tick.
        remaining: Images until the end of the run.
        elapsed: Seconds of the run.
        seconds, processor_seconds: Time of this tick, on the wall and of this process.
        lr, aux_lr: Learning rates of its last step.
        means: What `RunningMeans` gathered, by TensorBoard tag.
        skipped: Steps left out so far, by network.
        memory: Peak use in GiB, by kind.
    """

    tick: int
    nimg: int
    images: int
    remaining: int
    elapsed: float
    seconds: float
    processor_seconds: float
    lr: float
    aux_lr: float
    means: dict[str, float]
    skipped: dict[str, int]
    memory: dict[str, float]

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / max(self.seconds, 1e-9)

    def line(self) -> str:
        """The line of log.txt."""
        fields = [
            f"tick {self.tick:<5d}",
            f"kimg {self.nimg / 1000:<8.1f}",
            f"time {format_time(self.elapsed):<12s}",
            f"sec/tick {self.seconds:<7.1f}",
            f"sec/kimg {self.seconds / self.images * 1000:<8.2f}",
            f"img/s {self.rate:<7.1f}",
            f"ETA {format_time(self.remaining / self.rate):<10s}",
            f"loss aux {self.means.get('Loss/aux', math.nan):<8.1f}",
            *(f"{name} {value:<6.2f}" for name, value in self.memory.items()),
            *(f"skipped {name} steps {count}" for name, count in self.skipped.items() if count),
        ]
        return " ".join(fields)

    def scalars(self) -> dict[str, float]:
        """Values by TensorBoard tag."""
        return {
            **self.means,
            "Progress/lr": self.lr,
            "Progress/aux_lr": self.aux_lr,
            **{f"Progress/skipped_{name}_steps": float(count) for name, count in self.skipped.items()},
            "Timing/img_per_sec": self.rate,
            "Timing/sec_per_tick": self.seconds,
            "Timing/total_hours": self.elapsed / 3600,
            "Timing/cpu_sec_per_kimg": self.processor_seconds / self.images * 1000,
            **{f"Resources/peak_{name}_gb": value for name, value in self.memory.items()},
        }


def last_line(reason: StopReason, nimg: int, config: RefineConfig, best: Best | None, go_on: str) -> str | None:
    """Why a run ends before its kimg, and what to type for it to go on; None if it came to its end."""
    how_to_go_on = f"saved at {nimg / 1000:.1f} of {config.kimg:g} kimg; go on with  {go_on}"
    if reason == StopReason.TIME_IS_UP:
        return f"time is up; {how_to_go_on}"
    if reason == StopReason.SIGNALLED:
        return f"stopped; {how_to_go_on}"
    if reason == StopReason.ASKED:
        return f"stopped by a callback; {how_to_go_on}"
    if reason == StopReason.NO_BETTER and best is not None:
        return f"no better {best.metric} in {config.patience} snapshots: done, the best is {best.snapshot}"
    if reason == StopReason.RECALL_LOST:
        return f"less than {config.keep_recall:g} of the recall at the start is left: done"
    return None


def result_line(folder: Path, metric: NamedMetric | OwnMetric, best: Best | None, elapsed: float) -> str:
    """What a run gained by its first metric, at what cost, and which network to take.

    Args:
        folder: Of the run, where the metric's numbers are.
        metric: The first one.
        best: The best snapshot.
        elapsed: Seconds of the run.
    """
    measured = _measured(folder, metric.name)
    before = measured.get("init", {})
    if best is None:
        return "result      nothing to choose from: no snapshot was measured and kept as the best"
    after = measured.get(best.snapshot, {}) if best.metric == metric.name else {}
    file, time = "network-snapshot-best.safetensors", format_time(elapsed)
    length = after.get("average_length")
    which = f"average {length:g}, {best.kimg:.1f} kimg" if length is not None else f"{best.kimg:.1f} kimg"
    if metric.key not in after:
        return f"result      {best.metric} {best.value:.3g} at best, in {time}; take {file} ({best.kimg:.1f} kimg)"
    if metric.key not in before:
        now = f"{metric.key} {after[metric.key]:.3g}, not measured at the start"
        return f"result      {now}, in {time}; take {file} ({which})"
    shares = [name for name in _SHARES if name != metric.key]
    pairs = [f"{metric.key} {before[metric.key]:.3g} → {after[metric.key]:.3g}"]
    pairs += [f"{key} {before[key]:.3f} → {after[key]:.3f}" for key in shares if key in before and key in after]
    numbers = f"{', '.join(pairs)} in {time}"
    if not is_better(metric.direction, after[metric.key], before[metric.key]):
        return f"result      nothing gained: {numbers} at best ({which}); keep the generator as it came"
    return f"result      {numbers}; take {file} ({which})"


def outcome(folder: Path, metric: NamedMetric | OwnMetric, best: Best | None, elapsed: float) -> dict[str, float]:
    """The numbers of `result_line` by name, for tables of many runs: the best ones, those before, and the hours."""
    measured = _measured(folder, metric.name)
    found = {"hours": elapsed / 3600}
    for when, name in (("before", "init"), ("after", best.snapshot if best is not None else "")):
        for key, value in measured.get(name, {}).items():
            if key == metric.key or key in _SHARES:
                found[key if when == "after" else f"{key}_before"] = value
    return found


def next_commands(folder: Path, config: RefineConfig, like: Path | None) -> list[str]:
    """What to type after a run: a comparison, images, and a file for other tools.

    Args:
        folder: Of the run.
        config: Its options, with absolute paths.
        like: The pickle that the GAN came in, if it did.
    """
    before, after = f"one-step:{config.teacher}" if config.gan == ONE_STEP else config.gan, str(folder)
    if own := custom.parse(before):  # the function has to be named again
        files = [*sorted(folder.glob("network-snapshot-0*.safetensors")), folder / "network-snapshot-best.safetensors"]
        after = f"{own}@{next(file for file in reversed(files) if file.exists())}"
    judge = []
    if config.ref is not None:
        judge.append(f"--ref={config.teacher if config.ref == TEACHER else config.ref}")
    if config.metrics:
        with contextlib.suppress(ValueError):  # a metric of the caller's own
            of_fid = detector_of(config.metrics[0])
            detector = config.metrics[0].partition("-")[2] or of_fid
            judge.append(f"--detector={config.teacher if detector == TEACHER else detector}")
    elif config.ref == TEACHER:
        judge.append(f"--detector={config.teacher}")
    out = folder / "out"
    lines = []
    if config.ref is not None:
        lines.append(["compare", f"--before={before}", f"--after={after}", *judge, f"--outdir={out / 'comparison'}"])
    lines.append(["generate", f"--network={after}", "--seeds=0-63", f"--outdir={out / 'images'}"])
    to = [f"--like={like}", f"--out={out}.pkl"] if like is not None else ["--format=plain", f"--out={out}.safetensors"]
    if own is None:
        lines.append(["export", f"--network={folder}", *to])
    return [f"python -m refine {shlex.join(line)}" for line in lines]


def _measured(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """Snapshot → its numbers, as the run wrote them; 'init' is the student as it came."""
    path, found = folder / f"metric-{name}.jsonl", {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        row = json.loads(line)
        found[row["snapshot"]] = row["results"]
    return found
