"""What a run leaves at every snapshot: the networks, pictures of fixed latents, metrics, and a copy of the best."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from refine.checkpoints.export import members, write_like
from refine.checkpoints.native import save_networks
from refine.config import NOT_IN_SNAPSHOTS, RefineConfig
from refine.dnnlib import sha256_of_file
from refine.images import image_grid, save_png, to_uint8
from refine.metrics.metric import is_better
from refine.metrics.named import NamedMetric
from refine.metrics.pipeline import sharing
from refine.metrics.sampling import latents_of_seeds
from refine.networks.bases import Generator
from refine.torch_utils import distributed
from refine.training.best import copy_best
from refine.training.finding import snapshot_number
from refine.training.monitor import Monitor
from refine.training.run_dir import RunDir
from refine.training.trainer import Trainer

GRID = (8, 8)  # rows and columns of the fixed-latent pictures


@dataclass(frozen=True)
class Origin:
    """The file that a network came from."""

    file: str  # its name
    sha256: str

    @classmethod
    def of(cls, path: str | Path) -> "Origin":
        return cls(Path(path).name, sha256_of_file(path))


@dataclass(frozen=True)
class Provenance:
    """What a run was made from."""

    student: Origin
    teacher: Origin


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


class Snapshots:
    """Writes snapshots of a trainer's student into a run folder.

    Args:
        trainer: As it is before its first step: the pictures before refinement are taken now.
        run_dir: Where everything is written.
        metrics: Measured at every snapshot; the first one decides which snapshot is the best.
        provenance: What student and teacher were made from, written into every snapshot.
        container: The pickle that the student came in; snapshots are then written into copies of it, too. None = not.
    """

    def __init__(
        self,
        trainer: Trainer,
        run_dir: RunDir,
        metrics: list[NamedMetric] | None = None,
        provenance: Provenance | None = None,
        container: Path | None = None,
    ):
        self.trainer, self.run_dir = trainer, run_dir
        self.metrics, self.provenance, self.container = metrics or [], provenance, container
        self.standing = Standing()
        self._grid_z, self._grid_c = self._fixed_latents()
        self._init_grid = self._grid(trainer.G_ema)

    def begin(self, monitor: Monitor) -> None:
        """Pictures and metrics of the student as it came."""
        if distributed.is_main():
            save_png(self.run_dir.path / "fakes_init.png", self._init_grid)
        monitor.image("Fakes/before", self._init_grid, 0)
        monitor.options(self.trainer.config.as_dict())
        self._measure(monitor, snapshot=None)

    def save(self, monitor: Monitor) -> str:
        """Networks, pictures and metrics of now. All processes measure, the first one writes and knows the best.

        Returns:
            The number in the snapshot's name, which its training state takes, too; of the first process.
        """
        trainer = self.trainer
        distributed.check_equal([trainer.G, trainer.G_ema, trainer.aux])
        exact = trainer.config.short_intervals
        number = snapshot_number(self.run_dir.path, trainer.nimg, exact) if distributed.is_main() else ""
        name = f"network-snapshot-{number}.safetensors"
        if distributed.is_main():
            self._save(name, monitor)
        self._measure(monitor, snapshot=name)
        return number

    def _save(self, name: str, monitor: Monitor) -> None:
        trainer, kimg = self.trainer, self.trainer.nimg / 1000
        files = {} if self.provenance is None else dataclasses.asdict(self.provenance)
        provenance = {**files, "options": _portable(trainer.config), "kimg": kimg}
        networks = {"G_ema": trainer.G_ema, "G": trainer.G}
        save_networks(self.run_dir.path / name, networks, provenance=provenance)
        if self.container is not None:
            theirs = {key: networks[key] for key in members(self.container) if key in networks}
            write_like(self.container, (self.run_dir.path / name).with_suffix(".pkl"), theirs)
        grid = self._grid(trainer.G_ema)
        picture = name.replace("network-snapshot-", "fakes")
        save_png((self.run_dir.path / picture).with_suffix(".png"), grid)
        gap = torch.full([grid.shape[0], grid.shape[1], 8], 255, dtype=torch.uint8)
        monitor.image("Fakes/now", grid, kimg)
        monitor.image("Fakes/before_after", torch.cat([self._init_grid, gap, grid], dim=2), kimg)

    def _measure(self, monitor: Monitor, snapshot: str | None) -> None:
        """Metrics of G_ema now, by all processes; a failing metric is reported and does not end the run."""
        distributed.wait_for_main()  # where there is no metric, too: nobody is ahead of what is being written
        device = self.trainer.device
        for index, metric in enumerate(self.metrics):
            try:
                with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), sharing():
                    results = metric.measure(self.trainer.G_ema, device, progress=True)
                value = float(results[metric.key])
            except Exception as error:
                if distributed.is_lost_connection(error):
                    raise
                reason = " ".join(str(error).split()) or type(error).__name__
                self.run_dir.log(f"metric {metric.name} failed: {reason}")
                continue
            if not distributed.is_main():
                continue
            self._record(metric, results, snapshot, monitor)
            if index == 0 and snapshot is None:
                self.standing.start_recall = results.get("recall")
            elif index == 0 and snapshot is not None and self._recall_is_kept(results) and math.isfinite(value):
                self._keep_best(metric, value, snapshot)
        distributed.wait_for_main()  # processes are not equally fast, and other exchanges are not so patient

    def _record(self, metric: NamedMetric, results: dict[str, Any], snapshot: str | None, monitor: Monitor) -> None:
        kimg = self.trainer.nimg / 1000
        numbers = {key: value for key, value in results.items() if isinstance(value, float) and key != "seconds"}
        monitor.scalars({f"Metrics/{metric.name}/{key}": value for key, value in numbers.items()}, kimg)
        if "class_histogram" in results:
            monitor.class_histogram(results["class_histogram"], kimg)
        self.run_dir.append_metric(metric.name, results, snapshot or "init", kimg)
        text = "  ".join(f"{key} {value:.4g}" for key, value in numbers.items())
        with tqdm.external_write_mode():
            self.run_dir.log(f"metric {metric.name} at {kimg:.1f} kimg: {text}")

    def _recall_is_kept(self, results: dict[str, Any]) -> bool:
        """Whether the share of the recall that `--keep-recall` asks for is still there; it decides what is the best."""
        share, recall, standing = self.trainer.config.keep_recall, results.get("recall"), self.standing
        if not share or recall is None or standing.start_recall is None:
            return True
        standing.recall_lost = recall < share * standing.start_recall
        return not standing.recall_lost

    def _keep_best(self, metric: NamedMetric, value: float, snapshot: str) -> None:
        standing = self.standing
        standing.since_best += 1
        if standing.best is None or is_better(metric.direction, value, standing.best.value):
            standing.since_best = 0
            standing.best = Best(metric.name, value, snapshot, self.trainer.nimg / 1000)
            copy_best(self.run_dir.path, snapshot)

    @torch.no_grad()
    def _fixed_latents(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows, columns = GRID
        G, device = self.trainer.G, self.trainer.device
        z, _ = latents_of_seeds(range(rows * columns), [G.z_dim])
        c = None
        if G.c_dim > 0:  # a column per class, while there are columns
            classes = torch.arange(columns).repeat(rows) % G.c_dim
            c = F.one_hot(classes, G.c_dim).float().to(device)
        return z.to(device), c

    @torch.no_grad()
    def _grid(self, G: Generator) -> torch.Tensor:
        """uint8 (C, H, W) of the fixed latents with the stored noise."""
        options = G.accepted(noise_mode="const")
        images = torch.cat([
            to_uint8(G(self._grid_z[i : i + 16], None if self._grid_c is None else self._grid_c[i : i + 16], **options))
            for i in range(0, len(self._grid_z), 16)
        ])  # fmt: skip
        return image_grid(images, GRID[1])


def _portable(config: RefineConfig) -> dict[str, Any]:
    """Options that decide the result: not where files lie, so that two equal runs write equal snapshots."""
    return {k: v for k, v in config.as_dict().items() if k not in NOT_IN_SNAPSHOTS}
