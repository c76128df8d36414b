"""The options of a refinement run: one frozen dataclass that checks itself.

Everything that is known about an option stands in its field: default, kind of value, group and text of --help, whether
--resume may change it, whether snapshots show it. The command line, the checks and the sets below come from there; what
an option needs to have a part in a run stands in `needs.py`.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from refine.config.kinds import (
    BETAS,
    BOOLEAN,
    JSON_TABLE,
    LABEL_DIST,
    LENGTHS,
    LIMIT,
    MINUTES,
    NAMES,
    NOT_NEGATIVE,
    OBJECTIVE,
    POSITIVE,
    RATE,
    SHARE,
    SIGMA_LAW,
    Kind,
    SigmaOptions,
    count,
    count_or,
    number,
    optional,
    some_of,
    text,
    words,
)
from refine.config.needs import NEEDS, compares
from refine.config.option import GROUPS, Option, flag, option
from refine.config.presets import PRESETS

__all__ = [
    *("CHANGEABLE", "MAX_IMAGES", "NOT_IN_SNAPSHOTS", "OPS_HELP", "OPS_MODES", "OPTIONS", "PRECISIONS", "PRESETS"),
    *("RefineConfig", "SigmaOptions", "TEACHER"),
]

TEACHER = "teacher"  # as --ref, images of --teacher; as the detector of --metrics, --teacher itself

OPS_MODES = ("auto", "native", "ref")  # those of torch_utils.build.custom_ops, without importing it
OPS_HELP = "Compiled ops: auto = where they are available, native = always, or an error, ref = plain torch."
WARMUP_STEPS = 100  # aux is of the teacher's size whatever that is, and begins as near to its goal as the pair is close
_MAX_NUMBER = 1e15  # larger ones overflow somewhere
MAX_IMAGES = 1 << 30  # of a bank or a metric: so many seeds there are from the first of a bank to the last of all
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")

_FILES, _LENGTH, _RATES, _NOISE, _OBJECTIVE, _COVERAGE, _SPEED, _MONITORING, _RESUMING = GROUPS

_KNOWN = "a file or a name of pretrained/index.toml"
# A run that holds all its values may have been made with a preset that is gone.
_PRESET = dataclasses.replace(words(tuple(PRESETS)), holds=lambda value: isinstance(value, str))


@dataclass(frozen=True)
class RefineConfig:
    """All options of a run; `training_options.json` is this, written out.

    An argument that is not given (`...`) takes the value of the preset, or else the option's default. A distribution of
    noise levels may be given as a dict of some of the fields of SigmaOptions, which are laid over the preset's. Once
    made, all values are there, and the preset is only a name.

    The order of the fields is that of the options in snapshots and `training_options.json`.

    Raises:
        ValueError: A number out of range or an unknown word; the message names the command line option.
    """

    # An argument a line would be three pages.
    # fmt: off
    gan: str = option(
        text("FILE|URL|NAME|one-step[:FILE]|MODULE:FUNCTION", f"the generator to refine, {_KNOWN}"), ..., _FILES,
        "Generator to refine (the student): a file, one-step = the teacher's own U-Net, one-step:FILE = one that was "
        "distilled before, or one of your own code.",
        in_snapshots=False, aliases=("generator", "student", "network"),
    )
    teacher: str = option(
        text("FILE|URL|NAME|MODULE:FUNCTION", f"the diffusion model to learn from, {_KNOWN}"), ..., _FILES,
        "Diffusion model of the same data (the teacher): a file, or one of your own code.",
        in_snapshots=False, aliases=("diffusion", "edm", "denoiser"),
    )
    gan_kwargs: dict[str, Any] | None = option(
        optional(JSON_TABLE, "what names and shapes of its tensors tell"), None, _FILES,
        "Constructor arguments of --gan that its state dict does not tell.",
        in_snapshots=False, aliases=("g-kwargs", "generator-kwargs"),
    )
    outdir: str = option(
        text("DIR"), "runs", _FILES, "Where run folders are made.",
        in_snapshots=False, aliases=("out", "output", "output-dir"),
    )
    desc: str | None = option(
        optional(text("TEXT"), "none"), None, _FILES, "Added to the run folder's name.",
        in_snapshots=False, aliases=("name",),
    )
    preset: str = option(
        _PRESET, "default", _FILES, "Defaults for a kind of run; --show prints them.",
        aliases=("recipe",),
    )
    teacher_kwargs: dict[str, Any] | None = option(
        optional(JSON_TABLE, "what the file tells"), None, _FILES,
        "How a teacher is built whose file does not tell it all; see docs/teachers.md.",
        aliases=("model-flags",),
    )

    kimg: float = option(
        POSITIVE, 200.0, _LENGTH, "Length of the run: thousands of images through the student step.",
        changeable=True, aliases=("duration", "steps", "iterations", "epochs", "total-kimg"),
    )
    batch: int = option(count(1), 64, _LENGTH, "Images per step.", aliases=("batch-size", "bs"))
    batch_gpu: int | None = option(
        optional(count(1), "all of --batch"), None, _SPEED,
        "How many images are computed at once, at most; gradients are accumulated.",
        changeable=True, aliases=("micro-batch", "gradient-accumulation"),
    )
    lr: float | None = option(
        optional(NOT_NEGATIVE, "by the kind of network"), None, _RATES, "Learning rate of the student (Adam).",
        changeable=True, aliases=("learning-rate", "glr"),
    )
    aux_lr: float | None = option(
        optional(NOT_NEGATIVE, "by the kind of network"), None, _RATES,
        "Learning rate of the auxiliary network (Adam).",
        changeable=True, aliases=("aux-learning-rate", "fake-lr"),
    )
    betas: tuple[float, float] = option(BETAS, (0.0, 0.999), _RATES, "Adam's betas, student.", aliases=("adam-betas",))
    aux_betas: tuple[float, float] = option(BETAS, (0.9, 0.999), _RATES, "Adam's betas, auxiliary network.")
    clip: float | None = option(
        LIMIT, None, _RATES, "Largest norm of the student's gradient; 0 = no limit.", aliases=("grad-clip", "max-norm")
    )
    aux_clip: float | None = option(
        LIMIT, None, _RATES, "Largest norm of the auxiliary network's gradient; 0 = no limit."
    )
    lr_schedule: str = option(
        words(("constant", "cosine", "linear")), "constant", _RATES,
        "Schedule of the student's rate over the run; the auxiliary network has to keep up, so its rate is constant.",
        aliases=("scheduler", "lr-scheduler"),
    )
    lr_rampup_kimg: float = option(
        NOT_NEGATIVE, 0.0, _RATES, "The student's rate rises linearly from zero over this many kimg.",
        aliases=("lr-warmup", "lr-rampup"),
    )

    sigma: SigmaOptions = option(
        SIGMA_LAW, SigmaOptions(P_mean=0.4), _NOISE,
        "Noise levels of the student step: lognormal:P_mean,P_std | karras:rho | loguniform.",
    )
    aux_sigma: SigmaOptions = option(
        SIGMA_LAW, SigmaOptions(P_mean=-0.4), _NOISE, "Noise levels of the auxiliary step."
    )
    objective: str = option(
        OBJECTIVE, "dmd", _OBJECTIVE,
        "What the student follows: ikl, dmd, sid, sim, or a sum such as ikl:0.7+sid:0.3; see docs/objectives.md.",
        aliases=("loss", "method"),
    )
    sid_alpha: float = option(
        NOT_NEGATIVE, 1.0, _OBJECTIVE, "α of the objective sid; published with 1.0 to 1.2.", aliases=("alpha",)
    )
    weighting: str = option(text("W"), "1", _OBJECTIVE, "Weight of the objective over noise levels: 1 | sigma^P.")
    guidance: float = option(
        POSITIVE, 1.0, _OBJECTIVE,
        "Strength of the teacher's guidance, by --guide or, without it, classifier-free; 1 = none.",
        aliases=("cfg", "cfg-scale", "guidance-scale"),
    )
    guide: str | None = option(
        optional(text("FILE|URL|NAME|MODULE:FUNCTION", _KNOWN), "none: the teacher without a label"), None, _OBJECTIVE,
        "A worse diffusion model of the same data, away from which --guidance leads the teacher (autoguidance).",
        in_snapshots=False, aliases=("autoguidance", "gnet"),
    )
    label_dist: tuple[float, ...] | None = option(
        LABEL_DIST, None, _COVERAGE, "How often each class is drawn: uniform, or a JSON list or file.",
        aliases=("class-weights", "prior"),
    )
    adversarial: float = option(
        NOT_NEGATIVE, 0.5, _COVERAGE,
        "Weight of a critic that compares the student's images with the teacher's, or with --data; 0 = none.",
        aliases=("gan-loss", "discriminator"), formerly=0.0,
    )
    bank: int = option(count(2, MAX_IMAGES), 2000, _COVERAGE, "How many images of the teacher the critic knows.")
    data: str | None = option(
        optional(text("DIR|ZIP"), "none: the teacher's images"), None, _COVERAGE,
        "Real images for the critic; the run is then no longer free of data.", in_snapshots=False,
        aliases=("dataset", "images"),
    )
    keep_distances: float = option(
        NOT_NEGATIVE, 0.0, _COVERAGE, "Pull towards the student's own pairwise distances.", aliases=("diversity",)
    )
    keep_recall: float = option(
        SHARE, 0.0, _COVERAGE,
        "Stop, and keep no snapshot as the best, below this share of the recall at the start; 0 = never.",
    )
    sigma_init: float = option(
        POSITIVE, 2.5, _NOISE, "Noise level at which --gan=one-step or one-step:FILE uses its U-Net."
    )
    aux_steps: int | str = option(
        count_or("auto", 1), 2, _LENGTH,
        "Auxiliary steps per student step; auto = more where aux lags, fewer where not.", aliases=("critic-steps",),
    )
    aux_warmup_kimg: float | None = option(
        optional(NOT_NEGATIVE, f"{WARMUP_STEPS} steps, at most as many as the run has"), None, _LENGTH,
        "Thousands of images for the auxiliary network to learn from first, while the student is frozen.",
        aliases=("aux-warmup", "warmup"),
    )
    average: str = option(
        words(("power", "ema")), "power", _RATES,
        "Average of the student that snapshots hold as G_ema: power = its length is a share of the run and can be "
        "chosen afterwards; ema = a half-life in kimg.", formerly="ema",
    )
    average_lengths: tuple[float, ...] = option(
        LENGTHS, (0.05, 0.1, 0.25), _RATES,
        "Lengths of the power averages that are kept, as relative standard deviations; metrics try all of them.",
    )
    ema_kimg: float = option(
        NOT_NEGATIVE, 50.0, _RATES, "Half-life of the student's moving average.",
        aliases=("ema", "ema-halflife-kimg", "ema-decay"),
    )
    ema_rampup: float | None = option(
        LIMIT, 0.05, _RATES, "Limits the half-life to this share of the images so far; 0 = no limit."
    )

    noise_mode: str = option(
        words(("random", "const", "none")), "random", _NOISE, "Noise inputs of the student while training."
    )
    clamp: bool = option(
        BOOLEAN, True, _OBJECTIVE, "Judge the student's images as they are saved, clamped to [-1, 1].", formerly=False
    )
    train: str = option(
        words(("all", "synthesis", "mapping")), "all", _OBJECTIVE, "Which part of the student is trained.",
        aliases=("trainable", "freeze"),
    )
    dropout: bool = option(
        BOOLEAN, False, _OBJECTIVE, "Train the auxiliary network with the dropout that its file asks for."
    )
    aux_dropout: float | None = option(
        RATE, None, _OBJECTIVE, "Train the auxiliary network with this rate of dropout instead; published: 0.13."
    )
    aux_augment: float = option(
        SHARE, 0.0, _OBJECTIVE,
        "How often each augmentation is applied to what the auxiliary network learns from; published: 0.12.",
    )

    precision: str = option(
        words(("auto", *PRECISIONS)), "auto", _SPEED,
        "Format of activations and products; weights stay float32. auto = bf16 on GPUs that have it, else fp32.",
        aliases=("amp", "dtype", "fp16", "bf16", "mixed-precision"), formerly="fp32",
    )
    compile: bool = option(
        BOOLEAN, False, _SPEED, "Translate the networks with torch.compile.", changeable=True,
        aliases=("torch-compile",),
    )
    cuda_graphs: bool = option(
        BOOLEAN, True, _SPEED, "Launch the steps of an iteration as CUDA graphs, where that is possible.",
        changeable=True, in_snapshots=False, aliases=("graphs", "cudagraphs"),
    )
    reuse_batch: bool = option(
        BOOLEAN, False, _SPEED,
        "The student step takes the images of the auxiliary step: a forward pass less, but no longer independent.",
    )

    seed: int = option(
        Kind("N", int, "0 to 2147483647", lambda value: 0 <= value < 2**31), 0, _NOISE,
        "Random seed of latents, labels and noise.", aliases=("random-seed",),
    )
    tick: float = option(
        POSITIVE, 4.0, _MONITORING, "How many kimg there are between two lines of progress.", changeable=True,
        aliases=("kimg-per-tick", "log-every"),
    )
    snap: int = option(
        count(0), 5, _MONITORING, "How many ticks there are between two snapshots; 0 = one at the end only.",
        changeable=True,
        aliases=("snapshot", "save-every"),
    )
    metrics: tuple[str, ...] = option(
        NAMES, (f"fd2k-{TEACHER}",), _MONITORING,
        "At every snapshot: fid50k_full, is50k, fd5k-<detector> …, or none. The detector teacher is --teacher itself.",
        changeable=True, aliases=("metric",), formerly=(),
    )
    metrics_batch: int | None = option(
        optional(count(1), "100, fewer above 256×256"), None, _MONITORING,
        "Images that metrics make and look at at once, on each GPU.",
    )
    ref: str | None = option(
        optional(text("FILE|NAME"), "none"), TEACHER, _MONITORING,
        "What metrics compare with: statistics (.npz), images, a network; teacher = images of --teacher, drawn once.",
        changeable=True, in_snapshots=False, aliases=("reference",), formerly=None,
    )
    trust_detector: bool = option(
        BOOLEAN, False, _MONITORING,
        "Run the TorchScript files that --metrics names: programs that can do more than compute.",
        changeable=True, in_snapshots=False,
    )
    logger: tuple[str, ...] = option(
        some_of(("tensorboard", "wandb")), ("tensorboard",), _MONITORING,
        "Who is told of the run's course, besides its own files: TensorBoard, Weights & Biases, both, or none.",
        changeable=True, in_snapshots=False, aliases=("log-with", "report-to", "wandb", "tracker"),
    )
    device: str | None = option(
        optional(text("DEVICE"), "cuda where there is one"), None, _SPEED, "cpu, cuda or cuda:N.",
        changeable=True, in_snapshots=False,
    )
    ops: str | None = option(
        optional(words(OPS_MODES), "$REFINE_OPS, else auto"), None, _SPEED, OPS_HELP, changeable=True
    )

    keep: int = option(
        count(1), 2, _RESUMING,
        "How many training states are kept; 1 takes half the room, and leaves nothing to fall back on.",
        changeable=True, in_snapshots=False, aliases=("keep-states", "max-checkpoints", "save-total-limit"),
    )
    state_minutes: float = option(
        number("a number ≥ 0", lambda value: value >= 0), 10.0, _RESUMING,
        "Save a training state at least this often, besides every snapshot.", changeable=True, in_snapshots=False,
    )
    time_limit: float | None = option(  # seconds
        optional(MINUTES, "none"), None, _RESUMING,
        "Stop in time for the state to be saved, as a batch queue wants it.", changeable=True, in_snapshots=False,
    )
    patience: int = option(
        count(0), 4, _RESUMING,
        "Stop after this many snapshots without a better first metric; 0 = never, as where there is no metric.",
        changeable=True, in_snapshots=False, aliases=("early-stopping",), formerly=0,
    )
    max_skips: int = option(
        count(1), 20, _RESUMING, "Stop after this many steps in a row with NaN or infinite gradients.",
        changeable=True, in_snapshots=False,
    )
    rollback: int = option(
        count(0), 0, _RESUMING,
        "When the numbers diverge, go on from the best training state with half the rates, at most so many times.",
        changeable=True, in_snapshots=False,
    )
    # fmt: on

    given: ClassVar[frozenset[str]] = frozenset()  # what was not left to the preset; empty where all was there already

    def __post_init__(self) -> None:
        names = frozenset(name for name in OPTIONS if getattr(self, name) is not ...)
        object.__setattr__(self, "given", names if names < OPTIONS.keys() else frozenset())
        preset, asks_for_patience = self._preset_values(), self.patience is not ...
        for name, known in OPTIONS.items():
            value, usual = getattr(self, name), preset.get(name, known.default)
            try:
                value = usual if value is ... else known.kind.cast(value, usual)
            except TypeError:  # of values from JSON
                raise ValueError(f"{flag(name)} is {value}; expected {known.kind.expected}") from None
            if value is ...:
                raise ValueError(f"{flag(name)} is missing; expected {known.kind.expected}")
            if not known.kind.allows(value):
                raise ValueError(f"{flag(name)} is {value}; expected {known.kind.expected}")
            numbers = value if isinstance(value, tuple) else (value,)
            if any(isinstance(number, int | float) and abs(number) > _MAX_NUMBER for number in numbers):
                raise ValueError(f"{flag(name)} is {value}; expected {known.kind.expected}, up to {_MAX_NUMBER:g}")
            object.__setattr__(self, name, value)
        if not self.metrics and not asks_for_patience:
            object.__setattr__(self, "patience", 0)
        self._check_combinations()

    def _preset_values(self) -> dict[str, Any]:
        if all(getattr(self, name) is not ... for name in OPTIONS):
            return {}
        name = OPTIONS["preset"].default if self.preset is ... else self.preset
        if name not in PRESETS:
            raise ValueError(f"--preset is {name}; expected {_PRESET.expected}")
        return PRESETS[name]

    def _check_combinations(self) -> None:
        if self.reuse_batch and self.batch_gpu is not None and self.batch_gpu < self.batch:
            raise ValueError(
                f"--batch-gpu is {self.batch_gpu}; expected --batch beside --reuse-batch, which keeps it whole"
            )
        if self.aux_dropout is not None and self.dropout:
            raise ValueError(f"--aux-dropout is {self.aux_dropout}; expected none beside --dropout, the file's rate")
        if self.data is not None and not self.adversarial:
            raise ValueError("--data is looked at by the critic only: add --adversarial, such as 0.5")
        if self.patience and not self.metrics:
            raise ValueError(f"--patience is {self.patience}; expected 0, or --metrics to go by")
        if self.keep_recall and not (self.metrics and self.ref):
            raise ValueError("--keep-recall needs a metric that measures recall: add --metrics and --ref")
        compared = list(filter(compares, self.metrics))
        if compared and self.ref is None:
            raise ValueError(f"--metrics={','.join(compared)} needs a reference: add --ref=teacher or --ref=FILE.npz")

    def without_part(self, student: Any, teacher: Any) -> list[str]:
        """A line for each option that somebody chose, by giving it or by what differs from the preset, and that has no
        part in a run with these networks."""
        lines = []
        for name, needs in NEEDS.items():
            value, usual = getattr(self, name), PRESETS.get(self.preset, {}).get(name, OPTIONS[name].default)
            chosen = value not in (None, False) and (name in self.given or value != usual)
            if chosen and not (needs.options(self) and needs.networks(student, teacher)):
                lines.append(f"{flag(name)} has no part in this run; it needs {needs.words}")
        return lines

    @property
    def num_steps(self) -> int:
        """Student steps of the whole run."""
        return math.ceil(round(self.kimg * 1000) / self.batch)

    @property
    def warmup_steps(self) -> int:
        """Auxiliary steps before the first student step."""
        if self.aux_warmup_kimg is None:
            return min(WARMUP_STEPS, self.num_steps)
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

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for training_options.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RefineConfig":
        """The inverse of `as_dict`, also after a trip through JSON.

        No preset is looked up: an option that an older version did not know takes its default, or what was done before
        there was a choice, so that presets may change without changing the runs that were made with them.

        Raises:
            ValueError: Unknown names, or impossible values.
        """
        if unknown := set(values) - set(OPTIONS):
            raise ValueError(f"training options hold {', '.join(sorted(unknown))}, which this version does not know")
        missing = {name: known.default if known.formerly is ... else known.formerly for name, known in OPTIONS.items()}
        return cls(**{**missing, **values})


OPTIONS: dict[str, Option] = {f.name: f.metadata["option"] for f in dataclasses.fields(RefineConfig)}
CHANGEABLE = frozenset(name for name, known in OPTIONS.items() if known.changeable)
NOT_IN_SNAPSHOTS = frozenset(name for name, known in OPTIONS.items() if not known.in_snapshots)
