"""What the ops share: how torch learns of them, and how they call their compiled kernels.

A kernel is code without torch in it that takes one packed record per call: on a CPU a C function, on a GPU device code
that `launch` starts. It is compiled at first use by `refine.torch_utils.build`; where it is not available, callers take
plain torch.
"""

import functools
import struct
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

from refine.torch_utils.build import custom_ops, device_code, driver
from refine.torch_utils.build.progress import line

IMPLEMENTATIONS = (None, "native", "torch", "ref")
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}  # as in kernels.h
NUMBERS = dict(zip(DTYPES, ("float", "double", "refine::Float16", "refine::BFloat16"), strict=True))
SHARED_BYTES = driver.SHARED_BYTES  # of shared memory that every GPU grants a block without asking
MOST_BLOCKS = 2**31 - 1  # of a launch; kernels loop over what is more
_ERRORS = {-1: "unknown dtype", -2: "unknown activation", -3: "out of memory"}


# On a GPU torch.compile makes one kernel of what these do and what is around them; a compiled op would stand between.
_FUSED_BY_COMPILERS = {"bias_act", "group_norm_silu"}


def choose(op: str, x: torch.Tensor, impl: str | None) -> str:
    """'native', 'torch' or 'ref': what runs `op` on `x`.

    Args:
        op: One of `custom_ops.OPS`.
        x: The image; only its device and dtype count.
        impl: As the caller asked. None = native where it is available and serves `x`, else plain torch.

    Raises:
        ValueError: An unknown `impl`.
        RuntimeError: `impl` is 'native' and there is no compiled op for this device and dtype.
    """
    if impl in ("ref", "torch"):
        return impl
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}; expected one of {', '.join(map(repr, IMPLEMENTATIONS))}")
    if impl is None and op in _FUSED_BY_COMPILERS and x.device.type == "cuda" and torch.compiler.is_compiling():
        return "torch"
    if x.dtype in DTYPES and _available(op, x.device.type):
        return "native"
    if impl == "native":
        raise RuntimeError(f"{op} has no compiled kernel for {x.dtype} on {x.device.type}")
    return "torch"


def exporting() -> bool:
    """Whether a graph is being made that is to hold for every batch, so that no choice may depend on sizes."""
    return getattr(torch.compiler, "is_exporting", bool)()  # since torch 2.7


def is_small(x: torch.Tensor, least: int) -> bool:
    """Whether a call on so few numbers costs more than it saves."""
    return not exporting() and x.numel() < least


def _available(op: str, device_type: str) -> bool:
    return op in custom_ops.OPS.get(device_type, ()) and custom_ops.load(device_type) is not None


# A compiled graph keeps the choice it was traced with. This is what torch.compiler.assume_constant_result does, but for
# the import of torch._dynamo, which would cost every command a second.
_available._dynamo_marked_constant = True  # type: ignore[attr-defined]


_functions: dict[str, Callable[[bytes], int]] = {}  # looked up once: a call costs microseconds


def function(op: str, x: torch.Tensor) -> Callable | None:
    """What calls the compiled `op` on the device of `x`; None where there is none."""
    if x.is_cuda:
        return launch if _available(op, "cuda") else None
    if op not in _functions:
        library = custom_ops.load(x.device.type)
        if library is None:  # e.g. a graph exported where there was a compiler
            return None
        _functions[op] = getattr(library, f"refine_{op}")
    return _functions[op]


_THREADS = struct.Struct("=q")


def run(op: str, x: torch.Tensor, record: bytes) -> None:
    """Call the compiled `op` on the CPU with a record as in kernels.h, but for the threads at its end.

    Raises:
        RuntimeError: The op reports an error.
    """
    status = _functions[op](record + _THREADS.pack(torch.get_num_threads()))
    if status:
        raise RuntimeError(f"{op} on {x.device}: {_ERRORS[status]}")


def kernels(op: str, *templates: str, dtypes: Iterable[torch.dtype] = tuple(DTYPES)) -> None:
    """Notes the GPU kernels of an op: name expressions of its .cu with `{}` for the type of numbers. What is noted is
    compiled with the first of the op's kernels for that type, and ahead of time by `ops build`."""
    for number in (NUMBERS[dtype] for dtype in dtypes):
        device_code.KERNELS.setdefault((op, number), []).extend(template.format(number) for template in templates)


_kernels: dict[tuple[str, int], driver.Kernel] = {}


