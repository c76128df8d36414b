"""Pictures on disk: the one rule from float to uint8, PNG files and grids of them."""

from __future__ import annotations

import io
import math
import os

import numpy as np
import torch
from PIL import Image

from refine.dnnlib import replaced_atomically

#: How `to_uint8` quantises, in words; printed beside every number that was measured on quantised images.
QUANTISATION = "uint8: x*127.5+128, clamped to [0, 255], truncated"

PICTURE_CHANNELS = (1, 3, 4)  # grey, RGB, RGBA


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Quantises images as NVIDIA's tools do. Files and metrics both go through here, so their numbers agree.

    Args:
        images: Any shape, floating point, range about [-1, 1]; uint8 passes through unchanged.

    Returns:
        uint8 tensor of the same shape and device: x * 127.5 + 128, clamped to [0, 255], truncated.

    Raises:
        ValueError: If the images are of another integer type, whose range is unknown.
    """
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ValueError(f"images have dtype {images.dtype}, expected floats in [-1, 1] or uint8")
    # Always in float32: bfloat16 has 8 bits of precision, half the grey levels would be lost.
    return images.float().mul(127.5).add(128).clamp(0, 255).to(torch.uint8)


def clamp_images(x: torch.Tensor) -> torch.Tensor:
    """Images as they are saved: clamped to [-1, 1], so that a network may learn from what people see of its output.

    A generator leaves black at -1.1 as well as at -0.9; only the second is seen, and only of the second can a teacher
    say something. A gradient that leads back into the range passes, one that leads further out of it ends here: a
    pixel that is out of range can come back, and need not be pulled to the bound.

    Args:
        x: Any shape, floating point.
    """
    return _Clamp.apply(x)


class _Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        clamped = x.clamp(-1, 1)
        ctx.save_for_backward(x, clamped)
        return clamped

    @staticmethod
    def backward(ctx, gradient):
        # Descent moves x against its gradient: outwards where that and the excess have different signs.
        x, clamped = ctx.saved_tensors
        return gradient.masked_fill((x - clamped) * gradient < 0, 0)


def image_grid(images: torch.Tensor, columns: int | None = None) -> torch.Tensor:
    """Tiles images row by row without gaps.

    Args:
        images: [N, C, H, W], floats in [-1, 1] or uint8, N ≥ 1.
        columns: Images per row; None = the smallest square that holds them.

    Returns:
        uint8 tensor [C, rows * H, columns * W]; cells without an image are black.
    """
    if images.ndim != 4 or images.shape[0] == 0:
        raise ValueError(f"images have shape {tuple(images.shape)}, expected [N, C, H, W] with at least one image")
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    cells = torch.zeros([rows * columns, channels, height, width], dtype=torch.uint8)
    cells[:count] = to_uint8(images).cpu()
    cells = cells.reshape(rows, columns, channels, height, width)
    return cells.permute(2, 0, 3, 1, 4).reshape(channels, rows * height, columns * width)


def to_pil(image: torch.Tensor) -> Image.Image:
    """PIL picture ('L', 'RGB' or 'RGBA') of one image [C, H, W], C 1, 3 or 4, floats in [-1, 1] or uint8."""
    if image.ndim != 3 or image.shape[0] not in PICTURE_CHANNELS:
        raise ValueError(f"image has shape {tuple(image.shape)}, expected [1, H, W], [3, H, W] or [4, H, W]")
    pixels = to_uint8(image.detach()).cpu().numpy()
    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def png_bytes(image: torch.Tensor | Image.Image) -> bytes:
    """The PNG file of one image ([C, H, W] tensor as for `to_pil`, or a PIL picture) as bytes; lossless."""
    picture = image if isinstance(image, Image.Image) else to_pil(image)
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return buffer.getvalue()


def save_png(path: str | os.PathLike, image: torch.Tensor | Image.Image) -> None:
    """Writes one image as PNG; the file appears whole or not at all."""
    data = png_bytes(image)
    with replaced_atomically(path) as temporary:
        temporary.write_bytes(data)


def save_image_grid(path: str | os.PathLike, images: torch.Tensor, columns: int | None = None) -> None:
    """Writes `image_grid(images, columns)` as PNG; the file appears whole or not at all."""
    save_png(path, to_pil(image_grid(images, columns)))
