"""Upsample, pad, FIR-filter and downsample images: the one resampling primitive of StyleGAN2.

Every channel is treated alike: (1) insert up−1 zeros after each sample, (2) pad, or crop where the padding is negative,
(3) filter without further padding, (4) keep every down-th sample, beginning with the first. Differentiable to any order
in x; the filter is a constant.

Three implementations give the same numbers: compiled kernels (kernels.h, upfirdn2d.cpp, upfirdn2d.cu), the fastest
plain torch, and the reference, which follows the four steps to the letter.
"""

import functools
import math
import struct
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from refine.torch_utils.ops import native

Pair = int | Sequence[int]


def setup_filter(
    f: torch.Tensor | Sequence | float | None,
    device: torch.device | str = "cpu",
    normalize: bool = True,
    flip_filter: bool = False,
    gain: float = 1,
    separable: bool | None = None,
) -> torch.Tensor:
    """Prepare a filter for `upfirdn2d`.

    Args:
        f: 2-D taps (fh, fw), 1-D taps, one number, or None for a single tap of 1.
        device: Where the result lives.
        normalize: Divide by the sum of all taps.
        flip_filter: Reverse the taps along every axis.
        gain: Factor on the image that the filter will apply in all.
        separable: Keep 1-D taps as they are (applied along both axes) instead of their outer product.
            None = keep them from 8 taps on, where two passes are cheaper.

    Returns:
        float32 (fh, fw), or (taps,) when separable.

    Raises:
        ValueError: The taps have more than two axes or are empty.
    """
    f = torch.as_tensor(1.0 if f is None else f, dtype=torch.float32)
    if f.ndim > 2 or f.numel() == 0:
        raise ValueError(f"filter has shape {tuple(f.shape)}; expected 1-D or 2-D taps")
    if f.ndim == 0:
        f = f[None]
    if separable is None:
        separable = f.ndim == 1 and f.numel() >= 8
    if f.ndim == 1 and not separable:
        f = torch.outer(f, f)
    if f.ndim != (1 if separable else 2):
        raise ValueError(f"filter has shape {tuple(f.shape)}; a separable filter needs 1-D taps")
    if normalize:
        f = f / f.sum()
    if flip_filter:
        f = f.flip(tuple(range(f.ndim)))
    return (f * gain ** (f.ndim / 2)).to(device)


def upfirdn2d(
    x: torch.Tensor,
    f: torch.Tensor | None,
    up: Pair = 1,
    down: Pair = 1,
    padding: Pair = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str | None = None,
) -> torch.Tensor:
    """Upsample, pad, filter and downsample.

    Args:
        x: (N, C, H, W), any floating dtype.
        f: From `setup_filter`: float32 (fh, fw), or (taps,) applied along both axes; None = identity.
        up: Upsampling factor, int or (x, y).
        down: Downsampling factor, int or (x, y).
        padding: In the upsampled image: int, (x, y) or (x0, x1, y0, y1); negative numbers crop.
        flip_filter: False = convolution (the filter is reversed), True = correlation.
        gain: Factor on the result.
        impl: 'native' = compiled kernels, 'torch' = the fastest plain torch, 'ref' = the reference.
            None = native where it is available, else plain torch.

    Returns:
        (N, C, (H·upy + y0 + y1 − fh) // downy + 1, the same in x), dtype of `x`.

    Raises:
        ValueError: x is no image batch, a factor is below 1, or padding leaves less than one filter's size.
        RuntimeError: `impl` is 'native' and there is no compiled kernel for this device and dtype.
    """
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (N, C, H, W)")
    up, down, padding = parse_factor(up), parse_factor(down), parse_padding(padding)
    (upx, upy), (px0, px1, py0, py1), (fw, fh) = up, padding, filter_size(f)
    if x.shape[3] * upx + px0 + px1 < fw or x.shape[2] * upy + py0 + py1 < fh:
        raise ValueError(f"image {tuple(x.shape[2:])} with up {up} and padding {padding} is smaller than the filter")
    chosen = native.choose("upfirdn2d", x, impl)
    if chosen == "native":
        return _native(x, f, up, down, padding, flip_filter, gain)
    return (_reference if chosen == "ref" else _plain_torch)(x, f, up, down, padding, flip_filter, gain)


