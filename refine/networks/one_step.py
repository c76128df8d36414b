"""A diffusion model's U-Net as a generator of one step: what one-step distillation starts from."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from refine.errors import option
from refine.networks import adm, ddpm, edm, edm2
from refine.networks.bases import Denoiser, Generator, TrainingRate, records_init_kwargs
from refine.networks.denoiser import Preconditioner

DENOISERS: dict[str, Callable[..., Preconditioner]] = {
    f"{module.__name__.rpartition('.')[2]}.{cls.__name__}": cls
    for module, cls in (
        *((edm, cls) for cls in (edm.EDMPrecond, edm.VPPrecond, edm.VEPrecond, edm.iDDPMPrecond)),
        (edm2, edm2.Precond),
        (ddpm, ddpm.DDPMPrecond),
        *((adm, cls) for cls in (adm.ADMPrecond, adm.CMPrecond)),
    )
}


class OneStepGenerator(Generator):
    """G(z, c) = D(sigma_init · z; sigma_init, c): unit noise to images in one evaluation of a denoiser.

    Args:
        denoiser: Class of the denoiser, a key of `DENOISERS`, such as 'edm.EDMPrecond'.
        sigma_init: The noise level, in units of [-1, 1] images; within the denoiser's range.
        img_resolution, img_channels: Size of the images.
        c_dim: Number of classes.
        denoiser_kwargs: The denoiser's other constructor arguments.

    Attributes:
        z_dim: img_channels · img_resolution²: a latent is an image of unit noise, flat or in its own shape. Its seeds
            give the same noise as a diffusion model's.

    Raises:
        ValueError: An unknown class, or a noise level outside its range.
    """

    @records_init_kwargs(defaults=True)
    def __init__(
        self, denoiser: str, sigma_init: float, img_resolution: int, img_channels: int, c_dim: int,
        denoiser_kwargs: dict[str, Any],
    ):  # fmt: skip
        if denoiser not in DENOISERS:
            raise ValueError(f"unknown denoiser {denoiser!r}; expected one of {', '.join(DENOISERS)}")
        sizes = {"img_resolution": img_resolution, "img_channels": img_channels, "label_dim": c_dim}
        self._set_up(DENOISERS[denoiser](**sizes, **denoiser_kwargs), sigma_init)

    def _set_up(self, denoiser: Denoiser, sigma_init: float) -> None:
        super().__init__()
        self.img_resolution, self.img_channels = denoiser.img_resolution, denoiser.img_channels
        self.c_dim, self.z_dim = denoiser.label_dim, denoiser.img_channels * denoiser.img_resolution**2
        self.denoiser = denoiser
        low, high = denoiser.sigma_min, denoiser.sigma_max
        if not max(low, 0) < sigma_init <= high or math.isinf(sigma_init):
            raise ValueError(
                f"sigma_init is {sigma_init:g}; expected a noise level of the network, {low:g} to {high:g}"
            )
        self.sigma_init = sigma_init
        self.train(False)

    @property
    def training_rate(self) -> TrainingRate:
        rate = self.denoiser.training_rate
        return TrainingRate(rate.lr / 10, rate.batch)  # a trained network that is to keep what it knows (measured)

    @classmethod
    def from_teacher(cls, teacher: Denoiser, sigma_init: float) -> OneStepGenerator:
        """A generator that begins as a copy of `teacher`, float32; faults as those of `around`."""
        kwargs = cls._kwargs_around(teacher, sigma_init)
        with option("--sigma-init"):
            G = cls(**kwargs)
        G.denoiser.load_state_dict(teacher.state_dict())
        return G.float()

    @classmethod
    def around(cls, teacher: Denoiser, sigma_init: float) -> OneStepGenerator:
        """A generator whose denoiser is `teacher` itself.

        Raises:
            ValueError: The teacher is of no class of `DENOISERS`, or sigma_init is not in its range.
        """
        G, kwargs = cls.__new__(cls), cls._kwargs_around(teacher, sigma_init)
        with option("--sigma-init"):
            G._set_up(teacher, sigma_init)
        G.init_kwargs = kwargs
        return G

    @staticmethod
    def _kwargs_around(teacher: Denoiser, sigma_init: float) -> dict[str, Any]:
        name = next((name for name, known in DENOISERS.items() if type(teacher) is known), None)
        if name is None:
            raise ValueError(f"unknown denoiser {type(teacher).__name__!r}; expected one of {', '.join(DENOISERS)}")
        sizes = {"img_resolution": teacher.img_resolution, "img_channels": teacher.img_channels}
        given = {**sizes, "label_dim": teacher.label_dim}
        kwargs = {key: value for key, value in teacher.init_kwargs.items() if key not in given}
        own = {"denoiser": name, "sigma_init": sigma_init, "c_dim": teacher.label_dim, "denoiser_kwargs": kwargs}
        return {**own, **sizes}

    def forward(self, z: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        """Images for latents.

        Args:
            z: Unit noise, (N, z_dim) or (N, img_channels, img_resolution, img_resolution).
            c: One-hot labels (N, c_dim); None = no label.

        Returns:
            (N, img_channels, img_resolution, img_resolution), float32.
        """
        z = z.reshape(-1, self.img_channels, self.img_resolution, self.img_resolution)
        sigma = torch.full([1, 1, 1, 1], self.sigma_init, dtype=z.dtype, device=z.device)  # filled there, not copied
        sigma = self.denoiser.round_sigma(sigma)
        return self.denoiser(sigma * z, sigma, c, force_fp32=True)

    def train(self, mode: bool = True) -> OneStepGenerator:
        """Stays in eval mode: a generator is a function of z and c, without dropout and dropped labels."""
        return super().train(False)
