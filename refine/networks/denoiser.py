"""A network F, wrapped into a denoiser D that works at every noise level (Karras et al. 2022, eq. 7):

    D(x; sigma) = c_skip(sigma) · x + c_out(sigma) · F(c_in(sigma) · x, c_noise(sigma))

The four scalings say how F was trained; a family of diffusion models is a subclass that has them.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, TypeAlias

import torch
from torch import nn

from refine.networks.bases import Denoiser, MixedPrecision

Scalings: TypeAlias = "tuple[torch.Tensor | float, torch.Tensor | float, torch.Tensor | float, torch.Tensor]"


class _EncoderIsDone(Exception):
    """Raised at the end of an encoder where the rest of the network is not needed."""


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
        compute_dtype: What F computes in otherwise; parameters (but see `keeps_halves`), noise levels and D_x are
            float32 all the same.
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
        if not isinstance(sigma, torch.Tensor):
            sigma = torch.full([], sigma, device=x.device)  # filled there: a copy would wait for a GPU
        sigma = sigma.to(x.device, torch.float32).reshape(-1, 1, 1, 1)
        labels = self._checked_labels(class_labels, x)
        c_skip, c_out, c_in, c_noise = self.scalings(sigma)
        F_x = self._evaluate(c_in * x, c_noise.flatten(), labels, augment_labels, self._dtype(x, force_fp32))
        return c_skip * x + c_out * F_x[:, : self.img_channels]  # of 16 bits times float32, or times 1: is float32

    def encode(self, x: torch.Tensor, sigma: float) -> list[torch.Tensor]:
        """See `Denoiser.encode`. The decoder is not run; whoever knows no missing label is told the first class."""
        ends = self._ends_of_encoder()
        if not ends:
            return super().encode(x, sigma)
        level = self.round_sigma(min(max(sigma, self.sigma_min), self.sigma_max))
        means: dict[nn.Module, torch.Tensor] = {}

        def note(end: nn.Module, _: Any, output: torch.Tensor) -> None:
            output = getattr(output, "total", output)  # of a `Sum`
            means[end] = output.to(torch.float32).mean(dim=(2, 3))
            if end is ends[-1]:
                raise _EncoderIsDone

        labels = None
        if self.label_dim and not self.has_null_label:
            labels = torch.zeros(len(x), self.label_dim, device=x.device)
            labels[:, 0] = 1
        hooks = [end.register_forward_hook(note) for end in ends]
        try:
            self(x, level, labels, force_fp32=True)
        except _EncoderIsDone:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return [means[end] for end in ends]

    def _ends_of_encoder(self) -> list[nn.Module]:
        """The last layer of each resolution of F's encoder, from fine to coarse; none where F has no such encoder.

        Layers in `enc` of the published U-Nets of EDM and EDM2 are called '32x32_block0'; those of auxiliary paths,
        such as '16x16_aux_skip', come before the blocks.
        """
        layers = getattr(self.inner, "enc", None)
        if not isinstance(layers, nn.ModuleDict):
            return []
        ends = {name.partition("_")[0]: layer for name, layer in layers.items() if "_aux_" not in name}
        return list(ends.values())

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
        n = x.shape[0]  # of a graph for any number of images; len() would fix it
        if tuple(class_labels.shape) not in ((1, self.label_dim), (n, self.label_dim)):
            raise ValueError(
                f"class labels have shape {tuple(class_labels.shape)}, but this network takes one-hot rows "
                f"({n}, {self.label_dim})."
            )
        return class_labels.to(x.device, torch.float32)


CLASSES_ONLY = "this network was trained with classes only: every image needs one in class_labels."


def class_indices(class_labels: torch.Tensor) -> torch.Tensor:
    """One-hot rows as indices (N,), for a network that knows no missing label.

    Raises:
        ValueError: a row is empty.
    """
    there = (class_labels.amax(dim=1) > 0).all()
    if class_labels.device.type == "cuda":  # reading it would wait for the GPU, which ends the program instead
        torch._assert_async(there, CLASSES_ONLY)
    elif not (class_labels.is_meta or there):
        raise ValueError(CLASSES_ONLY)
    return class_labels.argmax(dim=1)
