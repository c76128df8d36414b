"""Diffusion networks of EDM2 (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models").

Everything preserves the magnitude of activations in expectation: weights are normalised at each call, sums and
concatenations are scaled, and there are no biases. A constant-one channel beside the image stands in for them.

    D(x; sigma) = c_skip(sigma) · x + c_out(sigma) · F(c_in(sigma) · x, c_noise(sigma))        as in EDM, see `edm`

Module, parameter and buffer names are those of the published checkpoints. Pixel-space networks only: those for the
latents of an image encoder denoise no images. Shape tags: N batch, C channels, R resolution, E embedding, L label_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from refine.networks.attention import by_pixel, merge_heads, scaled_dot_product, split_heads, thirds
from refine.networks.bases import TrainingRate, check_choice, records_init_kwargs
from refine.networks.denoiser import Preconditioner, Scalings
from refine.networks.edm import edm_scalings
from refine.torch_utils.ops.conv3x3 import conv2d

# ---------------------------------------------------------------------------------------------------------------------
# Operations that preserve magnitude (EDM2, section 2)


def normalize(x: torch.Tensor, dims: Sequence[int], eps: float = 1e-4) -> torch.Tensor:
    """x divided by its root mean square over `dims`, to which eps is added; the mean is taken in float32."""
    rms = x.to(torch.float32).square().mean(dim=tuple(dims), keepdim=True).sqrt()
    return x / (rms + eps).to(x.dtype)


def mp_silu(x: torch.Tensor) -> torch.Tensor:
    """SiLU scaled to keep the magnitude of normally distributed inputs (eq. 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: torch.Tensor, b: torch.Tensor, t: float = 0.5) -> torch.Tensor:
    """Sum with the weights 1 − t and t (eq. 88)."""
    return a.lerp(b, t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: torch.Tensor, b: torch.Tensor, t: float = 0.5) -> torch.Tensor:
    """Concatenation along the channels in which a and b contribute as 1 − t to t, however many there are (eq. 103)."""
    n_a, n_b = a.shape[1], b.shape[1]
    scale = math.sqrt((n_a + n_b) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (scale * (1 - t) / math.sqrt(n_a)), b * (scale * t / math.sqrt(n_b))], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Layers


class MPFourier(nn.Module):
    """Noise level as cosines at fixed random frequencies and phases (eq. 75): (N,) → (N, num_channels)."""

    freqs: torch.Tensor
    phases: torch.Tensor

    def __init__(self, num_channels: int):
        super().__init__()
        self.register_buffer("freqs", torch.randn(num_channels) * (2 * math.pi))
        self.register_buffer("phases", torch.rand(num_channels) * (2 * math.pi))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angles = x.to(torch.float32).outer(self.freqs.to(torch.float32)) + self.phases.to(torch.float32)
        return (angles.cos() * math.sqrt(2)).to(x.dtype)


