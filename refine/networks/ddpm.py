"""Discrete variance-preserving diffusion models, DDPM (Ho et al. 2020) and its kin, as denoisers in EDM's terms.

The U-Net is diffusers' `UNet2DModel`, an optional package that is imported when one is built. It takes images scaled
to x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · n at an integer time t; here x = x_t / √ᾱ_t and sigma = √((1 − ᾱ_t) / ᾱ_t) instead:

    D(x; sigma) = c_skip · x + c_out · F(c_in · x, t(sigma)),    c_in = 1/√(1 + sigma²)

    F predicts      c_skip            c_out
    'epsilon', n    1                 −sigma
    'v_prediction'  1 / (1 + sigma²)  −sigma / √(1 + sigma²)     (Salimans & Ho 2022: v = √ᾱ_t n − √(1 − ᾱ_t) x_0)
    'sample', x_0   0                 1
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from refine.networks.bases import TrainingRate, check_choice, records_init_kwargs
from refine.networks.denoiser import CLASSES_ONLY, Preconditioner, Scalings, class_indices

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
_SNAP = 1e-3  # a time this near to an integer is that integer: float32 resolves ln sigma to about 1e-5 of a step


def vp_betas(
    beta_schedule: str = "linear", beta_start: float = 1e-4, beta_end: float = 0.02, num_steps: int = 1000
) -> np.ndarray:
    """Noise added in each step, float64, (num_steps,), under diffusers' names of the schedules.

    'linear' (DDPM), 'scaled_linear' (linear in √beta: latent diffusion), 'squaredcos_cap_v2' (cosine: improved DDPM),
    'sigmoid' (GeoDiff). The cosine has no beta_start and beta_end.

    Raises:
        ValueError: an unknown schedule, or numbers of which none comes.
    """
    check_choice("beta_schedule", beta_schedule, SCHEDULES)
    if num_steps < 2 or not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"betas from {beta_start} to {beta_end} in {num_steps} steps are not a schedule of noise.")
    if beta_schedule == "squaredcos_cap_v2":
        signal = np.cos((np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1 - signal[1:] / signal[:-1], 0.999)
    if beta_schedule == "scaled_linear":
        return np.linspace(beta_start**0.5, beta_end**0.5, num_steps) ** 2
    if beta_schedule == "sigmoid":
        return (beta_end - beta_start) / (1 + np.exp(-np.linspace(-6, 6, num_steps))) + beta_start
    return np.linspace(beta_start, beta_end, num_steps)


def vp_discrete_sigmas(betas: Sequence[float] | np.ndarray) -> np.ndarray:
    """Noise levels √((1 − ᾱ_t) / ᾱ_t) of the times t = 0 … T − 1, float64, rising.

    1 − beta is rounded to float32, as it was where the networks were trained: that changes the smallest level of the
    cosine schedule by 3e-4 of its size.
    """
    alphas = np.float32(1) - np.asarray(betas, dtype=np.float32)
    signal = np.cumprod(alphas.astype(np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):  # what comes of impossible betas is for the caller to see
        return np.sqrt((1 - signal) / signal)


def log_sigma_table(sigmas: np.ndarray) -> torch.Tensor:
    """ln of the noise levels of the times 0 … T − 1, float32, for `time_between`.

    Raises:
        ValueError: they do not rise.
    """
    if len(sigmas) < 2 or not (np.isfinite(sigmas).all() and (np.diff(sigmas) > 0).all() and sigmas[0] > 0):
        raise ValueError("the schedule's noise levels do not rise from step to step.")
    return torch.tensor(np.log(sigmas), dtype=torch.float32, device="cpu")


def time_between(log_sigmas: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """The time of noise levels: an integer at those of the table, interpolated linearly in ln sigma between them, the
    first or last one outside.

    Args:
        log_sigmas: See `log_sigma_table`.
        sigma: Noise levels, of any shape.

    Returns:
        float32, between 0 and T − 1, the shape of sigma.
    """
    wanted = sigma.log().contiguous()
    below = (torch.searchsorted(log_sigmas, wanted) - 1).clamp(0, len(log_sigmas) - 2)
    low, high = log_sigmas[below], log_sigmas[below + 1]
    time = below + ((wanted - low) / (high - low)).clamp(0, 1)
    return torch.where((time - time.round()).abs() < _SNAP, time.round(), time)


def vp_scalings(prediction_type: str, sigma: torch.Tensor, time: torch.Tensor) -> Scalings:
    """c_skip, c_out, c_in and c_noise = time of a network that predicts one of `PREDICTIONS`; the table above."""
    total = 1 + sigma**2
    outside: dict[str, tuple[torch.Tensor | float, torch.Tensor | float]] = {
        "epsilon": (1, -sigma),
        "v_prediction": (1 / total, -sigma / total.sqrt()),
        "sample": (0, 1),
    }
    return *outside[prediction_type], 1 / total.sqrt(), time


class DDPMPrecond(Preconditioner):
    """A `UNet2DModel` of diffusers, in `unet`, as a denoiser D(x; sigma).

    Between the discrete noise levels the time is interpolated, linearly in ln sigma, and the U-Net is asked at that
    fraction: its embedding of time is made of sines, smooth in t. So D is continuous in sigma and the network is always
    told the actual noise level; rounding, as iDDPM does, would tell a wrong one by up to a quarter at the small levels.
    Outside of the range, the nearest time is taken. D is not clipped to [-1, 1], as the samplers of diffusers may do.

    Args:
        img_resolution, img_channels: Size of the images. A U-Net with more output channels (a learned variance) may be
            wrapped; only the first img_channels are used.
        label_dim: Number of classes, 0 = unconditional. There is no "no label": class_labels must be given.
        prediction_type: What the U-Net predicts, one of `PREDICTIONS`.
        beta_schedule, beta_start, beta_end, num_steps: See `vp_betas`.
        trained_betas: Betas to be used instead; None = those of the schedule.
        **model_kwargs: The configuration of the U-Net; what this version of diffusers does not know is left out.

    Raises:
        ValueError: diffusers is missing, or the configuration is impossible.
    """

    inner_name = "unet"
    log_sigmas: torch.Tensor

    @records_init_kwargs(defaults=False)
    def __init__(
        self, img_resolution: int, img_channels: int, label_dim: int = 0, prediction_type: str = "epsilon",
        beta_schedule: str = "linear", beta_start: float = 1e-4, beta_end: float = 0.02, num_steps: int = 1000,
        trained_betas: Sequence[float] | None = None, **model_kwargs: Any,
    ):  # fmt: skip
        check_choice("prediction_type", prediction_type, PREDICTIONS)
        if trained_betas is None:
            sigmas = vp_discrete_sigmas(vp_betas(beta_schedule, beta_start, beta_end, num_steps))
        else:
            sigmas = vp_discrete_sigmas(trained_betas)
        log_sigmas = log_sigma_table(sigmas)
        unet = _make_unet(img_resolution, img_channels, label_dim, model_kwargs)
        super().__init__(unet, img_resolution, img_channels, label_dim)
        self.sigma_min, self.sigma_max = float(sigmas[0]), float(sigmas[-1])
        self.prediction_type = prediction_type
        self.register_buffer("log_sigmas", log_sigmas, persistent=False)

    @property
    def training_rate(self) -> TrainingRate:
        return TrainingRate(2e-4, 128)  # DDPM's for CIFAR-10

    def scalings(self, sigma: torch.Tensor) -> Scalings:
        return vp_scalings(self.prediction_type, sigma, self.time(sigma))

    def time(self, sigma: torch.Tensor) -> torch.Tensor:
        """The time t of noise levels, float32, between 0 and T − 1, the shape of sigma."""
        return time_between(self.log_sigmas, sigma)

    def _evaluate(
        self, x: torch.Tensor, c_noise: torch.Tensor, class_labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None, dtype: torch.dtype,
    ) -> torch.Tensor:  # fmt: skip
        """By autocast, which leaves the library's own code as it is. The U-Net takes one time and class per image."""
        n = x.shape[0]
        time, classes = c_noise.expand(n), self._classes(class_labels, n)
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            return self.inner(x, time, class_labels=classes).sample

    def _ends_of_encoder(self) -> list[nn.Module]:
        """Before the layer that halves the resolution, which belongs to the same block here."""
        blocks = getattr(self.inner, "down_blocks", ())
        return [(getattr(block, "attentions", None) or block.resnets)[-1] for block in blocks]

    def _checked_labels(self, class_labels: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
        if self.label_dim and class_labels is None:
            raise ValueError(CLASSES_ONLY)
        return super()._checked_labels(class_labels, x)

    def _classes(self, class_labels: torch.Tensor | None, n: int) -> torch.Tensor | None:
        """One-hot rows as the indices that the U-Net takes."""
        if class_labels is None:
            return None
        return class_indices(class_labels).expand(n)


def _make_unet(img_resolution: int, img_channels: int, label_dim: int, config: dict) -> nn.Module:
    try:
        from diffusers import UNet2DModel
    except ImportError:
        raise ValueError("the package diffusers is missing: pip install 'gan-refine[diffusers]'") from None
    known = inspect.signature(UNet2DModel.__init__).parameters
    config = {name: value for name, value in config.items() if name in known}
    return UNet2DModel(
        **{"out_channels": img_channels, **config},
        sample_size=img_resolution,
        in_channels=img_channels,
        num_class_embeds=label_dim or None,
    )
