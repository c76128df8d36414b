"""What follows a modulated convolution of StyleGAN2, in one call: demodulation, noise, bias, activation, gain, clamp.

On a GPU one kernel (bias_act.cu) reads and writes memory once, where plain torch makes four; so does the backward pass,
which leaves the sums for demodulation, noise and bias as one number for each image and channel. Elsewhere these are the
operators one by one.
"""

import math
import struct
from typing import Any

import torch

from refine.torch_utils.ops import native
from refine.torch_utils.ops.bias_act import ACTIVATIONS, CODES, bias_act


def modulated_act(
    x: torch.Tensor,
    d: torch.Tensor | None,
    noise: torch.Tensor | None,
    strength: torch.Tensor | None,
    b: torch.Tensor,
    act: str = "linear",
    gain: float | None = None,
    clamp: float | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """clamp(act(x · d + noise · strength + b) · gain, −clamp, +clamp); derivatives as of `bias_act`.

    Args:
        x: (N, C, H, W), any floating dtype.
        d: (N, C), like x; None = 1.
        noise: (N, 1, H, W) or (H, W), without a gradient; None = 0.
        strength: A scalar; None = none, as noise.
        b: (C,), like x.
        act, gain, clamp, impl: See `bias_act`.

    Returns:
        Like x.
    """
    gain = float(ACTIVATIONS[act].gain if gain is None else gain)
    limit = -1.0 if clamp is None else float(clamp)
    served = x.device.type != "cpu" and (d is None or d.dtype == x.dtype) and b.dtype == x.dtype
    if impl != "ref" and served and native.choose("bias_act", x, impl) == "native":
        return _native(x, d, noise, strength, b, act, gain, limit)
    return _plain(x, d, noise, strength, b, act, gain, limit, impl)


def _plain(x, d, noise, strength, b, act, gain, clamp, impl=None):
    x = x if d is None else x * d[:, :, None, None]
    x = x if noise is None else x + (noise * strength).to(x.dtype)
    return bias_act(x, b, act=act, gain=gain, clamp=None if clamp < 0 else clamp, impl=impl)


# The kernels, registered as torch.ops.refine.modulated_act and its derivative.

_RECORD = struct.Struct("=14q3d")  # ModulatedActRecord of bias_act.cu
_THREADS = 256
_INPUTS = "Tensor x, Tensor? d, Tensor? noise, Tensor? strength, Tensor b"
_OPTIONS = "str act, float gain, float clamp"


def _forward(x, d, noise, strength, b, act, gain, clamp):
    if not x.is_cuda or native.function("bias_act", x) is None:  # a graph that was exported for a GPU
        y = _plain(x, d, noise, strength, b, act, gain, clamp)
        return y.contiguous(memory_format=native.layout_of(x))
    return _run(None, x, d, noise, strength, b, act, gain, clamp)


def _grad(dy, x, d, noise, strength, b, act, gain, clamp):
    if not x.is_cuda or native.function("bias_act", x) is None:
        inputs = [None if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in (x, d, strength, b)]
        with torch.enable_grad():
            y = _plain(inputs[0], inputs[1], noise, inputs[2], inputs[3], act, gain, clamp)
            found = iter(torch.autograd.grad(y, [t for t in inputs if t is not None], dy))
        dx, dd, ds, db = (x.new_empty(0) if t is None else next(found) for t in inputs)
        return dx.contiguous(memory_format=native.layout_of(x)), dd, ds, db
    sums = torch.empty([3, *x.shape[:2]], dtype=native.acc_dtype(x.dtype), device=x.device)
    dx = _run(dy, x, d, noise, strength, b, act, gain, clamp, sums)
    dd = x.new_empty(0) if d is None else sums[0].to(d.dtype)
    ds = x.new_empty(0) if strength is None else sums[2].sum().to(strength.dtype)
    return dx, dd, ds, sums[1].sum(0).to(b.dtype)


def _run(dy, x, d, noise, strength, b, act, gain, clamp, sums=None):
    layout, dtype = native.layout_of(x), native.acc_dtype(x.dtype)
    x = x.contiguous(memory_format=layout)
    out = torch.empty_like(x)
    if out.numel() == 0:
        if sums is not None:
            sums.zero_()
        return out
    dy = None if dy is None else dy.contiguous(memory_format=layout)
    d, b = None if d is None else d.contiguous(), b.contiguous()
    step = 0
    if noise is not None:
        noise, strength = noise.to(dtype).contiguous(), strength.to(dtype)
        step = math.prod(x.shape[2:]) if noise.ndim == 4 else 0
    addresses = (0 if t is None else t.data_ptr() for t in (x, d, noise, strength, b, dy, out, sums))
    last, area = layout == torch.channels_last, math.prod(x.shape[2:])
    sizes = (CODES[act], last, *x.shape[:2], area, step)
    record = _RECORD.pack(*addresses, *sizes, ACTIVATIONS[act].alpha, gain, clamp)
    blocks = min(len(x) * -(-x.shape[1] // (32 if last else 8)), native.MOST_BLOCKS)
    expression = f"refine::modulated_kernel<{int(sums is not None)},{native.NUMBERS[x.dtype]}>"
    native.launch("bias_act", x, expression, blocks, _THREADS, 0, record)
    return out


def _fake(x, *_):
    return torch.empty_like(x, memory_format=native.layout_of(x))


def _fake_grad(dy, x, d, noise, strength, b, *_):
    like = (x.new_empty(0) if t is None else torch.empty_like(t) for t in (d, strength, b))
    return _fake(x), *like


# Autograd.


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.act, ctx.gain, ctx.clamp = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: torch.Tensor) -> Any:
    x, d, noise, strength, b = ctx.saved_tensors
    options = (ctx.act, ctx.gain, ctx.clamp)
    need = [ctx.needs_input_grad[index] for index in (0, 1, 3, 4)]
    inputs = [None if t is None else t.view_as(t) for t in (x, d, strength, b)]  # an input may depend on another one
    if torch.is_grad_enabled():  # somebody will differentiate this: the graph of plain torch
        wanted = [t for t, needed in zip(inputs, need, strict=True) if needed and t is not None]
        y = _plain(inputs[0], inputs[1], noise, inputs[2], inputs[3], *options)
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
        dx, dd, ds, db = (
            next(found) if needed and t is not None else None for t, needed in zip(inputs, need, strict=True)
        )
    else:
        grads = _native_grad(dy, x, d, noise, strength, b, *options)
        dx, dd, ds, db = (
            g if needed and t is not None else None for g, t, needed in zip(grads, inputs, need, strict=True)
        )
    return dx, dd, None, ds, db, None, None, None


_native = native.register(f"modulated_act({_INPUTS}, {_OPTIONS}) -> Tensor", _forward, _fake, _save, _backward)
_native_grad = native.register(
    f"modulated_act_grad(Tensor dy, {_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)", _grad, _fake_grad
)
