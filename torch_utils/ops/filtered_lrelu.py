"""Bias, upsampling, leaky ReLU and downsampling in one call: the alias-free nonlinearity of StyleGAN3.

A pointwise nonlinearity makes frequencies that the sampling rate of its input cannot hold. So it is applied at a higher
rate, and what the output's rate cannot hold is filtered away (Karras et al., arXiv 2106.12423, section 3.2).

The compiled kernels take planes, (N, C, H, W), keep what lies between the filters in the cache, and
for the backward pass two bits a number of it. The reference is composed of `upfirdn2d` and `bias_act`. Both are
differentiable to any order in x and b.
"""

import functools
import math
import struct

import torch

from refine.torch_utils.ops import native
from refine.torch_utils.ops.bias_act import bias_act
from refine.torch_utils.ops.upfirdn2d import Pair, filter_size, parse_factor, parse_padding, upfirdn2d

_GAIN = math.sqrt(2)


def filtered_lrelu(
    x: torch.Tensor,
    fu: torch.Tensor | None = None,
    fd: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: Pair = 0,
    gain: float = _GAIN,
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
        impl: 'native' = the compiled kernel, 'torch' or 'ref' = composed of the other ops in this implementation.
            None = the compiled kernel where it is available and pays off, else composed of what is.

    Returns:
        (N, C, (H·up + y0 + y1 − (fuh − 1) − (fdh − 1) + down − 1) // down, the same in x), dtype of `x`.

    Raises:
        ValueError: As `upfirdn2d` and `bias_act`, or a negative slope.
        RuntimeError: `impl` is 'native' and there is no compiled kernel for this device and dtype.
    """
    if slope < 0:
        raise ValueError(f"slope is {slope}; expected a number ≥ 0")
    padding = parse_padding(padding)
    if fu is None and fd is None and up == down == 1 and not any(padding):  # one pass: bias and activation
        return bias_act(x, b, act="lrelu", alpha=slope, gain=gain, clamp=clamp, impl=impl)
    if impl is None and not _serves(x, fu, fd, up, down):
        return composed(x, fu, fd, b, up, down, padding, gain, slope, clamp, flip_filter)
    if native.choose("filtered_lrelu", x, impl) != "native":
        return composed(x, fu, fd, b, up, down, padding, gain, slope, clamp, flip_filter, impl)
    mid, size = _checked_sizes(x, fu, fd, b, up, down, padding, clamp)
    differentiable = torch.is_grad_enabled() and (x.requires_grad or (b is not None and b.requires_grad))
    step = _LRELU_AND_MASK if differentiable else _LRELU
    b = b if b is None else b.to(x.dtype)
    slopes = (float(gain), float(slope), -1.0 if clamp is None else float(clamp))
    geometry = (up, down, mid, size, (padding[0], padding[2]), (0, 0), flip_filter)
    return _native(x, b, fu, fd, None, step, *geometry, float(up**2), *slopes)[0]


def composed(
    x, fu, fd, b=None, up=1, down=1, padding=0, gain=_GAIN, slope=0.2, clamp=None, flip_filter=False, impl=None
) -> torch.Tensor:
    """`filtered_lrelu` as it is defined, of `bias_act` and `upfirdn2d`, whose kernels `impl` chooses."""
    x = bias_act(x, b, act="linear", impl=impl)
    x = upfirdn2d(x, fu, up=up, padding=padding, flip_filter=flip_filter, gain=up**2, impl=impl)
    x = bias_act(x, None, act="lrelu", alpha=slope, gain=gain, clamp=clamp, impl=impl)
    return upfirdn2d(x, fd, down=down, flip_filter=flip_filter, impl=impl)


def _serves(x, fu, fd, up, down) -> bool:
    """Whether the kernel takes such a call, and its derivative."""
    if native.layout_of(x) != torch.contiguous_format:
        return False
    if x.device.type != "cuda":
        return x.device.type == "cpu"
    extents, acc_bytes = (_extent(fu), _extent(fd)), native.acc_dtype(x.dtype).itemsize
    ways = (*extents, up, down), (*extents[::-1], down, up)
    return all(_plan_tile(*way, acc_bytes) is not None for way in ways)


def _checked_sizes(x, fu, fd, b, up, down, padding, clamp):
    """(height, width) between the filters and of the output. Raises ValueError as the composed form does."""
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (N, C, H, W)")
    parse_factor(up), parse_factor(down)
    if clamp is not None and clamp < 0:
        raise ValueError(f"clamp is {clamp}; expected None or a number ≥ 0")
    if b is not None and (b.ndim != 1 or b.shape[0] != x.shape[1]):
        raise ValueError(f"bias has shape {tuple(b.shape)}; expected ({x.shape[1]},) for dimension 1 of x")
    (n_u, n_d), (x0, x1, y0, y1) = (filter_size(fu), filter_size(fd)), padding
    mid = (x.shape[2] * up + y0 + y1 - n_u[1] + 1, x.shape[3] * up + x0 + x1 - n_u[0] + 1)
    if mid[0] < max(n_d[1], 1) or mid[1] < max(n_d[0], 1):
        raise ValueError(f"image {tuple(x.shape[2:])} with up {up} and padding {padding} is smaller than the filters")
    return mid, ((mid[0] - n_d[1]) // down + 1, (mid[1] - n_d[0]) // down + 1)


# The compiled kernel, registered as torch.ops.refine.filtered_lrelu: enlarge, apply slopes, shrink. Forward the slopes
# are those of lrelu; in derivatives of any order they come from the mask, for which the op is linear, and whose layout
# is the kernel's own business.

_RECORD, _TILES = struct.Struct("=6q2q8q4q2q5q4d"), struct.Struct("=9q")  # of filtered_lrelu.h
_LRELU, _LRELU_AND_MASK, _APPLY_MASK = range(3)
_THREADS = 256  # of a block
_FACTORS = [(2, 2), (4, 2), (2, 4)]  # with kernels of their own, which for others is called <0,0>

native.kernels("filtered_lrelu", *(f"refine::lrelu_kernel<{u},{d},{{}}>" for u, d in [*_FACTORS, (0, 0)]))


def _mask_size(x, mid, up, down, step):
    """On a CPU two bytes for every vector of a lane, which are even in number; on a GPU one for every four numbers."""
    if step != _LRELU_AND_MASK:
        return 0
    if x.device.type == "cuda":
        return x.shape[0] * x.shape[1] * mid[0] * _ceil_div(mid[1], 4)
    lanes, pair = math.lcm(up, down), 8 if x.dtype == torch.float64 else 16
    return x.shape[0] * x.shape[1] * mid[0] * lanes * _ceil_div(_ceil_div(mid[1], lanes), pair) * 4


def _ceil_div(a, b):
    return -(-a // b)


def _empty(x, b, fu, fd, mask, step, up, down, mid, size, *rest):
    y = x.new_empty((*x.shape[:2], *size))
    return y, x.new_empty(_mask_size(x, mid, up, down, step), dtype=torch.uint8)


def _kernel(x, b, fu, fd, mask, step, up, down, mid, size, pad, inset, flip, *numbers):
    y, made = _empty(x, b, fu, fd, mask, step, up, down, mid, size)
    if y.numel() == 0:
        return y, made
    if native.function("filtered_lrelu", x) is None:  # e.g. a graph exported where there was a compiler
        if step != _LRELU:
            raise RuntimeError(f"filtered_lrelu has no compiled kernel for {x.device.type}, which the derivative needs")
        _, gain, slope, clamp = numbers
        padding, clamp = _full_padding(x, fu, up, mid, pad), None if clamp < 0 else clamp
        return composed(x, fu, fd, b, up, down, padding, gain, slope, clamp, flip), made
    made.zero_()  # not every number between the filters is one that an output needs
    x = x.contiguous()
    b = b if b is None else b.contiguous()
    fu, fd = (_taps(f, x) for f in (fu, fd))
    addresses = [0 if t is None else t.data_ptr() for t in (x, b, fu, fd, made if mask is None else mask, y)]
    codes = (native.DTYPES[x.dtype], step)
    geometry = (*x.shape, *mid, *size, *_extent(fu), *_extent(fd), up, down, *pad, *inset, flip)
    record = _RECORD.pack(*addresses, *codes, *geometry, *numbers)
    if not x.is_cuda:
        native.run("filtered_lrelu", x, record)
        return y, made
    tile = _plan_tile(_extent(fu), _extent(fd), up, down, native.acc_dtype(x.dtype).itemsize)
    if tile is None:
        raise RuntimeError(f"filtered_lrelu on {x.device}: the filters are too large for a tile; use impl='torch'")
    tiles = (_ceil_div(size[0], tile[0]), _ceil_div(size[1], tile[1]))
    form = f"{up},{down}" if (up, down) in _FACTORS else "0,0"
    expression = f"refine::lrelu_kernel<{form},{native.NUMBERS[x.dtype]}>"
    blocks, shared = min(x.shape[0] * x.shape[1] * math.prod(tiles), native.MOST_BLOCKS), tile[-1]
    tiling = _TILES.pack(*tile[:-1], *tiles, numbers[-1] >= 0)
    native.launch("filtered_lrelu", x, expression, blocks, _THREADS, shared, record + tiling)
    return y, made


@functools.lru_cache(maxsize=1024)
def _plan_tile(fu, fd, up, down, acc_bytes):
    """(outputs of a tile, numbers between the filters and samples that they need, each (height, width), bytes of shared
    memory); None where not even one output has room."""
    (fu_h, fu_w), (fd_h, fd_w) = fu, fd
    height = width = 32
    while True:
        between = ((height - 1) * down + (fd_h or fd_w), _ceil_div((width - 1) * down + fd_w + 3, 4) * 4)
        held = tuple((n + taps - 2) // up + 2 for n, taps in zip(between, (fu_h or fu_w, fu_w), strict=True))
        work = max(0 if fu_h else held[0] * between[1], 0 if fd_h else between[0] * width)
        numbers = max(fu_h, 1) * fu_w + max(fd_h, 1) * fd_w + math.prod(held) + math.prod(between) + work
        if numbers * acc_bytes <= native.SHARED_BYTES:
            return height, width, *between, *held, numbers * acc_bytes
        if height == width == 1:
            return None
        height, width = (height // 2, width) if height >= width else (height, width // 2)


def _full_padding(x, fu, up, mid, pad):
    """(x0, x1, y0, y1) of an image between the filters of size `mid`."""
    fw, fh = filter_size(fu)
    return pad[0], mid[1] + fw - 1 - x.shape[3] * up - pad[0], pad[1], mid[0] + fh - 1 - x.shape[2] * up - pad[1]


def _taps(f, x):
    dtype = native.acc_dtype(x.dtype)
    if f is None:
        return torch.ones([1], dtype=dtype, device=x.device)
    return f.to(x.device, dtype).contiguous()


def _extent(f):
    if f is None:
        return 0, 1
    return (0, len(f)) if f.ndim == 1 else tuple(f.shape)


def _save(ctx, inputs, output):
    x, _, ctx.fu, ctx.fd, mask, _, *ctx.options = inputs
    ctx.in_size = tuple(x.shape[2:])
    ctx.save_for_backward(output[1] if mask is None else mask)


def _backward(ctx, dy, _):
    """Up and down, the filters and their paddings change places."""
    (mask,) = ctx.saved_tensors
    up, down, mid, _, pad, inset, flip, *numbers = ctx.options
    turned = [
        tuple(taps - 1 - zeros for taps, zeros in zip(filter_size(f), z, strict=True))
        for f, z in ((ctx.fd, inset), (ctx.fu, pad))
    ]
    dx, _ = _native(
        dy, None, ctx.fd, ctx.fu, mask, _APPLY_MASK, down, up, mid, ctx.in_size, *turned, not flip, *numbers
    )
    db = dx.sum([0, 2, 3]) if ctx.needs_input_grad[1] else None
    return (dx if ctx.needs_input_grad[0] else None, db, *[None] * 15)


_native = native.register(
    "filtered_lrelu(Tensor x, Tensor? b, Tensor? fu, Tensor? fd, Tensor? mask, int step, int up, int down, "
    "SymInt[] mid, SymInt[] size, SymInt[] pad, SymInt[] inset, bool flip, float scale, float gain, float slope, "
    "float clamp) -> (Tensor, Tensor)",
    _kernel,
    _empty,
    _save,
    _backward,
)
