"""Bias, activation, gain and clamp in one call (StyleGAN2's pointwise epilogue).

The compiled kernels (kernels.h, bias_act.cpp, bias_act.cu) read and write memory once, forward and backward. They
follow the mathematics as torch's own operations do, also in the corners where NVIDIA's CUDA op differs: a value exactly
at ±clamp passes its gradient, a clamped linear output does not, a NaN stays a NaN, softplus is never cut off.
"""

import math
import struct
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from refine.torch_utils.ops import native


class Activation(NamedTuple):
    """An activation and the gain and alpha it has when the caller names none."""

    apply: Callable[[torch.Tensor, float], torch.Tensor]
    gain: float
    alpha: float


# In the order of kernels.h. The default gains keep the variance of a unit-normal input near one.
ACTIVATIONS: dict[str, Activation] = {
    "linear": Activation(lambda x, alpha: x, 1.0, 0.0),
    "relu": Activation(lambda x, alpha: F.relu(x), math.sqrt(2), 0.0),
    "lrelu": Activation(lambda x, alpha: F.leaky_relu(x, alpha), math.sqrt(2), 0.2),
    "tanh": Activation(lambda x, alpha: torch.tanh(x), 1.0, 0.0),
    "sigmoid": Activation(lambda x, alpha: torch.sigmoid(x), 1.0, 0.0),
    "elu": Activation(lambda x, alpha: F.elu(x), 1.0, 0.0),
    "selu": Activation(lambda x, alpha: F.selu(x), 1.0, 0.0),
    "softplus": Activation(lambda x, alpha: F.softplus(x), 1.0, 0.0),
    "swish": Activation(lambda x, alpha: x * torch.sigmoid(x), math.sqrt(2), 0.0),
}

# With backward a compiled call costs some 15 µs more than plain torch's three on a CPU; so many numbers make up for it.
_WORTH_A_CALL = 16384


