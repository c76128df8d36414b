"""Group normalisation and silu in one call, with the embedding that a U-Net's block takes in ahead or in between.

On a CPU the compiled kernel (group_norm_silu.cpp) reads memory once where plain torch makes two to four passes, and
keeps of its inputs what is there anyway: x and two numbers for each group. On a GPU and in other dtypes than float32
plain torch runs.
"""

import math
import struct

import torch
import torch.nn.functional as F

from refine.torch_utils.ops import native

# With fewer numbers the call costs more than the passes over memory do.
_WORTH_A_CALL = 16384


def group_norm_silu(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    before: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    inplace: bool = False,
    impl: str | None = None,
) -> torch.Tensor:
    """silu(group_norm(x + before) · (scale + 1) + shift), differentiable to any order.

    Args:
        x: (N, C, ...), any floating dtype.
        num_groups: Divides C.
        weight, bias: (C,), of the normalisation; taken in the dtype of `x`, like all that follows.
        eps: Added to the variance.
        before, scale, shift: (N, C) or (1, C); None = 0. `scale` and `shift` come together.
        inplace: `before` may be added to `x` in place, which saves memory where plain torch runs.
        impl: 'native' = compiled kernel, 'torch' or 'ref' = plain torch. None = native where it is available.

    Returns:
        A tensor of the shape and dtype of `x`.

    Raises:
        ValueError: Shapes that do not fit, or an unknown `impl`.
        RuntimeError: `impl` is 'native' and there is no compiled kernel for this device and dtype.
    """
    if x.ndim < 2 or num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (N, C, ...) with C a multiple of {num_groups} groups")
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift come together; expected both or neither")
    n, c = x.shape[:2]
    weight, bias = _checked(weight, x, (c,)), _checked(bias, x, (c,))
    before, scale, shift = (None if t is None else _checked(t, x, (n, c), (1, c)) for t in (before, scale, shift))
    served = x.dtype == torch.float32 and x.device.type == "cpu"
    if impl is None and (not served or native.is_small(x, _WORTH_A_CALL)):
        impl = "torch"
    if impl == "native" and not served:
        raise RuntimeError(f"group_norm_silu has no compiled kernel for {x.dtype} on {x.device.type}")
    chosen = native.choose("group_norm_silu", x, impl)
    if chosen == "native":
        if n > 1:
            before, scale, shift = (t if t is None or len(t) > 1 else t.expand(n, c) for t in (before, scale, shift))
        return _native(x, weight, bias, before, scale, shift, num_groups, eps)[0]
    return _plain(x, weight, bias, before, scale, shift, num_groups, eps, inplace, chosen == "torch")


def _checked(t: torch.Tensor, x: torch.Tensor, *shapes: tuple[int, ...]) -> torch.Tensor:
    if t.shape not in shapes:
        raise ValueError(f"a parameter has shape {tuple(t.shape)}; expected {shapes[0]} for x of {tuple(x.shape)}")
    return t if t.dtype == x.dtype else t.to(x.dtype)


def _plain(x, weight, bias, before, scale, shift, num_groups, eps, add_inplace=False, silu_inplace=False):
    before, scale, shift = (
        None if t is None else t.reshape(*t.shape, *[1] * (x.ndim - 2)) for t in (before, scale, shift)
    )
    if before is not None:
        x = x.add_(before) if add_inplace else x + before
    y = F.group_norm(x, num_groups, weight, bias, eps)
    if scale is not None:
        y = torch.addcmul(shift, y, scale + 1)
    return F.silu(y, inplace=silu_inplace and not y.requires_grad)  # in place: no pass over fresh memory


# The compiled kernel, registered as torch.ops.refine.group_norm_silu. `stats` holds what the backward pass needs beside
# the inputs: float64 (N, num_groups, 2), the mean and 1/√(variance + eps) of each group.

_RECORD = struct.Struct("=23qd")  # GroupNormSiluCall of group_norm_silu.cpp
_INPUTS = "Tensor x, Tensor weight, Tensor bias, Tensor? before, Tensor? scale, Tensor? shift"
_OPTIONS = "int num_groups, float eps"


