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
    both: bool = False,
) -> Any:
    """clamp(act(x · d + noise · strength + b) · gain, −clamp, +clamp) · then + beside; derivatives as of `bias_act`.

    Args:
        x: (N, C, H, W), any floating dtype.
        d: (N, C), like x; None = 1.
        noise: (N, 1, H, W) or (H, W), without a gradient; None = 0.
        strength: A scalar; None = none, as noise.
        b: (C,), like x; None = 0.
        then: (N, C), like x; None = 1.
        beside: (N, C, H, W), like x or of float32, as which the result is returned then; None = 0.
        act, gain, clamp, impl: See `bias_act`.
        both: Also return what is multiplied with `then`; there is no `beside` then.

    Returns:
        Like x; if `both`, the pair (as it is before `then`, multiplied with it).
    """
    assert not both or (then is not None and beside is None)
    gain = float(ACTIVATIONS[act].gain if gain is None else gain)
    limit = -1.0 if clamp is None else float(clamp)
    alike = all(t is None or t.dtype == x.dtype for t in (d, b, then))
    alike = alike and (beside is None or beside.dtype in (x.dtype, native.acc_dtype(x.dtype)))
    if impl != "ref" and alike and x.device.type != "cpu" and native.choose("bias_act", x, impl) == "native":
        if both:
            return _native_both(x, d, noise, strength, b, then, act, gain, limit)
        return _native(x, d, noise, strength, b, then, beside, act, gain, limit)
    return (_plain_both if both else _plain)(x, d, noise, strength, b, then, beside, act, gain, limit, impl)


def _plain(x, d, noise, strength, b, then, beside, act, gain, clamp, impl=None):
    x = x if d is None else x * d[:, :, None, None]
    x = x if noise is None else x + (noise * strength).to(x.dtype)
    x = bias_act(x, b, act=act, gain=gain, clamp=None if clamp < 0 else clamp, impl=impl)
    x = x if then is None else x * then[:, :, None, None]
    return x if beside is None else x.to(beside.dtype) + beside


def _plain_both(x, d, noise, strength, b, then, *options):
    y = _plain(x, d, noise, strength, b, None, *options)
    return y, y * then[:, :, None, None]


# The kernels, registered as torch.ops.refine.modulated_act, modulated_act_both and their derivative.

_RECORD = struct.Struct("=18q3d")  # ModulatedActRecord of bias_act.cu
_THREADS = 256
_INPUTS = "Tensor x, Tensor? d, Tensor? noise, Tensor? strength, Tensor? b"
_OPTIONS = "str act, float gain, float clamp"


def _forward(x, d, noise, strength, b, then, beside, act, gain, clamp):
    if not x.is_cuda or native.function("bias_act", x) is None:  # a graph that was exported for a GPU
        y = _plain(x, d, noise, strength, b, then, beside, act, gain, clamp)
        return y.contiguous(memory_format=native.layout_of(x))
    x = x.contiguous(memory_format=native.layout_of(x))
    out = torch.empty_like(x, dtype=x.dtype if beside is None else beside.dtype)
    _run(0, x, d, noise, strength, b, then, act, gain, clamp, out, beside=beside)
    return out


def _forward_both(x, d, noise, strength, b, then, act, gain, clamp):
    if not x.is_cuda or native.function("bias_act", x) is None:
        pair = _plain_both(x, d, noise, strength, b, then, None, act, gain, clamp)
        return tuple(y.contiguous(memory_format=native.layout_of(x)) for y in pair)
    x = x.contiguous(memory_format=native.layout_of(x))
    out, scaled = torch.empty_like(x), torch.empty_like(x)
    _run(0, x, d, noise, strength, b, then, act, gain, clamp, out, scaled=scaled)
    return out, scaled


def _grad(x, dy, d_scaled, d, noise, strength, b, then, act, gain, clamp):
    """Gradients of x, d, strength, b and then, of those of the two results; empty where there is no such input."""
    given = (x, d, strength, b, then)
    if not x.is_cuda or native.function("bias_act", x) is None:
        inputs = [None if t is None else t.detach().requires_grad_() for t in given]
        with torch.enable_grad():
            found = iter(_grads_of(inputs, noise, dy, d_scaled, (act, gain, clamp), [t is not None for t in inputs]))
        dx, *grads = (x.new_empty(0) if t is None else next(found) for t in inputs)
        return dx.contiguous(memory_format=native.layout_of(x)), *grads
    x = x.contiguous(memory_format=native.layout_of(x))
    dx, sums = torch.empty_like(x), torch.empty([4, *x.shape[:2]], dtype=native.acc_dtype(x.dtype), device=x.device)
    _run(1, x, d, noise, strength, b, then, act, gain, clamp, dx, dy=dy, scaled=d_scaled, sums=sums)
    made = (lambda: sums[0], lambda: sums[2].sum(), lambda: sums[1].sum(0), lambda: sums[3])
    pairs = zip(given[1:], made, strict=True)
    return dx, *(x.new_empty(0) if t is None else make().to(t.dtype) for t, make in pairs)