def launch(op: str, x: torch.Tensor, expression: str, blocks: int, threads: int, shared: int, record: bytes) -> None:
    """Start a kernel on the current stream of the device of `x`, from any thread. Nothing is allocated or waited for,
    so that it can be captured into a CUDA graph, once it has been called outside of one.

    Args:
        op: The name of its .cu.
        x: A tensor on the device.
        expression: The kernel as C++ names it, e.g. "refine::plane_kernel<2,1,4,float>".
        blocks: At least 1, at most `MOST_BLOCKS`.
        threads: Of a block.
        shared: Bytes of dynamic shared memory of a block.
        record: The kernel's one argument, packed as its struct in kernels.h; may be longer, not shorter.

    Raises:
        RuntimeError: The kernel cannot be compiled, loaded or started; one line.
    """
    device = x.get_device()
    try:
        kernel = _kernels.get((expression, device)) or _load(op, expression, device)
        kernel.launch(blocks, threads, shared, torch.cuda.current_stream(device).cuda_stream, record)
    except custom_ops.FAILURES as error:
        line.break_off()
        raise RuntimeError(f"{op} on {x.device}: {' '.join(str(error).split())}") from None


def _load(op: str, expression: str, device: int) -> driver.Kernel:
    if torch.cuda.is_current_stream_capturing():
        raise driver.Failed(f"{expression} is not loaded yet: call the op before a CUDA graph is captured, too")
    loaded = device_code.load(op, expression, device)
    _kernels.update({(name, device): kernel for name, kernel in loaded.items()})
    return loaded[expression]


def can_skip_dispatch(x: torch.Tensor) -> bool:
    """Whether nothing but plain eager execution sees this call, so the kernel may be called without torch's dispatcher.

    The dispatcher and the autograd that torch.library makes cost 40 µs a call, 200 µs with backward, more than a small
    image costs itself. Compilers, tracers, transforms, modes, subclasses and profilers get the op they expect.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) in _PLAIN
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and not torch.autograd._profiler_enabled()
        and not torch.jit.is_tracing()
    )


_PLAIN = (torch.Tensor, torch.nn.Parameter)


_LIBRARY = torch.library.Library("refine", "DEF")


def register(
    schema: str, kernel: Callable, fake: Callable, save: Callable | None = None, backward: Callable | None = None
) -> Callable:
    """Makes an op `torch.ops.refine.*`, for the CPU and for CUDA, and returns the function that calls it.

    Args:
        schema: Name, arguments and results, as torch.library reads them. The first argument is a tensor.
        kernel: What the op does.
        fake: Empty results for the same arguments, of the right shapes and layouts.
        save: (ctx, inputs, output): what the derivative needs is kept. None = nothing.
        backward: (ctx, *gradients of the results) → gradients of the inputs, made of ops that can be differentiated
            again. None = the op is for calls without gradients only.

    Returns:
        The op as a function of positional arguments. It goes past torch's dispatcher where that makes no difference
        but in time, see `can_skip_dispatch`.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, _hidden_from_compilers(kernel), key)
    torch.library.register_fake(f"refine::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"refine::{name}", backward, setup_context=save, lib=_LIBRARY)
    op, derivative = getattr(torch.ops.refine, name), backward

    class Differentiable(torch.autograd.Function):
        """What register_autograd makes of the same functions, without its costs."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = kernel(*inputs)
            if save is not None:
                save(ctx, inputs, output)
            return output

        backward = staticmethod(derivative)  # type: ignore[arg-type]

    def call(*inputs: Any) -> Any:
        if not can_skip_dispatch(inputs[0]):
            return op(*inputs)
        if torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in inputs):
            return Differentiable.apply(*inputs)
        return kernel(*inputs)

    return call


def _hidden_from_compilers(function: Callable) -> Callable:
    """torch.compile would look into it where a compiled network calls it, and translate it anew for every size, in
    vain."""

    @functools.lru_cache(maxsize=1)
    def hidden() -> Callable:
        return torch.compiler.disable(function)

    def implementation(*args: Any) -> Any:
        # Whoever compiles has imported the compiler, which takes as long as torch itself.
        return (hidden() if "torch._dynamo" in sys.modules else function)(*args)

    return implementation


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the kernels compute in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def layout_of(x: torch.Tensor) -> torch.memory_format:
    """The layout in which a kernel serves `x`: contiguous where both readings hold, or neither."""
    if x.is_contiguous() or x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


assert struct.calcsize("P") == 8, "the records hold 64-bit addresses"
