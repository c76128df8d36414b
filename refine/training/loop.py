"""The course of a run around `Trainer`, from top to bottom: begin, warm up, step, report, save, stop."""

import math
import signal
import time
from typing import Any

from tqdm import tqdm

from refine.dnnlib import format_time
from refine.torch_utils import distributed
from refine.torch_utils.misc import peak_memory
from refine.training.monitor import Monitor
from refine.training.report import Clocks, TickReport
from refine.training.run_dir import RunDir, training_states
from refine.training.snapshots import Snapshots
from refine.training.state import Progress, gather_state, restore_state, save_training_state
from refine.training.stopping import StopReason, StopRequests
from refine.training.trainer import Trainer


class TrainingRun:
    """Trains to the end of `config.kimg`, with a progress line every tick and a snapshot every few ticks.

    Args:
        trainer, run_dir: A trainer before its first step, and where everything is written.
        **snapshot_options: metrics, provenance and container of `Snapshots`.
    """

    def __init__(self, trainer: Trainer, run_dir: RunDir, **snapshot_options: Any):
        self.trainer, self.config, self.run_dir = trainer, trainer.config, run_dir
        self.snapshots = Snapshots(trainer, run_dir, **snapshot_options)
        self.progress = Progress()
        self._saved_at = time.monotonic()
        self._iterations = 0  # of this process

    def run(self, monitor: Monitor, stop: StopRequests | None = None) -> int | None:
        """Train to the end, from wherever the state is.

        Args:
            monitor, stop: TensorBoard, and what may end the run early; it is asked once an iteration.

        Returns:
            None if the run came to its end (its kimg, no better snapshots, lost recall), 0 if its time was up, or the
            number of the signal that stopped it. The state is saved in any case.

        Raises:
            ValueError: Too many steps in a row had NaN or infinite gradients.
            OSError: A file could not be written; the last training state is as it was.
        """
        stop = stop or StopRequests()
        self._saved_at, self._clock = time.monotonic(), time.time() - self.progress.elapsed
        if not self.progress.begun:
            self.snapshots.begin(monitor)
            self.progress.begun = True
        reason = self._warm_up(stop) or self._refine(monitor, stop)
        self._explain(reason)
        monitor.flush()
        return {StopReason.TIME_IS_UP: 0, StopReason.SIGNALLED: stop.signal or signal.SIGTERM}.get(reason)

    def _warm_up(self, stop: StopRequests) -> StopReason:
        """Auxiliary steps while the student is frozen; returns a reason to stop, or GO_ON."""
        trainer, steps, start = self.trainer, self.config.warmup_steps, time.time()
        if trainer.warmup_steps_done >= steps:
            return StopReason.GO_ON
        self._say(f"auxiliary warm-up: {steps} steps, the student is frozen")
        with self._progress_bar(steps, trainer.warmup_steps_done, "step", "warm-up") as bar:
            while trainer.warmup_steps_done < steps:
                trainer.aux_step(self.config.aux_lr)
                trainer.warmup_steps_done += 1
                bar.update()
                if trainer.warmup_steps_done == steps:  # before the last state of the warm-up is saved
                    loss = trainer.means.drain().get("Loss/aux", math.nan)
                    self._say(f"auxiliary warm-up: done in {format_time(time.time() - start)}, mean loss {loss:.1f}")
                reason = self._between_iterations(stop)
                if reason > StopReason.SAVE:
                    return reason
        return StopReason.GO_ON

    def _refine(self, monitor: Monitor, stop: StopRequests) -> StopReason:
        """Iterations until the end or a reason to stop, which is returned."""
        config, trainer = self.config, self.trainer
        end = config.num_steps * config.batch
        if self.snapshots.standing.recall_lost:  # in a run that was resumed after its end
            return StopReason.RECALL_LOST
        with self._progress_bar(end, trainer.nimg, "img", "refine") as bar:
            since = Clocks()
            while trainer.nimg < end:
                tick = self._tick_index()
                trainer.step()
                bar.update(config.batch)
                done, saved = trainer.nimg >= end, False
                if self._tick_index() > tick or done:
                    self._report(monitor, since, end - trainer.nimg)
                    since = Clocks()
                    if done or (config.snap and self._tick_index() % config.snap == 0):
                        self.snapshots.save(monitor)
                        self._save_state(config.short_intervals)
                        saved = True
                reason = self._between_iterations(stop, saved)
                if reason > StopReason.SAVE:
                    return StopReason.GO_ON if done else reason
        return StopReason.GO_ON

    def _tick_index(self) -> int:
        return int(self.trainer.nimg / (self.config.tick * 1000) + 1e-9)

    def _report(self, monitor: Monitor, since: Clocks, remaining: int) -> None:
        """The progress line and statistics of the tick that ends now; every process gives its share of the means."""
        config, trainer, progress = self.config, self.trainer, self.progress
        progress.elapsed = time.time() - self._clock
        report = TickReport(
            tick=self._tick_index(),
            nimg=trainer.nimg,
            images=trainer.nimg - progress.tick_start,
            remaining=remaining,
            elapsed=progress.elapsed,
            means=trainer.means.drain(),
            skipped={name: optimizer.skips.read()[0] for name, optimizer in trainer.optimizers.items()},
            seconds=time.time() - since.wall,
            processor_seconds=time.process_time() - since.processor,
            lr=config.lr * config.lr_factor(max(trainer.nimg - config.batch, 0)),
            aux_lr=config.aux_lr,
            memory=peak_memory(trainer.device),
        )
        progress.tick_start = trainer.nimg
        self._say(report.line())
        kimg, scalars = trainer.nimg / 1000, report.scalars()
        monitor.scalars(scalars, kimg)
        self.run_dir.append_stats({"kimg": kimg, "tick": report.tick, **scalars})

    def _between_iterations(self, stop: StopRequests, saved: bool = False) -> StopReason:
        """What all processes do now; saves the state where that is due."""
        due = time.monotonic() - self._saved_at >= 60 * self.config.state_minutes
        reason = StopReason.SAVE if due else StopReason.GO_ON
        reason = StopReason.TIME_IS_UP if stop.time_is_up() else reason
        reason = StopReason.SIGNALLED if stop.signal else reason
        standing = self.snapshots.standing
        if self.config.patience and distributed.is_main() and standing.since_best >= self.config.patience:
            reason = StopReason.NO_BETTER
        if distributed.is_main() and standing.recall_lost:
            reason = StopReason.RECALL_LOST
        reason = StopReason(distributed.largest(reason))
        # On CUDA skipped steps are looked at now and then only: reading them waits for the device.
        self._iterations += 1
        if self.trainer.device.type != "cuda" or self._iterations % 50 == 0:
            self._check_skips()
        if reason >= StopReason.SAVE and not saved:
            self._save_state(exact_name=True)
        return reason

    def _check_skips(self) -> None:
        for name, optimizer in self.trainer.optimizers.items():
            _, row = optimizer.skips.read()
            if row >= self.config.max_skips:
                newest = training_states(self.run_dir.path)
                hint = f"; go on from before with --resume={newest[0]} and" if newest else "; try"
                raise ValueError(
                    f"{row} steps of the {name} network in a row had gradients that were NaN or infinite, at "
                    f"{self.trainer.nimg / 1000:.1f} kimg{hint} a smaller --lr or --aux-lr"
                )

    def _save_state(self, exact_name: bool) -> None:
        self.progress.elapsed = time.time() - self._clock
        state = self.state_dict()  # in every process: the means are those of all of them
        if distributed.is_main():
            save_training_state(self.run_dir.path, state, exact_name, self.config.keep)
        self._saved_at = time.monotonic()
        distributed.wait_for_main()

    def _explain(self, reason: StopReason) -> None:
        """Why the run ends before its kimg, if it does."""
        kimg = f"{self.trainer.nimg / 1000:.1f} of {self.config.kimg:g} kimg"
        how_to_go_on = f"saved at {kimg}; go on with  python refine.py --resume={self.run_dir.path}"
        if reason == StopReason.TIME_IS_UP:
            self._say(f"time is up; {how_to_go_on}")
        elif reason == StopReason.SIGNALLED:
            self._say(f"stopped; {how_to_go_on}")
        elif reason == StopReason.NO_BETTER and (best := self.snapshots.standing.best) is not None:
            count = self.config.patience
            self._say(f"no better {best.metric} in {count} snapshots: done, the best is {best.snapshot}")
        elif reason == StopReason.RECALL_LOST:
            self._say(f"less than {self.config.keep_recall:g} of the recall at the start is left: done")

    def _say(self, line: str) -> None:
        with tqdm.external_write_mode():
            self.run_dir.log(line)

    @staticmethod
    def _progress_bar(total: int, done: int, unit: str, text: str) -> tqdm:
        disable = None if distributed.is_main() else True  # None: on terminals only
        return tqdm(total=total, initial=done, unit=unit, disable=disable, desc=text, smoothing=0.05)

    def state_dict(self) -> dict[str, Any]:
        """The trainer's state and what the run itself counts; plain tensors, numbers and texts."""
        return gather_state(self.trainer, self.progress, self.snapshots.standing)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s result, with networks made from the same files. Raises ValueError for others."""
        self.progress, self.snapshots.standing = restore_state(state, self.trainer)
