"""The denoisers of EDM (Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022).

A preconditioning (table 1 of the paper) around one of the U-Nets of `edm_unets`, which are made of `edm_layers`. The
names of classes, arguments and modules are those of the published checkpoints.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from refine.networks.bases import TrainingRate, check_choice, records_init_kwargs
from refine.networks.denoiser import Preconditioner, Scalings
from refine.networks.edm_unets import UNETS, DhariwalUNet, LadderUNet


def edm_scalings(sigma: torch.Tensor, sigma_data: float) -> Scalings:
    """c_skip, c_out, c_in, c_noise with which input, target and error have unit variance (table 1, "Ours")."""
    c_in = (sigma**2 + sigma_data**2).rsqrt()
    scaled = c_in * sigma_data
    return scaled**2, sigma * scaled, c_in, sigma.log() / 4


class _AroundUNet(Preconditioner):
    """What the four share: the U-Net, in `model`, is made of the arguments that files have for it."""

    model: LadderUNet

    def __init__(
        self, img_resolution: int, img_channels: int, label_dim: int, use_fp16: bool,
        sigma_min: float, sigma_max: float, model_type: str, model_kwargs: dict[str, Any],
        out_channels: int | None = None,
    ):  # fmt: skip
        check_choice("model_type", model_type, tuple(UNETS))
        unet = UNETS[model_type](
            img_resolution=img_resolution, in_channels=img_channels, out_channels=out_channels or img_channels,
            label_dim=label_dim, **model_kwargs,
        )  # fmt: skip
        super().__init__(unet, img_resolution, img_channels, label_dim, use_fp16)
        self.sigma_min, self.sigma_max, self.augment_dim = sigma_min, sigma_max, unet.augment_dim

    @property
    def has_null_label(self) -> bool:
        return self.label_dim > 0 and self.model.label_dropout > 0

    @property
    def training_rate(self) -> TrainingRate:
        # EDM's for ImageNet-64 (ADM) and CIFAR-10 (DDPM++); the narrower a network, the larger its steps.
        if isinstance(self.model, DhariwalUNet):
            return TrainingRate(1e-4 * 192 / self.init_kwargs.get("model_channels", 192), 4096)
        return TrainingRate(1e-3 * 128 / self.init_kwargs.get("model_channels", 128), 512)


class EDMPrecond(_AroundUNet):
    """Preconditioning of EDM (eq. 7, table 1 "Ours").

    Args:
        img_resolution, img_channels: Size of the images.
        label_dim: Number of classes, 0 = unconditional.
        use_fp16: See `Preconditioner`.
        sigma_min, sigma_max: Range of noise levels.
        sigma_data: Standard deviation that the data are taken to have.
        model_type: 'SongUNet' or 'DhariwalUNet'.
        **model_kwargs: Arguments of that U-Net.
    """

    @records_init_kwargs(defaults=False)
    def __init__(
        self, img_resolution: int, img_channels: int, label_dim: int = 0, use_fp16: bool = False,
        sigma_min: float = 0, sigma_max: float = float("inf"), sigma_data: float = 0.5,
        model_type: str = "DhariwalUNet", **model_kwargs,
    ):  # fmt: skip
        super().__init__(
            img_resolution, img_channels, label_dim, use_fp16, sigma_min, sigma_max, model_type, model_kwargs
        )
        self.sigma_data = sigma_data

    def scalings(self, sigma: torch.Tensor) -> Scalings:
        return edm_scalings(sigma, self.sigma_data)


class VPPrecond(_AroundUNet):
    """Preconditioning of variance-preserving diffusion (Song et al. 2021; EDM, table 1 "VP").

    Args: see `EDMPrecond`, and
        beta_d, beta_min: Extent and minimum of the linear noise schedule.
        M: Number of time steps that c_noise counts in.
        epsilon_t: Smallest time, which sets sigma_min.
    """

    @records_init_kwargs(defaults=False)
    def __init__(
        self, img_resolution: int, img_channels: int, label_dim: int = 0, use_fp16: bool = False,
        beta_d: float = 19.9, beta_min: float = 0.1, M: int = 1000, epsilon_t: float = 1e-5,
        model_type: str = "SongUNet", **model_kwargs,
    ):  # fmt: skip
        sigma_min, sigma_max = (float(vp_sigma(t, beta_d, beta_min)) for t in (epsilon_t, 1))
        super().__init__(
            img_resolution, img_channels, label_dim, use_fp16, sigma_min, sigma_max, model_type, model_kwargs
        )
        self.beta_d, self.beta_min, self.M, self.epsilon_t = beta_d, beta_min, M, epsilon_t

    def scalings(self, sigma: torch.Tensor) -> Scalings:
        t = ((self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt() - self.beta_min) / self.beta_d
        return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), (self.M - 1) * t


def vp_sigma(t: torch.Tensor | float, beta_d: float = 19.9, beta_min: float = 0.1) -> torch.Tensor:
    """Noise level of variance-preserving diffusion at times t in (0, 1].

    In float32, where cancellation makes the smallest one, t = 1e-5, exactly 2^-10 (0.0010005 without rounding): the
    published networks carry that number as their sigma_min.
    """
    t = torch.as_tensor(t, dtype=torch.float32, device=t.device if isinstance(t, torch.Tensor) else "cpu")
    return ((beta_d * t**2 / 2 + beta_min * t).exp() - 1).sqrt()


class VEPrecond(_AroundUNet):
    """Preconditioning of variance-exploding diffusion (Song et al. 2021; EDM, table 1 "VE"). Args: see `EDMPrecond`."""

    @records_init_kwargs(defaults=False)
    def __init__(
        self, img_resolution: int, img_channels: int, label_dim: int = 0, use_fp16: bool = False,
        sigma_min: float = 0.02, sigma_max: float = 100, model_type: str = "SongUNet", **model_kwargs,
    ):  # fmt: skip
        super().__init__(
            img_resolution, img_channels, label_dim, use_fp16, sigma_min, sigma_max, model_type, model_kwargs
        )

    def scalings(self, sigma: torch.Tensor) -> Scalings:
        return 1, sigma, 1, (sigma / 2).log()


class iDDPMPrecond(_AroundUNet):
    """Preconditioning of improved DDPM (Nichol & Dhariwal 2021; EDM, table 1 "iDDPM"): M discrete noise levels.

    The U-Net has twice as many output channels as the images (iDDPM's learned variance); the second half is not used.

    Args: see `EDMPrecond`, and
        C_1: Floor of the ratio of successive signal levels.
        C_2: Offset of the cosine schedule.
        M: Number of noise levels.
    """

    u: torch.Tensor

    @records_init_kwargs(defaults=False)
    def __init__(
        self, img_resolution: int, img_channels: int, label_dim: int = 0, use_fp16: bool = False,
        C_1: float = 0.001, C_2: float = 0.008, M: int = 1000, model_type: str = "DhariwalUNet", **model_kwargs,
    ):  # fmt: skip
        levels = iddpm_sigmas(C_1, C_2, M)
        super().__init__(
            img_resolution, img_channels, label_dim, use_fp16, float(levels[M - 1]), float(levels[0]),
            model_type, model_kwargs, out_channels=2 * img_channels,
        )  # fmt: skip
        self.C_1, self.C_2, self.M = C_1, C_2, M
        self.register_buffer("u", torch.tensor(levels))

    def scalings(self, sigma: torch.Tensor) -> Scalings:
        c_noise = (self.M - 1 - self.sigma_index(sigma)).to(torch.float32)
        return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), c_noise

    def sigma_index(self, sigma: torch.Tensor) -> torch.Tensor:
        """Index of the nearest noise level in ``u``, int64, the shape of sigma."""
        return (sigma.to(self.u.dtype)[..., None] - self.u).abs().argmin(dim=-1)

    def round_sigma(self, sigma: torch.Tensor | float) -> torch.Tensor:
        sigma = torch.as_tensor(sigma, device=self.u.device)
        dtype = sigma.dtype if sigma.is_floating_point() else torch.float32
        return self.u.take(self.sigma_index(sigma)).to(dtype)  # u[…] would read a single index back


def iddpm_sigmas(C_1: float = 0.001, C_2: float = 0.008, M: int = 1000) -> np.ndarray:
    """Noise levels of iDDPM, float32, (M + 1,), falling from u[0] ≈ 20291 to u[M] = 0 (EDM, table 1).

    In float32 like the published networks' own; float64 would change the smallest levels by 5e-4 of their size.
    """
    steps = np.arange(M + 1, dtype=np.float32)
    signal = np.sin(np.float32(0.5 * np.pi) * steps / np.float32(M) / np.float32(C_2 + 1)) ** 2
    u = np.zeros(M + 1, dtype=np.float32)
    for j in range(M, 0, -1):
        u[j - 1] = np.sqrt((u[j] ** 2 + 1) / max(signal[j - 1] / signal[j], np.float32(C_1)) - 1)
    return u
