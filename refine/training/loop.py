"""The course of a run around `Trainer`: warm up, step, report, save."""

import json
import math
import signal
import time
from typing import Any

from tqdm import tqdm

from refine.dnnlib import format_time
from refine.torch_utils import distributed
from refine.torch_utils.misc import peak_memory
from refine.training.monitor import Monitor
from refine.training.run_dir import RunDir, training_states
from refine.training.snapshots import Snapshots
from refine.training.state import save_training_state
from refine.training.stopping import StopRequests
from refine.training.trainer import Trainer

# Why a run ends, or pauses, after an iteration; of several reasons the largest counts, in all processes alike.
GO_ON, SAVE, TIME_IS_UP, SIGNALLED, NO_BETTER, RECALL_LOST = range(6)


class _Clocks:
    """When a tick began, in seconds: on the wall, and of this process's threads, which others on a CPU disturb less."""

    def __init__(self) -> None:
        self.wall, self.processor = time.time(), time.process_time()


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
        self.begun = False  # whether what comes before the first step is done
        self.tick_start = 0  # images at the last progress line
        self._saved_at = time.monotonic()
        self._iterations = 0  # of this process

    def run(self, monitor: Monitor | None, stop: StopRequests | None = None) -> int | None:
        """Train to the end, from wherever the state is.

        Args:
            monitor: TensorBoard; None in processes other than the first.
            stop: Asked once an iteration; None = nothing ends the run early.

        Returns:
            None if the run came to its end (its kimg, no better snapshots, lost recall), 0 if its time was up, or the
            number of the signal that stopped it. The state is saved in any case.

        Raises:
            ValueError: Too many steps in a row had NaN or infinite gradients.
            OSError: A file could not be written; the last training state is as it was.
        """
        stop = stop or StopRequests()
        self._saved_at, self._clock = time.monotonic(), time.time() - self.elapsed
        if not self.begun:
            self.snapshots.begin(monitor)
            self.begun = True
        reason = self._warm_up(stop) or self._refine(monitor, stop)
        if reason == TIME_IS_UP:
            self._say(f"time is up; {self._how_to_go_on()}")
        elif reason == SIGNALLED:
            self._say(f"stopped; {self._how_to_go_on()}")
        elif reason == NO_BETTER and (best := self.snapshots.best) is not None:
            count = self.config.patience
            self._say(f"no better {best['metric']} in {count} snapshots: done, the best is {best['snapshot']}")
        elif reason == RECALL_LOST:
            self._say(f"less than {self.config.keep_recall:g} of the recall at the start is left: done")
        if monitor is not None:
            monitor.flush()
        return {TIME_IS_UP: 0, SIGNALLED: stop.signal or signal.SIGTERM}.get(reason)

    def _refine(self, monitor: Monitor | None, stop: StopRequests) -> int:
        """Iterations until the end or a reason to stop, which is returned."""
        config, trainer = self.config, self.trainer
        end = config.num_steps * config.batch
        if self.snapshots.recall_lost:  # in a run that was resumed after its end
            return RECALL_LOST
        with self._progress_bar(end, trainer.nimg, "img", "refine") as bar:
            since = _Clocks()
            while trainer.nimg < end:
                tick = self._tick_index()
                trainer.step()
                bar.update(config.batch)
                done, saved = trainer.nimg >= end, False
                if self._tick_index() > tick or done:
                    self._report(monitor, self._tick_index(), trainer.nimg - self.tick_start, since)
                    self.tick_start, since = trainer.nimg, _Clocks()
                    if done or (config.snap and self._tick_index() % config.snap == 0):
                        self.snapshots.save(monitor)
                        self._save_state(config.short_intervals)
                        saved = True
                reason = self._between_iterations(stop, saved)
                if reason > SAVE:
                    return GO_ON if done else reason
        return GO_ON

    def _warm_up(self, stop: StopRequests) -> int:
        """Auxiliary steps before the student moves; returns a reason to stop, or GO_ON."""
        trainer, steps, start = self.trainer, self.config.warmup_steps, time.time()
        if trainer.warmup_steps_done >= steps:
            return GO_ON
        self._say(f"auxiliary warm-up: {steps} steps, the student rests")
        with self._progress_bar(steps, trainer.warmup_steps_done, "step", "warm-up") as bar:
            while trainer.warmup_steps_done < steps:
                trainer.aux_step(self.config.aux_lr)
                trainer.warmup_steps_done += 1
                bar.update()
                if trainer.warmup_steps_done == steps:  # before the last state of the warm-up is saved
                    loss = trainer.means.drain().get("Loss/aux", math.nan)
                    self._say(f"auxiliary warm-up: done in {format_time(time.time() - start)}, mean loss {loss:.1f}")
                reason = self._between_iterations(stop)
                if reason > SAVE:
                    return reason
        return GO_ON

    def _between_iterations(self, stop: StopRequests, saved: bool = False) -> int:
        """What all processes do now; saves the state where that is due."""
        reason = SAVE if time.monotonic() - self._saved_at >= 60 * self.config.state_minutes else GO_ON
        reason = TIME_IS_UP if stop.time_is_up() else reason
        reason = SIGNALLED if stop.signal is not None else reason
        if self.config.patience and distributed.is_main() and self.snapshots.since_best >= self.config.patience:
            reason = NO_BETTER
        if distributed.is_main() and self.snapshots.recall_lost:
            reason = RECALL_LOST
        reason = distributed.largest(reason)
        # On CUDA skipped steps are looked at now and then only: reading them waits for the device.
        self._iterations += 1
        if self.trainer.device.type != "cuda" or self._iterations % 50 == 0:
            self._check_skips()
        if reason >= SAVE and not saved:
            self._save_state(exact_name=True)
        return reason

    def _check_skips(self) -> None:
        for name, skips in self.trainer.skips.items():
            _, row = skips.read()
            if row >= self.config.max_skips:
                newest = training_states(self.run_dir.path)
                hint = f"; go on from before with --resume={newest[0]} and" if newest else "; try"
                raise ValueError(
                    f"{row} steps of the {name} network in a row had gradients that were NaN or infinite, at "
                    f"{self.trainer.nimg / 1000:.1f} kimg{hint} a smaller --lr or --aux-lr"
                )

    def _save_state(self, exact_name: bool) -> None:
        self.elapsed = time.time() - self._clock
        state = self.state_dict()  # in every process: the means are those of all of them
        if distributed.is_main():
            save_training_state(self.run_dir.path, state, exact_name, self.config.keep)
        self._saved_at = time.monotonic()
        distributed.wait_for_main()

    def _how_to_go_on(self) -> str:
        kimg, path = f"{self.trainer.nimg / 1000:.1f} of {self.config.kimg:g} kimg", self.run_dir.path
        return f"saved at {kimg}; go on with  python refine.py --resume={path}"

    def _say(self, line: str) -> None:
        if not distributed.is_main():
            return
        with tqdm.external_write_mode():
            self.run_dir.log(line)

    def _tick_index(self) -> int:
        return int(self.trainer.nimg / (self.config.tick * 1000) + 1e-9)

    @staticmethod
    def _progress_bar(total: int, done: int, unit: str, text: str) -> tqdm:
        """On terminals only, and only from the first process."""
        disable = None if distributed.is_main() else True
        return tqdm(total=total, initial=done, unit=unit, disable=disable, desc=text, smoothing=0.05)

    def _report(self, monitor: Monitor | None, tick: int, images: int, since: "_Clocks") -> None:
        config, nimg, kimg = self.config, self.trainer.nimg, self.trainer.nimg / 1000
        self.elapsed = time.time() - self._clock
        stats = self.trainer.means.drain()
        skipped = {name: skips.read()[0] for name, skips in self.trainer.skips.items()}
        if not distributed.is_main():
            return
        seconds = time.time() - since.wall
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
            f"loss aux {stats.get('Loss/aux', math.nan):<8.1f}",
            *(f"{name} {value:<6.2f}" for name, value in memory.items()),
            *(f"skipped {name} steps {count}" for name, count in skipped.items() if count),
        ]
        self._say(" ".join(fields))
        stats |= {
            "Progress/lr": config.lr * config.lr_factor(max(nimg - config.batch, 0)),
            "Progress/aux_lr": config.aux_lr,
            **{f"Progress/skipped_{name}_steps": float(count) for name, count in skipped.items()},
            "Timing/img_per_sec": rate,
            "Timing/sec_per_tick": seconds,
            "Timing/total_hours": self.elapsed / 3600,
            "Timing/cpu_sec_per_kimg": (time.process_time() - since.processor) / images * 1000,
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
            "begun": self.begun,
            "tick_start": self.tick_start,
            "best": self.snapshots.best,
            "since_best": self.snapshots.since_best,
            "start_recall": self.snapshots.start_recall,
            "recall_lost": self.snapshots.recall_lost,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s result, with networks made from the same files.

        Raises:
            ValueError: The state is of other networks.
        """
        self.trainer.load_state_dict(state)
        self.elapsed, self.begun, self.tick_start = state["elapsed"], state["begun"], state["tick_start"]
        self.snapshots.best, self.snapshots.since_best = state["best"], state["since_best"]
        self.snapshots.start_recall = state.get("start_recall")
        self.snapshots.recall_lost = state.get("recall_lost", False)
