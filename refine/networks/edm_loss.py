"""The denoising loss of EDM (Karras et al. 2022, table 1 "Training"): how sigma is drawn, how the error is weighted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class EDMLoss:
    """ln sigma ~ N(P_mean, P_std²); the weight makes every noise level's loss start at 1.

    A call returns the weighted squared error of each pixel, unreduced: float32 of the shape of the images. Random
    numbers come from torch's global generator: noise levels first, then noise.
    """

    P_mean: float = -1.2
    P_std: float = 1.2
    sigma_data: float = 0.5

    def sigma(self, normal: torch.Tensor) -> torch.Tensor:
        """Noise level from a standard normal number."""
        return (self.P_mean + self.P_std * normal).exp()

    def weight(self, sigma: torch.Tensor) -> torch.Tensor:
        """Weight of the squared error at noise level sigma."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2

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
        sigma = self.sigma(torch.randn(len(images), 1, 1, 1, device=images.device))
        return self.at(net, images, sigma, torch.randn_like(images), class_labels, augment_labels)
