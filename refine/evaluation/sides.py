"""What is compared: a network that makes images, loaded from a file, and how it is sampled."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from refine.checkpoints import load_generator, source_file
from refine.checkpoints.given import given_generator, makes_latents, name_of, weights_sha256
from refine.checkpoints.native import read_metadata
from refine.checkpoints.sniff import sniff
from refine.checkpoints.sources import custom, one_step
from refine.checkpoints.teachers import TeacherSource
from refine.dnnlib import sha256_of_file
from refine.errors import option
from refine.evaluation.teachers import TeacherOptions
from refine.metrics.sampling import Batch, sample_images, sample_teacher, sensible_batch
from refine.networks.bases import Generator
from refine.networks.sampler_settings import SamplerChoice, flag
from refine.processes import is_first


class Side:
    """A network that makes images, a generator or a diffusion model.

    Args:
        path: Its file or name, or the network itself, of which a copy is taken.
        device: Where it runs.
        batch: Images per batch; None = what is sensible for their size.
        noise_mode, truncation_psi: Of a StyleGAN2.
        teachers: How a diffusion model is built and guided.
        choice: How a diffusion model is sampled; what is not said there is what suits it.
        sigma_init: Noise level of a `one-step:FILE`.
        gan_kwargs: How a generator is built, where its file does not tell it all.

    Attributes:
        file: Its file; None of a network that was given as it is.
        sampling: How images are drawn, in words.
        sampling_reason: Why a diffusion model is sampled like this; None for a generator.
        is_teacher, is_one_step: Whether it is a diffusion model, and whether it was asked for as a `one-step:FILE`.
        image_shape: [C, H, W].
        device: As given.
        batch: Images per batch.
    """

    def __init__(
        self,
        path: str | os.PathLike | torch.nn.Module,
        device: str,
        batch: int | None,
        noise_mode: str,
        truncation_psi: float,
        teachers: TeacherOptions | None = None,
        choice: SamplerChoice = SamplerChoice(),  # noqa: B008 - frozen
        sigma_init: float | None = None,
        gan_kwargs: Mapping[str, Any] | None = None,
    ):
        self.network, self._source = _load_any(path, device, teachers or TeacherOptions(), gan_kwargs, sigma_init)
        for note in self.network.notes if is_first() else ():
            print(f"note: {note}", file=sys.stderr)
        self.is_teacher = self._source is not None
        self.is_one_step = not isinstance(path, torch.nn.Module) and one_step.file_of(path) is not None
        self.file, self.refined_with = None, None
        if isinstance(path, torch.nn.Module):
            self.path = self.name = name_of(path)
            self.sha256 = weights_sha256(self.network)
        else:
            self.file = source_file(path)
            self.path, self.name, self.sha256 = str(self.file), self.file.name, sha256_of_file(self.file)
            self.refined_with = refined_with(provenance_of(self.file))
        self.image_shape = [self.network.img_channels, self.network.img_resolution, self.network.img_resolution]
        self.device, self.batch = device, batch or sensible_batch(self.network.img_resolution)
        self._own: dict[str, Any] = {"noise_mode": noise_mode, "truncation_psi": truncation_psi}
        self.sampling_reason: str | None = None
        if self._source is None:
            self.sampling = _sampling(self.network, truncation_psi, noise_mode)
        else:
            settings, self.sampling_reason = choice.resolve(self._source.info())
            self._own, self.sampling = {"settings": settings}, f"{settings.describe()}{self._source.guided_words}"

    @property
    def num_classes(self) -> int:
        return self.network.label_dim if self.is_teacher else self.network.c_dim

    def sample(
        self,
        seeds: Sequence[int],
        classes: int | Sequence[int] | None = None,
        noise_mode: str | None = None,
        floats: bool = False,
    ) -> Iterator[Batch]:
        """Batches of images for seeds, see `refine.metrics.sampling`; with another noise mode than usual if given."""
        how: dict[str, Any] = {"classes": classes, "floats": floats, "batch": self.batch, "device": self.device}
        if self.is_teacher:
            return sample_teacher(self.network, seeds, **how, **self._own)
        own = self._own if noise_mode is None else {**self._own, "noise_mode": noise_mode}
        return sample_images(self.network, seeds, **how, **own)

    def describe(self) -> dict[str, Any]:
        described = {"path": self.path, "name": self.name, "sha256": self.sha256, "sampling": self.sampling}
        guide = None if self._source is None else described_guide(self._source)
        more = {"sampling_reason": self.sampling_reason, "guide": guide, "refined_with": self.refined_with}
        return {**described, **{key: value for key, value in more.items() if value is not None}}


def load_side(name: str, path: str | os.PathLike | torch.nn.Module, *sampling: Any) -> Side:
    """A `Side`, whose faults begin with the option of that name."""
    with option(f"--{name}"):
        return Side(path, *sampling)


# Option → whether it reaches a network, and what is to be said of one that it does not reach.
_REACHES: dict[str, tuple[Callable[[Side], bool], str]] = {
    "trunc": (lambda side: not side.is_teacher and side.network.takes_truncation, "cannot be truncated"),
    "noise-mode": (lambda side: not side.is_teacher and bool(side.network.noise_modes), "has no noise inputs"),
    "sigma-init": (lambda side: side.is_one_step, "is not given as one-step:FILE"),
}


def check_reach(
    sides: Mapping[str, Side], psi: float = 1.0, noise_mode: str | None = None, sigma_init: float | None = None
) -> list[str]:
    """A line for each network that --trunc, --noise-mode or --sigma-init does not reach, by the names of their options.

    Args:
        sides: Name of the option → network.
        psi, noise_mode, sigma_init: What was asked for; 1 or None = nothing.

    Raises:
        ValueError: One of them reaches none.
    """
    if not math.isfinite(psi):
        raise ValueError(f"--trunc is {psi:g}; expected a finite number, such as 0.7")
    asked = {"trunc": (psi, psi != 1), "noise-mode": (noise_mode, noise_mode is not None)}
    asked |= {"sigma-init": (sigma_init, sigma_init is not None)}
    lines = []
    for name, (value, is_given) in asked.items():
        reaches, why = _REACHES[name]
        without = [key for key, side in sides.items() if not reaches(side)] if is_given else []
        if without and len(without) == len(sides):
            names = " and ".join(dict.fromkeys(sides[key].name for key in without))
            raise ValueError(f"--{name} is {value}, but {names} {why}; expected no --{name}")
        lines += [f"--{name} does not reach --{key}: {sides[key].name} {why}" for key in without]
    return lines


def check_choice(choice: SamplerChoice, is_used: bool) -> None:
    """Raises ValueError if settings of a sampler are given, and there is no diffusion model to be sampled."""
    if choice.given and not is_used:
        raise ValueError(f"{flag(next(iter(choice.given)))} is for diffusion models, and there is none here")


def check_same_images(before: Side, after: Side, name: str = "after") -> None:
    """Raises ValueError if the two networks do not make the same kind of images; `name` is the option of `after`."""
    if before.image_shape != after.image_shape:
        raise ValueError(
            f"--{name}: its images are {after.image_shape}, but those of --before are {before.image_shape}"
        )


def described_guide(source: TeacherSource) -> dict[str, Any] | None:
    """JSON-able: what guides a diffusion model, and how strongly; None if no other network does."""
    if (guide := source.guide) is None:
        return None
    return {"name": guide.path.name, "sha256": guide.sha256, "guidance": source.guidance}


def provenance_of(file: Path) -> dict[str, Any]:
    """What a file of this toolkit says of its making; empty for other files."""
    origins = read_metadata(file)["provenance"] if file.is_file() and sniff(file).kind == "native" else {}
    return origins if isinstance(origins, dict) else {}


def refined_with(origins: dict[str, Any]) -> str | None:
    """What a snapshot of `refine.py` learnt from; None for other files."""
    if not isinstance(teacher := origins.get("teacher"), dict):
        return None
    data = origins.get("data")
    with_data = f"and the real images of {data.get('file')}" if isinstance(data, dict) else "alone, without data"
    return f"the teacher {teacher.get('file')} {with_data}"


def _sampling(G: Generator, truncation_psi: float, noise_mode: str) -> str:
    """How images of a generator are drawn, in words."""
    words = [f"psi {truncation_psi:g}"] if G.takes_truncation else []
    words += [f"noise {noise_mode}"] if G.noise_modes else []
    return ", ".join(words) or "G(z, c)"


_NO_TEACHER = re.compile("expected a teacher(:|$)")  # of a file that holds none; not of one that lacks something else


def _load_any(
    path: str | os.PathLike | torch.nn.Module,
    device: str,
    teachers: TeacherOptions,
    gan_kwargs: Mapping[str, Any] | None,
    sigma_init: float | None,
) -> tuple[Any, TeacherSource | None]:
    """(generator, None), or a diffusion model and its source. Raises ValueError if it is neither."""
    if isinstance(path, torch.nn.Module):
        if gan_kwargs is not None:
            raise ValueError(f"a {type(path).__name__} is built already; expected no --gan-kwargs")
        if not makes_latents(path):
            source = teachers.source(path)
            return source.load().to(device), source
        given: Any = given_generator(path)
        return given.to(device, memory_format=torch.channels_last), None
    try:
        # channels_last halves a generator's time on a CPU: no page faults for copies between layouts
        G: Any = load_generator(path, gan_kwargs, sigma_init)
        return G.to(device, memory_format=torch.channels_last), None
    except ValueError as error:
        if gan_kwargs is not None or one_step.file_of(path) is not None:  # asked for as a generator
            raise
        try:
            source = teachers.source(path)
            return source.load().to(device), source
        except ValueError as refused:
            own, kept = custom.parse(path) is not None, not _NO_TEACHER.search(str(refused))
            if "z_dim is None" in str(error) if own else kept:  # a diffusion model with which something else is wrong
                raise
            raise error from None
