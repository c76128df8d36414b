"""The course of a run around `Trainer`, from top to bottom: begin, warm up, step, report, save, stop."""

import math
import signal
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from refine.dnnlib import format_time
from refine.torch_utils import distributed
from refine.torch_utils.misc import peak_memory
from refine.training.divergence import Diverged, check_before_saving, check_steps, go_back, state_of
from refine.training.finding import kimg_name
from refine.training.monitor import Monitor
from refine.training.report import Clocks, TickReport, last_line
from refine.training.run_dir import RunDir
from refine.training.snapshots import Snapshots
from refine.training.state import Progress, gather_state, restore_state, save_training_state
from refine.training.stopping import StopReason, StopRequests
from refine.training.trainer import Trainer


class TrainingRun:
    """Trains to the end of `config.kimg`, with a progress line every tick and a snapshot every few ticks.

    Args:
        trainer, run_dir: A trainer before its first step, and where everything is written.
        files, go_on: SHA-256 of what --gan, --teacher and --ref mean, and what to type to go on after a stop.
        **snapshot_options: metrics, provenance and container of `Snapshots`.
    """

    def __init__(
        self, trainer: Trainer, run_dir: RunDir, files: Mapping[str, str], go_on: str, **snapshot_options: Any
    ):
        self.trainer, self.config, self.run_dir, self.files, self.go_on = trainer, trainer.config, run_dir, files, go_on
        self.snapshots = Snapshots(trainer, run_dir, **snapshot_options)
        self.progress = Progress()
        self._saved_at, self._iterations = time.monotonic(), 0  # of this process
        trainer.graphs.say = self._say

    def run(self, monitor: Monitor, stop: StopRequests | None = None) -> int | None:
        """Train to the end, from wherever the state is.

        Args:
            monitor, stop: Who is told, and what may end the run early; it is asked once an iteration.

        Returns:
            None if the run came to its end (its kimg, no better snapshots, lost recall, a callback's wish), 0 if its
            time was up, or the number of the signal that stopped it. The state is saved in any case.

        Raises:
            ValueError: The numbers diverged, oftener than --rollback allows.
            OSError: A file could not be written; the last training state is as it was.
        """
        stop = stop or StopRequests()
        self._saved_at, self._clock = time.monotonic(), time.monotonic() - self.progress.elapsed
        if not self.progress.begun:
            self.snapshots.begin(monitor)
            monitor.tick(0)
            self.progress.begun = True
            if self.config.rollback:  # to where a run goes back that diverges before its first snapshot
                self._save_state()
        while True:
            try:
                reason = self._warm_up(stop) or self._refine(monitor, stop)
                break
            except Diverged as error:
                go_back(self, error)
                monitor.forget_after(self.trainer.nimg / 1000)
        if line := last_line(reason, self.trainer.nimg, self.config, self.snapshots.standing.best, self.go_on):
            self._say(line)
        monitor.flush()
        return {StopReason.TIME_IS_UP: 0, StopReason.SIGNALLED: stop.signal or signal.SIGTERM}.get(reason)

    def _warm_up(self, stop: StopRequests) -> StopReason:
        """Auxiliary steps while the student is frozen; returns a reason to stop, or GO_ON."""
        trainer, steps, start = self.trainer, self.config.warmup_steps, time.monotonic()
        if trainer.warmup_steps_done >= steps:
            return StopReason.GO_ON
        self._say(f"auxiliary warm-up: {steps} steps, the student is frozen")
        with self._progress_bar(steps, trainer.warmup_steps_done, "step", "warm-up") as bar:
            while trainer.warmup_steps_done < steps:
                trainer.warm_up_step()
                bar.update()
                if trainer.warmup_steps_done == steps:  # before the last state of the warm-up is saved
                    loss, took = trainer.means.drain().get("Loss/aux", math.nan), format_time(time.monotonic() - start)
                    self._say(f"auxiliary warm-up: done in {took}, mean loss {loss:.1f}")
                reason = self._between_iterations(stop)
                if reason > StopReason.SAVE:
                    return reason
        return StopReason.GO_ON

    def _refine(self, monitor: Monitor, stop: StopRequests) -> StopReason:
        """Iterations until the end or a reason to stop, which is returned."""
        config, trainer = self.config, self.trainer
        end = config.num_steps * config.batch
        if reason := distributed.largest(self._reason_of_metrics()):  # in a run that was resumed after its end
            return StopReason(reason)
        with self._progress_bar(end, trainer.nimg, "img", "refine") as bar:
            since = Clocks()
            while trainer.nimg < end:
                tick = self._tick_index()
                trainer.step()
                bar.update(config.batch)
                done, saved = trainer.nimg >= end, False
                if self._tick_index() > tick or done:
                    # A run may end between two ticks: its last one has a number of its own.
                    line = self._report(monitor, since, end - trainer.nimg, max(self._tick_index(), tick + 1))
                    since = Clocks()
                    if done or (config.snap and self._tick_index() % config.snap == 0):
                        check_before_saving(trainer, config.max_skips)
                        self._save_state(self.snapshots.save(monitor))
                        saved = True
                    self._say(line)
                    monitor.tick(trainer.nimg / 1000)
                reason = self._between_iterations(stop, saved)
                if reason > StopReason.SAVE:
                    return StopReason.GO_ON if done else reason
        return StopReason.GO_ON

    def _tick_index(self) -> int:
        return int(self.trainer.nimg / (self.config.tick * 1000) + 1e-9)

    def _report(self, monitor: Monitor, since: Clocks, remaining: int, tick: int) -> str:
        """Writes the statistics of the tick that ends now, and returns its progress line; every process must come."""
        config, trainer, progress = self.config, self.trainer, self.progress
        progress.elapsed = time.monotonic() - self._clock
        report = TickReport(
            tick=tick,
            nimg=trainer.nimg,
            images=trainer.nimg - progress.tick_start,
            remaining=remaining,
            elapsed=progress.elapsed,
            means=trainer.means.drain(),
            skipped={name: optimizer.skips.read()[0] for name, optimizer in trainer.optimizers.items()},
            seconds=time.monotonic() - since.wall,
            processor_seconds=time.process_time() - since.processor,
            lr=trainer.rate_factor * trainer.lr * config.lr_factor(max(trainer.nimg - config.batch, 0)),
            aux_lr=trainer.rate_factor * trainer.aux_lr,
            memory=peak_memory(trainer.device),
        )
        progress.tick_start, kimg, scalars = trainer.nimg, trainer.nimg / 1000, report.scalars()
        self.run_dir.append_stats({"kimg": kimg, "tick": report.tick, **scalars})
        monitor.scalars(scalars, kimg)
        return report.line()

    def _between_iterations(self, stop: StopRequests, saved: bool = False) -> StopReason:
        """What all processes do now; saves the state where that is due."""
        due = time.monotonic() - self._saved_at >= 60 * self.config.state_minutes
        reason = max(StopReason.SAVE if due else StopReason.GO_ON, stop.reason(), self._reason_of_metrics())
        reason = StopReason(distributed.largest(reason))
        # On CUDA skipped steps are looked at now and then only: reading them waits for the device.
        self._iterations += 1
        if self.trainer.device.type != "cuda" or self._iterations % 50 == 0:
            check_steps(self.trainer, self.config.max_skips)
        if reason >= StopReason.SAVE and not saved:
            self._save_state()
        return reason

    def _reason_of_metrics(self) -> StopReason:
        """Whether what was measured ends the run; only the first process knows."""
        standing, patience = self.snapshots.standing, self.config.patience
        if not distributed.is_main():
            return StopReason.GO_ON
        if standing.recall_lost:
            return StopReason.RECALL_LOST
        return StopReason.NO_BETTER if patience and standing.since_best >= patience else StopReason.GO_ON

    def _save_state(self, number: str | None = None) -> None:
        """Every process must come here. `number` is that of the snapshot, if there is one of now."""
        check_before_saving(self.trainer, self.config.max_skips)
        self.progress.elapsed = time.monotonic() - self._clock
        state = self.state_dict()  # in every process: the means are those of all of them
        if distributed.is_main():
            folder, best = self.run_dir.path, self.snapshots.standing.best
            protected = state_of(folder, best) if self.config.rollback and best is not None else None
            number = number or kimg_name(self.trainer.nimg, exact=True)
            save_training_state(folder, state, number, self.config.keep, protected)
        self._saved_at = time.monotonic()
        distributed.wait_for_main()

    def _say(self, line: str) -> None:
        with tqdm.external_write_mode():
            self.run_dir.log(line)

    @staticmethod
    def _progress_bar(total: int, done: int, unit: str, text: str) -> tqdm:
        disable = None if distributed.is_main() else True  # None: on terminals only
        return tqdm(total=total, initial=done, unit=unit, disable=disable, desc=text, smoothing=0.05)

    def state_dict(self) -> dict[str, Any]:
        """The trainer's state and what the run itself counts; plain tensors, numbers and texts."""
        return gather_state(self.trainer, self.progress, self.snapshots.standing, self.files)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`'s result, with networks made from the same files. Raises ValueError for others."""
        self.progress, self.snapshots.standing = restore_state(state, self.trainer)
