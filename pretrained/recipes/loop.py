"""What the training recipes share: a loop that can be killed at any time and goes on to the very same network."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import click
import torch

from refine.dnnlib import format_time, replaced_atomically

SAVE_SECONDS = 30  # what a kill costs at most
REPORT_SECONDS = 20


class Training(ABC):
    """Networks that are trained, one step of it, and everything that a resumed run needs.

    A subclass sets itself up after this class has fixed the seeds; `PARTS` names its attributes that have a state dict,
    `COUNTERS` those that are numbers.

    Args:
        options: The options of the command line; `seed` is one of them. A checkpoint is for the same options only.
        network: Keyword arguments of the network, or whatever else of the recipe itself makes checkpoints incompatible.

    Attributes:
        rng: Generator that belongs to the training alone.
        nimg: Number of images trained on so far.
        cpu_seconds: Processor seconds so far, summed over all the processes that had a part in it.
    """

    PARTS: tuple[str, ...]
    COUNTERS: tuple[str, ...] = ("nimg", "cpu_seconds")

    def __init__(self, options: dict, network: dict):
        torch.manual_seed(options["seed"])
        self.rng = torch.Generator().manual_seed(options["seed"])
        self.options, self.network = options, network
        self.nimg, self.cpu_seconds = 0, 0.0

    @abstractmethod
    def step(self) -> dict[str, float]:
        """Train on some images and count them in `nimg`. Returns losses by name, to be shown."""

    def state_dict(self) -> dict:
        parts = {name: getattr(self, name).state_dict() for name in self.PARTS}
        counters = {name: getattr(self, name) for name in self.COUNTERS}
        random = {"rng": self.rng.get_state(), "torch_rng": torch.get_rng_state(), "cuda_rng": cuda_rng_states()}
        return {**parts, **counters, **random, "options": self.options, "network": self.network}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            ValueError: It was made with other options or by another version of the recipe.
        """
        made, asked = state["options"], self.options
        if made != asked:
            names = [name for name in asked if asked[name] != made.get(name)]
            theirs, ours = (" ".join(f"--{n.replace('_', '-')}={o.get(n)}" for n in names) for o in (made, asked))
            raise ValueError(
                f"the checkpoint was made with {theirs}, but this run asks for {ours}; another --workdir begins anew"
            )
        if state.get("network") != self.network:
            raise ValueError("the checkpoint is of another network than the recipe's; another --workdir begins anew")
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        for name in self.COUNTERS:
            setattr(self, name, state[name])
        self.rng.set_state(state["rng"])
        torch.set_rng_state(state["torch_rng"])
        if state.get("cuda_rng"):
            torch.cuda.set_rng_state_all(state["cuda_rng"])

    def provenance(self, **facts: object) -> dict:
        """Where the networks come from, for the file that they are saved in."""
        used = {"cpu_seconds": round(self.cpu_seconds), "threads": torch.get_num_threads(), "torch": torch.__version__}
        if torch.cuda.is_initialized():
            used["gpu"] = torch.cuda.get_device_name()
        return {**facts, "options": self.options, "kimg": self.nimg / 1000, **used}


def cuda_rng_states() -> list[torch.Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def train(
    training: Training,
    workdir: Path,
    nimg: int,
    snapshot: Callable[[str], None] = lambda name: None,
    snap_kimg: float = math.inf,
) -> None:
    """Train until `nimg` images have been seen, from the checkpoint in `workdir` where there is one.

    Args:
        snapshot: Called every `snap_kimg` with that moment's name, e.g. "000120" at 120 kimg; must not draw from
            torch's random numbers.

    Raises:
        ValueError: The checkpoint is of other options.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    checkpoint = workdir / "checkpoint.pt"
    if checkpoint.is_file():
        try:
            training.load_state_dict(torch.load(checkpoint, weights_only=True))
        except ValueError as error:
            raise ValueError(f"{checkpoint}: {error}") from error
        click.echo(f"going on at {training.nimg / 1000:.1f} kimg", err=True)
    progress, seconds, next_save = Progress(training, nimg), training.cpu_seconds - time.process_time(), 0.0
    while training.nimg < nimg:
        snapshots = training.nimg // (snap_kimg * 1000)
        losses = training.step()
        training.cpu_seconds = seconds + time.process_time()
        progress.update(losses)
        is_last = training.nimg >= nimg
        is_snapshot = training.nimg // (snap_kimg * 1000) > snapshots
        if is_snapshot:  # before the checkpoint, so that none is lost by a kill
            snapshot(f"{training.nimg // 1000:06d}")
        if is_snapshot or is_last or time.monotonic() > next_save:
            with replaced_atomically(checkpoint) as temporary:
                torch.save(training.state_dict(), temporary)
            next_save = time.monotonic() + SAVE_SECONDS


class Progress:
    """A line on stderr every `REPORT_SECONDS`: images, speed, means of the losses since the last line, time to go."""

    def __init__(self, training: Training, total_nimg: int):
        self.training, self.total_nimg = training, total_nimg
        self.start, self.first_nimg = time.monotonic(), training.nimg
        self.next_report = 0.0
        self.losses: dict[str, list[float]] = {}

    def update(self, losses: dict[str, float]) -> None:
        for name, value in losses.items():
            self.losses.setdefault(name, []).append(value)
        now, nimg = time.monotonic(), self.training.nimg
        if now < self.next_report and nimg < self.total_nimg:
            return
        rate = (nimg - self.first_nimg) / (now - self.start)
        means = "".join(f"  {name} {sum(values) / len(values):.4f}" for name, values in self.losses.items())
        left = format_time(max(self.total_nimg - nimg, 0) / rate)
        click.echo(
            f"kimg {nimg / 1000:.1f} / {self.total_nimg / 1000:g}  {rate:.0f} img/s{means}  {left} to go", err=True
        )
        self.next_report, self.losses = now + REPORT_SECONDS, {}
