"""2-D convolution with FIR-filtered up- or downsampling around it."""

import platform
from collections.abc import Callable

import torch
import torch.nn.functional as F

from refine.torch_utils.ops.conv3x3 import conv2d
from refine.torch_utils.ops.upfirdn2d import (
    Pair,
    add_padding,
    down_padding,
    filter_size,
    up_padding,
    upfirdn2d,
)

_CPU_COMPUTES_IN_HALF = (
    platform.machine() not in ("x86_64", "AMD64") or "AVX512" in torch.backends.cpu.get_cpu_capability()
)


def conv2d_resample(
    x: torch.Tensor,
    w: torch.Tensor,
    f: torch.Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: Pair = 0,
    groups: int = 1,
    flip_weight: bool = True,
) -> torch.Tensor:
    """Enlarge by `up` with `f`, convolve with `w`, shrink by `down` with `f`; all padding happens once, at the start.

    Args:
        x: (N, Cin, H, W).
        w: (Cout, Cin / groups, kh, kw).
        f: Filter from `upfirdn2d.setup_filter`, or None for plain zero-stuffing and decimation.
        up: Integer upsampling factor.
        down: Integer downsampling factor.
        padding: int, (x, y) or (x0, x1, y0, y1), in the upsampled image, on top of the padding that centres the filter.
        groups: As in `torch.nn.functional.conv2d`.
        flip_weight: True = correlation, as `conv2d` does; False = convolution (the kernel is reversed).

    Returns:
        (N, Cout, H', W'), differentiable to any order in `x` and `w`.

    Raises:
        ValueError: A factor below 1, or an image smaller than filter or kernel.
    """
    if up < 1 or down < 1:
        raise ValueError(f"up is {up} and down is {down}; expected at least 1")
    fw, fh = filter_size(f)
    p = add_padding(padding, (0, 0, 0, 0))
    if up > 1:
        p = add_padding(p, (*up_padding(fw, up), *up_padding(fh, up)))
    if down > 1:
        p = add_padding(p, (*down_padding(fw, down), *down_padding(fh, down)))
    pointwise = w.shape[2] == w.shape[3] == 1

    # The cheapest order that gives the same result: convolve at the lowest resolution that is right.
    if pointwise and up == 1 and down > 1:
        return _conv(upfirdn2d(x, f, down=down, padding=p), w, groups, flip_weight)
    if pointwise and up > 1 and down == 1:
        return upfirdn2d(_conv(x, w, groups, flip_weight), f, up=up, padding=p, gain=up**2)
    if up == 1 and down > 1:
        return _conv(upfirdn2d(x, f, padding=p), w, groups, flip_weight, stride=down)
    if up > 1:
        x = _upsampling_conv(x, w, f, up, p, groups, flip_weight)
        return upfirdn2d(x, f, down=down) if down > 1 else x
    return _conv(x, w, groups, flip_weight, padding=p)


def _conv(x, w, groups, flip_weight, stride=1, padding=(0, 0, 0, 0)):
    x0, x1, y0, y1 = padding
    if not (x0 == x1 >= 0 and y0 == y1 >= 0):  # conv2d itself pads evenly only
        x, x0, y0 = F.pad(x, padding), 0, 0
    w = w if flip_weight else w.flip([2, 3])
    return _convolve(conv2d, x, w, stride=stride, padding=(y0, x0), groups=groups)


def _upsampling_conv(x, w, f, up, p, groups, flip_weight):
    """Convolve the zero-stuffed image without making it (a transposed convolution), then filter.

    The transposed convolution lets the kernel hang over by k−1 at the start and k−up at the end, which the filter's
    padding takes back; it convolves with the stored kernel, so a correlation needs the reversed one.
    """
    cout, cin_group, kh, kw = w.shape
    w = w.flip([2, 3]) if flip_weight else w
    w = w.reshape(groups, cout // groups, cin_group, kh, kw).transpose(1, 2)
    w = w.reshape(groups * cin_group, cout // groups, kh, kw)
    x = _convolve(F.conv_transpose2d, x, w, stride=up, groups=groups)
    p = add_padding(p, (1 - kw, up - kw, 1 - kh, up - kh))
    return upfirdn2d(x, f, padding=p, gain=up**2)


def _convolve(function: Callable, x: torch.Tensor, w: torch.Tensor, **options) -> torch.Tensor:
    """A convolution of torch's. On a CPU that has no half-precision arithmetic it is computed in float32, where torch's
    own takes 5 to 60 times as long (docs/ops.md); the result has the dtype that autocast or `x` asks for."""
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return function(x, w, **options)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if dtype == torch.float32 or _CPU_COMPUTES_IN_HALF:
        return function(x, w, **options)
    with torch.autocast("cpu", enabled=False):
        return function(x.float(), w.float(), **options).to(dtype)
