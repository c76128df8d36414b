"""Layers of StyleGAN2's networks, which NVIDIA's other generators share.

All weights are stored with unit variance; the layers scale them at run time ("equalised learning rate"). Shapes in
comments: N batch, I/O input/output channels, k kernel size, L layers that are computed together.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from refine.networks import bases
from refine.torch_utils.ops.bias_act import ACTIVATIONS, bias_act
from refine.torch_utils.ops.conv2d_resample import conv2d_resample
from refine.torch_utils.ops.modulated_act import modulated_act
from refine.torch_utils.ops.upfirdn2d import setup_filter

DEFAULT_FILTER = (1, 3, 3, 1)


def normalize_2nd_moment(x: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """Scale `x` to a mean square of 1 along `dim`."""
    if dim % x.ndim == x.ndim - 1:
        return F.rms_norm(x, x.shape[-1:], eps=1e-8)  # one kernel on a GPU
    return x * (x.square().mean(dim=dim, keepdim=True) + 1e-8).rsqrt()


class FullyConnectedLayer(nn.Module):
    """Linear layer with bias and activation: (N, I) → (N, O)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "linear",
        lr_multiplier: float = 1.0,
        bias_init: float = 0.0,
    ):
        super().__init__()
        bases.check_choice("activation", activation, tuple(ACTIVATIONS))
        self.activation = activation
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full([out_features], float(bias_init))) if bias else None
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(x.dtype) * self.weight_gain
        if self.bias is None:
            return bias_act(F.linear(x, weight), act=self.activation)
        return bias_act(torch.addmm(self.bias.to(x.dtype), x, weight.t(), beta=self.bias_gain), act=self.activation)


class Conv2dLayer(nn.Module):
    """Convolution with optional resampling, bias and activation: (N, I, H, W) → (N, O, H·up/down, W·up/down)."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    resample_filter: torch.Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        bias: bool = True,
        activation: str = "linear",
        up: int = 1,
        down: int = 1,
        resample_filter: Sequence = DEFAULT_FILTER,
        conv_clamp: float | None = None,
        trainable: bool = True,
    ):
        super().__init__()
        self.activation, self.up, self.down, self.conv_clamp = activation, up, down, conv_clamp
        self.padding = kernel_size // 2
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)
        self.act_gain = ACTIVATIONS[activation].gain
        self.register_buffer("resample_filter", setup_filter(resample_filter))
        # Frozen layers (Freeze-D) hold their tensors as buffers, under the same names.
        register = self.register_parameter if trainable else self.register_buffer
        wrap = nn.Parameter if trainable else (lambda tensor: tensor)
        register("weight", wrap(torch.randn(out_channels, in_channels, kernel_size, kernel_size)))
        register("bias", wrap(torch.zeros(out_channels)) if bias else None)

    def forward(self, x: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
        weight = (self.weight * self.weight_gain).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        f, flip = self.resample_filter, self.up == 1  # layers that enlarge convolve with the reversed kernel
        x = conv2d_resample(x, weight, f, up=self.up, down=self.down, padding=self.padding, flip_weight=flip)
        clamp = None if self.conv_clamp is None else self.conv_clamp * gain
        return bias_act(x, bias, act=self.activation, gain=self.act_gain * gain, clamp=clamp)


def modulated_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    styles: torch.Tensor,
    up: int = 1,
    padding: int = 0,
    resample_filter: torch.Tensor | None = None,
    demodulate: bool | torch.Tensor = True,
    fused: bool = False,
    scaled: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Convolve with a kernel that each sample scales per input channel (StyleGAN2, eqs. 1–3).

    Args:
        x: (N, I, H, W).
        weight: (O, I, k, k), shared by the samples.
        styles: (N, I) scales of the input channels.
        up: Integer upsampling factor.
        padding: Padding of the convolution.
        resample_filter: Filter of the upsampling.
        demodulate: Scale each output channel to unit expected variance; or the factors that do it, (N, O).
        fused: Build one kernel per sample and run them as a grouped convolution. The other form scales activations
            before and after one shared convolution: the same numbers to 1e-6, and on a CPU about twice as fast.
        scaled: x has been multiplied with the styles (not if `fused`).

    Returns:
        (N, O, H·up, W·up), and the factors (N, O) by which it is still to be multiplied, or None.
    """
    n, (o, i, k, _) = x.shape[0], weight.shape
    if x.dtype == torch.float16 and demodulate is True:  # keep the products in range; demodulation undoes it
        weight = weight * (weight.abs().amax(dim=[1, 2, 3], keepdim=True).reciprocal() / math.sqrt(i * k * k))
        styles = styles / styles.abs().amax(dim=1, keepdim=True)
    d = demodulate if isinstance(demodulate, torch.Tensor) else None
    if demodulate is True:
        d = _demodulation(styles, weight.square().sum(dim=[2, 3]))
    geometry: dict[str, Any] = {"f": resample_filter, "up": up, "padding": padding, "flip_weight": up == 1}

    if not fused:
        x = x if scaled else x * styles.to(x.dtype)[:, :, None, None]
        x = conv2d_resample(x, weight.to(x.dtype), **geometry)
        return x, None if d is None else d.to(x.dtype)
    w = weight[None] * styles[:, None, :, None, None]  # [NOIkk]
    w = w if d is None else w * d[:, :, None, None, None]
    # One sample with n·I channels has no useful channels_last form; its backward is wrong there (torch 2.13, CPU).
    x = x.contiguous().reshape(1, n * i, *x.shape[2:])
    w = w.contiguous().reshape(n * o, i, k, k)
    x = conv2d_resample(x, w.to(x.dtype), groups=n, **geometry)
    return x.reshape(n, o, *x.shape[2:]), None


