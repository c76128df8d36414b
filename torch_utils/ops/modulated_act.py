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
    b: torch.Tensor | None,
    then: torch.Tensor | None = None,
    beside: torch.Tensor | None = None,
    act: str = "linear",
    gain: float | None = None,
    clamp: float | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """clamp(act(x · d + noise · strength + b) · gain, −clamp, +clamp) · then + beside; derivatives as of `bias_act`.

    Args:
        x: (N, C, H, W), any floating dtype.
        d: (N, C), like x; None = 1.
        noise: (N, 1, H, W) or (H, W), without a gradient; None = 0.
        strength: A scalar; None = none, as noise.
        b: (C,), like x; None = 0.
        then: (N, C), like x; None = 1.
        beside: (N, C, H, W), like x; None = 0.
        act, gain, clamp, impl: See `bias_act`.

    Returns:
        Like x.
    """
    gain = float(ACTIVATIONS[act].gain if gain is None else gain)
    limit = -1.0 if clamp is None else float(clamp)
    alike = all(t is None or t.dtype == x.dtype for t in (d, b, then, beside))
    served = alike and x.device.type != "cpu"
    if impl != "ref" and served and native.choose("bias_act", x, impl) == "native":
        return _native(x, d, noise, strength, b, then, beside, act, gain, limit)
    return _plain(x, d, noise, strength, b, then, beside, act, gain, limit, impl)


def _plain(x, d, noise, strength, b, then, beside, act, gain, clamp, impl=None):
    x = x if d is None else x * d[:, :, None, None]
    x = x if noise is None else x + (noise * strength).to(x.dtype)
    x = bias_act(x, b, act=act, gain=gain, clamp=None if clamp < 0 else clamp, impl=impl)
    x = x if then is None else x * then[:, :, None, None]
    return x if beside is None else x + beside


# The kernels, registered as torch.ops.refine.modulated_act and its derivative.

_RECORD = struct.Struct("=16q3d")  # ModulatedActRecord of bias_act.cu
_THREADS = 256
_INPUTS = "Tensor x, Tensor? d, Tensor? noise, Tensor? strength, Tensor? b, Tensor? then, Tensor? beside"
_OPTIONS = "str act, float gain, float clamp"


def _forward(x, d, noise, strength, b, then, beside, act, gain, clamp):
    if not x.is_cuda or native.function("bias_act", x) is None:  # a graph that was exported for a GPU
        y = _plain(x, d, noise, strength, b, then, beside, act, gain, clamp)
        return y.contiguous(memory_format=native.layout_of(x))
    return _run(None, x, d, noise, strength, b, then, beside, act, gain, clamp)


def _grad(dy, x, d, noise, strength, b, then, beside, act, gain, clamp):
    """Gradients of x, d, strength, b and then; empty where there is no such input."""
    given = (x, d, strength, b, then)
    if not x.is_cuda or native.function("bias_act", x) is None:
        inputs = [None if t is None else t.detach().requires_grad_() for t in given]
        with torch.enable_grad():
            y = _plain(inputs[0], inputs[1], noise, *inputs[2:], beside, act, gain, clamp)
            found = iter(torch.autograd.grad(y, [t for t in inputs if t is not None], dy))
        dx, *grads = (x.new_empty(0) if t is None else next(found) for t in inputs)
        return dx.contiguous(memory_format=native.layout_of(x)), *grads
    sums = torch.empty([4, *x.shape[:2]], dtype=native.acc_dtype(x.dtype), device=x.device)
    dx = _run(dy, x, d, noise, strength, b, then, None, act, gain, clamp, sums)
    made = (lambda: sums[0], lambda: sums[2].sum(), lambda: sums[1].sum(0), lambda: sums[3])
    pairs = zip(given[1:], made, strict=True)
    return dx, *(x.new_empty(0) if t is None else make().to(t.dtype) for t, make in pairs)


def _run(dy, x, d, noise, strength, b, then, beside, act, gain, clamp, sums=None):
    layout, dtype = native.layout_of(x), native.acc_dtype(x.dtype)
    x = x.contiguous(memory_format=layout)
    out = torch.empty_like(x)
    if out.numel() == 0:
        if sums is not None:
            sums.zero_()
        return out
    dy = None if dy is None else dy.contiguous(memory_format=layout)
    d, b, then = (None if t is None else t.contiguous() for t in (d, b, then))
    beside = None if beside is None else beside.contiguous(memory_format=layout)
    step = 0
    if noise is not None:
        noise, strength = noise.to(dtype).contiguous(), strength.to(dtype)
        step = math.prod(x.shape[2:]) if noise.ndim == 4 else 0
    addresses = (0 if t is None else t.data_ptr() for t in (x, d, noise, strength, b, then, beside, dy, out, sums))
    last, area = layout == torch.channels_last, math.prod(x.shape[2:])
    sizes = (CODES[act], last, *x.shape[:2], area, step)
    record = _RECORD.pack(*addresses, *sizes, ACTIVATIONS[act].alpha, gain, clamp)
    blocks = min(len(x) * -(-x.shape[1] // (32 if last else 8)), native.MOST_BLOCKS)
    expression = f"refine::modulated_kernel<{int(sums is not None)},{native.NUMBERS[x.dtype]}>"
    native.launch("bias_act", x, expression, blocks, _THREADS, 0, record)
    return out


def _fake(x, *_):
    return torch.empty_like(x, memory_format=native.layout_of(x))


def _fake_grad(dy, x, d, noise, strength, b, then, *_):
    return _fake(x), *(x.new_empty(0) if t is None else torch.empty_like(t) for t in (d, strength, b, then))


# Autograd.


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.act, ctx.gain, ctx.clamp = inputs
    ctx.save_for_backward(*tensors[:6])


def _backward(ctx: Any, dy: torch.Tensor) -> Any:
    x, d, noise, strength, b, then = ctx.saved_tensors
    options = (ctx.act, ctx.gain, ctx.clamp)
    need = [ctx.needs_input_grad[index] for index in (0, 1, 3, 4, 5)]
    inputs = [None if t is None else t.view_as(t) for t in (x, d, strength, b, then)]  # one may depend on another
    wanted = [needed and t is not None for needed, t in zip(need, inputs, strict=True)]
    if not any(wanted):
        grads: Any = (None,) * 5
    elif torch.is_grad_enabled():  # somebody will differentiate this: the graph of plain torch
        (x, d, strength, b, then), act, gain, clamp = inputs, *options
        y = _plain(x, d, noise, strength, b, then, None, act, gain, clamp)
        chosen: Any = [t for t, is_wanted in zip(inputs, wanted, strict=True) if is_wanted]
        found = iter(torch.autograd.grad(y, chosen, dy, create_graph=True))
        grads = [next(found) if is_wanted else None for is_wanted in wanted]
    else:
        grads = _native_grad(dy, x, d, noise, strength, b, then, None, *options)
    dx, dd, ds, db, dt = (g if is_wanted else None for g, is_wanted in zip(grads, wanted, strict=True))
    return dx, dd, None, ds, db, dt, dy if ctx.needs_input_grad[6] else None, None, None, None


_native = native.register(f"modulated_act({_INPUTS}, {_OPTIONS}) -> Tensor", _forward, _fake, _save, _backward)
_native_grad = native.register(
    f"modulated_act_grad(Tensor dy, {_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _grad,
    _fake_grad,
)
