"""The sum that ends a residual block, and the normalisation that follows it.

On a GPU the kernels of group_norm_silu make the sum on their way, with the channels that a U-Net's decoder puts beside
it, and in the backward pass add up the gradients of both: one launch and one pass over memory, where plain torch makes
up to four. Elsewhere these are the operators one by one.
"""

import torch

from refine.torch_utils.ops import native
from refine.torch_utils.ops.group_norm_silu import Terms, gpu_serves, group_norm_silu, launch, plain


def sum_group_norm_silu(
    x: torch.Tensor,
    y: torch.Tensor | None,
    beside: torch.Tensor | None,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    scale: float = 1.0,
    silu: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + y) · scale and what is beside it, and that normalised; differentiable to any order.

    Args:
        x: (N, C, ...), any floating dtype. It may be written to, so nobody else's gradient may need it.
        y: Like x; None = 0, and scale is 1.
        beside: (N, B, ...), further channels behind those of the sum, not scaled; None = none.
        num_groups, weight, bias, eps, silu: See `group_norm_silu`, for C + B channels.
        scale: Factor of the sum.

    Returns:
        The sum, (N, C + B, ...), and silu(group_norm(sum)).
    """
    terms, layout = [t for t in (x, y, beside) if t is not None], native.layout_of(x)
    alike = all(t.dtype == x.dtype and t.is_contiguous(memory_format=layout) for t in terms)
    served = len(terms) > 1 and alike and x.device.type != "cpu" and weight.dtype == bias.dtype == torch.float32
    if served and gpu_serves(x, num_groups, len(weight)) and native.choose("group_norm_silu", x, None) == "native":
        return _native(x, y, beside, weight, bias, num_groups, eps, silu, scale)[:2]
    total = sum_beside(x, y, beside, scale)
    return total, group_norm_silu(total, num_groups, weight, bias, eps, silu=silu)


def sum_beside(
    x: torch.Tensor, y: torch.Tensor | None, beside: torch.Tensor | None, scale: float = 1.0
) -> torch.Tensor:
    """The sum alone; arguments as above."""
    total = x if y is None else x.add_(y)
    if scale != 1:
        total = total.mul_(scale)
    return total if beside is None else torch.cat([total, beside], dim=1)


def _forward(x, y, beside, weight, bias, num_groups, eps, silu, scale):
    total, normed, stats = _fake(x, y, beside, weight, bias, num_groups, eps, silu, scale)
    if not x.is_cuda or native.function("group_norm_silu", x) is None:  # a graph that was exported for a GPU
        own = x if y is None else (x + y) * scale
        total.copy_(own if beside is None else torch.cat([own, beside], dim=1))
        return total, normed.copy_(_normed(total, weight, bias, num_groups, eps, silu)), stats.zero_()
    if x.numel():
        layout = native.layout_of(x)
        terms = Terms(y, beside, total, own=x.shape[1], scale=scale)
        launch(x, (weight, bias, None, None, None), (num_groups, eps, silu), layout, stats, normed, terms=terms)
    return total, normed, stats


def _normed(total, weight, bias, num_groups, eps, silu):
    return plain(total, weight, bias, None, None, None, num_groups, eps, silu)


def _grad(d_normed, d_total, stats, total, weight, bias, num_groups, eps, silu, scale, own):
    layout, options = native.layout_of(total), (num_groups, eps, silu)
    dx, d_beside, d_weight, d_bias = grads = _empty_grads(total, weight, own)
    if not total.is_cuda or native.function("group_norm_silu", total) is None:
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in (total, weight, bias)]
            found = _grads_of(inputs, d_normed, d_total, options, scale, own)
        return tuple(grad.copy_(value) for grad, value in zip(grads, found, strict=True))
    if total.numel() == 0:
        return dx, d_beside, d_weight.zero_(), d_bias.zero_()
    d_normed = d_normed.contiguous(memory_format=layout)
    d_total = None if d_total is None else d_total.contiguous(memory_format=layout)
    shares = total.new_empty(2, *total.shape[:2], dtype=torch.float32)
    terms = Terms(d_total=d_total, d_beside=d_beside, own=own, scale=scale)
    launch(total, (weight, bias, None, None, None), options, layout, stats, dx, d_normed, shares=shares, terms=terms)
    return dx, d_beside, *shares.sum(1).unbind()


def _grads_of(inputs, d_normed, d_total, options, scale, own, **more):
    """By plain torch: the gradients of x, of what is beside it, of weight and bias."""
    d, d_weight, d_bias = torch.autograd.grad(_normed(*inputs, *options), inputs, d_normed, **more)
    d = d if d_total is None else d + d_total
    return d[:, :own] * scale, d[:, own:], d_weight, d_bias


def _empty(like, channels):
    shape = [like.shape[0], channels, *like.shape[2:]]
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=native.layout_of(like))


def _empty_grads(total, weight, own):
    sides = _empty(total, own), _empty(total, total.shape[1] - own)
    return *sides, torch.empty_like(weight), torch.empty_like(weight)


def _fake(x, y, beside, weight, bias, num_groups, *options):
    stats = x.new_empty(x.shape[0], num_groups, 2, dtype=torch.float64)
    return _empty(x, len(weight)), _empty(x, len(weight)), stats


def _save(ctx, inputs, output):
    x, y, beside, weight, bias, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.terms = (x.shape[1], y is not None, beside is not None)
    ctx.save_for_backward(weight, bias, output[0], output[2])


def _backward(ctx, d_total, d_normed, _):
    weight, bias, total, stats = ctx.saved_tensors
    own, with_y, with_beside = ctx.terms
    if d_normed is None:
        d_normed = torch.zeros_like(total)
    if torch.is_grad_enabled():  # somebody will differentiate this: the graph of plain torch, any order
        inputs, (*options, scale) = [t.view_as(t) for t in (total, weight, bias)], ctx.options
        grads = _grads_of(inputs, d_normed, d_total, options, scale, own, create_graph=True)
    else:
        grads = _native_grad(d_normed, d_total, stats, total, weight, bias, *ctx.options, own)
    dx, d_beside, d_weight, d_bias = grads
    return dx, dx if with_y else None, d_beside if with_beside else None, d_weight, d_bias, *[None] * 4


_OPTIONS = "int num_groups, float eps, bool silu, float scale"
_native = native.register(
    f"sum_group_norm_silu(Tensor x, Tensor? y, Tensor? beside, Tensor weight, Tensor bias, {_OPTIONS}) -> "
    "(Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    _save,
    _backward,
)
_native_grad = native.register(
    "sum_group_norm_silu_grad(Tensor d_normed, Tensor? d_total, Tensor stats, Tensor total, Tensor weight, "
    f"Tensor bias, {_OPTIONS}, int own) -> (Tensor, Tensor, Tensor, Tensor)",
    _grad,
    lambda d_normed, d_total, stats, total, weight, bias, *options: _empty_grads(total, weight, options[-1]),
)
