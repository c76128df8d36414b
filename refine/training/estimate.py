"""What a run would cost: one iteration of it is counted, and made and measured; nothing is written (`--dry-run`)."""

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
from refine.networks.bases import Denoiser, Generator
from refine.pair import check_pair
from refine.torch_utils import distributed
from refine.torch_utils.misc import peak_memory
from refine.training.adversary import Others
from refine.training.counting import H100_SHARE, Counted, count, h100_precision, meta_trainer, weightless
from refine.training.graphs import WARM_UP
from refine.training.trainer import Trainer

_LONG = 20  # seconds: an iteration as long as that is measured once, others three times, and the first does not count
_TOO_LONG = 5e13  # operations: an iteration of more takes a CPU from minutes to days, and is only counted


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The cost of a run.

    Attributes:
        pair: Student and teacher in words.
        parameters: Network → number of parameters; of the student, those that are trained.
        seconds_per_kimg: Of 1000 images through the student step, with what goes with them; without metrics. None = not
            measured, as an iteration would take too long.
        seconds: Of the whole run with its warm-up, without metrics, or None.
        metric_images: How many images are drawn for metrics in the whole run.
        memory_bytes: Peak of this process after an iteration, of the device where it is CUDA; None = not measured.
        state_bytes, snapshot_bytes: A training state, and a snapshot in all its files.
        disk_bytes: What the run folder will hold in the end, but for pictures and logs.
        flops_per_image, flops: Counted operations of an iteration for each image, and of the whole run; None = they
            cannot be counted, for a network whose code needs numbers.
        least_bytes: Memory that a GPU needs at least, counted, or None.
        h100_hours: Of the whole run on an H100, if it sustains `h100_share` of its peak: assumed, not measured.
    """

    pair: str
    parameters: dict[str, int]
    seconds_per_kimg: float | None
    seconds: float | None
    metric_images: int
    memory_bytes: int | None
    state_bytes: int
    snapshot_bytes: int
    disk_bytes: int
    flops_per_image: float | None = None
    flops: float | None = None
    least_bytes: float | None = None
    h100_hours: float | None = None
    h100_share: float = H100_SHARE

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def stand_ins(student: tuple[int, int, int], teacher: tuple[int, int, int], device: torch.device) -> Others:
    """Noise instead of images for a critic, one per class; student and teacher are (resolution, channels, classes)."""
    size, channels, _ = teacher
    count = max(student[2], 1)
    images = torch.randint(256, [count, channels, size, size], dtype=torch.uint8)
    return Others(images, torch.arange(count) if student[2] else None, student[2], device)


def counted(
    config: RefineConfig, student: Generator, teacher: Denoiser, guide: Denoiser | None, critic: bool
) -> Counted | None:
    """What an iteration takes, see `counting`; None where code of the user's needs numbers, or with several processes.

    Args:
        critic: Whether there is one.
    """
    if distributed.world_size() > 1:
        return None
    sizes = check_pair(student, teacher)
    others = stand_ins(sizes.student, sizes.teacher, torch.device("meta")) if critic else None
    try:
        guide = None if guide is None else weightless(guide)
        return count(meta_trainer(config, weightless(student), weightless(teacher), guide, others))
    except Exception:  # noqa: BLE001 - of code that looks at its numbers, or that no copy can be made of
        return None


def is_too_long(config: RefineConfig, device: torch.device, counts: Counted | None) -> bool:
    """Whether an iteration would take so long on a CPU that it is only counted."""
    return device.type in ("cpu", "meta") and counts is not None and counts.flops_per_image * config.batch > _TOO_LONG


def outlined(
    config: RefineConfig, student: Generator, teacher: Denoiser, guide: Denoiser | None, critic: bool
) -> Trainer:
    """The trainer of a run with shapes but no numbers, for an estimate without an iteration; as `counted`."""
    sizes, meta = check_pair(student, teacher), torch.device("meta")
    others = stand_ins(sizes.student, sizes.teacher, meta) if critic else None
    guide = None if guide is None else weightless(guide)
    return Trainer(config, weightless(student), weightless(teacher), meta, others, guide)


def estimate(
    trainer: Trainer, metric_images: int = 0, in_container: bool = False, counts: Counted | None = None
) -> Estimate:
    """Makes a few iterations, which leave the trainer changed; every process of a run must come here.

    On a CPU an iteration that takes very long is left out.

    Args:
        trainer: Before its first step; where the iteration is left out, one of `outlined` will do.
        metric_images: How many images all metrics together draw of one network.
        in_container: Whether snapshots are also written into a copy of the GAN's own file.
        counts: What an iteration takes, where that is known.
    """
    config = trainer.config
    slow = is_too_long(config, trainer.device, counts)
    measured = {"seconds_per_kimg": None, "seconds": None, "memory_bytes": None} if slow else _measured(trainer)
    snapshots = 0
    if config.snap:
        snapshots = math.ceil(config.num_steps * config.batch / (1000 * config.tick * config.snap) - 1e-9)
    student, critic = _bytes(trainer.G), [trainer.adversary.critic] if trainer.adversary else []
    averages = len(trainer.averages.networks)
    snapshot = student * (2 + averages) + (2 * student if in_container else 0)
    adam = sum(2 * p.numel() * p.element_size() for o in trainer.optimizers.values() for p in o.parameters)
    state = adam + _bytes(trainer.aux) + student * (1 + max(averages, 1)) + sum(map(_bytes, critic))
    networks = max(averages, 1) + (1 if averages else 0)  # the student of the moment, too
    return Estimate(
        pair=f"{_words(trainer.bridge.student)} → {_words(trainer.bridge.teacher)}",
        parameters={
            "student": sum(p.numel() for p in trainer.student_parameters),
            "teacher": sum(p.numel() for p in trainer.teacher.parameters()),
        }
        | ({"critic": sum(p.numel() for p in critic[0].parameters())} if critic else {}),
        metric_images=metric_images * (networks * snapshots + 1),
        state_bytes=state,
        snapshot_bytes=snapshot,
        disk_bytes=snapshot * (snapshots + bool(config.metrics)) + state * config.keep,
        flops_per_image=counts.flops_per_image if counts else None,
        flops=counts.flops(config) if counts else None,
        least_bytes=counts.memory(config) if counts else None,
        h100_hours=counts.h100_hours(config) if counts else None,
        **measured,
    )


def _measured(trainer: Trainer) -> dict[str, Any]:
    config = trainer.config
    warm_up, iteration = _seconds(trainer, trainer.warm_up_step), _seconds(trainer, trainer.step)
    if distributed.largest(round(warm_up + iteration)) < _LONG:  # alike in all processes, which step together
        more = range(2 if trainer.graphs.reason else WARM_UP + 3)  # until the steps are graphs
        warm_up = min(_seconds(trainer, trainer.warm_up_step) for _ in more)
        iteration = min(_seconds(trainer, trainer.step) for _ in more)
    memory = peak_memory(trainer.device)
    return {
        "seconds_per_kimg": iteration * 1000 / config.batch,
        "seconds": warm_up * config.warmup_steps + iteration * config.num_steps,
        "memory_bytes": round(memory.get("reserved", memory["cpumem"]) * 2**30),
    }


def in_words(found: Estimate, config: RefineConfig, device: str, run_dir: str, bridge: Iterable[str]) -> str:
    """The estimate for people, a line for each question."""
    metrics = f"; metrics draw {found.metric_images:,} images on top" if found.metric_images else ""
    lines = [("pair", found.pair), *(("bridge", line) for line in bridge)]
    lines += [("parameters", ", ".join(f"{name} {number:,}" for name, number in found.parameters.items()))]
    if found.seconds_per_kimg is None or found.seconds is None or found.memory_bytes is None:
        lines += [("time", f"not measured: one iteration would take very long on this {device}{metrics}")]
    else:
        speed = f"{found.seconds_per_kimg:.3g} s per kimg on {device}"
        lines += [("time", f"{speed}, {format_time(found.seconds)} in all{metrics}")]
        lines += [("memory", f"{format_bytes(found.memory_bytes)} at its peak, without metrics")]
    if found.flops_per_image is not None and found.flops is not None and found.least_bytes is not None:
        at_once = config.batch_gpu or config.batch
        work = f"{_number(found.flops_per_image / 1e9)} GFLOP an image, {_number(found.flops / 1e15)} PFLOP in all"
        least = f"at least {format_bytes(round(found.least_bytes))} of a GPU with {at_once} images at once"
        share = f"{found.h100_share:.0%} of its {h100_precision(config)} peak (assumed)"
        lines += [("counted", f"{work}; {least}")]
        lines += [("H100", f"{format_time(3600 * (found.h100_hours or 0))} in all at {share}")]
    lines += [
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


def _number(value: float) -> str:
    """Three digits: 0.00178, 1.78, 11,600."""
    return f"{float(f'{value:.3g}'):,.10g}"


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