def upsample2d(
    x, f, up: Pair = 2, padding: Pair = 0, flip_filter: bool = False, gain: float = 1, impl=None
) -> torch.Tensor:
    """Enlarge by `up`; brightness is kept, `padding` adds to the centred one. Shapes as in `upfirdn2d`."""
    (upx, upy), (fw, fh) = parse_factor(up), filter_size(f)
    p = add_padding(padding, (*up_padding(fw, upx), *up_padding(fh, upy)))
    return upfirdn2d(x, f, up=up, padding=p, flip_filter=flip_filter, gain=gain * upx * upy, impl=impl)


def downsample2d(
    x, f, down: Pair = 2, padding: Pair = 0, flip_filter: bool = False, gain: float = 1, impl=None
) -> torch.Tensor:
    """Shrink by `down`; `padding` adds to the centred one. Shapes as in `upfirdn2d`."""
    (downx, downy), (fw, fh) = parse_factor(down), filter_size(f)
    p = add_padding(padding, (*down_padding(fw, downx), *down_padding(fh, downy)))
    return upfirdn2d(x, f, down=down, padding=p, flip_filter=flip_filter, gain=gain, impl=impl)


# Geometry, shared with conv2d_resample.


def parse_factor(factor: Pair) -> tuple[int, int]:
    """int or (x, y) → (x, y)."""
    x, y = (factor, factor) if isinstance(factor, int) else factor
    if x < 1 or y < 1:
        raise ValueError(f"resampling factor is {factor}; expected at least 1")
    return x, y


def parse_padding(padding: Pair) -> tuple[int, int, int, int]:
    """int, (x, y) or (x0, x1, y0, y1) → (x0, x1, y0, y1)."""
    if isinstance(padding, int):
        return padding, padding, padding, padding
    if len(padding) == 2:
        return padding[0], padding[0], padding[1], padding[1]
    if len(padding) != 4:
        raise ValueError(f"padding is {padding}; expected an int, (x, y) or (x0, x1, y0, y1)")
    x0, x1, y0, y1 = padding
    return x0, x1, y0, y1


def add_padding(padding: Pair, extra: Sequence[int]) -> tuple[int, ...]:
    """Side by side sum of a user's padding and (x0, x1, y0, y1)."""
    return tuple(p + e for p, e in zip(parse_padding(padding), extra, strict=True))


def filter_size(f: torch.Tensor | None) -> tuple[int, int]:
    """(width, height) in taps; 1-D taps serve both axes."""
    return (1, 1) if f is None else (f.shape[-1], f.shape[0])


def up_padding(taps: int, up: int) -> tuple[int, int]:
    """Padding that keeps an image centred when enlarged by `up`."""
    return (taps + up - 1) // 2, (taps - up) // 2


def down_padding(taps: int, down: int) -> tuple[int, int]:
    """Padding that keeps an image centred when shrunk by `down`."""
    return (taps - down + 1) // 2, (taps - down) // 2


# The reference: the four steps as they are defined.


def _reference(x, f, up, down, padding, flip_filter, gain):
    x = _pad(_insert_zeros(x, *up), padding)
    return _filter(x, f, down, flip_filter, gain)


def _insert_zeros(x: torch.Tensor, upx: int, upy: int) -> torch.Tensor:
    if upx == 1 and upy == 1:
        return x
    n, c, h, w = x.shape
    x = F.pad(x.reshape(n, c, h, 1, w, 1), [0, upx - 1, 0, 0, 0, upy - 1])
    return x.reshape(n, c, h * upy, w * upx)


def _pad(x: torch.Tensor, padding: Sequence[int]) -> torch.Tensor:
    """Zeros at the sides with positive padding, then crop the others (which may take away some of those zeros)."""
    if any(p > 0 for p in padding):
        x = F.pad(x, [max(p, 0) for p in padding])
    x0, x1, y0, y1 = (max(-p, 0) for p in padding)
    return x[:, :, y0 : x.shape[2] - y1, x0 : x.shape[3] - x1]


def _filter(x: torch.Tensor, f: torch.Tensor | None, down: tuple[int, int], flip: bool, gain: float) -> torch.Tensor:
    """Depthwise filtering and decimation; 1-D taps take one pass per axis."""
    stride = (down[1], down[0])
    if f is None:
        x = x[:, :, :: stride[0], :: stride[1]]
        return x if gain == 1 else x * gain
    f = f.to(native.acc_dtype(x.dtype)) * gain ** (f.ndim / 2)
    f = (f if flip else f.flip(tuple(range(f.ndim)))).to(x)
    channels = x.shape[1]
    if f.ndim == 2:
        return F.conv2d(x, f.expand(channels, 1, *f.shape), stride=stride, groups=channels)
    x = F.conv2d(x, f[:, None].expand(channels, 1, -1, 1), stride=(stride[0], 1), groups=channels)
    return F.conv2d(x, f[None, :].expand(channels, 1, 1, -1), stride=(1, stride[1]), groups=channels)


