"""A network F, wrapped into a denoiser D that works at every noise level (Karras et al. 2022, eq. 7):

    D(x; sigma) = c_skip(sigma) · x + c_out(sigma) · F(c_in(sigma) · x, c_noise(sigma))

The four scalings say how F was trained; a family of diffusion models is a subclass that has them.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TypeAlias

import torch
from torch import nn

from refine.networks.bases import Denoiser, MixedPrecision

Scalings: TypeAlias = "tuple[torch.Tensor | float, torch.Tensor | float, torch.Tensor | float, torch.Tensor]"


class Preconditioner(Denoiser, MixedPrecision):
    """Base of the families: any network F around which the scalings are put.

    F is called as `F(x, c_noise, class_labels=…, augment_labels=…)`; a family whose F is called in another way
    overrides `_evaluate`. It is a child of this module under the name `inner_name`, that of the published files.

    Args:
        inner: F.
        img_resolution, img_channels: Size of the images. Where F has more output channels (a learned variance), the
            first img_channels are used.
        label_dim: Number of classes, 0 = unconditional.
        use_fp16: Run F in float16 where the images are on a GPU.

    Attributes:
        compute_dtype: What F computes in otherwise; parameters, noise levels and D_x are float32 all the same.
    """

    inner_name = "model"

    def __init__(
        self, inner: nn.Module, img_resolution: int, img_channels: int, label_dim: int = 0, use_fp16: bool = False
    ):
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.use_fp16 = use_fp16
        self.add_module(self.inner_name, inner)

    @property
    def inner(self) -> nn.Module:
        """The network F."""
        return getattr(self, self.inner_name)

    @abstractmethod
    def scalings(self, sigma: torch.Tensor) -> Scalings:
        """c_skip, c_out, c_in, c_noise for noise levels of any shape."""

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        force_fp32: bool = False,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Denoise, see `Denoiser.forward`.

        Args:
            x, sigma, class_labels: As there.
            force_fp32: Run in float32 whatever `use_fp16` and `compute_dtype` say.
            augment_labels: (N, augment_dim), for networks trained with augmentation; None or zeros mean "none". Others
                do not use them.

        Returns:
            D_x, float32, the shape of x.

        Raises:
            ValueError: If the shape of x or of class_labels does not fit the network.
        """
        x = self._checked_images(x).to(torch.float32)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1, 1, 1, 1)
        labels = self._checked_labels(class_labels, x)
        c_skip, c_out, c_in, c_noise = self.scalings(sigma)
        F_x = self._evaluate(c_in * x, c_noise.flatten(), labels, augment_labels, self._dtype(x, force_fp32))
        return c_skip * x + c_out * F_x[:, : self.img_channels].to(torch.float32)

    def _evaluate(
        self, x: torch.Tensor, c_noise: torch.Tensor, class_labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None, dtype: torch.dtype,
    ) -> torch.Tensor:  # fmt: skip
        """F at scaled images x, float32, computed in `dtype`; c_noise is (N,) or (1,)."""
        return self.inner(x.to(dtype), c_noise, class_labels=class_labels, augment_labels=augment_labels)

    def _dtype(self, x: torch.Tensor, force_fp32: bool) -> torch.dtype:
        """What F computes in, for images x."""
        if self.use_fp16 and not force_fp32 and x.device.type == "cuda":
            return torch.float16
        return torch.float32 if force_fp32 else self.compute_dtype

    def _checked_images(self, x: torch.Tensor) -> torch.Tensor:
        expected = (self.img_channels, self.img_resolution, self.img_resolution)
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(f"images have shape {tuple(x.shape)}, but this network denoises {('N', *expected)}.")
        return x

    def _checked_labels(self, class_labels: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
        if self.label_dim == 0:
            return None
        if class_labels is None:
            return x.new_zeros(1, self.label_dim)
        if tuple(class_labels.shape) not in ((1, self.label_dim), (len(x), self.label_dim)):
            raise ValueError(
                f"class labels have shape {tuple(class_labels.shape)}, but this network takes one-hot rows "
                f"({len(x)}, {self.label_dim})."
            )
        return class_labels.to(x.device, torch.float32)
