"""Bias, upsampling, leaky ReLU and downsampling in one call: the alias-free nonlinearity of StyleGAN3.

A pointwise nonlinearity makes frequencies that the sampling rate of its input cannot hold. So it is applied at a higher
rate, and what the output's rate cannot hold is filtered away (Karras et al., arXiv 2106.12423, section 3.2).

Composed of `upfirdn2d` and `bias_act`, which have compiled kernels; differentiable to any order in x and b.
"""

import math

import torch

from refine.torch_utils.ops.bias_act import bias_act
from refine.torch_utils.ops.upfirdn2d import Pair, parse_padding, upfirdn2d


def filtered_lrelu(
    x: torch.Tensor,
    fu: torch.Tensor | None = None,
    fd: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: Pair = 0,
    gain: float = math.sqrt(2),
    slope: float = 0.2,
    clamp: float | None = None,
    flip_filter: bool = False,
    impl: str | None = None,
) -> torch.Tensor:
    """Add a bias, enlarge, apply clamp(lrelu(·) · gain), shrink.

    Args:
        x: (N, C, H, W), any floating dtype.
        fu: Filter of the enlargement: float32 (fh, fw), or (taps,) applied along both axes; None = identity.
        fd: Filter of the reduction, likewise.
        b: Bias (C,), added before zeros are inserted and padded; None = none.
        up: Integer factor of the enlargement, which keeps the brightness.
        down: Integer factor of the reduction.
        padding: In the enlarged image: int, (x, y) or (x0, x1, y0, y1); negative numbers crop.
        gain: Factor after the nonlinearity.
        slope: Of the nonlinearity below zero, ≥ 0; 1 = none.
        clamp: Limit of the absolute value after the gain; None = off.
        flip_filter: False = convolution (the filters are reversed), True = correlation.
        impl: As of `upfirdn2d` and `bias_act`.

    Returns:
        (N, C, (H·up + y0 + y1 − (fuh − 1) − (fdh − 1) + down − 1) // down, the same in x), dtype of `x`.

    Raises:
        ValueError: As `upfirdn2d` and `bias_act`, or a negative slope.
        RuntimeError: `impl` is 'native' and there is no compiled kernel for this device and dtype.
    """
    if slope < 0:
        raise ValueError(f"slope is {slope}; expected a number ≥ 0")
    plain = fu is None and fd is None and up == down == 1 and not any(parse_padding(padding))
    if plain:  # one pass: bias and activation
        return bias_act(x, b, act="lrelu", alpha=slope, gain=gain, clamp=clamp, impl=impl)
    x = bias_act(x, b, act="linear", impl=impl)
    x = upfirdn2d(x, fu, up=up, padding=padding, flip_filter=flip_filter, gain=up**2, impl=impl)
    x = bias_act(x, None, act="lrelu", alpha=slope, gain=gain, clamp=clamp, impl=impl)
    return upfirdn2d(x, fd, down=down, flip_filter=flip_filter, impl=impl)
