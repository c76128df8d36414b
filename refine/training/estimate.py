"""What a run would cost: one iteration of it is made and measured, and nothing is written (`--dry-run`)."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from refine.config import OPTIONS, PRESETS, RefineConfig
from refine.config.option import flag
from refine.dnnlib import format_bytes, format_time
from refine.torch_utils import distributed
from refine.torch_utils.misc import peak_memory
from refine.training.adversary import Others
from refine.training.graphs import WARM_UP
from refine.training.trainer import Trainer

_LONG = 20  # seconds: an iteration as long as that is measured once, others three times, and the first does not count


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The cost of a run.

    Attributes:
        pair: Student and teacher in words.
        parameters: Network → number of parameters; of the student, those that are trained.
        seconds_per_kimg: Of 1000 images through the student step, with what goes with them; without metrics.
        seconds: Of the whole run with its warm-up, without metrics.
        metric_images: How many images are drawn for metrics in the whole run.
        memory_bytes: Peak of this process after an iteration; of the device where it is CUDA.
        state_bytes, snapshot_bytes: A training state, and a snapshot in all its files.
        disk_bytes: What the run folder will hold in the end, but for pictures and logs.
    """

    pair: str
    parameters: dict[str, int]
    seconds_per_kimg: float
    seconds: float
    metric_images: int
    memory_bytes: int
    state_bytes: int
    snapshot_bytes: int
    disk_bytes: int

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def stand_ins(student: tuple[int, int, int], teacher: tuple[int, int, int], device: torch.device) -> Others:
    """Noise instead of images for a critic, one per class; student and teacher are (resolution, channels, classes)."""
    size, channels, _ = teacher
    count = max(student[2], 1)
    images = torch.randint(256, [count, channels, size, size], dtype=torch.uint8)
    return Others(images, torch.arange(count) if student[2] else None, student[2], device)


def estimate(trainer: Trainer, metric_images: int = 0, in_container: bool = False) -> Estimate:
    """Makes a few iterations, which leave the trainer changed; every process of a run must come here.

    Args:
        trainer: Before its first step.
        metric_images: How many images all metrics together draw of one network.
        in_container: Whether snapshots are also written into a copy of the GAN's own file.
    """
    config = trainer.config
    warm_up, iteration = _seconds(trainer, trainer.warm_up_step), _seconds(trainer, trainer.step)
    if distributed.largest(round(warm_up + iteration)) < _LONG:  # alike in all processes, which step together
        more = range(2 if trainer.graphs.reason else WARM_UP + 3)  # until the steps are graphs
        warm_up = min(_seconds(trainer, trainer.warm_up_step) for _ in more)
        iteration = min(_seconds(trainer, trainer.step) for _ in more)
    snapshots = 0
    if config.snap:
        snapshots = math.ceil(config.num_steps * config.batch / (1000 * config.tick * config.snap) - 1e-9)
    student, critic = _bytes(trainer.G), [trainer.adversary.critic] if trainer.adversary else []
    averages = len(trainer.averages.networks)
    snapshot = student * (2 + averages) + (2 * student if in_container else 0)
    adam = sum(2 * p.numel() * p.element_size() for o in trainer.optimizers.values() for p in o.parameters)
    state = adam + _bytes(trainer.aux) + student * (1 + max(averages, 1)) + sum(map(_bytes, critic))
    networks = max(averages, 1) + (1 if averages else 0)  # the student of the moment, too
    memory = peak_memory(trainer.device)
    return Estimate(
        pair=f"{_words(trainer.bridge.student)} → {_words(trainer.bridge.teacher)}",
        parameters={
            "student": sum(p.numel() for p in trainer.student_parameters),
            "teacher": sum(p.numel() for p in trainer.teacher.parameters()),
        }
        | ({"critic": sum(p.numel() for p in critic[0].parameters())} if critic else {}),
        seconds_per_kimg=iteration * 1000 / config.batch,
        seconds=warm_up * config.warmup_steps + iteration * config.num_steps,
        metric_images=metric_images * (networks * snapshots + 1),
        memory_bytes=round(memory.get("reserved", memory["cpumem"]) * 2**30),
        state_bytes=state,
        snapshot_bytes=snapshot,
        disk_bytes=snapshot * (snapshots + bool(config.metrics)) + state * config.keep,
    )


def in_words(found: Estimate, config: RefineConfig, device: str, run_dir: str, bridge: Iterable[str]) -> str:
    """The estimate for people, a line for each question."""
    metrics = f"; metrics draw {found.metric_images:,} images on top" if found.metric_images else ""
    lines = [("pair", found.pair), *(("bridge", line) for line in bridge)]
    lines += [("parameters", ", ".join(f"{name} {number:,}" for name, number in found.parameters.items()))]
    lines += [
        ("time", f"{found.seconds_per_kimg:.3g} s per kimg on {device}, {format_time(found.seconds)} in all{metrics}"),
        ("memory", f"{format_bytes(found.memory_bytes)} at its peak, without metrics"),
        (
            "disk",
            f"{format_bytes(found.disk_bytes)}: snapshots of {format_bytes(found.snapshot_bytes)}, "
            f"{_states(config.keep)} of {format_bytes(found.state_bytes)}",
        ),
        ("options", " ".join(differing(config)) or f"those of --preset={config.preset}"),
        ("run folder", f"{run_dir} (nothing has been written)"),
    ]
    return "\n".join(f"{name:<11} {text}" for name, text in lines)


def differing(config: RefineConfig) -> list[str]:
    """The preset, and the options that are not as it has them, as the command line has them."""
    found = [f"--preset={config.preset}"]
    for name, known in OPTIONS.items():
        usual = PRESETS.get(config.preset, {}).get(name, known.default)
        if name != "preset" and getattr(config, name) != usual:
            found.append(f"{flag(name)}={known.kind.format(getattr(config, name))}")
    return found


def _states(keep: int) -> str:
    return "one training state" if keep == 1 else f"{keep} training states (--keep=1 keeps one)"


def _seconds(trainer: Trainer, step: Callable[[], None]) -> float:
    began = _waited(trainer)
    step()
    return _waited(trainer) - began


def _waited(trainer: Trainer) -> float:
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    return time.perf_counter()


def _bytes(network: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())


def _words(shape: tuple[int, int, int]) -> str:
    size, channels, classes = shape
    kind = {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels")
    return f"{size}×{size} {kind}, {f'{classes} classes' if classes else 'no classes'}"
