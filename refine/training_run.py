"""The course of a run around `Trainer`: warm up, step, report, save."""

import json
import math
import time
from typing import Any

from tqdm import tqdm

from dnnlib import format_time
from refine.monitor import Monitor
from refine.run_dir import RunDir
from refine.snapshots import Snapshots
from refine.trainer import Trainer
from refine.training_state import save_training_state
from torch_utils.misc import peak_memory


class TrainingRun:
    """Trains to the end of `config.kimg`, with a progress line every tick and a snapshot every few ticks.

    Args:
        trainer: As it is before its first step.
        run_dir: Where everything is written.
        **snapshot_options: metrics, provenance and container of `Snapshots`.
    """

    def __init__(self, trainer: Trainer, run_dir: RunDir, **snapshot_options: Any):
        self.trainer, self.config, self.run_dir = trainer, trainer.config, run_dir
        self.snapshots = Snapshots(trainer, run_dir, **snapshot_options)
        self.elapsed = 0.0  # seconds of this run, over resumes

    def run(self, monitor: Monitor) -> None:
        """Train to the end, from wherever the state is.

        Raises:
            ValueError: The losses became NaN or infinite.
        """
        config, trainer = self.config, self.trainer
        start = time.time() - self.elapsed
        if trainer.nimg == 0:
            self.snapshots.begin(monitor)
        self._warm_up()
        with self._progress_bar() as bar:
            tick, since, tick_start = self._tick_index(), trainer.nimg, time.time()
            while trainer.nimg < config.num_steps * config.batch:
                trainer.step()
                bar.update(config.batch)
                done = trainer.nimg >= config.num_steps * config.batch
                if self._tick_index() > tick or done:
                    tick = self._tick_index()
                    self.elapsed = time.time() - start
                    self._report(monitor, tick, trainer.nimg - since, time.time() - tick_start)
                    if done or (config.snap and tick % config.snap == 0):
                        self.snapshots.save(monitor)
                        save_training_state(self.run_dir.path, self.state_dict())
                        monitor.flush()
                    self.elapsed = time.time() - start
                    since, tick_start = trainer.nimg, time.time()
        monitor.flush()

    def _warm_up(self) -> None:
        """Auxiliary steps before the student moves."""
        trainer, steps, start = self.trainer, self.config.warmup_steps, time.time()
        if trainer.warmup_steps_done >= steps:
            return
        self.run_dir.log(f"auxiliary warm-up: {steps} steps, the student rests")
        with tqdm(total=steps, initial=trainer.warmup_steps_done, unit="step", disable=None, desc="warm-up") as bar:
            while trainer.warmup_steps_done < steps:
                trainer.aux_step(self.config.aux_lr)
                trainer.warmup_steps_done += 1
                bar.update()
        loss = trainer.means.drain()["Loss/aux"]
        with tqdm.external_write_mode():
            self.run_dir.log(f"auxiliary warm-up: done in {format_time(time.time() - start)}, mean loss {loss:.1f}")

    def _tick_index(self) -> int:
        return int(self.trainer.nimg / (self.config.tick * 1000) + 1e-9)

    def _progress_bar(self) -> tqdm:
        total = self.config.num_steps * self.config.batch
        return tqdm(
            total=total, initial=self.trainer.nimg, unit="img", disable=None, desc="refine", smoothing=0.05
        )  # terminals only

    def _report(self, monitor: Monitor, tick: int, images: int, seconds: float) -> None:
        config, nimg, kimg = self.config, self.trainer.nimg, self.trainer.nimg / 1000
        stats = self.trainer.means.drain()
        broken = [name for name, value in stats.items() if not math.isfinite(value)]
        if broken:
            raise ValueError(
                f"{', '.join(broken)} became NaN or infinite at {kimg:.1f} kimg; try a smaller --lr or --aux-lr"
            )
        rate = images / max(seconds, 1e-9)
        remaining = (config.num_steps * config.batch - nimg) / rate
        memory = peak_memory(self.trainer.device)
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
            "Progress/lr": config.lr * config.lr_factor(max(nimg - config.batch, 0)),
            "Progress/aux_lr": config.aux_lr,
            "Timing/img_per_sec": rate,
            "Timing/sec_per_tick": seconds,
            "Timing/total_hours": self.elapsed / 3600,
            **{f"Resources/peak_{name}_gb": value for name, value in memory.items()},
        }
        monitor.scalars(stats, kimg)
        self.run_dir.append_stats({"kimg": kimg, "tick": tick, **stats})

    def state_dict(self) -> dict[str, Any]:
        """The trainer's state and what the run itself counts; plain tensors, numbers and texts."""
        return {
            **self.trainer.state_dict(),
            "config": json.dumps(self.config.as_dict()),
            "elapsed": self.elapsed,
            "best": self.snapshots.best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s result, with networks made from the same files.

        Raises:
            ValueError: The state is of other networks.
        """
        self.trainer.load_state_dict(state)
        self.elapsed, self.snapshots.best = state["elapsed"], state["best"]
