"""Group normalisation and silu in one call, with the embedding that a U-Net's block takes in ahead or in between.

The compiled kernels (group_norm_silu.cpp for float32 on a CPU, group_norm_silu.cu for float32, float16 and bfloat16 on
a GPU) read memory once where plain torch makes two to four passes, and keep of their inputs what is there anyway: x and
two numbers for each group. In channels_last they spare the copies to and fro that torch's own normalisation makes on a
GPU. Elsewhere plain torch runs.
"""

import functools
import itertools
import math
import struct
from typing import NamedTuple

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
    silu: bool = True,
    impl: str | None = None,
) -> torch.Tensor:
    """silu(group_norm(x + before) · (scale + 1) + shift), differentiable to any order.

    Args:
        x: (N, C, ...), any floating dtype.
        num_groups: Divides C.
        weight, bias: (C,), of the normalisation; taken in the dtype of `x`, but by the kernels of GPUs as they are if
            they are float32.
        eps: Added to the variance.
        before, scale, shift: (N, C) or (1, C), taken in the dtype of `x`; None = 0. `scale` and `shift` come together.
        inplace: `before` may be added to `x` in place, which saves memory where plain torch runs.
        silu: False = without it; the CPU's compiled kernel always has it.
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
    before, scale, shift = (
        None if t is None else _checked(t, x, (n, c), (1, c)).to(x.dtype) for t in (before, scale, shift)
    )
    on_cpu = x.device.type == "cpu"
    served = _cpu_serves(x, silu) if on_cpu else gpu_serves(x, num_groups, c)
    if impl is None and (not served or (on_cpu and native.is_small(x, _WORTH_A_CALL))):
        impl = "torch"
    if impl == "native" and not served:
        raise RuntimeError(f"group_norm_silu has no compiled kernel for {x.dtype} on {x.device.type}")
    chosen = native.choose("group_norm_silu", x, impl)
    if chosen == "native":
        if on_cpu or not weight.dtype == bias.dtype == torch.float32:
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        if n > 1:
            before, scale, shift = (t if t is None or len(t) > 1 else t.expand(n, c) for t in (before, scale, shift))
        return _native(x, weight, bias, before, scale, shift, num_groups, eps, silu)[0]
    return plain(x, weight, bias, before, scale, shift, num_groups, eps, silu, inplace, chosen == "torch")


def _checked(t: torch.Tensor, x: torch.Tensor, *shapes: tuple[int, ...]) -> torch.Tensor:
    if t.shape not in shapes:
        raise ValueError(f"a parameter has shape {tuple(t.shape)}; expected {shapes[0]} for x of {tuple(x.shape)}")
    return t


def _cpu_serves(x: torch.Tensor, silu: bool) -> bool:
    return x.dtype == torch.float32 and silu


def gpu_serves(x: torch.Tensor, num_groups: int, channels: int) -> bool:
    """Whether the GPU's kernels take images like x with so many channels."""
    fits = channels // num_groups <= _MOST_CHANNELS and channels * math.prod(x.shape[2:]) < 2**31
    return x.dtype in _GPU_DTYPES and fits


def plain(x, weight, bias, before, scale, shift, num_groups, eps, silu, add_inplace=False, silu_inplace=False):
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    before, scale, shift = (
        None if t is None else t.reshape(*t.shape, *[1] * (x.ndim - 2)) for t in (before, scale, shift)
    )
    if before is not None:
        x = x.add_(before) if add_inplace else x + before
    y = F.group_norm(x, num_groups, weight, bias, eps)
    if scale is not None:
        y = torch.addcmul(shift, y, scale + 1)
    if not silu:
        return y
    return F.silu(y, inplace=silu_inplace and not y.requires_grad)  # in place: no pass over fresh memory


# The compiled kernels, registered as torch.ops.refine.group_norm_silu. `stats` holds what the backward pass needs
# beside the inputs: float64 (N, num_groups, 2), the mean and 1/√(variance + eps) of each group.

_INPUTS = "Tensor x, Tensor weight, Tensor bias, Tensor? before, Tensor? scale, Tensor? shift"
_OPTIONS = "int num_groups, float eps, bool silu"


def _forward(x, weight, bias, before, scale, shift, *options):
    parameters = (weight, bias, before, scale, shift)
    stats = x.new_empty(x.shape[0], options[0], 2, dtype=torch.float64)
    layout = native.layout_of(x)
    if native.function("group_norm_silu", x) is None:
        y = plain(x, *parameters, *options)
        return y.contiguous(memory_format=layout), stats.zero_()
    x = x.contiguous(memory_format=layout)
    y = torch.empty_like(x)
    if x.numel():
        (launch if x.is_cuda else _run)(x, parameters, options, layout, stats, y)
    return y, stats


