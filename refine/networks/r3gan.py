"""The generator of R3GAN (Huang et al., "The GAN is dead; long live the GAN! A Modern GAN Baseline", arXiv 2501.05441).

A stack of residual blocks without normalisation, mapping network, noise inputs and truncation: latents are used as they
are drawn. Names of parameters are those of the published files behind their prefix `Model.`; shapes in comments: N
batch, I/O channels, W width of a stage, E = W · expansion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from refine.networks import bases
from refine.networks.bases import records_init_kwargs
from refine.torch_utils.ops.bias_act import bias_act
from refine.torch_utils.ops.upfirdn2d import setup_filter, upsample2d


class _Weight(nn.Module):
    def __init__(self, *shape: int, std: float):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape) * std if std else torch.zeros(*shape))


class Convolution(nn.Module):
    """Convolution without bias and with zero padding: (N, I, H, W) → (N, O, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, groups: int = 1, gain: float = 1.0):
        super().__init__()
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"{in_channels} to {out_channels} channels cannot be cut into {groups} groups")
        shape = (out_channels, in_channels // groups, kernel_size, kernel_size)
        self.Layer = _Weight(*shape, std=gain / math.sqrt(math.prod(shape[1:])))
        self.groups, self.padding = groups, (kernel_size - 1) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.Layer.weight.to(x.dtype), padding=self.padding, groups=self.groups)


class BiasedActivation(nn.Module):
    """Leaky ReLU of x + bias, without StyleGAN2's gain."""

    def __init__(self, channels: int):
        super().__init__()
        self.Bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return bias_act(x, self.Bias.to(x.dtype), act="lrelu", gain=1)


class ResidualBlock(nn.Module):
    """x + a bottleneck the other way round: 1×1 to E channels, grouped k×k, 1×1 back."""

    def __init__(self, width: int, expanded: int, cardinality: int, kernel_size: int, gain: float):
        super().__init__()
        self.LinearLayer1 = Convolution(width, expanded, 1, gain=gain)
        self.LinearLayer2 = Convolution(expanded, expanded, kernel_size, groups=cardinality, gain=gain)
        self.LinearLayer3 = Convolution(expanded, width, 1, gain=0.0)
        self.NonLinearity1, self.NonLinearity2 = BiasedActivation(expanded), BiasedActivation(expanded)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.NonLinearity1(self.LinearLayer1(x))
        return x + self.LinearLayer3(self.NonLinearity2(self.LinearLayer2(y)))


class GenerativeBasis(nn.Module):
    """Latents (N, I) → (N, W, 4, 4): each channel is a learnt picture times a number."""

    def __init__(self, in_features: int, width: int):
        super().__init__()
        self.Basis = nn.Parameter(torch.randn(width, 4, 4))
        self.LinearLayer = _Weight(width, in_features, std=1 / math.sqrt(in_features))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.Basis * F.linear(z, self.LinearLayer.weight)[:, :, None, None]


class _Resampler(nn.Module):
    Kernel: torch.Tensor

    def __init__(self, resample_filter: Sequence[float]):
        super().__init__()
        taps = torch.tensor([*resample_filter, 0.0]) + torch.tensor([0.0, *resample_filter])  # convolved with [1, 1]
        self.register_buffer("Kernel", setup_filter(taps, separable=False))