def _demodulation(styles: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """1 / √(Σ over I and k of (w·s)² + 1e-8), a product of matrices: (…, N, I), w² summed (…, O, I) → (…, N, O)."""
    return (styles.square() @ squares.mT + 1e-8).rsqrt()


class Modulation(NamedTuple):
    """What w tells a layer: scales of its input channels (N, I), and what `modulated_conv2d` takes as `demodulate`.

    weight: That of the layer in the dtype of its activations; of a `ToRGBLayer` (N, O, I), with the scales.
    """

    styles: torch.Tensor
    demodulate: bool | torch.Tensor
    weight: torch.Tensor


def modulations(
    layers: Sequence["SynthesisLayer | ToRGBLayer"], ws: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype]
) -> list[Modulation]:
    """Of some layers, for the w (N, w_dim) and the dtype of the activations of each.

    Layers of the same size share every operator: on a GPU a launch costs more than so small a product.
    """
    keys = [(layer.weight.shape, layer.demodulate, dtype) for layer, dtype in zip(layers, dtypes, strict=True)]
    result: dict[int, Modulation] = {}
    for some in _alike([layer.affine.weight.shape for layer in layers]):
        groups = [[some[place] for place in group] for group in _alike([keys[index] for index in some])]
        order = [index for group in groups for index in group]
        affines = [layers[index].affine for index in order]
        weight = stacked([affine.weight for affine in affines])  # [LIw]
        bias = stacked([affine.bias for affine in affines if affine.bias is not None])[..., None]
        w, beta, alpha = stacked([ws[index] for index in order]), affines[0].bias_gain, affines[0].weight_gain
        styles = torch.baddbmm(bias, weight, w.mT, beta=beta, alpha=alpha).mT  # [LNI]
        for group, its in zip(groups, styles.split([len(group) for group in groups]), strict=True):
            found = _modulations_of([layers[index] for index in group], its, dtypes[group[0]])
            result |= zip(group, found, strict=True)
    return [result[index] for index in range(len(layers))]


def _modulations_of(
    layers: Sequence["SynthesisLayer | ToRGBLayer"], styles: torch.Tensor, dtype: torch.dtype
) -> list[Modulation]:
    """Of layers of one kind and size, from their styles (L, N, I)."""
    weights: Sequence[torch.Tensor] = [layer.weight for layer in layers]
    if not torch.is_grad_enabled():
        weights = [weight.detach() for weight in weights]  # a view of a parameter asks for a gradient even then
    factors: Sequence[bool | torch.Tensor] = [layers[0].demodulate] * len(layers)
    if isinstance(layers[0], ToRGBLayer):
        styles = styles * layers[0].style_gain
        weights = (stacked(weights).flatten(2)[:, None] * styles[:, :, None]).to(dtype).unbind()
    elif dtype != torch.float16:  # which `modulated_conv2d` keeps in range
        planes = weights[0].is_contiguous()  # else they are kept in channels_last, here, too
        weight = stacked([w if planes else w.permute(0, 2, 3, 1) for w in weights])
        squares = weight.square().sum(dim=[3, 4] if planes else [2, 3])  # [LOI]
        factors = _demodulation(styles, squares).to(dtype).unbind()
        weights = [w if planes else w.permute(0, 3, 1, 2) for w in weight.to(dtype).unbind()]
        styles = styles.to(dtype)
    return [Modulation(*each) for each in zip(styles.unbind(), factors, weights, strict=True)]


