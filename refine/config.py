"""What a refinement run is told: one frozen dataclass that checks itself, and presets that hold the defaults."""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any

SCHEDULES = ("constant", "cosine", "linear")
TRAINABLE = ("all", "synthesis", "mapping")
NOISE_MODES = ("random", "const", "none")
OPS_MODES = ("auto", "native", "ref")  # those of torch_utils.build.custom_ops, without importing it
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


# What --resume may be given: the length and the course of the run, where and how it runs, and the two rates, which are
# what one changes after a run went astray. The rest decides what is being trained and stays as it was.
CHANGEABLE = frozenset({
    *("kimg", "lr", "aux_lr", "batch_gpu", "device", "ops", "compile", "tick", "snap", "metrics", "ref"),
    *("keep", "state_minutes", "time_limit", "patience", "max_skips"),
})  # fmt: skip
# What does not show in a snapshot: two runs that differ in these write equal files.
NOT_IN_SNAPSHOTS = frozenset({
    *("gan", "teacher", "outdir", "desc", "ref", "device"),
    *("keep", "state_minutes", "time_limit", "patience", "max_skips"),
})  # fmt: skip


@dataclass(frozen=True)
class SigmaOptions:
    """The law of noise levels of one step; the fields of `refine.noise.SigmaLaw`, without importing torch."""

    name: str = "lognormal"
    P_mean: float = -1.2
    P_std: float = 1.2
    rho: float = 7.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0


