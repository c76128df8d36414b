"""How the ops call their compiled kernels: one packed record per call, through a C function without torch in it.

The kernels are built at first use by `torch_utils.custom_ops`; where they cannot be had, callers take plain torch.
"""

import ctypes
import struct
from collections.abc import Sequence

import torch

from torch_utils import custom_ops

# The ops that torch.library knows, `torch.ops.refine.*`.
LIBRARY = torch.library.Library("refine", "DEF")

IMPLEMENTATIONS = (None, "native", "torch", "ref")
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # as in kernels.h
_ERRORS = {-1: "unknown dtype", -2: "unknown activation", -3: "out of memory"}


def choose(op: str, x: torch.Tensor, impl: str | None) -> str:
    """'native', 'torch' or 'ref': what runs `op` on `x`.

    Args:
        op: 'upfirdn2d' or 'bias_act'.
        x: The image; only its device and dtype count.
        impl: As the caller asked. None = native where it can be had and serves `x`, else plain torch.

    Raises:
        ValueError: An unknown `impl`.
        RuntimeError: `impl` is 'native' and there is no compiled op for this device and dtype.
    """
    if impl in ("ref", "torch"):
        return impl
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}; expected one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    if x.dtype in DTYPES and _available(op, x.device.type):
        return "native"
    if impl == "native":
        raise RuntimeError(f"{op} has no compiled kernel for {x.dtype} on {x.device.type}")
    return "torch"


@torch.compiler.assume_constant_result  # a compiled graph keeps the choice it was traced with
def _available(op: str, device_type: str) -> bool:
    return device_type in ("cpu", "cuda") and custom_ops.load(op, device_type) is not None


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the kernels compute in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether the channels of a pixel lie side by side; False where both readings hold."""
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def dense(x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """`x` without gaps or overlaps, in one of the two layouts."""
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def threads_and_stream(device: torch.device) -> tuple[int, int]:
    """The two last fields of a record; kernels run on torch's current stream."""
    if device.type == "cuda":
        return 1, torch.cuda.current_stream(device).cuda_stream
    return torch.get_num_threads(), 0


def call(op: str, device: torch.device, layout: struct.Struct, fields: Sequence[int | float]) -> None:
    """Run a compiled op.

    Raises:
        RuntimeError: The op reports an error.
    """
    function = getattr(custom_ops.load(op, device.type), f"refine_{op}")
    if device.type == "cuda":
        with torch.cuda.device(device):
            status = function(layout.pack(*fields))
    else:
        status = function(layout.pack(*fields))
    if status:
        raise RuntimeError(f"{op} on {device}: {_ERRORS.get(status, f'CUDA error {status}')}")


assert ctypes.sizeof(ctypes.c_void_p) == 8, "the records hold 64-bit addresses"