def _forward(x, weight, bias, before, scale, shift, num_groups, eps):
    stats = x.new_empty(x.shape[0], num_groups, 2, dtype=torch.float64)
    layout = native.layout_of(x)
    if native.function("group_norm_silu", x) is None:
        y = _plain(x, weight, bias, before, scale, shift, num_groups, eps)
        return y.contiguous(memory_format=layout), stats.zero_()
    x = x.contiguous(memory_format=layout)
    y = torch.empty_like(x)
    _run(x, weight, bias, before, scale, shift, num_groups, eps, layout, stats, y=y)
    return y, stats


def _grad(dy, stats, x, weight, bias, before, scale, shift, num_groups, eps):
    inputs = (x, weight, bias, before, scale, shift)
    layout = native.layout_of(x)
    if native.function("group_norm_silu", x) is None:
        with torch.enable_grad():
            inputs = [None if t is None else t.detach().requires_grad_() for t in inputs]
            dx, *rest = _grads_of(_plain(*inputs, num_groups, eps), inputs, dy)
        return dx.contiguous(memory_format=layout), *(x.new_empty(0) if t is None else t.contiguous() for t in rest)
    dx, *rest = grads = _empty_grads(*inputs)
    dy, x = dy.contiguous(memory_format=layout), x.contiguous(memory_format=layout)
    _run(x, weight, bias, before, scale, shift, num_groups, eps, layout, stats, dy=dy, dx=dx, grads=rest)
    return grads


def _grads_of(y, inputs, dy, **options):
    """Gradients of y with respect to the inputs, None for those that are None."""
    found = iter(torch.autograd.grad(y, [t for t in inputs if t is not None], dy, **options))
    return [None if t is None else next(found) for t in inputs]


def _empty_grads(x, *parameters):
    """Dense, in the layout that the kernel writes; without numbers for what is not there."""
    dx = torch.empty_like(x, memory_format=native.layout_of(x))
    return dx, *(x.new_empty(0 if t is None else t.shape) for t in parameters)


def _run(x, weight, bias, before, scale, shift, num_groups, eps, layout, stats, y=None, dy=None, dx=None, grads=()):
    if x.numel() == 0:
        for grad in grads:
            grad.zero_()
        return
    weight, bias = weight.contiguous(), bias.contiguous()
    rows = [t if t is None or t.stride(1) == 1 else t.contiguous() for t in (before, scale, shift)]
    addresses = [0 if t is None else t.data_ptr() for t in (x, y, stats, weight, bias, *rows)]
    steps = [0 if t is None else t.stride(0) for t in rows]
    grad_addresses = [t.data_ptr() for t in grads] or [0] * 5  # an empty tensor's is 0
    grad_addresses = [0 if t is None else t.data_ptr() for t in (dy, dx)] + grad_addresses
    sizes = (x.shape[0], x.shape[1], math.prod(x.shape[2:]), num_groups)
    record = _RECORD.pack(*addresses, *steps, *grad_addresses, layout == torch.channels_last, *sizes, eps)
    native.run("group_norm_silu", x, record)


def _fake(x, weight, bias, before, scale, shift, num_groups, eps):
    y = torch.empty_like(x, memory_format=native.layout_of(x))
    return y, x.new_empty(x.shape[0], num_groups, 2, dtype=torch.float64)


# Autograd.


def _save(ctx, inputs, output):
    *tensors, ctx.num_groups, ctx.eps = inputs
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx, dy, _):
    *inputs, stats = ctx.saved_tensors
    options = (ctx.num_groups, ctx.eps)
    if torch.is_grad_enabled():  # somebody will differentiate this: the graph of plain torch, any order
        inputs = [None if t is None else t.view_as(t) for t in inputs]  # an input may depend on another one
        wanted = [t if need else None for t, need in zip(inputs, ctx.needs_input_grad, strict=False)]
        grads = _grads_of(_plain(*inputs, *options), wanted, dy, create_graph=True)
    else:
        grads = _native_grad(dy, stats, *inputs, *options)
    return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)), None, None


_native = native.register(
    f"group_norm_silu({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)",
    _forward,
    _fake,
    _save,
    _backward,
)
_native_grad = native.register(
    f"group_norm_silu_grad(Tensor dy, Tensor stats, {_INPUTS}, {_OPTIONS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _grad,
    lambda dy, stats, *inputs: _empty_grads(*inputs[:6]),
)
