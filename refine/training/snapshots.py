"""What a run leaves at every snapshot: the networks, pictures of fixed latents, metrics, and a copy of the best."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from refine.checkpoints.export import members, write_like
from refine.checkpoints.native import save_networks
from refine.config import NOT_IN_SNAPSHOTS, RefineConfig
from refine.diff_instruct import evaluating
from refine.images import save_png
from refine.metrics.metric import is_better
from refine.metrics.named import NamedMetric
from refine.metrics.own import OwnMetric
from refine.metrics.pipeline import sharing
from refine.metrics.registry import METRICS
from refine.metrics.sampling import sample_images
from refine.networks.bases import Generator
from refine.torch_utils import distributed
from refine.training.averages import average_name
from refine.training.best import copy_best
from refine.training.fakes import FakesGrid
from refine.training.finding import snapshot_number
from refine.training.monitor import Monitor
from refine.training.run_dir import RunDir
from refine.training.trainer import Trainer


@dataclass(frozen=True)
class Best:
    """The best snapshot so far by the first metric."""

    metric: str
    value: float
    snapshot: str  # name of the file
    kimg: float


@dataclass
class Standing:
    """What the metrics have said of a run so far; in a training state by these names."""

    best: Best | None = None
    since_best: int = 0  # snapshots measured since the best one
    start_recall: float | None = None  # of the first metric, where config.keep_recall asks for it
    recall_lost: bool = False

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> "Standing":
        """From the values of a training state; older ones know nothing of recall."""
        best = None if state["best"] is None else Best(**state["best"])
        return cls(best, state["since_best"], state.get("start_recall"), state.get("recall_lost", False))


@dataclass(frozen=True)
class Judged:
    """An average of the student and what the first metric says of it; nothing where no metric could be measured."""

    network: Generator
    length: float | None = None  # of a power-function average
    value: float | None = None
    results: dict[str, Any] | None = None


class Snapshots:
    """Writes snapshots of a trainer's student into a run folder.

    Args:
        trainer: As it is before its first step: the pictures before refinement are taken now.
        run_dir: Where everything is written.
        metrics: Measured at every snapshot; the first one decides which snapshot is the best.
        provenance: Name and sha256 of the files of student and teacher, and of real images if the run uses any; written
            into every snapshot.
        container: The pickle that the student came in; snapshots are then written into copies of it, too. None = not.
    """

    def __init__(
        self,
        trainer: Trainer,
        run_dir: RunDir,
        metrics: Sequence[NamedMetric | OwnMetric] | None = None,
        provenance: dict[str, Any] | None = None,
        container: Path | None = None,
    ):
        self.trainer, self.run_dir = trainer, run_dir
        self.metrics, self.provenance, self.container = list(metrics or []), provenance or {}, container
        self.standing = Standing()
        self._fakes = FakesGrid(trainer.G, trainer.device)
        self._init_grid = self._fakes.draw(trainer.G_ema)

    def begin(self, monitor: Monitor) -> None:
        """Pictures and metrics of the student as it came."""
        if distributed.is_main():
            save_png(self.run_dir.path / "fakes_init.png", self._init_grid)
        monitor.image("Fakes/before", self._init_grid, 0)
        monitor.begin(self.trainer.config.as_dict(), {metric.name: metric.key for metric in self.metrics})
        judged = self._measure({None: self.trainer.G_ema}, "init", monitor)
        if judged.results is not None:
            self.standing.start_recall = judged.results.get("recall")

    def save(self, monitor: Monitor) -> str:
        """Networks, pictures and metrics of now. All processes measure, the first one writes and knows the best.

        Returns:
            The number in the snapshot's name, which its training state takes, too; of the first process.
        """
        trainer = self.trainer
        distributed.check_equal([getattr(trainer, name) for name in trainer.stateful])
        exact = trainer.config.short_intervals
        number = snapshot_number(self.run_dir.path, trainer.nimg, exact) if distributed.is_main() else ""
        name = f"network-snapshot-{number}.safetensors"
        averages: dict[Any, Generator] = dict(trainer.averages.networks) or {None: trainer.G_ema}
        judged = self._measure(averages, name, monitor)
        if distributed.is_main():
            self._save(name, judged, monitor)
            self._compare_with_best(name, judged)
        distributed.wait_for_main()
        return number

    def images(self, seeds: Sequence[int]) -> torch.Tensor:
        """Images of the average as it is now, uint8 [N, C, H, W] on the CPU; the random state is left alone."""
        trainer = self.trainer
        batches = sample_images(trainer.G_ema, seeds, batch=16, device=trainer.device, noise_mode="const")
        return torch.cat([batch.images.cpu() for batch in batches])

    def _save(self, name: str, judged: Judged, monitor: Monitor) -> None:
        trainer, kimg = self.trainer, self._kimg
        provenance = {**self.provenance, "options": _portable(trainer.config), "kimg": kimg}
        if judged.length is not None:
            provenance["average_length"] = judged.length
        networks = {"G_ema": judged.network, "G": trainer.G}
        networks |= {average_name(length): average for length, average in trainer.averages.networks.items()}
        save_networks(self.run_dir.path / name, networks, provenance=provenance)
        if self.container is not None:
            theirs = {key: networks[key] for key in members(self.container) if key in networks}
            write_like(self.container, (self.run_dir.path / name).with_suffix(".pkl"), theirs)
        grid = self._fakes.draw(judged.network)
        picture = name.replace("network-snapshot-", "fakes")
        save_png((self.run_dir.path / picture).with_suffix(".png"), grid)
        monitor.image("Fakes/now", grid, kimg)
        both = beside(self._init_grid, grid, self._fakes.columns, trainer.G.c_dim)
        monitor.image("Fakes/before_after", both, kimg)

    def _measure(self, averages: Mapping[float | None, Generator], snapshot: str, monitor: Monitor) -> Judged:
        """The best of these averages by the first metric, which all processes measure; the longest where none can be.

        The other metrics are measured of that one. A failing metric is reported and does not end the run.
        """
        distributed.wait_for_main()  # where there is no metric, too: nobody is ahead of what is being written
        longest = max(averages, key=lambda length: length or 0.0)
        best = Judged(averages[longest], longest)
        if self.metrics:
            metric = self.metrics[0]
            others: dict[str, dict[str, float]] = {}  # of all averages, and of the student as it is
            for length, network in averages.items():
                judged = self._judge(metric, network, length)
                if judged.results is not None and length is not None:
                    others[f"{length:g}"] = _leading(metric, judged.results)
                if judged.value is not None and (
                    best.value is None or is_better(metric.direction, judged.value, best.value)
                ):
                    best = judged
            if others:
                with evaluating(self.trainer.G):
                    raw = self._judge(metric, self.trainer.G, None)
                if raw.results is not None:
                    others["raw"] = _leading(metric, raw.results)
            for name, numbers in others.items():
                scalars = {f"Metrics/{metric.name}/{key}_{name}": value for key, value in numbers.items()}
                monitor.scalars(scalars, self._kimg)
            if best.results is not None:
                if others:
                    best.results["averages"] = others
                self._record(metric, best.results, snapshot, monitor, best.length)
        for metric in self.metrics[1:]:
            if (results := self._judge(metric, best.network, best.length).results) is not None:
                self._record(metric, results, snapshot, monitor, best.length)
        distributed.wait_for_main()  # processes are not equally fast, and other exchanges are not so patient
        return best

    def _judge(self, metric: NamedMetric | OwnMetric, network: Generator, length: float | None) -> Judged:
        """One average in one metric; without a value where that fails or is not finite."""
        device = self.trainer.device
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), sharing():
                results = metric.measure(network, device, progress=True)
            value = float(results[metric.key])
        except Exception as error:
            if distributed.is_lost_connection(error):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            self.run_dir.log(f"metric {metric.name} failed: {reason}")
            return Judged(network, length)
        return Judged(network, length, value, results) if math.isfinite(value) else Judged(network, length)

    @property
    def _kimg(self) -> float:
        return self.trainer.nimg / 1000

    def _record(
        self,
        metric: NamedMetric | OwnMetric,
        results: dict[str, Any],
        snapshot: str,
        monitor: Monitor,
        length: float | None,
    ) -> None:
        if not distributed.is_main():
            return
        numbers = {key: value for key, value in results.items() if isinstance(value, float) and key != "seconds"}
        monitor.scalars({f"Metrics/{metric.name}/{key}": value for key, value in numbers.items()}, self._kimg)
        if "class_histogram" in results:
            monitor.class_histogram(results["class_histogram"], self._kimg)
        self.run_dir.append_metric(metric.name, {**results, "average_length": length}, snapshot, self._kimg)
        text = "  ".join(f"{key} {value:.4g}" for key, value in numbers.items())
        of = "" if length is None else f" of the average of length {length:g}"
        with tqdm.external_write_mode():
            self.run_dir.log(f"metric {metric.name} at {self._kimg:.1f} kimg{of}: {text}")

    def _recall_is_kept(self, results: dict[str, Any]) -> bool:
        """Whether the share of the recall that `--keep-recall` asks for is still there; it decides what is the best."""
        share, recall, standing = self.trainer.config.keep_recall, results.get("recall"), self.standing
        if not share or recall is None or standing.start_recall is None:
            return True
        standing.recall_lost = recall < share * standing.start_recall
        return not standing.recall_lost

    def _compare_with_best(self, snapshot: str, judged: Judged) -> None:
        """Keep a copy of the snapshot that was just written, if it is the best so far and its recall is kept."""
        if judged.results is None or judged.value is None or not self._recall_is_kept(judged.results):
            return
        standing, metric = self.standing, self.metrics[0]
        standing.since_best += 1
        best = standing.best
        if best is not None and best.metric != metric.name:  # --resume with other metrics: their numbers say nothing
            best = None
        if best is None or is_better(metric.direction, judged.value, best.value):
            standing.since_best = 0
            standing.best = Best(metric.name, judged.value, snapshot, self._kimg)
            copy_best(self.run_dir.path, snapshot)


def _leading(metric: NamedMetric | OwnMetric, results: Mapping[str, Any]) -> dict[str, float]:
    """The number that a metric is led by, and the shares that stand beside it in curves, such as recall."""
    shares = {row.name for one in METRICS for row in one.rows if row.in_curve}
    return {key: value for key, value in results.items() if key == metric.key or key in shares}


def _portable(config: RefineConfig) -> dict[str, Any]:
    """Options that decide the result: not where files lie, so that two equal runs write equal snapshots."""
    return {k: v for k, v in config.as_dict().items() if k not in NOT_IN_SNAPSHOTS}


def beside(before: torch.Tensor, now: torch.Tensor, columns: int, num_classes: int = 0) -> torch.Tensor:
    """The same left half of two pictures of `columns` images a row, side by side: as large as one, and every class is
    there if it was in half a row."""
    half = columns // 2
    if 1 < num_classes <= half:
        half -= half % num_classes
    width = half * before.shape[2] // columns
    gap = torch.full([now.shape[0], now.shape[1], 8], 255, dtype=torch.uint8)
    return torch.cat([before[:, :, :width], gap, now[:, :, :width]], dim=2)