class UpsampleLayer(nn.Module):
    """(N, I, H, W) → (N, O, 2H, 2W); a 1×1 convolution comes first where the widths differ."""

    def __init__(self, in_channels: int, out_channels: int, resample_filter: Sequence[float]):
        super().__init__()
        self.Resampler = _Resampler(resample_filter)
        self.LinearLayer = Convolution(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return upsample2d(x if self.LinearLayer is None else self.LinearLayer(x), self.Resampler.Kernel)


class GeneratorStage(bases.MixedPrecision):
    """A transition and the blocks of one resolution.

    Attributes:
        use_bf16: Whether the file asks for bfloat16 here; the network says which of its calls comply.
    """

    def __init__(self, transition: nn.Module, blocks: list[ResidualBlock], use_bf16: bool):
        super().__init__()
        self.Layers = nn.ModuleList([transition, *blocks])
        self.use_bf16 = use_bf16

    def forward(self, x: torch.Tensor, force_fp32: bool) -> torch.Tensor:
        first = isinstance(self.Layers[0], GenerativeBasis)  # from numbers, not from images: always float32
        x = x.to(torch.bfloat16 if self.use_bf16 and not force_fp32 else torch.float32 if first else self.compute_dtype)
        for layer in self.Layers:
            x = layer(x)
        return x


class Generator(bases.Generator):
    """R3GAN generator: z and labels → images (N, img_channels, R, R), float32, about [−1, 1].

    Args:
        z_dim: Latent size.
        c_dim: Label size; 0 = unconditional.
        img_resolution: R = 4 · 2^(stages − 1).
        img_channels: Colour channels.
        widths, cardinalities, blocks: Channels, groups of the k×k convolutions and residual blocks of each stage.
        expansion: E / W.
        embed_features: Size of the label embedding.
        kernel_size: k of the grouped convolutions.
        resample_filter: Base filter of the upsampling.
        bf16_stages: Stages that compute in bfloat16 on a GPU.

    Raises:
        ValueError: The lists are not of one length, or are not those of this resolution.
    """

    training_rate = bases.TrainingRate(2e-4, 512)  # the paper's at the start, for weights that no gain is applied to

    @records_init_kwargs(defaults=True)
    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        img_resolution: int,
        img_channels: int,
        widths: Sequence[int],
        cardinalities: Sequence[int],
        blocks: Sequence[int],
        expansion: int = 2,
        embed_features: int = 0,
        kernel_size: int = 3,
        resample_filter: Sequence[float] = (1, 2, 1),
        bf16_stages: Sequence[int] = (),
    ):
        super().__init__()
        if not len(widths) == len(cardinalities) == len(blocks) > 0 or img_resolution != 2 << len(widths):
            found = f"{len(widths)} widths, {len(cardinalities)} cardinalities and {len(blocks)} numbers of blocks"
            raise ValueError(
                f"img_resolution is {img_resolution}, with {found}; expected one for each stage from 4×4 on"
            )
        if z_dim < 1 or min(widths) < 1:
            raise ValueError(f"z_dim is {z_dim} and widths are {list(widths)}; expected numbers of at least 1")
        if any(count < 0 for count in blocks) or 0 in bf16_stages:
            raise ValueError("a stage has less than 0 blocks, or the first stage computes in bfloat16")
        self.z_dim, self.c_dim = z_dim, c_dim
        self.img_resolution, self.img_channels = img_resolution, img_channels
        gain = math.sqrt(2 / (1 + 0.2**2)) * max(sum(blocks), 1) ** -0.25
        stages, before = [], 0
        for index, width in enumerate(widths):
            transition: nn.Module = GenerativeBasis(z_dim + (embed_features if c_dim else 0), width)
            if index:
                transition = UpsampleLayer(before, width, resample_filter)
            geometry = (width, width * expansion, cardinalities[index], kernel_size, gain)
            made = [ResidualBlock(*geometry) for _ in range(blocks[index])]
            stages.append(GeneratorStage(transition, made, index in bf16_stages))
            before = width
        self.MainLayers = nn.ModuleList(stages)
        self.AggregationLayer = Convolution(before, img_channels, 1)
        if c_dim:
            self.EmbeddingLayer = _Weight(embed_features, c_dim, std=1 / math.sqrt(c_dim))

    def forward(self, z: torch.Tensor, c: torch.Tensor | None = None, force_fp32: bool | None = None) -> torch.Tensor:
        """Images for latents.

        Args:
            z: (N, z_dim), any float dtype.
            c: (N, c_dim), usually one-hot; ignored without classes.
            force_fp32: Run bfloat16 stages in float32. None = on a CPU only.

        Raises:
            ValueError: z or c has another shape.
        """
        x = z.to(torch.float32)
        if x.ndim != 2 or x.shape[1] != self.z_dim:
            raise ValueError(f"z is of shape {tuple(z.shape)}; expected (N, {self.z_dim})")
        if self.c_dim:
            if c is None or c.ndim != 2 or c.shape[1] != self.c_dim:
                found = "missing" if c is None else f"of shape {tuple(c.shape)}"
                raise ValueError(f"c is {found}; expected (N, {self.c_dim})")
            x = torch.cat([x, F.linear(c.to(torch.float32), self.EmbeddingLayer.weight)], dim=1)
        force_fp32 = x.device.type == "cpu" if force_fp32 is None else force_fp32
        for stage in self.MainLayers:
            x = stage(x, force_fp32)
        return self.AggregationLayer(x).to(torch.float32)