def _grad(dy, stats, x, weight, bias, before, scale, shift, *options):
    parameters = (weight, bias, before, scale, shift)
    layout = native.layout_of(x)
    if native.function("group_norm_silu", x) is None:
        with torch.enable_grad():
            inputs = [None if t is None else t.detach().requires_grad_() for t in (x, *parameters)]
            dx, *rest = _grads_of(plain(*inputs, *options), inputs, dy)
        return dx.contiguous(memory_format=layout), *(x.new_empty(0) if t is None else t.contiguous() for t in rest)
    dx, *rest = grads = _empty_grads(x, *parameters)
    if x.numel() == 0:
        for grad in rest:
            grad.zero_()
        return grads
    dy, x = dy.contiguous(memory_format=layout), x.contiguous(memory_format=layout)
    if not x.is_cuda:
        _run(x, parameters, options, layout, stats, dx, dy, rest)
        return grads
    shares = x.new_empty(2, *x.shape[:2], dtype=torch.float32)  # of the images in the gradients of weight and bias
    launch(x, parameters, options, layout, stats, dx, dy, rest[2:], shares)
    return dx, *shares.sum(1).to(weight.dtype).unbind(), *rest[2:]


def _grads_of(y, inputs, dy, **options):
    """Gradients of y with respect to the inputs, None for those that are None."""
    found = iter(torch.autograd.grad(y, [t for t in inputs if t is not None], dy, **options))
    return [None if t is None else next(found) for t in inputs]


def _empty_grads(x, *parameters):
    """Dense, in the layout that the kernel writes; without numbers for what is not there."""
    dx = torch.empty_like(x, memory_format=native.layout_of(x))
    return dx, *(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in parameters)


def _addresses(*tensors):
    return [0 if t is None else t.data_ptr() for t in tensors]


_CPU_RECORD = struct.Struct("=23qd")  # GroupNormSiluCall of group_norm_silu.cpp


def _run(x, parameters, options, layout, stats, out, dy=None, grads=()):
    """The CPU's kernel. Without dy `out` becomes y, else dx, and `grads` those of the parameters."""
    (weight, bias, *rows), (num_groups, eps, _) = parameters, options
    weight, bias = weight.contiguous(), bias.contiguous()
    rows = [t if t is None or t.stride(1) == 1 else t.contiguous() for t in rows]
    y, dx = (out, None) if dy is None else (None, out)
    addresses = _addresses(x, y, stats, weight, bias, *rows)
    steps = [0 if t is None else t.stride(0) for t in rows]
    grad_addresses = _addresses(dy, dx, *grads) + [0] * (5 - len(grads))  # an empty tensor's is 0
    sizes = (x.shape[0], x.shape[1], math.prod(x.shape[2:]), num_groups)
    record = _CPU_RECORD.pack(*addresses, *steps, *grad_addresses, layout == torch.channels_last, *sizes, eps)
    native.run("group_norm_silu", x, record)


_GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_GPU_RECORD = struct.Struct("=24qd6qd")  # GroupNormSiluRecord of group_norm_silu.cu
_MOST_THREADS, _MOST_CHANNELS = 512, 512  # of a block
_KEPT = 4096  # packs of x that 256 threads keep in registers
_ENOUGH_BLOCKS = 264  # two for each multiprocessor of an H100

_GPU_KERNEL = "refine::group_norm_{0}<{{}},{1},{2}>"
native.kernels(
    "group_norm_silu",
    *(_GPU_KERNEL.format(*form) for form in itertools.product(("forward", "backward"), *[("true", "false")] * 2)),
    dtypes=_GPU_DTYPES,
)


class Terms(NamedTuple):
    """What a GPU's kernel makes x of, see sum_group_norm_silu.py, or gives the gradients of."""

    y: torch.Tensor | None = None
    beside: torch.Tensor | None = None
    total: torch.Tensor | None = None
    d_total: torch.Tensor | None = None
    d_beside: torch.Tensor | None = None
    own: int = 0  # channels of x
    scale: float = 1.0


_NO_TERMS = Terms()


class Plan(NamedTuple):
    """How a GPU's blocks share the work."""

    wide: bool  # packs of 16 bytes, else of one number
    channels: int  # of a block: whole groups
    lanes: int  # threads that share a channel of planes, or a pack of channels of pixels
    threads: int
    shared: int  # bytes


