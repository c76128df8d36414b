"""Diffusion models of guided-diffusion ("ADM", Dhariwal & Nichol 2021) and of consistency_models (Song et al. 2023).

Both have the U-Net of `adm_unet`, in `model`, under the names of their published state dicts. What differs is how it
was trained:

    ADMPrecond    ε at discrete times: D(x; sigma) = x − sigma · ε(x / √(1 + sigma²), t(sigma))
    CMPrecond     EDM's preconditioning, but with c_noise = 250 ln(sigma), a thousand times EDM's
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from refine.networks.adm_unet import ADMUNet
from refine.networks.bases import TrainingRate, check_choice, records_init_kwargs
from refine.networks.ddpm import log_sigma_table, time_between, vp_betas, vp_scalings
from refine.networks.denoiser import Preconditioner, Scalings, class_indices
from refine.networks.edm import edm_scalings

SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}  # their names → those of `ddpm.vp_betas`


def adm_sigmas(noise_schedule: str, num_steps: int) -> np.ndarray:
    """Noise levels √((1 − ᾱ_t) / ᾱ_t) of the times t = 0 … T − 1, float64, rising.

    Everything is computed in float64, as where these networks were trained. The linear schedule of T steps has betas
    from 0.1 / T to 20 / T, those of DDPM for T = 1000.

    Raises:
        ValueError: an unknown schedule, or a number of steps of which none comes.
    """
    check_choice("noise_schedule", noise_schedule, tuple(SCHEDULES))
    betas = vp_betas(SCHEDULES[noise_schedule], 0.1 / num_steps, 20 / num_steps, num_steps)
    signal = np.cumprod(1 - betas)
    return np.sqrt((1 - signal) / signal)


class _AroundADM(Preconditioner):
    """What the two share: the U-Net, and labels that every image of a network with classes must have."""

    model: ADMUNet

    @property
    def training_rate(self) -> TrainingRate:
        return TrainingRate(1e-4, 256)  # Dhariwal & Nichol's for LSUN and ImageNet at 128 pixels and more

    def _evaluate(
        self, x: torch.Tensor, c_noise: torch.Tensor, class_labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None, dtype: torch.dtype,
    ) -> torch.Tensor:  # fmt: skip
        if class_labels is not None:
            class_labels = class_indices(class_labels)
        return self.model(x.to(dtype), c_noise, class_labels)

    def _ends_of_encoder(self) -> list[torch.nn.Module]:
        return self.model.ends_of_encoder()


class ADMPrecond(_AroundADM):
    """A network of guided-diffusion, which predicts ε, as a denoiser D(x; sigma).

    It was trained at T discrete noise levels. Between them the time is interpolated, linearly in ln sigma, see
    `ddpm.DDPMPrecond`; outside of their range the first or last time is taken. D is not clipped to [-1, 1].

    Args:
        img_resolution, img_channels: Size of the images.
        label_dim: Number of classes, 0 = unconditional. There is no "no label": class_labels must be given.
        noise_schedule: 'linear' or 'cosine'.
        num_steps: Number T of the noise levels.
        rescale_timesteps: Whether the U-Net is told 1000 t / T instead of t.
        **model_kwargs: Arguments of `ADMUNet`.

    Raises:
        ValueError: the arguments are impossible.
    """

    log_sigmas: torch.Tensor

    @records_init_kwargs(defaults=False)
    def __init__(
        self, img_resolution: int, img_channels: int, label_dim: int = 0, noise_schedule: str = "linear",
        num_steps: int = 1000, rescale_timesteps: bool = False, **model_kwargs: Any,
    ):  # fmt: skip
        sigmas = adm_sigmas(noise_schedule, num_steps)
        unet = ADMUNet(img_resolution, img_channels, label_dim, **model_kwargs)
        super().__init__(unet, img_resolution, img_channels, label_dim)
        self.sigma_min, self.sigma_max = float(sigmas[0]), float(sigmas[-1])
        self.time_scale = 1000 / num_steps if rescale_timesteps else 1.0
        self.register_buffer("log_sigmas", log_sigma_table(sigmas), persistent=False)

    def scalings(self, sigma: torch.Tensor) -> Scalings:
        return vp_scalings("epsilon", sigma, self.time(sigma) * self.time_scale)

    def time(self, sigma: torch.Tensor) -> torch.Tensor:
        """The time t of noise levels, float32, between 0 and T − 1, the shape of sigma."""
        return time_between(self.log_sigmas, sigma)


class CMPrecond(_AroundADM):
    """A diffusion model of consistency_models, from which the consistency models there were distilled.

    Args:
        img_resolution, img_channels: Size of the images.
        label_dim: Number of classes, 0 = unconditional. There is no "no label": class_labels must be given.
        sigma_min, sigma_max: Range of noise levels.
        sigma_data: Standard deviation that the data are taken to have.
        **model_kwargs: Arguments of `ADMUNet`.

    Raises:
        ValueError: the arguments are impossible.
    """

    @records_init_kwargs(defaults=False)
    def __init__(
        self, img_resolution: int, img_channels: int, label_dim: int = 0, sigma_min: float = 0.002,
        sigma_max: float = 80.0, sigma_data: float = 0.5, **model_kwargs: Any,
    ):  # fmt: skip
        unet = ADMUNet(img_resolution, img_channels, label_dim, **model_kwargs)
        super().__init__(unet, img_resolution, img_channels, label_dim)
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data

    def scalings(self, sigma: torch.Tensor) -> Scalings:
        c_skip, c_out, c_in, c_noise = edm_scalings(sigma, self.sigma_data)
        return c_skip, c_out, c_in, 1000 * c_noise
