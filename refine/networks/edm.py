"""Diffusion networks of EDM (Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022).

From the inside out: small layers → ``UNetBlock`` → a U-Net F (``SongUNet`` for DDPM++ and NCSN++, ``DhariwalUNet``
for ADM) → a preconditioning, which wraps F into a denoiser D that works at every noise level (EDM, eq. 7):

    D(x; sigma) = c_skip(sigma) · x + c_out(sigma) · F(c_in(sigma) · x, c_noise(sigma))

Module, parameter and buffer names are those of the published checkpoints, so that their tensors fit in by name.
Shape tags: N batch, C channels, R resolution, E embedding, L label_dim.
"""

from __future__ import annotations

import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from refine.torch_utils.ops.conv3x3 import conv2d
from refine.torch_utils.ops.group_norm_silu import group_norm_silu

# ---------------------------------------------------------------------------------------------------------------------
# Initialisation


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
        return nn.Parameter(values * gain)


# ---------------------------------------------------------------------------------------------------------------------
# Small layers. Parameters stay float32 and are cast to the activations' dtype at each call (a no-op in float32).


class Linear(nn.Module):
    """Fully connected layer: (..., in_features) → (..., out_features)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, init: Init = Init()):
        super().__init__()
        fans = {"fan_in": in_features, "fan_out": out_features}
        self.weight = init.weight([out_features, in_features], **fans)
        self.bias = init.bias([out_features], **fans) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Conv2d(nn.Module):
    """Convolution with zero padding and optional 2× up- or downsampling by a separable FIR filter.

    Args:
        kernel: Odd kernel size; 0 makes a weightless layer that only resamples.
        up, down: Resample by 2 (not both).
        resample_filter: Taps of the FIR filter; [1, 1] is nearest-neighbour up and 2×2 mean down.
        fused_resample: Let filter and convolution share one padding, instead of padding for each. Differs at the
            borders only.
    """

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
        kernel_2d = taps.outer(taps)[None, None] / taps.sum() ** 2
        self.register_buffer("resample_filter", kernel_2d if up or down else None)

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
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return conv2d(x, self.weight.to(x.dtype), bias, padding=padding)

    def _resample(self, x: torch.Tensor, padding: int) -> torch.Tensor:
        if self.box_filter and padding == 0:  # the same numbers as below, several times faster on a CPU
            return F.interpolate(x, scale_factor=2, mode="nearest") if self.up else F.avg_pool2d(x, 2)
        depthwise = self.resample_filter.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        if self.up:  # × 4: three of four inputs are inserted zeros
            return F.conv_transpose2d(x, depthwise * 4, groups=x.shape[1], stride=2, padding=padding)
        return F.conv2d(x, depthwise, groups=x.shape[1], stride=2, padding=padding)


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
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


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
        embedding = {"before": before, "scale": scale, "shift": shift}
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, **embedding, inplace=True)


class PositionalEmbedding(nn.Module):
    """Noise level as cosines and sines of geometrically spaced frequencies, 1 to 1/max_positions.

    (N,) → (N, num_channels), the cosines first.

    Args:
        endpoint: Whether the lowest frequency is reached exactly (DDPM++) or would be the next one (ADM).
    """

    def __init__(self, num_channels: int, max_positions: int = 10_000, endpoint: bool = False):
        super().__init__()
        self.num_channels, self.max_positions, self.endpoint = num_channels, max_positions, endpoint

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = self.num_channels // 2
        exponents = torch.arange(half, dtype=torch.float32, device=x.device) / (half - self.endpoint)
        angles = x.outer(((1 / self.max_positions) ** exponents).to(x.dtype))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """Noise level as cosines and sines of fixed random frequencies (NCSN++): (N,) → (N, num_channels)."""

    def __init__(self, num_channels: int, scale: float = 16):
        super().__init__()
        self.register_buffer("freqs", torch.randn(num_channels // 2) * scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = x.outer((2 * math.pi * self.freqs).to(x.dtype))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Residual block


class UNetBlock(nn.Module):
    """Residual block of all the U-Nets: norm–silu–conv twice, noise embedding in the middle, optional self-attention.

    Args:
        in_channels, out_channels, emb_channels: Widths of input, output and embedding.
        up, down: Resample by 2 inside the first convolution and on the skip path.
        attention: Add a self-attention layer.
        num_heads: Attention heads; None derives them from ``channels_per_head``. With 0 heads (out_channels narrower
            than one head) the attention layers do not exist at all.
        skip_scale: Factor on every residual sum; √½ keeps the variance.
        eps: Of the group normalisations.
        resample_filter: See `Conv2d`.
        resample_proj: Give resampled skips a 1×1 convolution even where the width stays the same.
        adaptive_scale: Embedding scales and shifts after norm1 (ADM) instead of being added ahead of it (Song).
        init, init_zero, init_attn: Of the layers in general, those that close a residual branch, and qkv.
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
        resample = {"up": up, "down": down, "resample_filter": resample_filter}

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
            self.qkv = Conv2d(out_channels, out_channels * 3, kernel=1, init=init_attn or init)
            self.proj = Conv2d(out_channels, out_channels, kernel=1, init=init_zero)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:  # [N C_in H W], [N E] → [N C_out H' W']
        h = self.conv0(self.norm0(x))
        params = self.affine(emb)
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            h = self.norm1(h, scale=scale, shift=shift)
        else:
            h = self.norm1(h, before=params)
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        h = self._residual(h, x if self.skip is None else self.skip(x))
        if self.num_heads:
            h = self._residual(self.proj(self._attention(self.qkv(self.norm2(h)))), h)
        return h

    def _residual(self, branch: torch.Tensor, trunk: torch.Tensor) -> torch.Tensor:
        total = branch.add_(trunk)  # in place: branch is a convolution's output, which its gradient does not need
        return total if self.skip_scale == 1 else total.mul_(self.skip_scale)

    def _attention(self, qkv: torch.Tensor) -> torch.Tensor:  # [N 3C H W] → [N C H W]
        n, _, height, width = qkv.shape
        # Within a head the channels run q0 k0 v0 q1 k1 v1 …: that is how the published weights are laid out.
        q, k, v = qkv.reshape(n, self.num_heads, -1, 3, height * width).unbind(3)  # [N heads c HW]
        return scaled_dot_product(q, k, v).reshape(n, -1, height, width)