@functools.lru_cache(maxsize=1024)  # a network calls the op with the same few sizes again and again
def _plan(n: int, c: int, area: int, num_groups: int, last: bool, itemsize: int, aligned: bool) -> Plan:
    pack, per_group = 16 // itemsize, c // num_groups
    wide = aligned and (c if last else area) % pack == 0
    pack = pack if wide else 1
    width = pack if last else 1  # channels of a pack
    some = [per_group * k for k in range(1, num_groups + 1) if num_groups % k == 0]
    some = [channels for channels in some if channels <= _MOST_CHANNELS and channels % width == 0]
    if not some:
        return _plan(n, c, area, num_groups, last, itemsize, False)
    # Rows of pixels that fill the memory's sectors of 32 bytes, and blocks whose packs stay in registers, if they may.
    some = [channels for channels in some if not last or channels * itemsize >= 32] or some[-1:]
    kept = [channels for channels in some if channels * area <= _KEPT * pack]
    filling = [channels for channels in kept if n * c // channels >= _ENOUGH_BLOCKS]
    channels = max(filling, default=some[0])
    columns, packs = channels // width, channels * area // pack
    wanted = min(-(-packs // 4), 256 if packs <= _KEPT else _MOST_THREADS)
    lanes = 1
    while columns * lanes * 2 <= max(wanted, columns):
        lanes *= 2
    threads = columns * lanes
    shared = 4 * (8 * channels + channels * (lanes + 1) + max(threads, channels))
    return Plan(wide, channels, lanes, threads, shared)


def launch(x, parameters, options, layout, stats, out, dy=None, grads=(None,) * 3, shares=None, terms=_NO_TERMS):
    """The GPU's kernels. Without dy `out` becomes y, else dx; `grads` are those of before, scale and shift."""
    (weight, bias, *rows), (num_groups, eps, silu) = parameters, options
    weight, bias = weight.contiguous(), bias.contiguous()
    rows = [t if t is None or t.stride(1) == 1 else t.contiguous() for t in rows]
    (n, c), area, last = (len(x), len(weight)), math.prod(x.shape[2:]), layout == torch.channels_last
    images, sums = _addresses(x, out, dy), _addresses(*terms[:5])
    aligned = not any(address % 16 for address in (*images, *sums))
    aligned &= not last or terms.own * x.element_size() % 16 == 0
    plan = _plan(n, c, area, num_groups, last, x.element_size(), aligned)
    steps = [0 if t is None else t.stride(0) for t in rows]
    addresses = (*images, *_addresses(stats, weight, bias, *rows), *steps, *_addresses(*grads, shares))
    sizes = (n, c, area, c // num_groups, plan.channels, plan.lanes, weight.dtype == torch.float32, silu)
    way = "forward" if dy is None else "backward"
    kernel = _GPU_KERNEL.format(way, *(str(bool(flag)).lower() for flag in (last, plan.wide)))
    expression, blocks = kernel.format(native.NUMBERS[x.dtype]), n * (c // plan.channels)
    record = _GPU_RECORD.pack(*addresses, *sizes, eps, *sums, terms.own, terms.scale)
    native.launch("group_norm_silu", x, expression, blocks, plan.threads, plan.shared, record)


def _fake(x, weight, bias, before, scale, shift, num_groups, eps, silu):
    y = torch.empty_like(x, memory_format=native.layout_of(x))
    return y, x.new_empty(x.shape[0], num_groups, 2, dtype=torch.float64)


# Autograd.


def _save(ctx, inputs, output):
    *tensors, ctx.num_groups, ctx.eps, ctx.silu = inputs
    ctx.set_materialize_grads(False)  # of the statistics, which nobody differentiates: zeros would be made for them
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx, dy, _):
    if dy is None:
        return (None,) * 9
    *inputs, stats = ctx.saved_tensors
    options = (ctx.num_groups, ctx.eps, ctx.silu)
    if torch.is_grad_enabled():  # somebody will differentiate this: the graph of plain torch, any order
        inputs = [None if t is None else t.view_as(t) for t in inputs]  # an input may depend on another one
        wanted = [t if need else None for t, need in zip(inputs, ctx.needs_input_grad, strict=False)]
        grads = _grads_of(plain(*inputs, *options), wanted, dy, create_graph=True)
    else:
        grads = _native_grad(dy, stats, *inputs, *options)
    return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)), None, None, None


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
