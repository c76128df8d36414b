"""How a diffusion model among the networks of a command is built and guided."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from refine.checkpoints.teachers import TeacherSource
from refine.errors import option


@dataclass(frozen=True)
class TeacherOptions:
    """What a command says of diffusion models; what is not one is not concerned.

    Attributes:
        guide: A file, name, or `package.module:function` of what guides it; None = nothing.
        guidance: The strength, see `refine.checkpoints.teachers.TeacherSource`.
        kwargs: How it is built, where its file does not tell it all.
    """

    guide: str | os.PathLike | None = None
    guidance: float = 1.0
    kwargs: Mapping[str, Any] | None = None

    def source(self, name: str | os.PathLike | torch.nn.Module) -> TeacherSource:
        """The diffusion model `name`, or that network itself, as it is to be asked.

        Raises:
            ValueError: there is no such file.
        """
        teacher = TeacherSource.of(name, self.kwargs)
        with option("--guide"):
            guide = None if self.guide is None else TeacherSource.of(self.guide)
        return replace(teacher, guide=guide, guidance=self.guidance)

    def check_used(self, are_teachers: Iterable[bool]) -> list[str]:
        """Lines on what has no part.

        Raises:
            ValueError: No network is a diffusion model, and something was said of one.
        """
        given = {"--guide": self.guide, "--guidance": self.guidance != 1 or None, "--teacher-kwargs": self.kwargs}
        names = [name for name, value in given.items() if value is not None]
        if names and not any(are_teachers):
            raise ValueError(f"{names[0]} is about diffusion models; expected one among the networks")
        return ["--guide has no part in this: --guidance is 1"] if self.guide is not None and self.guidance == 1 else []