def scaled_dot_product(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention over the last axis: softmax(qᵀk / √c) over the keys, applied to v. Shapes (N, heads, c, HW)."""
    return F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT


# ---------------------------------------------------------------------------------------------------------------------
# U-Nets


class _UNet(nn.Module):
    """What the two U-Nets share: the ladder of blocks. They add embedding, auxiliary paths and output."""

    def __init__(self, img_resolution: int, label_dim: int, augment_dim: int, label_dropout: float):
        super().__init__()
        self.img_resolution, self.label_dim, self.augment_dim = img_resolution, label_dim, augment_dim
        self.label_dropout = label_dropout

    def _build_encoder(
        self, in_channels: int, stem_channels: int, widths: Sequence[int], num_blocks: int,
        attn_resolutions: Sequence[int], block: Callable[..., UNetBlock], init: Init,
    ) -> list[int]:  # fmt: skip
        """Make ``self.enc``; returns the widths of the feature maps that it hands to the decoder, in order."""
        if self.img_resolution % (divisor := 1 << len(widths) - 1):
            raise ValueError(f"img_resolution is {self.img_resolution}, expected a multiple of {divisor}.")
        self.enc = nn.ModuleDict()
        width, skips = stem_channels, []
        for level, level_width in enumerate(widths):
            res = self.img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = Conv2d(in_channels, width, kernel=3, init=init)
            else:
                self.enc[f"{res}x{res}_down"] = block(width, width, down=True)
                self._add_encoder_aux(f"{res}x{res}", width)
            skips.append(width)
            for index in range(num_blocks):
                self.enc[f"{res}x{res}_block{index}"] = block(width, level_width, attention=res in attn_resolutions)
                width = level_width
                skips.append(width)
        return skips

    def _build_decoder(
        self, skips: list[int], widths: Sequence[int], num_blocks: int,
        attend: Callable[[int, int], bool], block: Callable[..., UNetBlock],
    ) -> int:  # fmt: skip
        """Make ``self.dec``; ``attend(res, index)`` says which blocks have attention. Returns the last width."""
        self.dec = nn.ModuleDict()
        width = skips[-1]
        for level, level_width in reversed(list(enumerate(widths))):
            res = self.img_resolution >> level
            if level == len(widths) - 1:
                self.dec[f"{res}x{res}_in0"] = block(width, width, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(width, width)
            else:
                self.dec[f"{res}x{res}_up"] = block(width, width, up=True)
            for index in range(num_blocks + 1):
                attention = attend(res, index)
                self.dec[f"{res}x{res}_block{index}"] = block(width + skips.pop(), level_width, attention=attention)
                width = level_width
            self._add_decoder_aux(level, f"{res}x{res}", width)
        return width

    def _add_encoder_aux(self, prefix: str, width: int) -> None:
        """Hook behind each ``_down`` entry."""

    def _add_decoder_aux(self, level: int, prefix: str, width: int) -> None:
        """Hook behind the blocks of each decoder level."""

    def _drop_labels(self, class_labels: torch.Tensor) -> torch.Tensor:
        """In train mode, blank whole label rows at the rate ``label_dropout``."""
        if not (self.training and self.label_dropout):
            return class_labels
        keep = torch.rand(class_labels.shape[0], 1, device=class_labels.device) >= self.label_dropout
        return class_labels * keep.to(class_labels.dtype)


class SongUNet(_UNet):
    """U-Net of Song et al. (2021): DDPM++ and NCSN++, as re-implemented for EDM (configurations B–F, except ADM).

    DDPM++ is the default; NCSN++ is ``embedding_type='fourier', channel_mult_noise=2, encoder_type='residual',
    resample_filter=[1, 3, 3, 1]``.

    Args:
        img_resolution: Side of the square images.
        in_channels, out_channels: Of the images.
        label_dim: Width of one-hot class labels, 0 = unconditional.
        augment_dim: Width of augmentation labels, 0 = none.
        model_channels: Base width C.
        channel_mult: Width of each resolution level, in multiples of C, from fine to coarse.
        channel_mult_emb: Width of the embedding, in multiples of C.
        num_blocks: Residual blocks per level (the decoder has one more).
        attn_resolutions: Resolutions with self-attention.
        dropout: Inside the blocks, in train mode.
        label_dropout: Rate at which labels are blanked in train mode, for guidance.
        embedding_type: 'positional' (DDPM++) or 'fourier' (NCSN++).
        channel_mult_noise: Width of the noise embedding, in multiples of C.
        encoder_type: 'standard' (DDPM++), 'residual' (NCSN++) or 'skip'.
        decoder_type: 'standard' or 'skip'.
        resample_filter: [1, 1] (DDPM++) or [1, 3, 3, 1] (NCSN++).

    Raises:
        ValueError: If one of the three types is unknown.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ):
        _check_choice("embedding_type", embedding_type, ("positional", "fourier"))
        _check_choice("encoder_type", encoder_type, ("standard", "skip", "residual"))
        _check_choice("decoder_type", decoder_type, ("standard", "skip"))
        super().__init__(img_resolution, label_dim, augment_dim, label_dropout)
        self.encoder_type, self.decoder_type, self.resample_filter = encoder_type, decoder_type, resample_filter
        self.out_channels, self.aux_channels = out_channels, in_channels
        self.init = Init("xavier_uniform")
        emb_channels, noise_channels = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        block = functools.partial(
            UNetBlock, emb_channels=emb_channels, num_heads=1, dropout=dropout, skip_scale=math.sqrt(0.5), eps=1e-6,
            resample_filter=resample_filter, resample_proj=True, adaptive_scale=False,
            init=self.init, init_zero=self.init.scaled(1e-5), init_attn=self.init.scaled(math.sqrt(0.2)),
        )  # fmt: skip

        fourier = embedding_type == "fourier"
        embedding = FourierEmbedding(noise_channels) if fourier else PositionalEmbedding(noise_channels, endpoint=True)
        self.map_noise = embedding
        self.map_label = Linear(label_dim, noise_channels, init=self.init) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False, init=self.init) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels, init=self.init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=self.init)

        widths = [model_channels * mult for mult in channel_mult]
        skips = self._build_encoder(
            in_channels, model_channels, widths, num_blocks, attn_resolutions, block, self.init
        )  # the stem is C wide, whatever channel_mult[0] says
        self._build_decoder(
            skips, widths, num_blocks, lambda res, index: index == num_blocks and res in attn_resolutions, block
        )

    def _add_encoder_aux(self, prefix: str, width: int) -> None:
        resample = {"down": True, "resample_filter": self.resample_filter, "init": self.init}
        if self.encoder_type == "skip":
            self.enc[f"{prefix}_aux_down"] = Conv2d(self.aux_channels, self.aux_channels, kernel=0, **resample)
            self.enc[f"{prefix}_aux_skip"] = Conv2d(self.aux_channels, width, kernel=1, init=self.init)
        elif self.encoder_type == "residual":
            conv = Conv2d(self.aux_channels, width, kernel=3, fused_resample=True, **resample)
            self.enc[f"{prefix}_aux_residual"] = conv
            self.aux_channels = width

    def _add_decoder_aux(self, level: int, prefix: str, width: int) -> None:
        if level > 0 and self.decoder_type != "skip":
            return
        if f"{prefix}_in0" not in self.dec and self.decoder_type == "skip":  # the deepest level has no image to enlarge
            up = Conv2d(self.out_channels, self.out_channels, kernel=0, up=True, resample_filter=self.resample_filter)
            self.dec[f"{prefix}_aux_up"] = up
        self.dec[f"{prefix}_aux_norm"] = GroupNormSilu(width, eps=1e-6)
        self.dec[f"{prefix}_aux_conv"] = Conv2d(width, self.out_channels, kernel=3, init=self.init.scaled(1e-5))

    def forward(
        self,
        x: torch.Tensor,
        noise_labels: torch.Tensor,
        class_labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The raw network F: images [N C R R], c_noise [N] or [1], labels [N L], augmentation [N A] → [N C_out R R]."""
        emb = self._embed(noise_labels, class_labels, augment_labels)
        x, skips = self._encode(x, emb)
        return self._decode(x, skips, emb)

    def _embed(self, noise_labels, class_labels, augment_labels) -> torch.Tensor:
        cos, sin = self.map_noise(noise_labels).chunk(2, dim=1)
        emb = torch.cat([sin, cos], dim=1)  # this family was trained with the sines first
        if self.map_label is not None:
            emb = emb + self.map_label(self._drop_labels(class_labels) * math.sqrt(self.label_dim))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = F.silu(self.map_layer0(emb))
        return F.silu(self.map_layer1(emb))

    def _encode(self, x: torch.Tensor, emb: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        skips, aux = [], x
        for name, layer in self.enc.items():
            if name.endswith("aux_down"):
                aux = layer(aux)
            elif name.endswith("aux_skip"):
                x = skips[-1] = x + layer(aux)
            elif name.endswith("aux_residual"):
                x = skips[-1] = aux = (x + layer(aux)) * math.sqrt(0.5)
            else:
                x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
                skips.append(x)
        return x, skips

    def _decode(self, x: torch.Tensor, skips: list[torch.Tensor], emb: torch.Tensor) -> torch.Tensor:
        image = normed = None
        for name, layer in self.dec.items():
            if name.endswith("aux_up"):
                image = layer(image)
            elif name.endswith("aux_norm"):
                normed = layer(x)
            elif name.endswith("aux_conv"):
                image = layer(normed) if image is None else image + layer(normed)
            else:
                if x.shape[1] != layer.in_channels:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = layer(x, emb)
        return image


class DhariwalUNet(_UNet):
    """U-Net of Dhariwal & Nichol (2021), "ADM", as re-implemented for EDM.

    Args: see `SongUNet`; attention heads are 64 channels wide, and layers narrower than that have no attention.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0,
    ):
        super().__init__(img_resolution, label_dim, augment_dim, label_dropout)
        init = Init("kaiming_uniform", weight_gain=math.sqrt(1 / 3), bias_gain=math.sqrt(1 / 3))
        init_zero = init.scaled(0)
        emb_channels = model_channels * channel_mult_emb
        block = functools.partial(
            UNetBlock, emb_channels=emb_channels, channels_per_head=64, dropout=dropout, init=init, init_zero=init_zero
        )

        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = Linear(augment_dim, model_channels, bias=False, init=init_zero) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels, init=init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=init)
        label_init = Init("kaiming_normal", weight_gain=math.sqrt(label_dim))
        self.map_label = Linear(label_dim, emb_channels, bias=False, init=label_init) if label_dim else None

        widths = [model_channels * mult for mult in channel_mult]
        skips = self._build_encoder(in_channels, widths[0], widths, num_blocks, attn_resolutions, block, init)
        width = self._build_decoder(skips, widths, num_blocks, lambda res, _: res in attn_resolutions, block)
        self.out_norm = GroupNormSilu(width)
        self.out_conv = Conv2d(width, out_channels, kernel=3, init=init_zero)

    def forward(
        self,
        x: torch.Tensor,
        noise_labels: torch.Tensor,
        class_labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The raw network F: images [N C R R], c_noise [N] or [1], labels [N L], augmentation [N A] → [N C_out R R]."""
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(self._drop_labels(class_labels))
        emb = F.silu(emb)

        skips = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, UNetBlock) else layer(x)
            skips.append(x)
        for layer in self.dec.values():
            if x.shape[1] != layer.in_channels:
                x = torch.cat([x, skips.pop()], dim=1)
            x = layer(x, emb)
        return self.out_conv(self.out_norm(x))


UNETS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}


# ---------------------------------------------------------------------------------------------------------------------
# Preconditionings (EDM, table 1)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}.")


def _record_init_kwargs(init: Callable) -> Callable:
    """Decorate ``__init__`` so that the arguments given end up in ``self.init_kwargs``, flat and by name."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self, *args, **kwargs):
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        del given["self"]
        given.update(given.pop("model_kwargs", {}))
        init(self, *args, **kwargs)
        self.init_kwargs = given

    return wrapper


class Preconditioner(nn.Module, ABC):
    """Base of the four preconditionings: a U-Net F in ``model``, wrapped into a denoiser.

    Attributes:
        img_resolution, img_channels, label_dim: What the denoiser takes.
        sigma_min, sigma_max: Range of noise levels for which it is meant.
        use_fp16: Run the U-Net in float16 where the images are on a GPU.
        compute_dtype: What the U-Net computes in otherwise; parameters, noise levels and D_x are float32 all the same.
        init_kwargs: The constructor arguments that were given, U-Net's included: enough to build the network again.
    """

    def __init__(
        self, img_resolution: int, img_channels: int, label_dim: int, use_fp16: bool,
        sigma_min: float, sigma_max: float, model_type: str, model_kwargs: dict, out_channels: int | None = None,
    ):  # fmt: skip
        _check_choice("model_type", model_type, tuple(UNETS))
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = img_resolution, img_channels, label_dim
        self.use_fp16, self.sigma_min, self.sigma_max = use_fp16, sigma_min, sigma_max
        self.model = UNETS[model_type](
            img_resolution=img_resolution, in_channels=img_channels, out_channels=out_channels or img_channels,
            label_dim=label_dim, **model_kwargs,
        )  # fmt: skip

    compute_dtype = torch.float32

    @abstractmethod
    def scalings(self, sigma: torch.Tensor) -> tuple[torch.Tensor | float, ...]:
        """c_skip, c_out, c_in, c_noise for noise levels of any shape."""

    def round_sigma(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """The nearest noise level that the network knows: any, unless its levels are discrete."""
        return torch.as_tensor(sigma)

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        force_fp32: bool = False,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Denoise: the expected clean image behind each noisy one.

        Args:
            x: Noisy images, (N, img_channels, img_resolution, img_resolution): clean ones in [-1, 1] plus sigma times
                unit noise.
            sigma: Noise levels > 0: (N,) or anything that reshapes to it, or a single one for all.
            class_labels: One-hot rows (N, label_dim), never class indices; None or zeros mean "no label".
                Ignored by unconditional networks.
            force_fp32: Run in float32 even if the network was made with use_fp16.
            augment_labels: (N, augment_dim), for networks trained with augmentation; None or zeros mean "none".

        Returns:
            D_x, float32, the shape of x.

        Raises:
            ValueError: If the shape of x or of class_labels does not fit the network.
        """
        x = self._checked_images(x).to(torch.float32)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).reshape(-1, 1, 1, 1)
        labels = self._checked_labels(class_labels, x)
        c_skip, c_out, c_in, c_noise = self.scalings(sigma)
        inputs = (c_in * x).to(self._dtype(x, force_fp32))
        F_x = self.model(inputs, c_noise.flatten(), class_labels=labels, augment_labels=augment_labels)
        return c_skip * x + c_out * F_x[:, : self.img_channels].to(torch.float32)

    def _dtype(self, x: torch.Tensor, force_fp32: bool) -> torch.dtype:
        """What the U-Net computes in, for images x."""
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


class EDMPrecond(Preconditioner):
    """Preconditioning of EDM (eq. 7, table 1 "Ours").

    Args:
        img_resolution, img_channels: Of the images.
        label_dim: Number of classes, 0 = unconditional.
        use_fp16: See `Preconditioner`.
        sigma_min, sigma_max: Range of noise levels.
        sigma_data: Standard deviation that the data are taken to have.
        model_type: 'SongUNet' or 'DhariwalUNet'.
        **model_kwargs: Arguments of that U-Net.
    """

    @_record_init_kwargs
    def __init__(
        self, img_resolution: int, img_channels: int, label_dim: int = 0, use_fp16: bool = False,
        sigma_min: float = 0, sigma_max: float = float("inf"), sigma_data: float = 0.5,
        model_type: str = "DhariwalUNet", **model_kwargs,
    ):  # fmt: skip
        super().__init__(
            img_resolution, img_channels, label_dim, use_fp16, sigma_min, sigma_max, model_type, model_kwargs
        )
        self.sigma_data = sigma_data

    def scalings(self, sigma):
        variance = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = sigma * self.sigma_data / variance.sqrt()
        return c_skip, c_out, 1 / variance.sqrt(), sigma.log() / 4


class VPPrecond(Preconditioner):
    """Preconditioning of variance-preserving diffusion (Song et al. 2021; EDM, table 1 "VP").

    Args: see `EDMPrecond`, and
        beta_d, beta_min: Extent and minimum of the linear noise schedule.
        M: Number of time steps that c_noise counts in.
        epsilon_t: Smallest time, which sets sigma_min.
    """

    @_record_init_kwargs
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

    def scalings(self, sigma):
        t = ((self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt() - self.beta_min) / self.beta_d
        return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), (self.M - 1) * t


def vp_sigma(t: torch.Tensor | float, beta_d: float = 19.9, beta_min: float = 0.1) -> torch.Tensor:
    """Noise level of variance-preserving diffusion at times t in (0, 1].

    In float32, where cancellation makes the smallest one, t = 1e-5, exactly 2^-10 (0.0010005 without rounding): the
    published networks carry that number as their sigma_min.
    """
    t = torch.as_tensor(t, dtype=torch.float32, device=t.device if isinstance(t, torch.Tensor) else "cpu")
    return ((beta_d * t**2 / 2 + beta_min * t).exp() - 1).sqrt()


class VEPrecond(Preconditioner):
    """Preconditioning of variance-exploding diffusion (Song et al. 2021; EDM, table 1 "VE"). Args: see `EDMPrecond`."""

    @_record_init_kwargs
    def __init__(
        self, img_resolution: int, img_channels: int, label_dim: int = 0, use_fp16: bool = False,
        sigma_min: float = 0.02, sigma_max: float = 100, model_type: str = "SongUNet", **model_kwargs,
    ):  # fmt: skip
        super().__init__(
            img_resolution, img_channels, label_dim, use_fp16, sigma_min, sigma_max, model_type, model_kwargs
        )

    def scalings(self, sigma):
        return 1, sigma, 1, (sigma / 2).log()


class iDDPMPrecond(Preconditioner):
    """Preconditioning of improved DDPM (Nichol & Dhariwal 2021; EDM, table 1 "iDDPM"): M discrete noise levels.

    The U-Net has twice as many output channels as the images (iDDPM's learned variance); the second half is not used.

    Args: see `EDMPrecond`, and
        C_1: Floor of the ratio of successive signal levels.
        C_2: Offset of the cosine schedule.
        M: Number of noise levels.
    """

    @_record_init_kwargs
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

    def scalings(self, sigma):
        c_noise = (self.M - 1 - self.sigma_index(sigma)).to(torch.float32)
        return 1, -sigma, 1 / (sigma**2 + 1).sqrt(), c_noise

    def sigma_index(self, sigma: torch.Tensor) -> torch.Tensor:
        """Index of the nearest noise level in ``u``, int64, the shape of sigma."""
        return (sigma.to(self.u.dtype)[..., None] - self.u).abs().argmin(dim=-1)

    def round_sigma(self, sigma: torch.Tensor | float) -> torch.Tensor:
        sigma = torch.as_tensor(sigma, device=self.u.device)
        dtype = sigma.dtype if sigma.is_floating_point() else torch.float32
        return self.u[self.sigma_index(sigma)].to(dtype)


def iddpm_sigmas(C_1: float = 0.001, C_2: float = 0.008, M: int = 1000) -> np.ndarray:
    """Noise levels of iDDPM, float32, (M + 1,), falling from u[0] ≈ 20291 to u[M] = 0 (EDM, table 1).

    In float32 like the published networks' own; float64 would move the smallest levels by 5e-4 of their size.
    """
    j = np.arange(M + 1, dtype=np.float32)
    signal = np.sin(np.float32(0.5 * np.pi) * j / np.float32(M) / np.float32(C_2 + 1)) ** 2
    u = np.zeros(M + 1, dtype=np.float32)
    for j in range(M, 0, -1):
        u[j - 1] = np.sqrt((u[j] ** 2 + 1) / max(signal[j - 1] / signal[j], np.float32(C_1)) - 1)
    return u
