"""3×3 convolution with a quarter of the multiplications, for float32 on a CPU; `conv2d` is F.conv2d that knows it.

The compiled kernel (winograd.h, conv3x3.cpp) computes tiles of 4×4 outputs by Winograd's minimal filtering (Lavin &
Gray, arXiv 1509.09308), forward and for both gradients. Its largest error is about twice that of a direct float32
convolution. The result does not depend on the number of threads.
"""

import math
import struct

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from refine.torch_utils.ops import native

# With AVX-512 torch's convolutions are up to twice as fast; the kernel's vectors have 32 bytes everywhere.
_IS_MEASURED = torch.backends.cpu.get_cpu_capability() == "AVX2"


def conv2d(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None = None,
    stride: int = 1,
    padding: int | tuple[int, int] = 0,
    groups: int = 1,
) -> torch.Tensor:
    """`torch.nn.functional.conv2d`, by `conv3x3` where that is possible and faster."""
    if padding in (1, (1, 1)) and stride == 1 and groups == 1 and not native.exporting() and _pays(x, w, b):
        return conv3x3(x, w, b)
    return F.conv2d(x, w, b, stride=stride, padding=padding, groups=groups)


def conv3x3(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None, impl: str | None = None) -> torch.Tensor:
    """F.conv2d(x, w, b, padding=1) for a 3×3 kernel.

    Args:
        x: (N, C, H, W), contiguous or channels_last; other strides are copied.
        w: (K, C, 3, 3), any strides.
        b: (K,) or None.
        impl: 'native' = the compiled kernel, float32 on a CPU, 'torch' or 'ref' = F.conv2d. None = native where it is
            available.

    Returns:
        (N, K, H, W), channels_last if `x` or `w` is; differentiable to any order.

    Raises:
        ValueError: Shapes that do not fit.
        RuntimeError: `impl` is 'native' and there is no compiled kernel for this device and dtype.
    """
    if x.ndim != 4 or w.ndim != 4 or w.shape[2:] != (3, 3) or w.shape[1] != x.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)} and w {tuple(w.shape)}; expected (N, C, H, W) and (K, C, 3, 3)")
    if b is not None and b.shape != w.shape[:1]:
        raise ValueError(f"bias has shape {tuple(b.shape)}; expected ({w.shape[0]},)")
    served = _is_served(x, w, b)
    if impl == "native" and not served:
        raise RuntimeError(f"conv3x3 has no compiled kernel for {x.dtype} on {x.device.type}")
    if not served and impl is None:
        impl = "torch"
    if native.choose("conv3x3", x, impl) != "native":
        return F.conv2d(x, w, b, padding=1)
    return _native(x, w, b, False)


def _is_served(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> bool:
    return all(t.dtype == torch.float32 and t.device.type == "cpu" for t in (x, w, b) if t is not None)


def _pays(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None) -> bool:
    """Whether `conv2d` should call the kernel: it serves this call, autocast, transforms and forward-mode derivatives
    do not want a say, and it is faster on processors like the one it was measured on.

    Transforming the weights takes as long as some 100 pixels do, tiles that lie mostly outside of their image are a
    waste, and few channels leave a direct convolution little to do.
    """
    if not _IS_MEASURED or w.shape[2:] != (3, 3) or w.shape[1] < 16 or x.ndim != 4 or not _is_served(x, w, b):
        return False
    n, _, height, width = x.shape
    tiles_of_an_image = -(-height // 4) * -(-width // 4)
    return (
        n * height * width >= 128
        and height * width >= 8 * tiles_of_an_image
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and native.choose("conv3x3", x, None) == "native"
    )


# The compiled kernel, registered as torch.ops.refine.conv3x3. turned: `w` is that of the convolution whose gradient to
# the input this is, i.e. channels and outputs change places and the kernel is turned by half a turn.

_RECORD = struct.Struct("=16q")  # Conv3x3Call of conv3x3.cpp, but for threads and stream


def _forward(x, w, b, turned):
    y = _empty_output(x, w, b, turned)
    if native.function("conv3x3", x) is None:
        w = w.transpose(0, 1).flip([2, 3]) if turned else w
        return y.copy_(F.conv2d(x, w, b, padding=1))
    (sk, sc, sy, sx), address = w.stride(), w.data_ptr()
    if turned:
        sk, sc, sy, sx, address = sc, sk, -sy, -sx, address + (sy + sx) * 2 * w.element_size()
    _run(x, address, b, y, (sk, sc, sy, sx), False)
    return y


def _weight_grad(dy, x, channels_last):
    dw = _empty_weight(dy, x, channels_last)
    if x.numel() == 0:
        return dw.zero_()
    if native.function("conv3x3", x) is None:
        options = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])
        return dw.copy_(torch.ops.aten.convolution_backward(dy, x, dw, None, *options)[1])
    dy = dy.contiguous(memory_format=native.layout_of(dy))
    _run(x, dw.data_ptr(), None, dy, dw.stride(), True)
    return dw


