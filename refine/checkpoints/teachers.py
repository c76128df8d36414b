"""A teacher as the options of a command name it: where it comes from, how it is built, and what guides it."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from refine.checkpoints import NetworkInfo, load_teacher, peek, source_file
from refine.checkpoints.given import given_teacher, name_of, recipe_of, weights_sha256
from refine.checkpoints.sources import custom
from refine.dnnlib import sha256_of_file
from refine.errors import option
from refine.guidance import Autoguided, Guided
from refine.networks.bases import Denoiser


@dataclass(frozen=True)
class TeacherSource:
    """One diffusion model, or two of which the second guides the first.

    Attributes:
        name: A file, or `package.module:function` of the user's own.
        path: The file, or the source file of that module.
        kwargs: How its network is built, where the file does not tell it all, see `load_teacher`.
        guide: The network that guides it; None = none.
        guidance: The strength w, see `refine.guidance`; with w ≠ 1 and no guide, guidance is classifier-free.
        given: The network, where a caller in Python has it; `name` and `path` then only stand for it.
    """

    name: str | Path
    path: Path
    kwargs: Mapping[str, Any] | None = None
    guide: TeacherSource | None = None
    guidance: float = 1.0
    given: Denoiser | None = None

    @classmethod
    def of(
        cls, name: str | os.PathLike | torch.nn.Module | TeacherSource, kwargs: Mapping[str, Any] | None = None
    ) -> TeacherSource:
        """What a file, URL, name of the index or `package.module:function` means; or a network as it is.

        Raises:
            ValueError: there is no such file, or no such module, or the network is no diffusion model.
        """
        if isinstance(name, TeacherSource):
            return name
        if isinstance(name, torch.nn.Module):
            if kwargs is not None:
                raise ValueError(f"a {type(name).__name__} is built already; expected no --teacher-kwargs")
            stands_for = name_of(name)
            return cls(stands_for, Path(stands_for), given=given_teacher(name))
        path = source_file(name, "teacher")
        return cls(os.fspath(name) if custom.parse(name) else path, path, kwargs)

    @property
    def own(self) -> custom.Reference | None:
        """The user's function that makes it, if one does."""
        return None if self.given is not None else custom.parse(self.name)

    @property
    def is_file(self) -> bool:
        """Whether it is of a file, from which it can be built again."""
        return self.given is None and self.own is None

    @property
    def stem(self) -> str:
        """A short name, for folders and bars."""
        return str(self.own.function if self.own else self.path.stem)

    @property
    def guided_words(self) -> str:
        """How it is guided, ready to follow its name."""
        if self.guidance == 1:
            return ""
        by = "" if self.guide is None else f" by {self.guide.path.name}"
        return f", guided{by} with w {self.guidance:g}"

    def info(self) -> NetworkInfo:
        """Its sizes, without building the network where it is of a file."""
        if not self.is_file:
            T = self._own_network
            return NetworkInfo("teacher", T.img_resolution, T.img_channels, T.label_dim)
        return peek(self.path, "teacher", self.kwargs)

    def load_alone(self) -> Denoiser:
        """The network without what guides it."""
        return load_teacher(self.path, self.kwargs) if self.is_file else self._own_network

    def load(self) -> Denoiser:
        """The network as it is guided."""
        teacher = self.load_alone()
        if self.guidance == 1:
            return teacher
        if self.guide is None:
            return Guided(teacher, self.guidance)
        with option("--guide"):
            guide = self.guide.load_alone()
        return Autoguided(teacher, guide, self.guidance)

    @functools.cached_property
    def sha256(self) -> str:
        """Of the file; of a network of the user's own, of its weights."""
        return sha256_of_file(self.path) if self.is_file else weights_sha256(self._own_network)

    @functools.cached_property
    def identity(self) -> str:
        """What tells its images apart from those of every other teacher."""
        own = f"{self.sha256} {sha256_of_file(self.path)} {self.own}" if self.own else self.sha256
        if self.given is not None:
            own = f"{self.sha256} {recipe_of(self.given)}"
        said = "" if not self.kwargs else f" {sorted(self.kwargs.items())}"
        guide = "" if self.guidance == 1 else f" {self.guidance!r} {self.guide and self.guide.identity}"
        whole = f"{own}{said}{guide}"
        return whole if whole == self.sha256 else hashlib.sha256(whole.encode()).hexdigest()

    @functools.cached_property
    def _own_network(self) -> Denoiser:
        return load_teacher(self.name, self.kwargs) if self.given is None else self.given
