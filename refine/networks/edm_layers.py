"""Layers of EDM's U-Nets (Karras et al. 2022), from their first weights to the residual block.

Parameters stay float32 and are cast to the activations' dtype at each call, which does nothing in float32. Module,
parameter and buffer names are those of the published checkpoints, so that their tensors fit in by name. Shape tags:
N batch, C channels, E embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from refine.torch_utils.ops.conv3x3 import conv2d
from refine.torch_utils.ops.group_norm_silu import group_norm_silu
from refine.torch_utils.ops.sum_group_norm_silu import sum_beside, sum_group_norm_silu


@dataclass(frozen=True)
class Init:
    """How a layer draws its first weights: a variance rule, and gains on top of it for weight and bias."""

    rule: str = "kaiming_normal"
    weight_gain: float = 1.0
    bias_gain: float = 0.0

    def scaled(self, gain: float) -> Init:
        """The same rule with weight and bias multiplied by ``gain``."""
        return replace(self, weight_gain=self.weight_gain * gain, bias_gain=self.bias_gain * gain)

    def weight(self, shape: Sequence[int], fan_in: int, fan_out: int) -> nn.Parameter:
        return self._draw(shape, fan_in, fan_out, self.weight_gain)

    def bias(self, shape: Sequence[int], fan_in: int, fan_out: int) -> nn.Parameter:
        return self._draw(shape, fan_in, fan_out, self.bias_gain)

    def _draw(self, shape: Sequence[int], fan_in: int, fan_out: int, gain: float) -> nn.Parameter:
        if gain == 0:
            return nn.Parameter(torch.zeros(*shape))
        family, distribution = self.rule.rsplit("_", 1)
        variance = {"xavier": 2 / (fan_in + fan_out), "kaiming": 1 / fan_in}[family]
        if distribution == "uniform":
            values = (torch.rand(*shape) * 2 - 1) * math.sqrt(3 * variance)
        else:
            values = torch.randn(*shape) * math.sqrt(variance)
        return nn.Parameter(values if gain == 1 else values * gain)


class Linear(nn.Module):
    """Fully connected layer: (..., in_features) → (..., out_features)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, init: Init = Init()):
        super().__init__()
        fans = {"fan_in": in_features, "fan_out": out_features}
        self.weight = init.weight([out_features, in_features], **fans)
        self.bias = init.bias([out_features], **fans) if bias else None

    def forward(self, x: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
        """Of gain · x, (N, in_features) where there is a gain and a bias."""
        weight = self.weight.to(x.dtype)
        if self.bias is not None and gain != 1:
            return torch.addmm(self.bias.to(x.dtype), x, weight.t(), alpha=gain)
        return F.linear(x if gain == 1 else x * gain, weight, None if self.bias is None else self.bias.to(x.dtype))


def linear_together(layers: Sequence[Linear], x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """What each of some layers with biases makes of the same x, (N, in_features), in one product of matrices.

    A product with few rows takes a GPU less time than a launch takes the processor: many layers are as fast as one.
    """
    weight = torch.cat([layer.weight for layer in layers])
    bias = torch.cat([layer.bias for layer in layers if layer.bias is not None])
    return F.linear(x, weight, bias).to(dtype).split([layer.weight.shape[0] for layer in layers], dim=1)


class Conv2d(nn.Module):
    """Convolution with zero padding and optional 2× up- or downsampling by a separable FIR filter.

    Args:
        kernel: Odd kernel size; 0 makes a weightless layer that only resamples.
        up, down: Resample by 2 (not both).
        resample_filter: Taps of the FIR filter; [1, 1] is nearest-neighbour up and 2×2 mean down.
        fused_resample: Let filter and convolution share one padding, instead of padding for each. Differs at the
            borders only.
    """

    resample_filter: torch.Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        bias: bool = True,
        up: bool = False,
        down: bool = False,
        resample_filter: Sequence[float] = (1, 1),
        fused_resample: bool = False,
        init: Init = Init(),
    ):
        if up and down:
            raise ValueError("Conv2d resamples up or down, not both.")
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.up, self.down, self.fused_resample = up, down, fused_resample
        fans = {"fan_in": in_channels * kernel**2, "fan_out": out_channels * kernel**2}
        self.weight = init.weight([out_channels, in_channels, kernel, kernel], **fans) if kernel else None
        self.bias = init.bias([out_channels], **fans) if kernel and bias else None
        self.conv_pad = kernel // 2
        self.filter_pad = (len(resample_filter) - 1) // 2
        self.box_filter = list(resample_filter) == [1, 1]
        taps = torch.as_tensor(resample_filter, dtype=torch.float32)
        kernel_2d = taps.outer(taps)[None, None] / taps.sum() ** 2 if up or down else None
        self.register_buffer("resample_filter", kernel_2d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [N C_in H W] → [N C_out H' W']
        conv_pad, filter_pad = self.conv_pad, self.filter_pad
        if self.fused_resample and self.down:  # the filter sums to 1, so the bias may be added ahead of it
            return self._resample(self._conv(x, conv_pad + filter_pad), 0)
        if self.fused_resample and self.up:
            return self._conv(self._resample(x, max(filter_pad - conv_pad, 0)), max(conv_pad - filter_pad, 0))
        if self.up or self.down:
            x = self._resample(x, filter_pad)
        return x if self.weight is None else self._conv(x, conv_pad)

    def _conv(self, x: torch.Tensor, padding: int) -> torch.Tensor:
        assert self.weight is not None  # a weightless layer only resamples
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return conv2d(x, self.weight.to(x.dtype), bias, padding=padding)

    def _resample(self, x: torch.Tensor, padding: int) -> torch.Tensor:
        if self.box_filter and padding == 0:  # the same numbers as below, several times faster on a CPU
            return F.interpolate(x, scale_factor=2, mode="nearest") if self.up else F.avg_pool2d(x, 2)
        depthwise = self.resample_filter.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        if self.up:  # × 4: three of four inputs are inserted zeros
            return F.conv_transpose2d(x, depthwise * 4, groups=x.shape[1], stride=2, padding=padding)
        return F.conv2d(x, depthwise, groups=x.shape[1], stride=2, padding=padding)


class QKV(Conv2d):
    """The 1×1 convolution to queries, keys and values, which the published weights have in turns, see `thirds`."""

    def by_pixel(self, x: torch.Tensor, num_heads: int, given: Pointwise | None = None) -> torch.Tensor:
        """(N, C, H, W) → (N, H·W, 3, heads, c), see the function of that name; `given` is of `sorted_together`."""
        if given is None and x.is_contiguous():  # what is copied anyway is sorted there
            return self(x).flatten(2).unflatten(1, (num_heads, -1, 3)).permute(0, 4, 3, 1, 2).contiguous()
        weight, bias = given or sorted_together([self], x.dtype)[0]
        if x.is_contiguous():
            y = torch.baddbmm(bias, x.flatten(2).mT, weight.flatten(1).mT.expand(x.shape[0], -1, -1))
            return y.unflatten(2, (3, num_heads, -1))
        return by_pixel(conv2d(x, weight, bias), num_heads)


Pointwise: TypeAlias = tuple[torch.Tensor, torch.Tensor]  # weight (O, I, 1, 1) and bias (O,)


def sorted_together(layers: Sequence[QKV], dtype: torch.dtype) -> list[Pointwise]:
    """Weights of some layers in the order of `thirds`; those of one size are sorted in one operator."""
    found: dict[int, Pointwise] = {}
    for size in {layer.out_channels: None for layer in layers}:
        some = [index for index, layer in enumerate(layers) if layer.out_channels == size]
        weights, biases = (
            torch.stack([getattr(layers[index], name).to(dtype) for index in some])
            .unflatten(1, (-1, 3))
            .transpose(1, 2)
            .flatten(1, 2)
            .unbind()
            for name in ("weight", "bias")
        )
        found |= zip(some, zip(weights, biases, strict=True), strict=True)
    return [found[index] for index in range(len(layers))]


def as_products(x: torch.Tensor) -> bool:
    """Whether a GPU is to compute 1×1 convolutions around attention as products of matrices, which read and write
    pixels of either layout: nothing is copied then. Backward they would be four operators, a convolution is one."""
    return x.is_contiguous() and x.device.type != "cpu" and not torch.is_grad_enabled()


class GroupNorm(nn.Module):
    """Group normalisation with at least four channels in a group and at most 32 groups."""

    def __init__(self, num_channels: int, eps: float = 1e-5):
        super().__init__()
        self.num_groups, self.eps = min(32, num_channels // 4), eps
        if self.num_groups == 0 or num_channels % self.num_groups:
            raise ValueError(
                f"{num_channels} channels cannot be normalised in groups, expected a multiple of 4 (of 32 from 128 on)."
            )
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, silu=False)


class GroupNormSilu(GroupNorm):
    """Group normalisation and silu. An embedding, (N, C), comes in ahead (`before`) or in between (`scale`, `shift`).

    `before` may be added in place, so x has to be a convolution's own output then, which its gradient does not need.
    """

    def forward(
        self,
        x: torch.Tensor,
        before: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, before, scale, shift, inplace=True)


class Sum:
    """Images in the making: (x + y) · scale, and the channels that a decoder puts beside it, all (N, C, H, W).

    The norm that comes next makes the sum on its way, on a GPU in the same pass over memory. Whoever wants it, wants it
    after that norm or instead of it: asking for `total` before costs a pass more.

    Args: see `sum_group_norm_silu`.
    """

    def __init__(
        self, x: torch.Tensor, y: torch.Tensor | None = None, scale: float = 1.0, beside: torch.Tensor | None = None
    ):
        self.channels = x.shape[1] + (0 if beside is None else beside.shape[1])
        self._terms: tuple | None = (x, y, beside, scale)  # until they are added up
        self._total: torch.Tensor | None = None

    def with_beside(self, other: Sum) -> Sum:
        """The same with another one's channels behind its own."""
        if self._terms is None:
            return Sum(self.total, beside=other.total)
        x, y, _, scale = self._terms
        return Sum(x, y, scale, other.total)

    @property
    def total(self) -> torch.Tensor:
        if self._terms is not None:
            self._total, self._terms = sum_beside(*self._terms), None
        assert self._total is not None
        return self._total

    def normed(self, norm: Any) -> torch.Tensor:
        """What a `GroupNorm` makes of it."""
        if self._terms is None:
            return norm(self.total)
        x, y, beside, scale = self._terms
        silu, self._terms = isinstance(norm, GroupNormSilu), None
        self._total, normed = sum_group_norm_silu(
            x, y, beside, norm.num_groups, norm.weight, norm.bias, norm.eps, scale, silu
        )
        return normed


class PositionalEmbedding(nn.Module):
    """Noise level as cosines and sines of geometrically spaced frequencies, 1 to 1/max_positions.

    (N,) → (N, num_channels), the cosines first.

    Args:
        endpoint: Whether the lowest frequency is reached exactly (DDPM++) or would be the next one (ADM).
    """

    def __init__(self, num_channels: int, max_positions: int = 10_000, endpoint: bool = False):
        super().__init__()
        self.num_channels, self.max_positions, self.endpoint = num_channels, max_positions, endpoint

    def angles(self, x: torch.Tensor) -> torch.Tensor:
        half = self.num_channels // 2
        exponents = torch.arange(half, dtype=torch.float32, device=x.device) / (half - self.endpoint)
        return x.outer(((1 / self.max_positions) ** exponents).to(x.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = self.angles(x)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """Noise level as cosines and sines of fixed random frequencies (NCSN++): (N,) → (N, num_channels)."""

    freqs: torch.Tensor

    def __init__(self, num_channels: int, scale: float = 16):
        super().__init__()
        self.register_buffer("freqs", torch.randn(num_channels // 2) * scale)

    def angles(self, x: torch.Tensor) -> torch.Tensor:
        return x.outer((2 * math.pi * self.freqs).to(x.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = self.angles(x)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class UNetBlock(nn.Module):
    """Residual block of all the U-Nets: norm–silu–conv twice, noise embedding in the middle, optional self-attention.

    Args:
        in_channels, out_channels, emb_channels: Widths of input, output and embedding.
        up, down: Resample by 2 inside the first convolution and on the skip path.
        attention: Add a self-attention layer.
        num_heads: Attention heads; None derives them from ``channels_per_head``. With 0 heads (out_channels narrower
            than one head) the attention layers do not exist at all.
        skip_scale: Factor on every residual sum; √½ keeps the variance.
        eps: Added to the variance in the group normalisations.
        resample_filter: See `Conv2d`.
        resample_proj: Give resampled skips a 1×1 convolution even where the width stays the same.
        adaptive_scale: Embedding scales and shifts after norm1 (ADM) instead of being added ahead of it (Song).
        init, init_zero, init_attn: First weights of the layers in general, of those that close a residual branch,
            and of qkv.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
        num_heads: int | None = None,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
        resample_filter: Sequence[float] = (1, 1),
        resample_proj: bool = False,
        adaptive_scale: bool = True,
        init: Init = Init(),
        init_zero: Init = Init(weight_gain=0.0),
        init_attn: Init | None = None,
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.dropout, self.skip_scale, self.adaptive_scale = dropout, skip_scale, adaptive_scale
        if num_heads is None:
            num_heads = out_channels // channels_per_head
        self.num_heads = num_heads if attention else 0
        resample: dict[str, Any] = {"up": up, "down": down, "resample_filter": resample_filter}

        self.norm0 = GroupNormSilu(in_channels, eps)
        self.conv0 = Conv2d(in_channels, out_channels, kernel=3, init=init, **resample)
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1), init=init)
        self.norm1 = GroupNormSilu(out_channels, eps)
        self.conv1 = Conv2d(out_channels, out_channels, kernel=3, init=init_zero)
        self.skip = None
        if in_channels != out_channels or up or down:
            kernel = 1 if resample_proj or in_channels != out_channels else 0
            self.skip = Conv2d(in_channels, out_channels, kernel=kernel, init=init, **resample)
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, eps)
            self.qkv = QKV(out_channels, out_channels * 3, kernel=1, init=init_attn or init)
            self.proj = Conv2d(out_channels, out_channels, kernel=1, init=init_zero)

    def forward(
        self,
        x: Any,
        emb: torch.Tensor | None,
        params: torch.Tensor | None = None,
        qkv: Pointwise | None = None,
    ) -> Any:
        """[N C_in H W], [N E] → [N C_out H' W'].

        A `Sum` becomes a `Sum`. `params` is what `affine` makes of the embedding, which is not needed then, see
        `linear_together`; `qkv` is of `sorted_together`.
        """
        if not isinstance(x, Sum):
            return self.forward(Sum(x), emb, params, qkv).total
        h = self.conv0(x.normed(self.norm0))
        params = self.affine(emb) if params is None else params
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            h = self.norm1(h, scale=scale, shift=shift)
        else:
            h = self.norm1(h, before=params)
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        result = Sum(h, x.total if self.skip is None else self.skip(x.total), self.skip_scale)
        if self.num_heads:
            h = self._attention(result.normed(self.norm2), qkv)
            result = Sum(h, result.total, self.skip_scale)
        return result

    def _attention(self, x: torch.Tensor, qkv: Pointwise | None) -> torch.Tensor:  # [N C H W] → [N C H W]
        y = scaled_dot_product(*split_heads(self.qkv.by_pixel(x, self.num_heads, qkv)))
        if not as_products(x):
            return self.proj(merge_heads(y, like=x))
        assert self.proj.weight is not None and self.proj.bias is not None
        weight, bias = self.proj.weight.to(x.dtype), self.proj.bias.to(x.dtype)
        pixels = y.permute(0, 3, 1, 2).flatten(2)  # as attention writes them
        y = torch.baddbmm(bias[:, None], weight.flatten(1).expand(x.shape[0], -1, -1), pixels.mT)
        return y.unflatten(2, x.shape[2:])


def thirds(weight: torch.Tensor) -> torch.Tensor:
    """Rows q0 k0 v0 q1 k1 v1 …, as in the published weights, to q0 q1 … k0 k1 … v0 v1 …; shape (3C, ...).

    With them a convolution gives what attention takes; else its output, which is much larger, would be sorted.
    """
    return torch.cat(weight.unflatten(0, (-1, 3)).unbind(1))


def by_pixel(qkv: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Queries, keys and values, (N, 3C, H, W), as (N, H·W, 3, heads, c) with c = C / heads; dense.

    They lie so in memory already where `qkv` is channels_last.
    """
    n, _, height, width = qkv.shape
    return qkv.permute(0, 2, 3, 1).reshape(n, height * width, 3, num_heads, -1).contiguous()


def split_heads(pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(N, H·W, 3, heads, c) → queries, keys and values (N, heads, c, H·W), views with the c numbers side by side."""
    return tuple(part.permute(0, 2, 3, 1) for part in pixels.unbind(2))


def merge_heads(y: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(N, heads, c, H·W) → (N, heads · c, H, W), with the height, width and memory format of `like`."""
    n, heads, c, _ = y.shape
    height, width = like.shape[2:]
    if like.is_contiguous():
        return y.reshape(n, heads * c, height, width).contiguous()
    return y.permute(0, 3, 1, 2).reshape(n, height, width, heads * c).contiguous().permute(0, 3, 1, 2)  # channels_last


def scaled_dot_product(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention over the last axis: softmax(qᵀk / √c) over the keys, applied to v. Shapes (N, heads, c, HW).

    torch's fused attention takes (N, heads, HW, c), on a GPU with the c numbers side by side only; what lies otherwise
    is copied.
    """
    q, k, v = (x.mT if x.stride(-2) == 1 else x.mT.contiguous() for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).mT