def _run(x, w_address, b, y, w_strides, weight_grad):
    """`y` is written, or the weights at `w_address`."""
    if y.numel() == 0:
        return
    x = x.contiguous(memory_format=native.layout_of(x))
    b = None if b is None else b.contiguous()
    addresses = (x.data_ptr(), w_address, 0 if b is None else b.data_ptr(), y.data_ptr())
    layouts = (native.layout_of(t) == torch.channels_last for t in (x, y))
    n, c, h, w = x.shape
    native.run("conv3x3", x, _RECORD.pack(*addresses, weight_grad, *layouts, n, c, y.shape[1], h, w, *w_strides))


def _empty_output(x, w, b, turned):
    layouts = [native.layout_of(t) for t in (x, w)]
    layout = torch.channels_last if torch.channels_last in layouts else torch.contiguous_format
    return torch.empty((x.shape[0], w.shape[1 if turned else 0], *x.shape[2:]), dtype=x.dtype, device=x.device,
                       memory_format=layout)  # fmt: skip


def _empty_weight(dy, x, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((dy.shape[1], x.shape[1], 3, 3), dtype=x.dtype, device=x.device, memory_format=layout)


def _save(ctx, inputs, output):
    x, w, _, ctx.turned = inputs
    ctx.save_for_backward(x, w)


def _backward(ctx, dy):
    x, w = ctx.saved_tensors
    need_x, need_w, need_b, _ = ctx.needs_input_grad
    dx = _native(dy, w, None, not ctx.turned) if need_x else None
    dw = None
    if need_w:
        dw = _native_weight_grad(*((x, dy) if ctx.turned else (dy, x)), native.layout_of(w) == torch.channels_last)
    return dx, dw, dy.sum([0, 2, 3]) if need_b else None, None


def _save_weight_grad(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def _backward_weight_grad(ctx, g):
    """The gradient to the weights is linear in both of its inputs, as the convolution is in x and w."""
    dy, x = ctx.saved_tensors
    need_dy, need_x, _ = ctx.needs_input_grad
    return _native(x, g, None, False) if need_dy else None, _native(dy, g, None, True) if need_x else None, None


_native = native.register(
    "conv3x3(Tensor x, Tensor w, Tensor? b, bool turned) -> Tensor", _forward, _empty_output, _save, _backward
)
_native_weight_grad = native.register(
    "conv3x3_weight_grad(Tensor dy, Tensor x, bool channels_last) -> Tensor",
    _weight_grad,
    _empty_weight,
    _save_weight_grad,
    _backward_weight_grad,
)


# Counted as what they stand for, a direct convolution, so that numbers of FLOPs can be compared.


@register_flop_formula(torch.ops.refine.conv3x3)
def _flops(x, w, b, turned, *, out_shape):
    return 2 * 9 * x[1] * math.prod(out_shape)


@register_flop_formula(torch.ops.refine.conv3x3_weight_grad)
def _weight_grad_flops(dy, x, channels_last, *, out_shape):
    return 2 * 9 * x[1] * math.prod(dy)
