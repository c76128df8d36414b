"""Denoising losses of EDM (Karras et al. 2022, table 1 "Training"): how sigma is drawn, how the error is weighted.

A loss is called as ``loss(net, images, class_labels)`` and returns the weighted squared error of each pixel, unreduced:
float32 of the shape of the images. Random numbers come from torch's global generator: noise levels first, then noise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn

from refine.networks.edm import vp_sigma


class DenoisingLoss(ABC):
    """What the three losses share; they differ in `draw_sigma` and `weight`."""

    @abstractmethod
    def draw_sigma(self, n: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """n random noise levels, float32 (n, 1, 1, 1)."""

    @abstractmethod
    def weight(self, sigma: torch.Tensor) -> torch.Tensor:
        """Weight of the squared error at noise level sigma."""

    def at(
        self,
        net: nn.Module,
        images: torch.Tensor,
        sigma: torch.Tensor,
        noise: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss at given noise levels (N, 1, 1, 1) and unit noise of the images' shape."""
        D_x = net(images + sigma * noise, sigma, class_labels, augment_labels=augment_labels)
        return self.weight(sigma) * (D_x - images) ** 2

    def __call__(
        self,
        net: nn.Module,
        images: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss at random noise levels; images are clean ones in [-1, 1], (N, C, R, R)."""
        sigma = self.draw_sigma(len(images), images.device)
        return self.at(net, images, sigma, torch.randn_like(images), class_labels, augment_labels)


@dataclass(frozen=True)
class EDMLoss(DenoisingLoss):
    """ln sigma ~ N(P_mean, P_std²); the weight makes every noise level's loss start at 1."""

    P_mean: float = -1.2
    P_std: float = 1.2
    sigma_data: float = 0.5

    def sigma(self, normal: torch.Tensor) -> torch.Tensor:
        """Noise level from a standard normal number."""
        return (self.P_mean + self.P_std * normal).exp()

    def draw_sigma(self, n: int, device: torch.device | str = "cpu") -> torch.Tensor:
        return self.sigma(torch.randn(n, 1, 1, 1, device=device))

    def weight(self, sigma: torch.Tensor) -> torch.Tensor:
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


@dataclass(frozen=True)
class VPLoss(DenoisingLoss):
    """Times uniform in [epsilon_t, 1] of the variance-preserving process, weight 1/sigma²."""

    beta_d: float = 19.9
    beta_min: float = 0.1
    epsilon_t: float = 1e-5

    def sigma(self, uniform: torch.Tensor) -> torch.Tensor:
        """Noise level from a number uniform in [0, 1)."""
        return vp_sigma(1 + uniform * (self.epsilon_t - 1), self.beta_d, self.beta_min)

    def draw_sigma(self, n: int, device: torch.device | str = "cpu") -> torch.Tensor:
        return self.sigma(torch.rand(n, 1, 1, 1, device=device))

    def weight(self, sigma: torch.Tensor) -> torch.Tensor:
        return 1 / sigma**2


@dataclass(frozen=True)
class VELoss(DenoisingLoss):
    """ln sigma uniform between sigma_min and sigma_max, weight 1/sigma²."""

    sigma_min: float = 0.02
    sigma_max: float = 100

    def sigma(self, uniform: torch.Tensor) -> torch.Tensor:
        """Noise level from a number uniform in [0, 1)."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** uniform

    def draw_sigma(self, n: int, device: torch.device | str = "cpu") -> torch.Tensor:
        return self.sigma(torch.rand(n, 1, 1, 1, device=device))

    def weight(self, sigma: torch.Tensor) -> torch.Tensor:
        return 1 / sigma**2