# Plain torch at its fastest: no zero-stuffed image, and no padded copy where a convolution can pad by itself.


def _plain_torch(x, f, up, down, padding, flip_filter, gain):
    if f is None or x.numel() == 0:
        return _reference(x, f, up, down, padding, flip_filter, gain)
    f = f.to(native.acc_dtype(x.dtype)) * gain ** (f.ndim / 2)
    f = (f if flip_filter else f.flip(tuple(range(f.ndim)))).to(x)
    if f.ndim == 2:
        return _depthwise(x, f, up, down, padding)
    x0, x1, y0, y1 = padding
    x = _depthwise(x, f[None, :], (up[0], 1), (down[0], 1), (x0, x1, 0, 0))
    return _depthwise(x, f[:, None], (1, up[1]), (1, down[1]), (0, 0, y0, y1))


def _depthwise(x, f, up, down, padding):
    """Correlate every channel with `f` (fh, fw)."""
    fh, fw = f.shape
    weight = f.expand(x.shape[1], 1, fh, fw)
    x0, x1, y0, y1 = padding
    if up == (1, 1):
        if x0 == x1 >= 0 and y0 == y1 >= 0:
            return F.conv2d(x, weight, stride=down[::-1], padding=(y0, x0), groups=x.shape[1])
        return F.conv2d(_pad(x, padding), weight, stride=down[::-1], groups=x.shape[1])
    # A transposed convolution makes every output that a sample reaches; the padding says which of them are wanted.
    y = F.conv_transpose2d(x, weight.flip([2, 3]), stride=up[::-1], groups=x.shape[1])
    y = _pad(y, [x0 - fw + 1, x1 - fw + up[0], y0 - fh + 1, y1 - fh + up[1]])
    return y[:, :, :: down[1], :: down[0]]


# The compiled kernels, registered as torch.ops.refine.upfirdn2d.

_ADDRESSES, _GEOMETRY = struct.Struct("=3q"), struct.Struct("=17qd")  # Upfirdn2dRecord of kernels.h
_TILING = struct.Struct("=8q")  # what TilesRecord adds
_TILE_THREADS = 256
_FREQUENT = {(1, 1, 1, 1): "1,1,4", (2, 2, 1, 1): "2,1,4", (1, 1, 2, 2): "1,2,4"}  # (*up, *down), with 4×4 taps

native.kernels(
    "upfirdn2d",
    *(f"refine::tile_kernel<{form},{{}}>" for form in (*_FREQUENT.values(), "0,0,0")),
    "refine::direct_kernel<{}>",
)


def _out_size(x_size, taps, up, down, padding):
    (n, c, h, w), (fw, fh), (x0, x1, y0, y1) = x_size, taps, padding
    return n, c, (h * up[1] + y0 + y1 - fh) // down[1] + 1, (w * up[0] + x0 + x1 - fw) // down[0] + 1


def _empty_output(x, f, up, down, padding, flip_filter, gain):
    size = _out_size(x.shape, filter_size(f), up, down, padding)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=native.layout_of(x))


def _kernel(x, f, up, down, padding, flip_filter, gain):
    up, down, padding = tuple(up), tuple(down), tuple(padding)
    if native.function("upfirdn2d", x) is None:
        y = _plain_torch(x, f, up, down, padding, flip_filter, gain)
        return y.contiguous(memory_format=native.layout_of(x))
    dtype = native.acc_dtype(x.dtype)
    if f is None:
        f = torch.ones([1, 1], dtype=dtype, device=x.device)
    elif f.dtype != dtype or f.device != x.device or not f.is_contiguous():
        f = f.to(x.device, dtype).contiguous()
    if f.ndim == 2 or not x.is_cuda:
        return _run(x, f, up, down, padding, flip_filter, gain)
    (upx, upy), (downx, downy), (x0, x1, y0, y1), gain = up, down, padding, math.sqrt(gain)  # one pass per axis
    x = _run(x, f[None, :], (upx, 1), (downx, 1), (x0, x1, 0, 0), flip_filter, gain)
    return _run(x, f[:, None], (1, upy), (1, downy), (0, 0, y0, y1), flip_filter, gain)


