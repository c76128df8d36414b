"""The networks of a run: from options, or from a caller in Python, and where they came from."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refine.checkpoints import load_generator, peek, source_file
from refine.checkpoints.export import can_write_like
from refine.checkpoints.given import name_of, weights_sha256
from refine.checkpoints.sources import custom
from refine.checkpoints.sources.one_step import file_of
from refine.checkpoints.teachers import TeacherSource
from refine.config import RefineConfig
from refine.config.needs import ONE_STEP
from refine.dnnlib import sha256_of_file
from refine.errors import option
from refine.guidance import check_guide
from refine.metrics.own import OwnMetric
from refine.networks.bases import Denoiser, Generator
from refine.networks.one_step import OneStepGenerator
from refine.networks.own_teacher import OwnTeacher
from refine.noise import SigmaLaw, make_weighting
from refine.objectives import make_objective
from refine.pair import check_pair
from refine.training.callbacks import Event


@dataclass(frozen=True)
class Brought:
    """What a caller in Python brings beside options.

    Attributes:
        student, teacher: Networks instead of files.
        metrics: Of its own, by the names that --metrics has for them.
        callbacks: Who is told of the course of the run, and may stop it.
        quiet: Nothing to stdout.
    """

    student: Generator | None = None
    teacher: TeacherSource | None = None
    metrics: Sequence[OwnMetric] = ()
    callbacks: Sequence[Callable[[Event], object]] = ()
    quiet: bool = False

    def how_to_go_on(self, folder: Path) -> str:
        """The call that resumes a run of modules or of metrics of one's own; empty where a command does it."""
        G, T = ("G" if self.student is not None else "", "T=T" if self.teacher is not None else "")
        metrics = "metrics=…" if self.metrics else ""
        if not (G or T or metrics):
            return ""
        return f"refine.refine({', '.join(filter(None, (G, T, f'resume={str(folder)!r}', metrics)))}) in Python"


@dataclass(frozen=True)
class Pair:
    """The networks, and the files that they came from.

    Attributes:
        student, teacher, guide: The networks.
        student_path: File of the student, which stands for it only where `in_memory`.
        source: Where the teacher comes from.
        in_memory: Whether a caller gave the student as it is.
    """

    student: Generator
    teacher: Denoiser
    guide: Denoiser | None
    student_path: Path
    source: TeacherSource
    in_memory: bool = False

    @functools.cached_property
    def origins(self) -> dict[str, dict[str, str]]:
        """Name and sha256 of their files."""
        sources = {"teacher": self.source, **({"guide": self.source.guide} if self.source.guide else {})}
        found = {name: {"file": source.path.name, "sha256": source.sha256} for name, source in sources.items()}
        digest = weights_sha256(self.student) if self.in_memory else sha256_of_file(self.student_path)
        return {"student": {"file": self.student_path.name, "sha256": digest}, **found}


def load_pair(config: RefineConfig, brought: Brought) -> Pair:
    """The networks, and their files; those that do not fit are refused before any is built.

    Raises:
        ValueError: A file cannot be used, or the networks do not fit; the message begins with the option.
    """
    given, one_step = brought.student, config.gan == ONE_STEP
    from_file = given is None and not one_step
    _check_laws(config)
    with option("--gan"):
        student_path = source_file(config.gan, "generator") if from_file else None
        student_info = peek(config.gan, "generator", config.gan_kwargs) if from_file else given
    with option("--teacher"):
        source = brought.teacher or TeacherSource.of(config.teacher, config.teacher_kwargs)
        teacher_info = source.info()
    if not one_step:
        check_pair(student_info, teacher_info)
    with option("--guide"):
        by = None if config.guide is None else TeacherSource.of(config.guide)
        if by is not None:
            check_guide(teacher_info, by.info())
            source = dataclasses.replace(source, guide=by, guidance=config.guidance)
    with option("--gan"):
        if one_step and (source.own or isinstance(source.given, OwnTeacher)):
            raise ValueError(f"one-step needs a teacher of a file, which can be built again; found {source.name}")
        student: Any = load_generator(config.gan, config.gan_kwargs, config.sigma_init) if from_file else given
    with option("--teacher"):
        teacher = source.load_alone()
    with option("--guide"):
        guide = None if by is None else by.load_alone()
    if one_step:
        with option("--gan"):
            student = OneStepGenerator.from_teacher(teacher, config.sigma_init)
    stands_for = None if given is None else Path(name_of(given))
    return Pair(student, teacher, guide, student_path or stands_for or source.path, source, given is not None)


def _check_laws(config: RefineConfig) -> None:
    """What only torch can tell of the options, before anything is loaded."""
    for name, law in (("--sigma", config.sigma), ("--aux-sigma", config.aux_sigma)):
        wrong = not 0 < law.sigma_min < law.sigma_max < math.inf
        with option(f"{name}-range" if wrong else name):
            SigmaLaw(**vars(law)).sample(1)
    with option("--weighting"):
        make_weighting(config.weighting)
    with option("--objective"):
        make_objective(config.objective)


def no_container(gan: str, pair: Pair) -> str | None:
    """Why snapshots are not written into copies of the file that the GAN came in; None = they are."""
    if pair.in_memory:
        return "the GAN was given as it is, not as a file"
    if gan == ONE_STEP:
        return "the one-step generator is made here, from the teacher"
    if file_of(gan) is not None:
        return "refine export --like=FILE puts a one-step generator back into the pickle it came from"
    if reference := custom.parse(gan):
        return f"use them as {reference}@FILE"
    return can_write_like(pair.student_path)
