"""The refinement loop around `diff_instruct`: set up, step, report, save."""

import contextlib
import copy
import json
import math
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from dnnlib import format_kimg, format_time, replaced_atomically, sha256_of_file
from refine.checkpoints.export import members, write_like
from refine.checkpoints.native import save_networks
from refine.config import RefineConfig
from refine.diff_instruct import aux_loss, student_gradient
from refine.ema import ema_beta, update_ema
from refine.images import image_grid, save_png, to_uint8
from refine.metrics.named import NamedMetric
from refine.metrics.sampling import latents_of_seeds
from refine.monitor import Monitor
from refine.noise import SigmaLaw, make_weighting
from refine.run_dir import RunDir
from torch_utils.misc import RunningMeans, gradient_norm, peak_memory

# Where the gap between aux and teacher is reported: bins of the noise level.
SIGMA_EDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
GAP_NAMES = [
    f"Gap/sigma_{low:g}-{high:g}" for low, high in zip((0, *SIGMA_EDGES), (*SIGMA_EDGES, math.inf), strict=True)
]
GRID = (8, 8)  # rows and columns of the fixed-latent pictures


class Trainer:
    """Refines a student with a teacher.

    Args:
        config: All options.
        student: Generator G(z, c), float32; its weights are where the run starts.
        teacher: Denoiser D(x, sigma, c) with the same resolution, channels and number of classes.
        run_dir: Where everything is written.
        metrics: Measured at every snapshot; the first one decides which snapshot is the best.
        provenance: What student and teacher were made from, written into every snapshot.
        container: The pickle that the student came in; snapshots are then written into copies of it, too. None = not.
        device: Where the networks run.

    Raises:
        ValueError: The networks do not fit together, or the options name an impossible law or weighting.
    """

    def __init__(
        self,
        config: RefineConfig,
        student: torch.nn.Module,
        teacher: torch.nn.Module,
        run_dir: RunDir,
        metrics: list[NamedMetric] | None = None,
        provenance: dict[str, Any] | None = None,
        container: Path | None = None,
        device: torch.device | str = "cpu",
    ):
        check_pair(student, teacher)
        self.config, self.run_dir, self.device = config, run_dir, torch.device(device)
        self.metrics, self.provenance, self.container = metrics or [], provenance or {}, container
        self.sigma = SigmaLaw(**vars(config.sigma))
        self.aux_sigma = SigmaLaw(**vars(config.aux_sigma))
        self.weighting = make_weighting(config.weighting)

        torch.manual_seed(config.seed)
        # channels_last is faster on a CPU: a 32×32 student 1.3 to 2 times, a U-Net's forward 1.1 to 1.2 times.
        place = {"device": self.device, "memory_format": torch.channels_last}
        self.teacher = copy.deepcopy(teacher).to(**place).eval().requires_grad_(False)
        self.aux = copy.deepcopy(teacher).to(**place).train(config.dropout).requires_grad_(True)
        self.G = copy.deepcopy(student).to(**place).train()
        self.G_ema = copy.deepcopy(self.G).eval().requires_grad_(False)
        self.student_parameters = select_parameters(self.G, config.train)
        # eps as published; lr is set before every step.
        self.student_optimizer = torch.optim.Adam(self.student_parameters, betas=config.betas, eps=1e-8)
        self.aux_optimizer = torch.optim.Adam(self.aux.parameters(), betas=config.aux_betas, eps=1e-8)

        self.nimg = 0  # images through the student step
        self.warmup_steps_done = 0
        self.elapsed = 0.0  # seconds of this run, over resumes
        self.best: dict[str, Any] | None = None
        self.means = RunningMeans(self.device)
        self._grid_z, self._grid_c = self._fixed_latents()
        self._init_grid = self._grid(self.G_ema)

    # One iteration.

    def step(self) -> None:
        """The auxiliary steps and the student step of one iteration, and the moving average."""
        for _ in range(self.config.aux_steps):
            self.aux_step(self.config.aux_lr)
        self.student_step(self.config.lr * self.config.lr_factor(self.nimg))
        beta = ema_beta(self.config.batch, self.nimg, self.config.ema_kimg, self.config.ema_rampup)
        update_ema(self.G_ema, self.G, beta)
        self.nimg += self.config.batch

    def aux_step(self, lr: float) -> None:
        """One step of aux on fresh images of the student."""
        self.aux_optimizer.zero_grad(set_to_none=True)
        for z, c in self._latents():
            with torch.no_grad():
                x = self._images(z, c)
            sigma = self.aux_sigma.sample(len(x), self.device)
            loss = aux_loss(self.aux, x, c, sigma)
            (loss.sum() / self.config.batch).backward()
            self.means.add("Loss/aux", loss)
        self.means.add("Grad/aux", gradient_norm(list(self.aux.parameters())))
        _optimize(self.aux_optimizer, lr)

    def student_step(self, lr: float) -> None:
        """One step of the student along the difference of the two denoisers."""
        self.student_optimizer.zero_grad(set_to_none=True)
        for z, c in self._latents():
            x = self._images(z, c)
            sigma = self.sigma.sample(len(x), self.device)
            gradient, gap = student_gradient(self.teacher, self.aux, x.detach(), c, sigma, self.weighting)
            x.backward(gradient / self.config.batch)
            # The objective has no value of its own, only a gradient: its mean square over pixels is reported.
            self.means.add("Loss/student_gradient", gradient.square().mean(dim=[1, 2, 3]))
            edges = torch.tensor(SIGMA_EDGES, device=self.device)
            self.means.add_binned(GAP_NAMES, torch.bucketize(sigma.flatten(), edges), gap)
            self._report_diversity(x.detach(), c)
        self.means.add("Grad/student", gradient_norm(self.student_parameters))
        _optimize(self.student_optimizer, lr)

    def _latents(self):
        """Latents and labels of one batch, drawn at once and handed out in micro-batches of at most batch_gpu."""
        n = self.config.batch
        z = torch.randn(n, self.G.z_dim, device=self.device)
        c = None
        if self.G.c_dim > 0:  # labels are uniform over the classes
            c = F.one_hot(torch.randint(self.G.c_dim, [n], device=self.device), self.G.c_dim).float()
        size = self.config.batch_gpu or n
        return [(z[i : i + size], None if c is None else c[i : i + size]) for i in range(0, n, size)]

    def _images(self, z: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        options = {"noise_mode": self.config.noise_mode} if hasattr(self.G, "synthesis") else {}
        return self.G(z, c, **options)

    def _report_diversity(self, x: torch.Tensor, c: torch.Tensor | None) -> None:
        """Standard deviation of pixels within the batch, and within its classes."""
        self.means.add("Diversity/batch_spread", x.var(dim=0).mean().sqrt())
        if c is not None:  # variance around class means, from sums: no loop over classes, no synchronisation
            count = c.sum(dim=0).clamp_min(1)
            x = x.flatten(1)
            centre = (c.t() @ x) / count[:, None]
            freedom = (c.sum(dim=0) - 1).clamp_min(0).sum().clamp_min(1)
            within = (x - c @ centre).square().sum(dim=0) / freedom
            self.means.add("Diversity/class_spread", within.mean().sqrt())

    # The run.

    def run(self, monitor: Monitor) -> None:
        """Train to the end of `config.kimg`, from wherever the state is.

        Raises:
            ValueError: The losses became NaN or infinite.
        """
        config = self.config
        start = time.time() - self.elapsed
        if self.nimg == 0:
            save_png(self.run_dir.path / "fakes_init.png", self._init_grid)
            monitor.image("Fakes/before", self._init_grid, 0)
            monitor.options(config.as_dict())
            self._measure(monitor, snapshot=None)
        self._warm_up()
        with self._progress_bar() as bar:
            tick, since, tick_start = self._tick_index(), self.nimg, time.time()
            while self.nimg < config.num_steps * config.batch:
                self.step()
                bar.update(config.batch)
                done = self.nimg >= config.num_steps * config.batch
                if self._tick_index() > tick or done:
                    tick = self._tick_index()
                    self.elapsed = time.time() - start
                    self._report(monitor, tick, self.nimg - since, time.time() - tick_start)
                    if done or (config.snap and tick % config.snap == 0):
                        self._snapshot(monitor)
                    self.elapsed = time.time() - start
                    since, tick_start = self.nimg, time.time()
        monitor.flush()

    def _warm_up(self) -> None:
        """Auxiliary steps before the student moves."""
        steps, start = self.config.warmup_steps, time.time()
        if self.warmup_steps_done >= steps:
            return
        self.run_dir.log(f"auxiliary warm-up: {steps} steps, the student rests")
        with tqdm(total=steps, initial=self.warmup_steps_done, unit="step", disable=None, desc="warm-up") as bar:
            while self.warmup_steps_done < steps:
                self.aux_step(self.config.aux_lr)
                self.warmup_steps_done += 1
                bar.update()
        loss = self.means.drain()["Loss/aux"]
        with tqdm.external_write_mode():
            self.run_dir.log(f"auxiliary warm-up: done in {format_time(time.time() - start)}, mean loss {loss:.1f}")

    def _tick_index(self) -> int:
        return int(self.nimg / (self.config.tick * 1000) + 1e-9)

    def _progress_bar(self) -> tqdm:
        total = self.config.num_steps * self.config.batch
        return tqdm(
            total=total, initial=self.nimg, unit="img", disable=None, desc="refine", smoothing=0.05
        )  # terminals only

    def _report(self, monitor: Monitor, tick: int, images: int, seconds: float) -> None:
        config, kimg = self.config, self.nimg / 1000
        stats = self.means.drain()
        broken = [name for name, value in stats.items() if not math.isfinite(value)]
        if broken:
            raise ValueError(
                f"{', '.join(broken)} became NaN or infinite at {kimg:.1f} kimg; try a smaller --lr or --aux-lr"
            )
        rate = images / max(seconds, 1e-9)
        remaining = (config.num_steps * config.batch - self.nimg) / rate
        memory = peak_memory(self.device)
        fields = [
            f"tick {tick:<5d}",
            f"kimg {kimg:<8.1f}",
            f"time {format_time(self.elapsed):<12s}",
            f"sec/tick {seconds:<7.1f}",
            f"sec/kimg {seconds / images * 1000:<8.2f}",
            f"img/s {rate:<7.1f}",
            f"ETA {format_time(remaining):<10s}",
            f"loss aux {stats['Loss/aux']:<8.1f}",
            *(f"{name} {value:<6.2f}" for name, value in memory.items()),
        ]
        with tqdm.external_write_mode():
            self.run_dir.log(" ".join(fields))
        stats |= {
            "Progress/lr": config.lr * config.lr_factor(max(self.nimg - config.batch, 0)),
            "Progress/aux_lr": config.aux_lr,
            "Timing/img_per_sec": rate,
            "Timing/sec_per_tick": seconds,
            "Timing/total_hours": self.elapsed / 3600,
            **{f"Resources/peak_{name}_gb": value for name, value in memory.items()},
        }
        monitor.scalars(stats, kimg)
        self.run_dir.append_stats({"kimg": kimg, "tick": tick, **stats})

    # Snapshots.

    def _snapshot(self, monitor: Monitor) -> None:
        kimg = self.nimg / 1000
        name = f"network-snapshot-{format_kimg(self.nimg)}.safetensors"
        provenance = {**self.provenance, "options": _portable(self.config), "kimg": kimg}
        networks = {"G_ema": self.G_ema, "G": self.G}
        save_networks(self.run_dir.path / name, networks, provenance=provenance)
        if self.container is not None:
            theirs = {key: networks[key] for key in members(self.container) if key in networks}
            write_like(self.container, (self.run_dir.path / name).with_suffix(".pkl"), theirs)
        grid = self._grid(self.G_ema)
        save_png(self.run_dir.path / f"fakes{format_kimg(self.nimg)}.png", grid)
        gap = torch.full([grid.shape[0], grid.shape[1], 8], 255, dtype=torch.uint8)
        monitor.image("Fakes/now", grid, kimg)
        monitor.image("Fakes/before_after", torch.cat([self._init_grid, gap, grid], dim=2), kimg)
        self._measure(monitor, snapshot=name)
        self._save_state()
        monitor.flush()

    def _measure(self, monitor: Monitor, snapshot: str | None) -> None:
        """Metrics of G_ema now; a failing metric is reported and does not end the run."""
        kimg = self.nimg / 1000
        for index, metric in enumerate(self.metrics):
            try:
                with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                    results = metric.measure(self.G_ema, self.device)
            except (ValueError, RuntimeError) as error:
                self.run_dir.log(f"metric {metric.name} failed: {' '.join(str(error).split())}")
                continue
            numbers = {key: value for key, value in results.items() if isinstance(value, float) and key != "seconds"}
            monitor.scalars({f"Metrics/{metric.name}/{key}": value for key, value in numbers.items()}, kimg)
            if "class_histogram" in results:
                monitor.class_histogram(results["class_histogram"], kimg)
            self.run_dir.append_metric(metric.name, results, snapshot or "init", kimg)
            text = "  ".join(f"{key} {value:.4g}" for key, value in numbers.items())
            with tqdm.external_write_mode():
                self.run_dir.log(f"metric {metric.name} at {kimg:.1f} kimg: {text}")
            if index == 0 and snapshot is not None:
                self._keep_best(metric, results[metric.key], snapshot)

    def _keep_best(self, metric: NamedMetric, value: float, snapshot: str) -> None:
        if self.best is None or value < self.best["value"]:
            self.best = {"metric": metric.name, "value": value, "snapshot": snapshot, "kimg": self.nimg / 1000}
            for path in self.run_dir.path.glob(f"{Path(snapshot).stem}.*"):
                with replaced_atomically(path.with_stem("network-snapshot-best")) as temporary:
                    shutil.copyfile(path, temporary)

    @torch.no_grad()
    def _fixed_latents(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows, columns = GRID
        z, _ = latents_of_seeds(range(rows * columns), [self.G.z_dim])
        c = None
        if self.G.c_dim > 0:  # a column per class, while there are columns
            classes = torch.arange(columns).repeat(rows) % self.G.c_dim
            c = F.one_hot(classes, self.G.c_dim).float().to(self.device)
        return z.to(self.device), c

    @torch.no_grad()
    def _grid(self, G: torch.nn.Module) -> torch.Tensor:
        """uint8 (C, H, W) of the fixed latents with the stored noise."""
        options = {"noise_mode": "const"} if hasattr(G, "synthesis") else {}
        images = torch.cat([
            to_uint8(G(self._grid_z[i : i + 16], None if self._grid_c is None else self._grid_c[i : i + 16], **options))
            for i in range(0, len(self._grid_z), 16)
        ])  # fmt: skip
        return image_grid(images, GRID[1])

    # The state that a resumed run needs.

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes while training; plain tensors, numbers and texts."""
        return {
            "config": json.dumps(self.config.as_dict()),
            "networks": {name: getattr(self, name).state_dict() for name in ("G", "G_ema", "aux")},
            "student_optimizer": self.student_optimizer.state_dict(),
            "aux_optimizer": self.aux_optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "nimg": self.nimg,
            "warmup_steps_done": self.warmup_steps_done,
            "elapsed": self.elapsed,
            "best": self.best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s result, with networks made from the same files.

        Raises:
            ValueError: The state is of other networks.
        """
        try:
            for name, values in state["networks"].items():
                getattr(self, name).load_state_dict(values)
            self.student_optimizer.load_state_dict(state["student_optimizer"])
            self.aux_optimizer.load_state_dict(state["aux_optimizer"])
        except (RuntimeError, KeyError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"the training state does not fit the networks of --gan and --teacher: {reason}") from None
        self.nimg, self.elapsed, self.best = state["nimg"], state["elapsed"], state["best"]
        self.warmup_steps_done = state["warmup_steps_done"]
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def _save_state(self) -> None:
        path = self.run_dir.path / f"training-state-{format_kimg(self.nimg)}.pt"
        with replaced_atomically(path) as temporary:
            torch.save(self.state_dict(), temporary)
        for old in self.run_dir.path.glob("training-state-*.pt"):
            if old != path:
                with contextlib.suppress(FileNotFoundError):
                    old.unlink()


def load_training_state(path: Path) -> dict[str, Any]:
    """Read a training state; nothing in the file is executed.

    Raises:
        ValueError: The file is no training state of this toolkit.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        complete = {"config", "networks", "nimg", "rng"} <= set(state)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; expected a training-state-*.pt") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be read as a training state: {str(error).splitlines()[0][:100]}") from None
    if not complete:
        raise ValueError(f"{path} holds something else; expected a training state of this toolkit")
    return state


def check_pair(student: torch.nn.Module, teacher: torch.nn.Module) -> None:
    """Raise ValueError unless student and teacher make images of the same shape with the same classes."""
    pairs = [
        ("img_resolution", student.img_resolution, teacher.img_resolution),
        ("img_channels", student.img_channels, teacher.img_channels),
        ("classes", student.c_dim, teacher.label_dim),
    ]
    for name, found, expected in pairs:
        if found != expected:
            raise ValueError(f"--gan has {name} {found}, but --teacher has {expected}; expected a pair that agrees")


def select_parameters(G: torch.nn.Module, train: str) -> list[torch.nn.Parameter]:
    """The parameters of the part of the student that is to move; gradients of the rest are switched off.

    Raises:
        ValueError: The generator has no such part.
    """
    if train != "all" and not hasattr(G, train):
        raise ValueError(f"--train is {train}, but this generator has no part of that name; expected all")
    G.requires_grad_(train == "all")
    part = G if train == "all" else getattr(G, train)
    part.requires_grad_(True)
    return list(part.parameters())


def _optimize(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


def _portable(config: RefineConfig) -> dict[str, Any]:
    """Options that decide the result: not where files lie, so that two equal runs write equal snapshots."""
    return {k: v for k, v in config.as_dict().items() if k not in ("gan", "teacher", "outdir", "desc", "ref", "device")}


def file_provenance(path: str | Path) -> dict[str, str]:
    """Name and sha256 of a file that a network came from."""
    return {"file": Path(path).name, "sha256": sha256_of_file(path)}