def _run(x, f, *options):
    layout = native.layout_of(x)
    size, geometry = _plan(x.shape, f.shape, x.dtype, layout, *options)
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)
    if y.numel() == 0:
        return y
    x = x.contiguous(memory_format=layout)
    record = _ADDRESSES.pack(x.data_ptr(), f.data_ptr(), y.data_ptr()) + geometry
    if x.is_cuda:
        expression, blocks, shared, tiling = _plan_launch(f.shape, size, x.dtype, layout, *options[:2])
        native.launch("upfirdn2d", x, expression, blocks, _TILE_THREADS, shared, record + tiling)
    else:
        native.run("upfirdn2d", x, record)
    return y


@functools.lru_cache(maxsize=1024)  # a network calls the op with the same few sizes again and again
def _plan(x_size, f_size, dtype, layout, up, down, padding, flip_filter, gain):
    """(size of the output, what the record holds between addresses and threads)."""
    size = _out_size(x_size, (f_size[-1], f_size[0]), up, down, padding)
    fh, fw = f_size if len(f_size) == 2 else (0, f_size[0])
    geometry = (*x_size, *size[2:], fh, fw, *up, *down, padding[0], padding[2], flip_filter)
    return size, _GEOMETRY.pack(native.DTYPES[dtype], layout == torch.channels_last, *geometry, gain)


@functools.lru_cache(maxsize=1024)
def _plan_launch(f_size, size, dtype, layout, up, down):
    """(kernel, blocks, bytes of shared memory, what the record says of the tiles).

    Tiles of 32 × 32 outputs of a plane, or 8 × 8 × 32 channels of pixels; halved until the samples that they need, and
    the taps, fit in shared memory. Where not even one output does, the kernel reads everything straight from memory.
    """
    number, (n, c, out_h, out_w), taps = native.NUMBERS[dtype], size, math.prod(f_size)
    acc_bytes = native.acc_dtype(dtype).itemsize
    tile_c = min(c, 32) if layout == torch.channels_last else 1
    tile_h = tile_w = 8 if tile_c >= 16 else 32
    while True:  # outputs beside each other can need so many samples
        held_h = ((tile_h - 1) * down[1] + f_size[0] - 1) // up[1] + 2
        held_w = ((tile_w - 1) * down[0] + f_size[1] - 1) // up[0] + 2
        shared = (held_h * held_w * tile_c + taps) * acc_bytes
        if shared <= native.SHARED_BYTES:
            break
        if tile_c > 1 and tile_h * tile_w <= 16:
            tile_c = (tile_c + 1) // 2
        elif tile_h >= tile_w and tile_h > 1:
            tile_h //= 2
        elif tile_w > 1:
            tile_w //= 2
        elif tile_c > 1:
            tile_c = (tile_c + 1) // 2
        else:
            blocks = -(-math.prod(size) // _TILE_THREADS)
            return f"refine::direct_kernel<{number}>", min(blocks, native.MOST_BLOCKS), 0, b""
    tiles = -(-out_w // tile_w), -(-out_h // tile_h), -(-c // tile_c)
    form = _FREQUENT.get((*up, *down), "0,0,0") if tuple(f_size) == (4, 4) else "0,0,0"
    tiling = _TILING.pack(tile_h, tile_w, tile_c, held_h, held_w, *tiles)
    return f"refine::tile_kernel<{form},{number}>", min(n * math.prod(tiles), native.MOST_BLOCKS), shared, tiling


def _save_geometry(ctx, inputs, output):
    x, ctx.f, ctx.up, ctx.down, ctx.padding, ctx.flip_filter, ctx.gain = inputs
    ctx.in_size, ctx.out_size = x.shape[2:], output.shape[2:]


def _adjoint(ctx, dy):
    """Up and down change places, the filter is reversed, and the padding gives the input's size back."""
    (fw, fh), (h, w), (out_h, out_w) = filter_size(ctx.f), ctx.in_size, ctx.out_size
    (x0, _, y0, _), (upx, upy), (downx, downy) = ctx.padding, ctx.up, ctx.down
    x1 = w * upx - out_w * downx + x0 - upx + 1
    y1 = h * upy - out_h * downy + y0 - upy + 1
    padding = (fw - x0 - 1, x1, fh - y0 - 1, y1)
    dx = _native(dy, ctx.f, ctx.down, ctx.up, padding, not ctx.flip_filter, ctx.gain)
    return dx, None, None, None, None, None, None


_native = native.register(
    "upfirdn2d(Tensor x, Tensor? f, int[] up, int[] down, SymInt[] padding, bool flip_filter, float gain) -> Tensor",
    _kernel,
    _empty_output,
    _save_geometry,
    _adjoint,
)