def _grads_of(inputs, noise, dy, d_scaled, options, wanted, **more):
    """By plain torch, of those of x, d, strength, b and then that are wanted."""
    x, d, strength, b, then = inputs
    if d_scaled is None:
        pairs = [(_plain(x, d, noise, strength, b, then, None, *options).to(dy.dtype), dy)]
    else:
        pairs = [*zip(_plain_both(x, d, noise, strength, b, then, None, *options), (dy, d_scaled), strict=True)]
    chosen = [t for t, is_wanted in zip(inputs, wanted, strict=True) if is_wanted]
    return torch.autograd.grad([y for y, _ in pairs], chosen, [slope for _, slope in pairs], **more)


def _run(order, x, d, noise, strength, b, then, act, gain, clamp, out, dy=None, scaled=None, beside=None, sums=None):
    """Of dense x. `scaled` is the second result, or its gradient."""
    layout, dtype = native.layout_of(x), native.acc_dtype(x.dtype)
    if out.numel() == 0:
        if sums is not None:
            sums.zero_()
        return
    dy, beside, scaled = (None if t is None else t.contiguous(memory_format=layout) for t in (dy, beside, scaled))
    d, b, then = (None if t is None else t.contiguous() for t in (d, b, then))
    step = 0
    if noise is not None:
        noise, strength = noise.to(dtype).contiguous(), strength.to(dtype)
        step = math.prod(x.shape[2:]) if noise.ndim == 4 else 0
    tensors = (x, d, noise, strength, b, then, beside, dy, scaled, out, sums)
    addresses = (0 if t is None else t.data_ptr() for t in tensors)
    last, area, wide = layout == torch.channels_last, math.prod(x.shape[2:]), (out if dy is None else dy).dtype
    sizes = (CODES[act], last, wide != x.dtype, *x.shape[:2], area, step)
    record = _RECORD.pack(*addresses, *sizes, ACTIVATIONS[act].alpha, gain, clamp)
    blocks = min(len(x) * -(-x.shape[1] // (32 if last else 8)), native.MOST_BLOCKS)
    expression = f"refine::modulated_kernel<{order},{native.NUMBERS[x.dtype]}>"
    native.launch("bias_act", x, expression, blocks, _THREADS, 0, record)


def _fake(x, d=None, noise=None, strength=None, b=None, then=None, beside=None, *_):
    dtype = x.dtype if beside is None else beside.dtype
    return torch.empty_like(x, dtype=dtype, memory_format=native.layout_of(x))


def _fake_both(x, *_):
    return _fake(x), _fake(x)


def _fake_grad(x, dy, d_scaled, d, noise, strength, b, then, *_):
    return _fake(x), *(x.new_empty(0) if t is None else torch.empty_like(t) for t in (d, strength, b, then))


# Autograd.


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.act, ctx.gain, ctx.clamp = inputs
    ctx.save_for_backward(*tensors[:6])


def _backward(ctx: Any, dy: torch.Tensor) -> Any:
    grads = _backward_of(ctx, dy, None)
    return *grads, dy if ctx.needs_input_grad[6] else None, None, None, None


def _backward_both(ctx: Any, dy: torch.Tensor, d_scaled: torch.Tensor) -> Any:
    return *_backward_of(ctx, dy, d_scaled), None, None, None


def _backward_of(ctx: Any, dy: torch.Tensor, d_scaled: torch.Tensor | None) -> Any:
    """The gradients of x, d, noise, strength, b and then."""
    x, d, noise, strength, b, then = ctx.saved_tensors
    options = (ctx.act, ctx.gain, ctx.clamp)
    need = [ctx.needs_input_grad[index] for index in (0, 1, 3, 4, 5)]
    inputs = [None if t is None else t.view_as(t) for t in (x, d, strength, b, then)]  # one may depend on another
    wanted = [needed and t is not None for needed, t in zip(need, inputs, strict=True)]
    if not any(wanted):
        grads: Any = (None,) * 5
    elif torch.is_grad_enabled():  # somebody will differentiate this: the graph of plain torch
        found = iter(_grads_of(inputs, noise, dy, d_scaled, options, wanted, create_graph=True))
        grads = [next(found) if is_wanted else None for is_wanted in wanted]
    else:
        grads = _native_grad(x, dy, d_scaled, d, noise, strength, b, then, *options)
    dx, dd, ds, db, dt = (g if is_wanted else None for g, is_wanted in zip(grads, wanted, strict=True))
    return dx, dd, None, ds, db, dt


_native = native.register(
    f"modulated_act({_INPUTS}, Tensor? then, Tensor? beside, {_OPTIONS}) -> Tensor", _forward, _fake, _save, _backward
)
_native_both = native.register(
    f"modulated_act_both({_INPUTS}, Tensor then, {_OPTIONS}) -> (Tensor, Tensor)",
    _forward_both,
    _fake_both,
    _save,
    _backward_both,
)
_native_grad = native.register(
    "modulated_act_grad(Tensor x, Tensor dy, Tensor? d_scaled, Tensor? d, Tensor? noise, Tensor? strength, Tensor? b, "
    f"Tensor? then, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _grad,
    _fake_grad,
)
