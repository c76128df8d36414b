"""Upsample, pad, FIR-filter and downsample images: the one resampling primitive of StyleGAN2.

Every channel is treated alike: (1) insert up−1 zeros after each sample, (2) pad, or crop where the padding is negative,
(3) filter without further padding, (4) keep every down-th sample, beginning with the first. All of it is plain torch,
differentiable to any order in x; the filter is a constant.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

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

    Returns:
        (N, C, (H·upy + y0 + y1 − fh) // downy + 1, the same in x), dtype of `x`.

    Raises:
        ValueError: x is no image batch, a factor is below 1, or padding leaves less than one filter's size.
    """
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (N, C, H, W)")
    (upx, upy), (downx, downy) = parse_factor(up), parse_factor(down)
    px0, px1, py0, py1 = parse_padding(padding)
    fw, fh = filter_size(f)
    if x.shape[3] * upx + px0 + px1 < fw or x.shape[2] * upy + py0 + py1 < fh:
        raise ValueError(f"image {tuple(x.shape[2:])} with up {up} and padding {padding} is smaller than the filter")
    x = _insert_zeros(x, upx, upy)
    if px0 or px1 or py0 or py1:
        x = F.pad(x, [px0, px1, py0, py1])  # negative padding crops
    return _filter(x, f, (downy, downx), flip_filter, gain)


def filter2d(x, f, padding: Pair = 0, flip_filter: bool = False, gain: float = 1) -> torch.Tensor:
    """Filter at the same resolution; `padding` adds to the one that keeps the size. Shapes as in `upfirdn2d`."""
    fw, fh = filter_size(f)
    p = add_padding(padding, (fw // 2, (fw - 1) // 2, fh // 2, (fh - 1) // 2))
    return upfirdn2d(x, f, padding=p, flip_filter=flip_filter, gain=gain)


def upsample2d(x, f, up: Pair = 2, padding: Pair = 0, flip_filter: bool = False, gain: float = 1) -> torch.Tensor:
    """Enlarge by `up`; brightness is kept, `padding` adds to the centred one. Shapes as in `upfirdn2d`."""
    (upx, upy), (fw, fh) = parse_factor(up), filter_size(f)
    p = add_padding(padding, (*up_padding(fw, upx), *up_padding(fh, upy)))
    return upfirdn2d(x, f, up=up, padding=p, flip_filter=flip_filter, gain=gain * upx * upy)


def downsample2d(x, f, down: Pair = 2, padding: Pair = 0, flip_filter: bool = False, gain: float = 1) -> torch.Tensor:
    """Shrink by `down`; `padding` adds to the centred one. Shapes as in `upfirdn2d`."""
    (downx, downy), (fw, fh) = parse_factor(down), filter_size(f)
    p = add_padding(padding, (*down_padding(fw, downx), *down_padding(fh, downy)))
    return upfirdn2d(x, f, down=down, padding=p, flip_filter=flip_filter, gain=gain)


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
    return tuple(padding)


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


def _insert_zeros(x: torch.Tensor, upx: int, upy: int) -> torch.Tensor:
    if upx == 1 and upy == 1:
        return x
    n, c, h, w = x.shape
    x = F.pad(x.reshape(n, c, h, 1, w, 1), [0, upx - 1, 0, 0, 0, upy - 1])
    return x.reshape(n, c, h * upy, w * upx)


def _filter(x: torch.Tensor, f: torch.Tensor | None, stride: tuple[int, int], flip: bool, gain: float) -> torch.Tensor:
    """Depthwise filtering and decimation; 1-D taps take one pass per axis."""
    if f is None:
        x = x[:, :, :: stride[0], :: stride[1]]
        return x if gain == 1 else x * gain
    f = f * gain ** (f.ndim / 2)
    f = (f if flip else f.flip(tuple(range(f.ndim)))).to(x)
    channels = x.shape[1]
    if f.ndim == 2:
        return F.conv2d(x, f.expand(channels, 1, *f.shape), stride=stride, groups=channels)
    x = F.conv2d(x, f[:, None].expand(channels, 1, -1, 1), stride=(stride[0], 1), groups=channels)
    return F.conv2d(x, f[None, :].expand(channels, 1, 1, -1), stride=(1, stride[1]), groups=channels)
