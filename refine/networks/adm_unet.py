"""The U-Net of guided-diffusion (Dhariwal & Nichol 2021) and consistency_models, under the names of their files.

It is the network that EDM calls `DhariwalUNet`, in all the variants that exist as files: attention heads by number or
by width, two layouts of q, k and v, resampling inside residual blocks or by plain convolutions, embeddings that scale
and shift or are added. Shape tags: N batch, C channels, E embedding, L label_dim, R resolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from refine.networks.attention import scaled_dot_product
from refine.networks.bases import check_choice
from refine.networks.edm_layers import Conv2d, Init, Linear
from refine.torch_utils.ops.conv3x3 import conv2d
from refine.torch_utils.ops.group_norm_silu import group_norm_silu

GROUPS, EPS = 32, 1e-5  # of every normalisation, whatever its width
QKV_ORDERS = ("heads", "thirds")
_ZERO = Init(weight_gain=0.0)  # of layers that close a residual branch


class Norm(nn.Module):
    """Group normalisation in 32 groups, as it is or followed by a silu."""

    def __init__(self, num_channels: int):
        super().__init__()
        if num_channels % GROUPS:
            raise ValueError(f"{num_channels} channels cannot be normalised in {GROUPS} groups.")
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return group_norm_silu(x, GROUPS, self.weight, self.bias, EPS, silu=False)

    def silu(
        self, x: torch.Tensor, before: torch.Tensor | None = None, scale: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """The normalised x after a silu; an embedding (N, C) comes in ahead (`before`) or between (`scale`, `shift`).

        `before` may be added in place, so x has to be a convolution's own output then.
        """
        return group_norm_silu(x, GROUPS, self.weight, self.bias, EPS, before, scale, shift, inplace=True)


class PointConv(nn.Module):
    """A 1×1 convolution whose weight has as many axes of size 1 as the files have: one or two."""

    def __init__(self, in_channels: int, out_channels: int, axes: int, init: Init):
        super().__init__()
        fans = {"fan_in": in_channels, "fan_out": out_channels}
        self.weight = init.weight([out_channels, in_channels, *[1] * axes], **fans)
        self.bias = init.bias([out_channels], **fans)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.reshape(*self.weight.shape[:2], 1, 1)
        return conv2d(x, weight.to(x.dtype), self.bias.to(x.dtype))


class Attention(nn.Module):
    """Residual self-attention over all pixels.

    Args:
        channels: Width.
        num_heads: Attention heads; divides the width.
        qkv_order: How the 3C channels of qkv are laid out: 'heads' = for each head q, then k, then v; 'thirds' = the q
            of all heads, then all k, then all v.
        axes: Of the weights, see `PointConv`.
    """

    def __init__(self, channels: int, num_heads: int, qkv_order: str, axes: int):
        super().__init__()
        self.num_heads, self.qkv_order = num_heads, qkv_order
        self.norm = Norm(channels)
        self.qkv = PointConv(channels, 3 * channels, axes, Init())
        self.proj_out = PointConv(channels, channels, axes, _ZERO)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [N C H W] → [N C H W]
        n, _, height, width = x.shape
        qkv = self.qkv(self.norm(x))
        if self.qkv_order == "thirds":
            q, k, v = qkv.reshape(n, 3, self.num_heads, -1, height * width).unbind(1)
        else:
            q, k, v = qkv.reshape(n, self.num_heads, 3, -1, height * width).unbind(2)
        return x + self.proj_out(scaled_dot_product(q, k, v).reshape(n, -1, height, width))


class ResBlock(nn.Module):
    """Residual block: norm–silu–conv twice, with the embedding in the middle.

    Args:
        in_channels, out_channels, emb_channels: Widths of input, output and embedding.
        resample: 'up' or 'down' by 2 between the first silu and the first convolution, and on the skip path; 'keep'.
        scale_shift: The embedding scales and shifts after the second norm; otherwise it is added ahead of it.
        dropout: In train mode, before the second convolution.
    """

    def __init__(
        self, in_channels: int, out_channels: int, emb_channels: int, resample: str, scale_shift: bool, dropout: float
    ):
        super().__init__()
        self.resample, self.scale_shift, self.dropout = resample, scale_shift, dropout
        self.in_layers = nn.ModuleDict({"0": Norm(in_channels), "2": Conv2d(in_channels, out_channels, 3)})
        self.emb_layers = nn.ModuleDict({"1": Linear(emb_channels, out_channels * (2 if scale_shift else 1))})
        self.out_layers = nn.ModuleDict(
            {"0": Norm(out_channels), "3": Conv2d(out_channels, out_channels, 3, init=_ZERO)}
        )
        self.skip_connection = None if in_channels == out_channels else Conv2d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:  # [N C H W], [N E], after its silu
        norm0: Any = self.in_layers["0"]
        norm1: Any = self.out_layers["0"]
        h = self.in_layers["2"](_resampled(norm0.silu(x), self.resample))
        params = self.emb_layers["1"](emb)
        if self.scale_shift:
            scale, shift = params.chunk(2, dim=1)
            h = norm1.silu(h, scale=scale, shift=shift)
        else:
            h = norm1.silu(h, before=params)
        h = self.out_layers["3"](F.dropout(h, self.dropout, self.training))
        x = _resampled(x, self.resample)
        return h.add_(x if self.skip_connection is None else self.skip_connection(x))  # a convolution's own output


def _resampled(x: torch.Tensor, resample: str) -> torch.Tensor:
    if resample == "down":
        return F.avg_pool2d(x, 2)
    return F.interpolate(x, scale_factor=2, mode="nearest") if resample == "up" else x


class LabelTable(nn.Module):
    """An embedding for each class: indices (N,) → (N, E)."""

    def __init__(self, label_dim: int, emb_channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(label_dim, emb_channels))

    def forward(self, classes: torch.Tensor) -> torch.Tensor:
        return F.embedding(classes, self.weight)


class Downsample(nn.Module):
    """A 3×3 convolution at every second pixel."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = Conv2d(channels, channels, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.op.weight is not None and self.op.bias is not None  # it has a kernel
        return F.conv2d(x, self.op.weight.to(x.dtype), self.op.bias.to(x.dtype), stride=2, padding=1)


