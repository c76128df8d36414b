"""How the CUDA kernels for the frequent filters of `upfirdn2d` share the work (upfirdn2d.cu)."""

import functools
import math
import struct
from typing import NamedTuple

import torch

from refine.torch_utils.ops import native

FACTORS = ((1, 1), (2, 1), (1, 2))  # up and down, along both axes
TAPS = 4
_THREADS = 128
_PLANE_PATCH, _PIXEL_PATCH = 4, 2  # outputs along each side, as in upfirdn2d.cu
_RECORD = struct.Struct("=13q")  # what PatchesRecord adds
_PLANE_KERNEL = "refine::plane_kernel<{0},{1},4,{{}}>"
_PIXEL_KERNEL = "refine::pixel_kernel<{0},{1},4,{{}},{2}>"

KERNELS = [
    *(_PLANE_KERNEL.format(*factors) for factors in FACTORS),
    *(_PIXEL_KERNEL.format(*factors, wide) for factors in FACTORS for wide in ("true", "false")),
]


class Launch(NamedTuple):
    """What `native.launch` asks for, and what the record says beyond the geometry."""

    expression: str
    blocks: int
    threads: int
    shared: int
    tail: bytes


@functools.lru_cache(maxsize=1024)
def plan(
    x_size: tuple[int, ...],
    size: tuple[int, ...],
    f_size: tuple[int, ...],
    dtype: torch.dtype,
    layout: torch.memory_format,
    up: tuple[int, int],
    down: tuple[int, int],
    padding: tuple[int, ...],
    aligned: bool,
) -> Launch | None:
    """For images of `x_size` and outputs of `size`, (N, C, H, W); None where these kernels are not for.

    Args:
        f_size: Of the filter.
        layout: Of the images.
        up, down, padding: As in `upfirdn2d`, parsed.
        aligned: Whether the images begin at a multiple of 16 bytes.
    """
    factors = (up[0], down[0])
    square = tuple(f_size) == (TAPS, TAPS) and up[0] == up[1] and down[0] == down[1] and factors in FACTORS
    if not square or max(math.prod(x_size[1:]), math.prod(size[1:])) >= 2**31:
        return None
    shift = padding[2] % up[0], padding[0] % up[0]  # so that a patch begins with the first tap
    make = _pixels if layout == torch.channels_last else _planes
    launch = make(size, dtype, *factors, shift, aligned)
    return launch if launch.blocks <= native.MOST_BLOCKS else None


def _planes(size, dtype, up, down, shift, aligned) -> Launch:
    n, c, _, out_w = size
    acc_bytes = native.acc_dtype(dtype).itemsize
    across_y, across_x = (-(-(out + s) // _PLANE_PATCH) for out, s in zip(size[2:], shift, strict=True))
    patches_x = min(across_x, 16)
    patches_y = min(across_y, _THREADS // patches_x)
    whole = (patches_y, patches_x) == (across_y, across_x)
    planes = min(_THREADS // (patches_y * patches_x), n * c) if whole else 1
    samples, step = ((_PLANE_PATCH - 1) * down + TAPS - 1) // up + 1, _PLANE_PATCH * down // up
    most = 16 // acc_bytes
    vector = 2 if step % most else most
    pitch = (patches_x - 1) * step + -(-samples // vector) * vector
    pitch = -(-pitch // vector) * vector
    while True:
        held_h = (patches_y - 1) * step + samples
        shared = planes * held_h * pitch * acc_bytes
        if shared <= native.SHARED_BYTES:
            break
        if planes > 1:
            planes = (planes + 1) // 2
        else:
            patches_y = (patches_y + 1) // 2
    tiles = -(-across_y // patches_y), -(-across_x // patches_x)
    whole_rows = out_w % _PLANE_PATCH == 0 and shift[1] == 0
    by = (_reciprocal(held_h), _reciprocal(patches_y * patches_x), _reciprocal(patches_x))
    tail = _RECORD.pack(planes, patches_y, patches_x, *tiles, *shift, held_h, pitch, *by, whole_rows)
    expression = _PLANE_KERNEL.format(up, down).format(native.NUMBERS[dtype])
    return Launch(expression, -(-n * c // planes) * math.prod(tiles), _THREADS, shared, tail)


def _pixels(size, dtype, up, down, shift, aligned) -> Launch:
    n, c = size[:2]
    count = 16 // dtype.itemsize
    wide = aligned and c % count == 0
    packs_of_all = c // count if wide else c
    packs = min(packs_of_all, 16)
    if packs_of_all % packs:
        packs = max((p for p in range(8, 17) if packs_of_all % p == 0), default=16)
    across_y, across_x = (-(-(out + s) // _PIXEL_PATCH) for out, s in zip(size[2:], shift, strict=True))
    patches_x = min(across_x, 1 << math.isqrt(_THREADS // packs).bit_length() - 1)
    patches_y = min(across_y, _THREADS // packs // patches_x)
    tiles = -(-across_y // patches_y), -(-across_x // patches_x)
    by = (0, 0, _reciprocal(patches_x))
    tail = _RECORD.pack(packs, patches_y, patches_x, *tiles, *shift, 0, 0, *by, False)
    expression = _PIXEL_KERNEL.format(up, down, str(wide).lower()).format(native.NUMBERS[dtype])
    blocks = n * -(-packs_of_all // packs) * math.prod(tiles)
    return Launch(expression, blocks, packs * patches_y * patches_x, 0, tail)


def _reciprocal(divisor: int) -> int:
    return -(-(2**32) // divisor)