def bias_act(
    x: torch.Tensor,
    b: torch.Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """clamp(act(x + b) · gain, −clamp, +clamp).

    Differentiable to any order with impl='ref' and for linear, relu and lrelu; the compiled kernels of the other
    activations have first and second derivatives.

    Args:
        x: Any shape, any floating dtype.
        b: 1-D bias along `dim` of `x`, or None; taken in the dtype of `x`.
        dim: The dimension that `b` runs along; ignored without `b`.
        act: A key of `ACTIVATIONS`.
        alpha: Negative slope of 'lrelu'; other activations ignore it. None = 0.2.
        gain: Factor after the activation. None = the activation's default.
        clamp: Limit of the absolute value after the gain, ≥ 0. None = off.
        impl: 'native' = compiled kernels, 'torch' or 'ref' = plain torch. None = native where it is available.

    Returns:
        A tensor of the shape and dtype of `x`.

    Raises:
        ValueError: Unknown activation, negative clamp, or a bias that does not fit `x`.
        RuntimeError: `impl` is 'native' and there is no compiled kernel for this device and dtype.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"act is {act!r}; expected one of {', '.join(ACTIVATIONS)}")
    if clamp is not None and clamp < 0:
        raise ValueError(f"clamp is {clamp}; expected None or a number ≥ 0")
    if b is not None:
        if b.ndim != 1 or b.shape[0] != x.shape[dim]:
            raise ValueError(f"bias has shape {tuple(b.shape)}; expected ({x.shape[dim]},) for dimension {dim} of x")
        b = b.to(x.dtype)
    spec = ACTIVATIONS[act]
    alpha = float(spec.alpha if alpha is None else alpha)
    gain = float(spec.gain if gain is None else gain)
    clamp = -1.0 if clamp is None else float(clamp)
    if b is None and act == "linear" and gain == 1 and clamp < 0:
        return x
    dim = dim % x.ndim if x.ndim else 0
    if impl is None and x.device.type == "cpu" and native.is_small(x, _WORTH_A_CALL):
        impl = "torch"
    if native.choose("bias_act", x, impl) == "native":
        return _native(x, b, dim, act, alpha, gain, clamp)
    return _reference(x, b, dim, act, alpha, gain, clamp)


def _reference(x, b, dim, act, alpha, gain, clamp):
    if b is not None:
        x = x + b.reshape([-1 if i == dim else 1 for i in range(x.ndim)])
    x = ACTIVATIONS[act].apply(x, alpha)
    if gain != 1:
        x = x * gain
    return x.clamp(-clamp, clamp) if clamp >= 0 else x


# The compiled kernels, registered as torch.ops.refine.bias_act; its derivatives are ops, too. clamp < 0 = off.

_RECORD = struct.Struct("=13q3d")  # BiasActRecord of kernels.h
_POINT_THREADS = 256
_LRELU, _ANY = 2, -1  # kernels.h: the one activation with kernels of its own, and all others
CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
_PIECEWISE_LINEAR = ("linear", "relu", "lrelu")  # no second derivative
_OPTIONS = "int dim, str act, float alpha, float gain, float clamp"

native.kernels(
    "bias_act",
    *(f"refine::point_kernel<{a},{order},{{}}>" for a in (_LRELU, _ANY) for order in range(3)),
    *(f"refine::sum_kernel<{a},{{}}>" for a in (_LRELU, _ANY)),
    *(f"refine::modulated_kernel<{order},{{}}>" for order in range(2)),  # of modulated_act.py
)


def _extents(x: torch.Tensor, dim: int, layout: torch.memory_format) -> tuple[int, int, int]:
    """(outer, channels, inner) of `x` in memory, channels running along `dim`."""
    sizes = list(x.shape)
    if layout == torch.channels_last:
        sizes, dim = [sizes[0], *sizes[2:], sizes[1]], (0, 3, 1, 2)[dim]
    return math.prod(sizes[:dim]), sizes[dim], math.prod(sizes[dim + 1 :])


def _forward(x, b, dim, act, alpha, gain, clamp):
    if native.function("bias_act", x) is None:
        return _reference(x, b, dim, act, alpha, gain, clamp).contiguous(memory_format=native.layout_of(x))
    return _run(0, None, None, x, b, dim, act, alpha, gain, clamp)


def _grad(dy, x, b, dim, act, alpha, gain, clamp, with_db):
    db = x.new_empty(x.shape[dim] if with_db else 0)
    if native.function("bias_act", x) is not None:
        return _run(1, None, dy, x, b, dim, act, alpha, gain, clamp, db if with_db else None), db
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        (dx,) = torch.autograd.grad(_reference(z, b, dim, act, alpha, gain, clamp), z, dy)
    db = dx.sum([i for i in range(x.ndim) if i != dim]) if with_db else db
    return dx.contiguous(memory_format=native.layout_of(x)), db


def _grad2(g, dy, x, b, dim, act, alpha, gain, clamp):
    if native.function("bias_act", x) is not None:
        return _run(2, g, dy, x, b, dim, act, alpha, gain, clamp)
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        y = _reference(z, b, dim, act, alpha, gain, clamp)
        (dx,) = torch.autograd.grad(y, z, dy, create_graph=True)
        (d_x,) = torch.autograd.grad(dx, z, g)
    return d_x.contiguous(memory_format=native.layout_of(x))


def _run(order, g, dy, x, b, dim, act, alpha, gain, clamp, db=None):
    layout = native.layout_of(x)
    x = x.contiguous(memory_format=layout)
    out = torch.empty_like(x)
    if out.numel() == 0:
        if db is not None:
            db.zero_()
        return out
    dy_address = g_address = b_address = db_address = partial_address = 0
    if order > 0:
        dy = dy.contiguous(memory_format=layout)
        dy_address = dy.data_ptr()
    if order > 1:
        g = g.contiguous(memory_format=layout)
        g_address = g.data_ptr()
    extents = (1, 1, x.numel())
    if b is not None or db is not None:
        extents = _extents(x, dim, layout)
    if b is not None:
        b = b.contiguous()
        b_address = b.data_ptr()
    if db is not None and x.is_cuda:
        partial = x.new_empty(_partial_size(*extents), dtype=native.acc_dtype(x.dtype))
        partial_address = partial.data_ptr()
    elif db is not None:
        db_address = db.data_ptr()
    addresses = (x.data_ptr(), b_address, dy_address, g_address, out.data_ptr(), db_address, partial_address)
    codes = (native.DTYPES[x.dtype], CODES[act], order)
    record, number = _RECORD.pack(*addresses, *codes, *extents, alpha, gain, clamp), native.NUMBERS[x.dtype]
    act_form = _LRELU if act == "lrelu" else _ANY
    if not x.is_cuda:
        native.run("bias_act", x, record)
    elif db is None:
        blocks = -(-x.numel() * x.element_size() // (16 * _POINT_THREADS))  # 16 bytes a thread
        _launch(f"refine::point_kernel<{act_form},{order},{number}>", x, blocks, record)
    else:
        _launch(f"refine::sum_kernel<{act_form},{number}>", x, _sum_blocks(*extents), record)
        db.copy_(partial.sum([0, 2]))
    return out


def _launch(expression, x, blocks, record):
    native.launch("bias_act", x, expression, min(blocks, native.MOST_BLOCKS), _POINT_THREADS, 0, record)


def _sum_blocks(outer: int, channels: int, inner: int) -> int:
    """Rectangles that the numbers are divided into (Points in kernels.h)."""
    if inner >= 64:
        return outer * channels * -(-inner // 4096)
    return -(-outer // 128) * -(-channels * inner // 32)


def _partial_size(outer: int, channels: int, inner: int) -> tuple[int, int, int]:
    """Sums that the CUDA kernel leaves to add up: one per block and column (Points in kernels.h)."""
    if inner >= 64:
        return outer, channels, -(-inner // 4096)
    return -(-outer // 128), channels, inner


def _fake_like(x):
    return torch.empty_like(x, memory_format=native.layout_of(x))


# Autograd. For an activation that is linear on both sides of zero, the sign of y tells the slope: y is kept, which the
# next layer keeps anyway, instead of x. A clamp hides where exactly at the limit y lies, and a gain below 1 may round
# a small y to zero, so both keep x.


def _save(ctx, inputs, output):
    x, b, *ctx.options = inputs
    _, act, alpha, gain, clamp = ctx.options
    if act in _PIECEWISE_LINEAR and clamp < 0 and gain >= 1 and alpha >= 0:
        x, b = output, None
    ctx.save_for_backward(x, b)


def _backward(ctx, dy):
    x, b = ctx.saved_tensors
    need_x, need_b = ctx.needs_input_grad[:2]
    if not (need_x or need_b):
        return (None,) * 7
    dx, db = _native_grad(dy, x, b, *ctx.options, need_b)
    return (dx if need_x else None, db if need_b else None, *[None] * 5)


def _save_grad(ctx, inputs, output):
    dy, x, b, *ctx.options, ctx.with_db = inputs
    ctx.save_for_backward(dy, x, b)


def _backward_grad(ctx, g, g_db):
    """dx and Σ dx depend linearly on dy, and through act'' on x + b."""
    dy, x, b = ctx.saved_tensors
    dim, act = ctx.options[:2]
    if ctx.with_db:
        g = g + g_db.reshape([-1 if i == dim else 1 for i in range(x.ndim)])
    need_dy, need_x, need_b = ctx.needs_input_grad[:3]
    d_dy = d_x = d_b = None
    if need_dy:
        d_dy, _ = _native_grad(g, x, b, *ctx.options, False)
    if act not in _PIECEWISE_LINEAR and (need_x or need_b):
        d_x = _native_grad2(g, dy, x, b, *ctx.options)
        d_b = d_x.sum([i for i in range(x.ndim) if i != dim]) if need_b else None
    return (d_dy, d_x if need_x else None, d_b, *[None] * 6)


def _no_third_derivative(ctx, *grads):
    raise RuntimeError("bias_act: compiled kernels have no third derivative; use impl='ref'")


_native = native.register(
    f"bias_act(Tensor x, Tensor? b, {_OPTIONS}) -> Tensor",
    _forward,
    lambda x, b, *options: _fake_like(x),
    _save,
    _backward,
)
_native_grad = native.register(
    f"bias_act_grad(Tensor dy, Tensor x, Tensor? b, {_OPTIONS}, bool with_db) -> (Tensor, Tensor)",
    _grad,
    lambda dy, x, b, dim, *options: (_fake_like(x), x.new_empty(x.shape[dim] if options[-1] else 0)),
    _save_grad,
    _backward_grad,
)
_native_grad2 = native.register(
    f"bias_act_grad2(Tensor g, Tensor dy, Tensor x, Tensor? b, {_OPTIONS}) -> Tensor",
    _grad2,
    lambda g, dy, x, b, *options: _fake_like(x),
    backward=_no_third_derivative,
)