class Upsample(nn.Module):
    """Every pixel four times, then a 3×3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(_resampled(x, "up"))


class Stage(nn.Sequential):
    """An entry of the ladder; residual blocks among its layers are given the embedding, too."""

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class ADMUNet(nn.Module):
    """The raw network F.

    Args:
        img_resolution, img_channels: Size of the images.
        label_dim: Number of classes, 0 = unconditional.
        model_channels: Width C of the embedding of time, before its two layers.
        widths: Channels of each resolution level, from fine to coarse.
        num_blocks: Residual blocks per level (the decoder has one more).
        attention_levels: Indices of the levels with self-attention; the middle has it anyway.
        learn_sigma: The output has twice the channels; the second half is about the variance.
        num_heads, num_heads_upsample: Attention heads, and those of the decoder (None = the same).
        num_head_channels: Channels of a head, from which their number follows; None = by `num_heads`.
        qkv_order: See `Attention`.
        qkv_axes: Of the attention's weights, see `PointConv`.
        scale_shift: See `ResBlock`.
        residual_resampling: Resample inside residual blocks; otherwise by plain convolutions.
        dropout: Inside the blocks, in train mode.

    Raises:
        ValueError: the sizes do not go together.
    """

    freqs: torch.Tensor

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        model_channels: int = 256,
        widths: Sequence[int] = (256, 256, 512, 512, 1024, 1024),
        num_blocks: int = 2,
        attention_levels: Sequence[int] = (3, 4, 5),
        learn_sigma: bool = True,
        num_heads: int = 1,
        num_heads_upsample: int | None = None,
        num_head_channels: int | None = 64,
        qkv_order: str = "heads",
        qkv_axes: int = 1,
        scale_shift: bool = True,
        residual_resampling: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        check_choice("qkv_order", qkv_order, QKV_ORDERS)
        if img_resolution % (divisor := 1 << len(widths) - 1):
            raise ValueError(f"img_resolution is {img_resolution}, expected a multiple of {divisor}.")
        if model_channels % 2 or qkv_axes not in (1, 2):
            raise ValueError(f"model_channels is {model_channels} and qkv_axes {qkv_axes}, expected even, and 1 or 2.")
        self.num_blocks, self.levels, emb_channels = num_blocks, len(widths), 4 * model_channels
        freqs = torch.arange(model_channels // 2, dtype=torch.float32, device="cpu")
        self.register_buffer("freqs", (freqs * (-math.log(10_000) / (model_channels // 2))).exp(), persistent=False)

        def block(c_in: int, c_out: int, resample: str = "keep") -> ResBlock:
            return ResBlock(c_in, c_out, emb_channels, resample, scale_shift, dropout)

        def attention(channels: int, heads: int) -> Attention:
            heads = channels // num_head_channels if num_head_channels else heads
            if heads < 1 or channels % heads or (num_head_channels and channels % num_head_channels):
                what = f"heads of {num_head_channels} channels" if num_head_channels else f"{heads} heads"
                raise ValueError(f"a layer of {channels} channels cannot have {what}.")
            return Attention(channels, heads, qkv_order, qkv_axes)

        def resampler(channels: int, resample: str) -> nn.Module:
            if residual_resampling:
                return block(channels, channels, resample)
            return Downsample(channels) if resample == "down" else Upsample(channels)

        def stage(c_in: int, c_out: int, level: int, heads: int, *more: nn.Module) -> Stage:
            attends = [attention(c_out, heads)] if level in attention_levels else []
            return Stage(block(c_in, c_out), *attends, *more)

        self.time_embed = nn.ModuleDict(
            {"0": Linear(model_channels, emb_channels), "2": Linear(emb_channels, emb_channels)}
        )
        self.label_emb = LabelTable(label_dim, emb_channels) if label_dim else None
        width = widths[0]
        stages, skips = [Stage(Conv2d(img_channels, width, 3))], [width]
        for level, level_width in enumerate(widths):
            for _ in range(num_blocks):
                stages.append(stage(width, level_width, level, num_heads))
                width = level_width
                skips.append(width)
            if level < len(widths) - 1:
                stages.append(Stage(resampler(width, "down")))
                skips.append(width)
        self.input_blocks = nn.ModuleList(stages)
        self.middle_block = Stage(block(width, width), attention(width, num_heads), block(width, width))
        stages, heads = [], num_heads_upsample or num_heads
        for level, level_width in reversed(list(enumerate(widths))):
            for index in range(num_blocks + 1):
                up = [resampler(level_width, "up")] if level and index == num_blocks else []
                stages.append(stage(width + skips.pop(), level_width, level, heads, *up))
                width = level_width
        self.output_blocks = nn.ModuleList(stages)
        out_channels = img_channels * (2 if learn_sigma else 1)
        self.out = nn.ModuleDict({"0": Norm(width), "2": Conv2d(width, out_channels, 3, init=_ZERO)})

    def forward(self, x: torch.Tensor, time: torch.Tensor, classes: torch.Tensor | None) -> torch.Tensor:
        """Scaled images [N C R R], times [N] or [1], indices of classes [N], [1] or None → [N C_out R R].

        The embedding is computed in float32, everything else in the dtype of x.
        """
        angles = time.outer(self.freqs)
        emb = torch.cat([angles.cos(), angles.sin()], dim=1)
        emb = self.time_embed["2"](F.silu(self.time_embed["0"](emb)))
        if self.label_emb is not None:
            emb = emb + self.label_emb(classes)
        emb = F.silu(emb)
        skips: list[torch.Tensor] = []
        for stage in self.input_blocks:
            x = stage(x, emb)
            skips.append(x)
        x = self.middle_block(x, emb)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, skips.pop()], dim=1), emb)
        norm: Any = self.out["0"]
        return self.out["2"](norm.silu(x))

    def ends_of_encoder(self) -> list[nn.Module]:
        """The last entry of each resolution of the encoder, from fine to coarse."""
        per_level = self.num_blocks + 1
        return [self.input_blocks[level * per_level + self.num_blocks] for level in range(self.levels)]
