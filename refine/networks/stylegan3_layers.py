"""Layers of StyleGAN3 (Karras et al., arXiv 2106.12423), with NVIDIA's parameter names: signals with a band limit.

A layer's activations are samples of a continuous signal over the unit square: `rate` samples per unit length, no
frequencies above `cutoff` (cycles per unit length), a filter that falls off within `half_width` on both sides of it,
and a margin around the square, without which the borders would show. Shapes in comments: N batch, I/O input/output
channels, k kernel size.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import special
from torch import nn

from refine.networks import bases
from refine.networks.stylegan2_layers import FullyConnectedLayer
from refine.torch_utils.ops.conv2d_resample import conv2d_resample
from refine.torch_utils.ops.filtered_lrelu import filtered_lrelu

_MAX_TAPS = 256  # of a filter along one axis; the published networks have up to 24


class Signal(NamedTuple):
    """Activations between two layers.

    Attributes:
        channels: How many.
        size: Samples along each axis, margins included.
        rate: Samples per width of the image.
        cutoff: Highest frequency that is kept, in cycles per width of the image.
        half_width: Of the filter's transition band, likewise.
    """

    channels: int
    size: int
    rate: float
    cutoff: float
    half_width: float


def design_lowpass(taps: int, cutoff: float, width: float, rate: float, radial: bool = False) -> torch.Tensor | None:
    """A low-pass filter by the Kaiser window (arXiv 2106.12423, appendix C.1).

    Args:
        taps: Length; 1 = no filter.
        cutoff: In cycles per unit length, as `width`, the width of the transition band.
        width: See there.
        rate: Samples per unit length.
        radial: Circular instead of separable: 2-D taps with the same response in all directions.

    Returns:
        float32 (taps,), or (taps, taps) where radial, of sum 1; None for one tap.

    Raises:
        ValueError: The numbers describe no filter.
    """
    if not (1 <= taps <= _MAX_TAPS and 0 < cutoff < math.inf and 0 <= width < math.inf and 0 < rate < math.inf):
        raise ValueError(f"no filter has {taps} taps, cutoff {cutoff}, width {width} and rate {rate}")
    if taps == 1:
        return None
    attenuation = 2.285 * (taps - 1) * math.pi * width / (rate / 2) + 7.95  # dB, by Kaiser's formula
    beta = 0.0
    if attenuation > 50:
        beta = 0.1102 * (attenuation - 8.7)
    elif attenuation > 21:
        beta = 0.5842 * (attenuation - 21) ** 0.4 + 0.07886 * (attenuation - 21)
    if beta > 700:
        raise ValueError(f"a transition band of {width} is too wide for a rate of {rate} and {taps} taps")
    steps = np.arange(taps) - (taps - 1) / 2
    window = special.i0(beta * np.sqrt(np.maximum(1 - (2 * steps / (taps - 1)) ** 2, 0))) / special.i0(beta)
    x = steps / rate
    if radial:
        r = np.hypot(x[:, None], x[None, :])
        centre = r == 0  # of an odd number of taps, where the limit is cutoff² · π, as 2 · J1(z) / z → 1
        r = np.where(centre, 1.0, r)
        f = np.where(centre, math.pi * cutoff**2, special.j1(2 * math.pi * cutoff * r) * cutoff / r)
        f = f * window[:, None] * window[None, :]
    else:
        f = np.sinc(2 * cutoff * x) * window
    return torch.as_tensor((f / f.sum()).astype(np.float32))


class SynthesisInput(nn.Module):
    """w (N, w_dim) → Fourier features (N, channels, size, size), moved and turned as w says.

    Args:
        w_dim: Size of an intermediate latent.
        signal: What it makes; the frequencies lie in the disc of radius `signal.cutoff`.

    Attributes:
        transform: Inverse of a transformation of the image, 3×3, homogeneous; the identity in files.
    """

    transform: torch.Tensor
    freqs: torch.Tensor
    phases: torch.Tensor

    def __init__(self, w_dim: int, signal: Signal):
        super().__init__()
        self.signal = signal
        channels = signal.channels
        self.weight = nn.Parameter(torch.randn(channels, channels))
        self.affine = FullyConnectedLayer(w_dim, 4)
        self.affine.weight = nn.Parameter(torch.zeros(4, w_dim))
        self.affine.bias = nn.Parameter(torch.tensor([1.0, 0.0, 0.0, 0.0]))
        self.register_buffer("transform", torch.eye(3))
        freqs = torch.randn(channels, 2)
        if not freqs.is_meta:  # there are no values to arrange, and arithmetic would import torch's compiler
            norm = freqs.square().sum(dim=1, keepdim=True).sqrt()
            freqs = freqs / norm * (norm.square() / -4).exp() * signal.cutoff
        self.register_buffer("freqs", freqs)
        self.register_buffer("phases", torch.rand(channels) - 0.5)

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        _, size, rate, bandwidth, _ = self.signal
        t = self.affine(w)
        t = t / t[:, :2].norm(dim=1, keepdim=True)  # the translation is divided by the same norm
        cos, sin = t[:, 0], t[:, 1]
        rotation = torch.stack([cos, -sin, sin, cos], dim=1).reshape(-1, 2, 2)
        # Rotation · translation · transform, without the last row.
        placed = rotation @ (self.transform[:2] - t[:, 2:, None] * self.transform[2:])  # [N23]
        linear, offset = placed.split([2, 1], dim=2)
        phases = self.phases + (self.freqs @ offset).squeeze(2)  # [NC]
        freqs = self.freqs @ linear  # [NC2]
        # Frequencies that the sampling rate cannot hold, after an enlarging transform, fade out.
        fade = 1 - (freqs.norm(dim=2) - bandwidth) / (rate / 2 - bandwidth)
        x = (torch.arange(size, device=w.device) + (0.5 - size / 2)) / rate
        angle = (freqs[:, :, 0, None] * x)[:, :, None, :] + (freqs[:, :, 1, None] * x)[:, :, :, None]
        angle = (angle + phases[:, :, None, None]) * (2 * math.pi)  # [NCHW]
        h = angle.sin() * fade.clamp(0, 1)[:, :, None, None]
        weight = self.weight / math.sqrt(self.signal.channels)
        return F.conv2d(h, weight[:, :, None, None])


def modulated_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    styles: torch.Tensor,
    input_gain: torch.Tensor,
    demodulate: bool = True,
) -> torch.Tensor:
    """Correlate with a kernel that each sample scales per input channel, over all positions that touch the image.

    The scales of a sample act on its activations, before and after one convolution with a shared kernel, as they do in
    StyleGAN2's `modulated_conv2d`.

    Args:
        x: (N, I, H, W); its dtype is that of the convolution.
        weight: (O, I, k, k), shared by the samples.
        styles: (N, I) scales of the input channels.
        input_gain: Factor on the input, a number; after demodulation, which would undo it.
        demodulate: Scale each output channel to unit expected variance.

    Returns:
        (N, O, H + k − 1, W + k − 1).
    """
    _, i, k, _ = weight.shape
    gain = input_gain.expand(styles.shape[0], 1)  # [N1], with demodulation [NO]
    if demodulate:
        eps = 1e-8 / (i * k * k)  # of kernels that are normalised here, so that no sum leaves float16's range
        weight = weight / weight.square().sum(dim=[1, 2, 3], keepdim=True).sqrt()
        styles = styles / styles.square().mean().sqrt()
        gain = gain * (styles.square() @ weight.square().sum(dim=[2, 3]).t() + eps).rsqrt()
    else:
        styles = styles * gain
    x = x * styles.to(x.dtype)[:, :, None, None]
    # Half of the padding by hand: what is left is that of the compiled 3×3 convolution.
    by_hand = k // 2 if x.device.type == "cpu" else 0
    x = F.pad(x, [by_hand] * 4) if by_hand else x
    x = conv2d_resample(x, weight.to(x.dtype), padding=k - 1 - by_hand)
    return x * gain.to(x.dtype)[:, :, None, None] if demodulate else x


class SynthesisLayer(bases.MixedPrecision):
    """Modulated convolution, then bias and a nonlinearity at a higher sampling rate: (N, I, …) and w (N, w_dim) →
    (N, O, size, size).

    Args:
        w_dim: Size of an intermediate latent.
        source, target: The signals before and after.
        is_torgb: A 1×1 convolution to colours, without demodulation, nonlinearity and filters.
        is_critically_sampled: The cutoff is half the sampling rate, which a circular filter cannot have.
        use_fp16: Compute in float16 on a GPU.
        conv_kernel: Kernel size, except in a ToRGB layer.
        filter_size: Taps of a filter per factor of resampling.
        lrelu_upsampling: How much higher than that of the signals the nonlinearity's sampling rate is.
        use_radial_filters: Reduce with circular filters.
        conv_clamp: Limit of the absolute value of the output. None = off.
        magnitude_ema_beta: Decay of the running mean of the input's square.

    Raises:
        ValueError: The signals do not fit together, or an argument is no number.
    """

    magnitude_ema: torch.Tensor
    up_filter: torch.Tensor | None
    down_filter: torch.Tensor | None

    def __init__(
        self,
        w_dim: int,
        source: Signal,
        target: Signal,
        is_torgb: bool = False,
        is_critically_sampled: bool = False,
        use_fp16: bool = False,
        conv_kernel: int = 3,
        filter_size: int = 6,
        lrelu_upsampling: int = 2,
        use_radial_filters: bool = False,
        conv_clamp: float | None = 256,
        magnitude_ema_beta: float = 0.999,
    ):
        super().__init__()
        for what, value in (("conv_clamp", conv_clamp or 0), ("magnitude_ema_beta", magnitude_ema_beta)):
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{what} is {value!r}; expected a number ≥ 0")
        self.source, self.target, self.is_torgb, self.use_fp16 = source, target, is_torgb, use_fp16
        self.conv_clamp, self.magnitude_ema_beta = conv_clamp, magnitude_ema_beta
        k = 1 if is_torgb else conv_kernel
        self.affine = FullyConnectedLayer(w_dim, source.channels, bias_init=1)
        self.weight = nn.Parameter(torch.randn(target.channels, source.channels, k, k))
        self.bias = nn.Parameter(torch.zeros(target.channels))
        self.register_buffer("magnitude_ema", torch.ones([]))

        rate = max(source.rate, target.rate) * (1 if is_torgb else lrelu_upsampling)
        self.up, self.down = _factor(rate, source.rate), _factor(rate, target.rate)
        up_taps = filter_size * self.up if self.up > 1 and not is_torgb else 1
        down_taps = filter_size * self.down if self.down > 1 and not is_torgb else 1
        radial = use_radial_filters and not is_critically_sampled
        up_filter = design_lowpass(up_taps, source.cutoff, 2 * source.half_width, rate)
        down_filter = design_lowpass(down_taps, target.cutoff, 2 * target.half_width, rate, radial)
        self.register_buffer("up_filter", up_filter)
        self.register_buffer("down_filter", down_filter)
        total = (target.size - 1) * self.down + 1 - (source.size + k - 1) * self.up + up_taps + down_taps - 2
        low = (total + self.up) // 2
        self.padding = (low, total - low, low, total - low)

    def forward(
        self, x: torch.Tensor, w: torch.Tensor, force_fp32: bool = False, update_magnitude: bool = False
    ) -> torch.Tensor:
        if update_magnitude:
            magnitude = x.detach().to(torch.float32).square().mean()
            self.magnitude_ema.copy_(magnitude.lerp(self.magnitude_ema, self.magnitude_ema_beta))
        dtype = torch.float16 if self.use_fp16 and not force_fp32 else self.compute_dtype
        styles = self.affine(w)
        if self.is_torgb:
            styles = styles / math.sqrt(self.weight[0].numel())
        x = modulated_conv2d(x.to(dtype), self.weight, styles, self.magnitude_ema.rsqrt(), not self.is_torgb)
        return filtered_lrelu(
            x,
            self.up_filter,
            self.down_filter,
            self.bias.to(dtype),
            up=self.up,
            down=self.down,
            padding=self.padding,
            gain=1 if self.is_torgb else math.sqrt(2),
            slope=1 if self.is_torgb else 0.2,
            clamp=self.conv_clamp,
        )


def _factor(rate: float, of: float) -> int:
    """How many times as high a sampling rate is. Raises ValueError unless it is a small whole number."""
    factor = rate / of if of > 0 else 0
    if not (1 <= factor <= _MAX_TAPS and factor == int(factor)):
        raise ValueError(f"sampling rates {of} and {rate}: one is not a multiple of the other")
    return int(factor)