class MPConv(nn.Module):
    """Convolution, or with `kernel=()` a linear layer, whose weights count by their direction only (eq. 47, 66).

    In train mode the stored weights are first replaced by the normalised ones ("forced weight normalisation"), which
    keeps the effective learning rate from decaying as they would grow. In eval mode nothing is changed.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: Sequence[int] = ()):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))

    def forward(self, x: torch.Tensor, gain: torch.Tensor | float = 1.0, qkv: bool = False) -> torch.Tensor:
        """`qkv`: the outputs are queries, keys and values, which the weights have in turns; see `thirds`."""
        dims = range(1, self.weight.ndim)
        if self.training:
            with torch.no_grad():
                self.weight.copy_(normalize(self.weight, dims))
        fan_in = self.weight[0].numel()
        weight = normalize(self.weight.to(torch.float32), dims) * (gain / math.sqrt(fan_in))
        weight = (thirds(weight) if qkv else weight).to(x.dtype)
        return F.linear(x, weight) if weight.ndim == 2 else conv2d(x, weight, padding=weight.shape[-1] // 2)


class Block(nn.Module):
    """Residual block: convolution twice, modulated by the embedding in between; optional self-attention.

    Args:
        in_channels, out_channels, emb_channels: Widths of input, output and embedding.
        flavor: 'enc' normalises its input pixel by pixel, 'dec' does not.
        resample_mode: 'keep', 'up' or 'down', by 2, of the input.
        attention: Add a self-attention layer.
        channels_per_head: Width of an attention head.
        dropout: In train mode, between the convolutions.
        res_balance, attn_balance: Weight of the branch in the residual sums.
        clip_act: Bound of the output; None = none.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        flavor: str = "enc",
        resample_mode: str = "keep",
        attention: bool = False,
        channels_per_head: int = 64,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256,
    ):
        check_choice("flavor", flavor, ("enc", "dec"))
        check_choice("resample_mode", resample_mode, ("keep", "up", "down"))
        super().__init__()
        self.flavor, self.resample_mode, self.dropout = flavor, resample_mode, dropout
        self.res_balance, self.attn_balance, self.clip_act = res_balance, attn_balance, clip_act
        self.num_heads = out_channels // channels_per_head if attention else 0
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(out_channels if flavor == "enc" else in_channels, out_channels, (3, 3))
        self.emb_linear = MPConv(emb_channels, out_channels)
        self.conv_res1 = MPConv(out_channels, out_channels, (3, 3))
        self.conv_skip = MPConv(in_channels, out_channels, (1, 1)) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, out_channels * 3, (1, 1)) if self.num_heads else None
        self.attn_proj = MPConv(out_channels, out_channels, (1, 1)) if self.num_heads else None

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:  # [N C_in H W], [N E] → [N C_out H' W']
        if self.resample_mode != "keep":
            x = F.interpolate(x, scale_factor=2, mode="nearest") if self.resample_mode == "up" else F.avg_pool2d(x, 2)
        if self.flavor == "enc":
            x = normalize(self._skip(x), [1])
        y = self.conv_res0(mp_silu(x))
        scale = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = mp_silu(y * scale[:, :, None, None].to(y.dtype))
        y = self.conv_res1(F.dropout(y, self.dropout, self.training))
        if self.flavor == "dec":
            x = self._skip(x)
        x = mp_sum(x, y, self.res_balance)
        if self.attn_qkv is not None and self.attn_proj is not None:
            x = mp_sum(x, self.attn_proj(self._attention(self.attn_qkv(x, qkv=True))), self.attn_balance)
        return x if self.clip_act is None else x.clip(-self.clip_act, self.clip_act)

    def _skip(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.conv_skip is None else self.conv_skip(x)

    def _attention(self, qkv: torch.Tensor) -> torch.Tensor:  # [N 3C H W] → [N C H W]
        pixels = normalize(by_pixel(qkv, self.num_heads), [4])  # cosine attention
        return merge_heads(scaled_dot_product(*split_heads(pixels)), like=qkv)


class UNet(nn.Module):
    """The U-Net F of EDM2, configuration G.

    Args:
        img_resolution, img_channels: Size of the images.
        label_dim: Width of one-hot class labels, 0 = unconditional.
        model_channels: Base width C: 128 (XS), 192 (S), 256 (M), 320 (L), 384 (XL).
        channel_mult: Width of each resolution level, in multiples of C, from fine to coarse.
        channel_mult_noise: Width of the noise embedding in multiples of C; None = that of the finest level.
        channel_mult_emb: Width of the embedding in multiples of C; None = that of the widest level.
        num_blocks: Residual blocks per level (the decoder has one more).
        attn_resolutions: Resolutions with self-attention.
        label_balance, concat_balance: Weight of the label in the embedding, and of the skips in the decoder.
        **block_kwargs: Arguments of `Block`.
    """

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        **block_kwargs,
    ):
        super().__init__()
        if img_resolution % (divisor := 1 << len(channel_mult) - 1):
            raise ValueError(f"img_resolution is {img_resolution}, expected a multiple of {divisor}.")
        self.label_dim, self.label_balance, self.concat_balance = label_dim, label_balance, concat_balance
        widths = [model_channels * mult for mult in channel_mult]
        noise_channels = widths[0] if channel_mult_noise is None else model_channels * channel_mult_noise
        emb_channels = max(widths) if channel_mult_emb is None else model_channels * channel_mult_emb
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(noise_channels)
        self.emb_noise = MPConv(noise_channels, emb_channels)
        self.emb_label = MPConv(label_dim, emb_channels) if label_dim else None

        def block(c_in: int, c_out: int, flavor: str, resample: str = "keep", attention: bool = False) -> Block:
            return Block(c_in, c_out, emb_channels, flavor, resample, attention, **block_kwargs)

        resolutions = [img_resolution >> level for level in range(len(widths))]
        self.enc = nn.ModuleDict()
        skips: list[int] = []
        for level, (res, width) in enumerate(zip(resolutions, widths, strict=True)):
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = MPConv(img_channels + 1, width, (3, 3))
                last = width
            else:
                self.enc[f"{res}x{res}_down"] = block(last, last, "enc", "down")
            skips.append(last)
            for index in range(num_blocks):
                self.enc[f"{res}x{res}_block{index}"] = block(last, width, "enc", attention=res in attn_resolutions)
                last = width
                skips.append(last)

        self.dec = nn.ModuleDict()
        for level, (res, width) in reversed(list(enumerate(zip(resolutions, widths, strict=True)))):
            if level == len(widths) - 1:
                self.dec[f"{res}x{res}_in0"] = block(last, last, "dec", attention=True)
                self.dec[f"{res}x{res}_in1"] = block(last, last, "dec")
            else:
                self.dec[f"{res}x{res}_up"] = block(last, last, "dec", "up")
            for index in range(num_blocks + 1):
                attention = res in attn_resolutions
                self.dec[f"{res}x{res}_block{index}"] = block(last + skips.pop(), width, "dec", attention=attention)
                last = width
        self.out_conv = MPConv(last, img_channels, (3, 3))

    def forward(self, x: torch.Tensor, noise_labels: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        """The raw network F: images [N C R R], c_noise [N] or [1], labels [N L] → [N C R R]."""
        emb = self.emb_noise(self.emb_fourier(noise_labels))
        if self.emb_label is not None:
            assert class_labels is not None  # a preconditioning gives zeros for "no label"
            emb = mp_sum(emb, self.emb_label(class_labels * math.sqrt(self.label_dim)), self.label_balance)
        emb = mp_silu(emb).to(x.dtype)

        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips: list[torch.Tensor] = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            if "block" in name:
                x = mp_cat(x, skips.pop(), self.concat_balance)
            x = layer(x, emb)
        return self.out_conv(x, gain=self.out_gain)


class Precond(Preconditioner):
    """EDM2's denoiser: EDM's preconditioning (EDM, table 1 "Ours") around its own U-Net, in `unet`.

    Args:
        img_resolution, img_channels: Size of the images.
        label_dim: Number of classes, 0 = unconditional.
        use_fp16: See `Preconditioner`.
        sigma_data: Standard deviation that the data are taken to have.
        logvar_channels: Width of the noise embedding from which the uncertainty u is computed.
        **model_kwargs: Arguments of `UNet`.
    """

    inner_name = "unet"
    keeps_halves = True  # they are normalised, in float32, at each call; gains are single numbers

    @records_init_kwargs(defaults=False)
    def __init__(
        self, img_resolution: int, img_channels: int, label_dim: int = 0, use_fp16: bool = True,
        sigma_data: float = 0.5, logvar_channels: int = 128, **model_kwargs: Any,
    ):  # fmt: skip
        unet = UNet(img_resolution, img_channels, label_dim, **model_kwargs)
        super().__init__(unet, img_resolution, img_channels, label_dim, use_fp16)
        self.sigma_data = sigma_data
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = MPConv(logvar_channels, 1)

    @property
    def training_rate(self) -> TrainingRate:
        return TrainingRate(1e-2, 2048)  # EDM2's for the size S: weights are normalised, so that steps are relative

    def scalings(self, sigma: torch.Tensor) -> Scalings:
        return edm_scalings(sigma, self.sigma_data)

    def _evaluate(
        self, x: torch.Tensor, c_noise: torch.Tensor, class_labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None, dtype: torch.dtype,
    ) -> torch.Tensor:  # fmt: skip
        return self.inner(x.to(dtype), c_noise, class_labels)

    def logvar(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """The uncertainty u(sigma) that the loss was weighted with in training (eq. 21), shape (N, 1, 1, 1)."""
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=self.logvar_linear.weight.device)
        c_noise = self.scalings(sigma.flatten())[3]
        return self.logvar_linear(self.logvar_fourier(c_noise)).reshape(-1, 1, 1, 1)
