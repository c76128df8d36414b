"""What options need to have a part in a run: whoever chooses one that has none is told so, and the run goes on.

What contradicts itself is refused instead, by `RefineConfig` and by what looks at the networks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ONE_STEP = "one-step"  # of --gan: the teacher's own U-Net as the generator


@dataclass(frozen=True)
class Needs:
    """What one option needs.

    Attributes:
        words: That, for people.
        options: RefineConfig → whether it is there.
        networks: (student, teacher) → whether it is there.
    """

    words: str
    options: Callable[[Any], object] = lambda config: True
    networks: Callable[[Any, Any], object] = lambda student, teacher: True


def compares(metric: str) -> bool:
    """Whether a metric needs a reference; an Inception Score does not."""
    return not metric.startswith("is")


def _has_dropout(network: Any) -> bool:
    rates = ("dropout", "label_dropout", "p")  # of the toolkit's layers, of whole labels, and of torch's
    return any(isinstance(rate := getattr(module, name, 0), int | float) and rate > 0
               for module in network.modules() for name in rates)  # fmt: skip


_POWER = Needs("--average=power", lambda config: config.average == "power")
_EMA = Needs("--average=ema", lambda config: config.average == "ema")
_METRICS = Needs("--metrics", lambda config: config.metrics)

NEEDS = {
    "gan_kwargs": Needs("a --gan other than one-step", lambda config: config.gan != ONE_STEP),
    "sid_alpha": Needs("sid in --objective", lambda config: "sid" in config.objective),
    "guide": Needs("a --guidance other than 1", lambda config: config.guidance != 1),
    "bank": Needs("--adversarial, without --data", lambda config: config.adversarial and config.data is None),
    "sigma_init": Needs("--gan=one-step or one-step:FILE", lambda config: f"{config.gan}:".startswith(f"{ONE_STEP}:")),
    "average_lengths": _POWER,
    "ema_kimg": _EMA,
    "ema_rampup": _EMA,
    "noise_mode": Needs("a student with noise inputs", networks=lambda student, teacher: student.noise_modes),
    "dropout": Needs("a teacher whose file asks for it", networks=lambda student, teacher: _has_dropout(teacher)),
    "cuda_graphs": Needs("a CUDA device", lambda config: not (config.device or "").startswith("cpu")),
    "metrics_batch": _METRICS,
    "ref": Needs("one of --metrics that compares", lambda config: any(map(compares, config.metrics))),
    "trust_detector": _METRICS,
    "patience": Needs("snapshots before the end, --snap of 1 or more", lambda config: config.snap),
}