def _alike(keys: Sequence[Any]) -> list[list[int]]:
    """The places of each key."""
    places: dict[Any, list[int]] = {}
    for index, key in enumerate(keys):
        places.setdefault(key, []).append(index)
    return list(places.values())


def stacked(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """torch.stack; without a copy where there is but one."""
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)


class SynthesisLayer(nn.Module):
    """Modulated convolution, noise, bias and activation: (N, I, r/up, r/up) and w (N, w_dim) → (N, O, r, r)."""

    noise_const: torch.Tensor
    resample_filter: torch.Tensor
    demodulate = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        kernel_size: int = 3,
        up: int = 1,
        use_noise: bool = True,
        activation: str = "lrelu",
        resample_filter: Sequence = DEFAULT_FILTER,
        conv_clamp: float | None = None,
    ):
        super().__init__()
        self.resolution, self.up, self.use_noise = resolution, up, use_noise
        self.activation, self.conv_clamp = activation, conv_clamp
        self.padding = kernel_size // 2
        self.act_gain = ACTIVATIONS[activation].gain
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        if use_noise:
            self.register_buffer("noise_const", torch.randn(resolution, resolution))
            self.noise_strength = nn.Parameter(torch.zeros([]))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.register_buffer("resample_filter", setup_filter(resample_filter))

    def forward(self, x, w, noise_mode="random", fused_modconv=False, gain=1.0, then=None, scaled=False, both=False):
        """`w` may be the `Modulation` that follows from it. The output is multiplied with `then`, (N, O): styles of the
        next layer, for which its input is `scaled` then. If `both`, as it is and multiplied."""
        styles, factors, weight = w if isinstance(w, Modulation) else modulations([self], [w], [x.dtype])[0]
        noise = strength = None
        if self.use_noise and noise_mode == "random":
            noise = torch.randn([x.shape[0], 1, self.resolution, self.resolution], device=x.device)
        elif self.use_noise and noise_mode == "const":
            noise = self.noise_const
        if noise is not None:
            strength = self.noise_strength
        x, factors = modulated_conv2d(
            x, weight, styles, self.up, self.padding, self.resample_filter, factors, fused_modconv, scaled
        )
        clamp = None if self.conv_clamp is None else self.conv_clamp * gain
        bias, gain = self.bias.to(x.dtype), self.act_gain * gain
        return modulated_act(x, factors, noise, strength, bias, then, None, self.activation, gain, clamp, both=both)


class ToRGBLayer(nn.Module):
    """1×1 modulated convolution to image channels, without demodulation: (N, I, r, r) → (N, img_channels, r, r)."""

    demodulate = False

    def __init__(self, in_channels: int, out_channels: int, w_dim: int, conv_clamp: float | None = None):
        super().__init__()
        self.conv_clamp = conv_clamp
        self.affine = FullyConnectedLayer(w_dim, in_channels, bias_init=1)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.style_gain = 1 / math.sqrt(in_channels)

    def forward(self, x, w, img=None):
        """Added to `img`, in float32; `w` may be the `Modulation` that follows from it."""
        weight = (w if isinstance(w, Modulation) else modulations([self], [w], [x.dtype])[0]).weight
        bias = self.bias.to(x.dtype)[:, None]
        y = torch.baddbmm(bias, weight.to(x.dtype), x.flatten(2)).unflatten(2, x.shape[2:])
        if img is None or self.conv_clamp is None:
            y = bias_act(y, clamp=self.conv_clamp).to(torch.float32)
            return y if img is None else img + y
        return modulated_act(y, None, None, None, None, beside=img, clamp=self.conv_clamp)