@dataclass(frozen=True)
class RefineConfig:
    """All options of a run; `training_options.json` is this, written out.

    Raises:
        ValueError: A number out of range or an unknown word; the message names the command line option.
    """

    gan: str  # file, or name in pretrained/index.toml
    teacher: str
    outdir: str = "runs"  # run folders are made here
    desc: str | None = None  # added to the run folder's name
    preset: str = "default"

    kimg: float = 200.0  # images through the student step, in thousands
    batch: int = 64  # images per student step
    batch_gpu: int | None = None  # at most so many at once, gradients accumulated. None = batch
    lr: float = 1e-4  # of the student
    aux_lr: float = 1e-4
    betas: tuple[float, float] = (0.0, 0.999)  # Adam, student
    aux_betas: tuple[float, float] = (0.0, 0.999)  # Adam, auxiliary network
    lr_schedule: str = "constant"  # of the student, over the run's kimg; aux must keep up and keeps its rate
    lr_rampup_kimg: float = 0.0  # the student's rate rises linearly from zero

    sigma: SigmaOptions = field(default_factory=SigmaOptions)  # noise levels of the student step
    aux_sigma: SigmaOptions = field(default_factory=SigmaOptions)  # noise levels of the auxiliary step
    objective: str = "ikl"  # a name, or a sum such as "ikl:0.7+sid:0.3"; see refine.objectives.make_objective
    sid_alpha: float = 1.0  # α of sid; published with 1.0 to 1.2
    weighting: str = "1"  # of the objective over noise levels; see refine.noise.make_weighting
    guidance: float = 1.0  # of the teacher, where it knows a missing label. 1 = none
    label_dist: tuple[float, ...] | None = None  # how often each class is drawn. None = uniformly
    keep_distances: float = 0.0  # pull towards the student's own pairwise distances; see refine.training.diversity
    keep_recall: float = 0.0  # stop, and keep no snapshot as the best, below this share of the recall at the start
    sigma_init: float = 2.5  # noise level at which --gan=one-step uses the teacher's U-Net
    aux_steps: int = 1  # auxiliary steps per student step
    aux_warmup_kimg: float = 0.0  # images that aux follows before the student first moves
    ema_kimg: float = 50.0  # half-life of the student's moving average
    ema_rampup: float | None = 0.05  # half-life at most this share of the images so far. None = no limit

    noise_mode: str = "random"  # of the student while training
    train: str = "all"  # which part of the student moves
    dropout: bool = False  # aux trains with the dropout that its file asks for
    aux_dropout: float | None = None  # aux trains with this rate of dropout instead
    aux_augment: float = 0.0  # how often each augmentation is applied to what aux learns from; 0 = never

    precision: str = "fp32"  # of activations and products; weights stay float32
    compile: bool = False  # torch.compile the three networks
    reuse_batch: bool = False  # the student step takes the images that aux has just learned from

    seed: int = 0
    tick: float = 4.0  # kimg between progress lines
    snap: int = 10  # ticks between snapshots. 0 = at the end only
    metrics: tuple[str, ...] = ()  # at every snapshot, e.g. fd2k-digits
    ref: str | None = None  # reference statistics of the metrics
    device: str | None = None  # None = cuda if there is one, else cpu
    ops: str | None = None  # one of OPS_MODES. None = as $REFINE_OPS says, else auto

    keep: int = 2  # training states that are kept
    state_minutes: float = 10.0  # a training state at least so often, beside those at snapshots
    time_limit: float | None = None  # seconds after which the run stops, its state saved. None = no limit
    patience: int = 0  # snapshots without a better first metric before the run stops. 0 = never
    max_skips: int = 20  # steps in a row with NaN or infinite gradients before the run stops

    def __post_init__(self):
        self._expect(self.kimg > 0 and math.isfinite(self.kimg), "--kimg", self.kimg, "a number > 0")
        self._expect(self.batch >= 1, "--batch", self.batch, "at least 1")
        self._expect(self.batch_gpu is None or self.batch_gpu >= 1, "--batch-gpu", self.batch_gpu, "at least 1")
        for name in ("lr", "aux_lr", "lr_rampup_kimg", "aux_warmup_kimg", "ema_kimg", "keep_distances", "sid_alpha"):
            value = getattr(self, name)
            self._expect(value >= 0 and math.isfinite(value), _flag(name), value, "a number ≥ 0")
        for name in ("betas", "aux_betas"):
            ok = len(getattr(self, name)) == 2 and all(0 <= b < 1 for b in getattr(self, name))
            self._expect(ok, _flag(name), getattr(self, name), "two numbers in [0, 1)")
        split = self.reuse_batch and self.batch_gpu is not None and self.batch_gpu < self.batch
        self._expect(not split, "--batch-gpu", self.batch_gpu, "--batch beside --reuse-batch, which keeps it whole")
        self._expect(self.aux_steps >= 1, "--aux-steps", self.aux_steps, "at least 1")
        self._expect(self.ema_rampup is None or self.ema_rampup > 0, "--ema-rampup", self.ema_rampup, "a number > 0")
        self._expect(self.tick > 0 and math.isfinite(self.tick), "--tick", self.tick, "a number > 0")
        self._expect(self.snap >= 0, "--snap", self.snap, "at least 0")
        self._expect(self.keep >= 1, "--keep", self.keep, "at least 1")
        self._expect(self.state_minutes >= 0, "--state-minutes", self.state_minutes, "a number ≥ 0")
        self._expect(self.time_limit is None or self.time_limit > 0, "--time-limit", self.time_limit, "a time > 0")
        self._expect(self.patience >= 0, "--patience", self.patience, "at least 0")
        self._expect(not self.patience or self.metrics, "--patience", self.patience, "0, or --metrics to go by")
        self._expect(self.max_skips >= 1, "--max-skips", self.max_skips, "at least 1")
        self._expect(0 <= self.seed < 2**31, "--seed", self.seed, "0 to 2147483647")
        self._expect(0 <= self.keep_recall <= 1, "--keep-recall", self.keep_recall, "0 to 1")
        for name in ("guidance", "sigma_init"):
            value = getattr(self, name)
            self._expect(0 < value < math.inf, _flag(name), value, "a number > 0")
        if self.label_dist is not None:
            ok = all(0 <= p < math.inf for p in self.label_dist) and sum(self.label_dist) > 0
            self._expect(ok, "--label-dist", list(self.label_dist), "numbers ≥ 0, not all of them 0")
        choices = {"lr_schedule": SCHEDULES, "train": TRAINABLE, "noise_mode": NOISE_MODES}
        choices |= {"precision": PRECISIONS}
        for name, words in choices.items():
            self._expect(getattr(self, name) in words, _flag(name), getattr(self, name), f"one of {', '.join(words)}")
        self._expect(self.ops is None or self.ops in OPS_MODES, "--ops", self.ops, f"one of {', '.join(OPS_MODES)}")
        words = "a name such as ikl, or a sum such as ikl:0.7+sid:0.3"  # which names there are, the registry knows
        self._expect(bool(re.fullmatch(_OBJECTIVE, self.objective)), "--objective", repr(self.objective), words)
        rate = self.aux_dropout
        self._expect(rate is None or 0 <= rate < 1, "--aux-dropout", rate, "a rate in [0, 1)")
        self._expect(rate is None or not self.dropout, "--aux-dropout", rate, "none beside --dropout, the file's rate")
        self._expect(0 <= self.aux_augment <= 1, "--aux-augment", self.aux_augment, "0 to 1")
        if self.keep_recall and not (self.metrics and self.ref):
            raise ValueError("--keep-recall needs a metric that measures recall: add --metrics and --ref")
        compared = [name for name in self.metrics if not name.startswith("is")]  # an Inception Score needs no other
        if compared and self.ref is None:
            raise ValueError(f"--metrics={','.join(compared)} needs reference statistics: add --ref=FILE.npz")

    @staticmethod
    def _expect(condition: bool, flag: str, found: Any, expected: str) -> None:
        if not condition:
            raise ValueError(f"{flag} is {found}; expected {expected}")

    @property
    def num_steps(self) -> int:
        """Student steps of the whole run."""
        return math.ceil(round(self.kimg * 1000) / self.batch)

    @property
    def warmup_steps(self) -> int:
        """Auxiliary steps before the first student step."""
        return math.ceil(round(self.aux_warmup_kimg * 1000) / self.batch)

    @property
    def short_intervals(self) -> bool:
        """Whether whole kimg, NVIDIA's names, would give two snapshots of this run the same name."""
        return 0 < self.snap * self.tick < 1

    def lr_factor(self, nimg: int) -> float:
        """What the student's learning rate is multiplied with after nimg images."""
        progress = min(nimg / (self.kimg * 1000), 1.0)
        factor = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
        rampup = min((nimg + self.batch) / (self.lr_rampup_kimg * 1000), 1.0) if self.lr_rampup_kimg > 0 else 1.0
        return factor[self.lr_schedule] * rampup

    def as_dict(self) -> dict:
        """Plain values, for training_options.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "RefineConfig":
        """The inverse of `as_dict`, also after a trip through JSON. Raises ValueError for unknown names."""
        unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"training options hold {', '.join(sorted(unknown))}, which this version does not know")
        values = dict(values)
        for name in ("betas", "aux_betas", "metrics", "label_dist"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        for name in ("sigma", "aux_sigma"):
            if isinstance(values.get(name), dict):
                values[name] = SigmaOptions(**values[name])
        return cls(**values)


_TERM = r"\s*\w+(:[^+:]+)?\s*"  # NAME or NAME:WEIGHT
_OBJECTIVE = rf"{_TERM}(\+{_TERM})*"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# The published distillation settings (Luo et al. 2023): Adam (0, 0.999), lr 1e-5 for both, batch 128, EMA half-life
# 500 kimg with 5 % ramp-up, ln σ ~ N(−1.2, 1.2²), one auxiliary step. The length of the runs is not published there.
_PUBLISHED = {"kimg": 5000.0, "batch": 128, "lr": 1e-5, "aux_lr": 1e-5, "ema_kimg": 500.0, "tick": 50.0, "snap": 10}

# Defaults of --preset; an option that is given wins. What differs from the dataclass has its reason beside it.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "cifar10": _PUBLISHED,  # the nearest known proxy for refinement at 32×32
    "one-step": _PUBLISHED,  # for --gan=one-step; sigma_init is that of SiD (Zhou et al. 2024)
    # The shipped digits pair: a small student needs larger rates than a CIFAR-10 one, digits want coarser noise than
    # photographs, and the run is short because precision falls again afterwards (README, "When it does not help").
    "demo": {
        "kimg": 2.56,
        "batch": 32,
        "lr": 1.5e-3,
        "aux_lr": 1.5e-3,
        "aux_betas": (0.9, 0.999),
        "lr_schedule": "cosine",
        "sigma": SigmaOptions(P_mean=0.4),
        "aux_sigma": SigmaOptions(P_mean=-0.4),
        "aux_warmup_kimg": 3.2,
        "ema_kimg": 0.6,
        "ema_rampup": None,  # in so short a run the ramp-up would leave next to no averaging
        "tick": 0.32,
        "snap": 5,
        "metrics": ("fd2k-digits",),
        "ref": "digits-reference",
    },
    # For --gan=one-step with the shipped teacher. It starts next to the mean image of a class, and has all its variety
    # to learn. That takes an aux that is ahead of the student: three steps at ten times the rate. With one step recall
    # stays lower; with one step and a student three times as fast, it draws one image per class (docs/objectives.md).
    "one-step-demo": {
        "kimg": 12.8,
        "batch": 32,
        "lr": 1e-4,
        "aux_lr": 1e-3,
        "aux_betas": (0.9, 0.999),
        "aux_steps": 3,
        "aux_warmup_kimg": 1.6,
        "lr_schedule": "cosine",
        "sigma": SigmaOptions("karras", sigma_max=24.4),  # SiD's
        "aux_sigma": SigmaOptions(P_mean=-0.4),
        "ema_kimg": 1.2,
        "ema_rampup": None,
        "tick": 0.32,
        "snap": 5,
        "metrics": ("fd2k-digits",),
        "ref": "digits-reference",
    },
}
