"""What the compiled ops take on a GPU, against a device copy of the same bytes and against plain torch.

    python benchmarks/gpu_ops.py [--only=group_norm_silu] [--batch=64]

Every row is a CUDA graph of some calls, replayed several times; the median counts, so that no launch of the host is
measured (a column of its own says what the host takes for a call). "× copy" is the time of a device copy that reads and
writes as many bytes as the op has to, relative to the op's: 1 is the speed of the memory, or of the L2 cache where the
tensors fit in it. "× torch" is how many times longer plain torch takes. Prints Markdown; less than a minute on an H100.
"""

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import click
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refine.torch_utils.ops.bias_act import bias_act
from refine.torch_utils.ops.group_norm_silu import group_norm_silu
from refine.torch_utils.ops.upfirdn2d import setup_filter, upfirdn2d

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# What networks use: bf16 mostly in channels_last, fp32 in contiguous images.
KINDS = [(torch.bfloat16, "channels_last"), (torch.bfloat16, "contiguous"), (torch.float32, "contiguous")]
KINDS += [(torch.float32, "channels_last"), (torch.float16, "channels_last")]
# (channels, size, embedding): CIFAR-10's DDPM++, then FFHQ-64's, then ImageNet-64's ADM
GROUP_NORM_SILU = [(256, 32, "before"), (256, 16, "before"), (256, 8, "before")]
GROUP_NORM_SILU += [(128, 64, "before"), (192, 64, "scale")]
# (up, down, padding, gain, channels, size): StyleGAN2 at CIFAR-10's sizes; same size, up, down, and RGB
UPFIRDN2D = [
    *((1, 1, (1, 1, 1, 1), 4, c, size) for c, size in ((512, 33), (512, 17), (512, 9))),
    *((2, 1, (2, 1, 2, 1), 4, c, size) for c, size in ((512, 16), (512, 8), (3, 16))),
    *((1, 2, (1, 1, 1, 1), 1, c, size) for c, size in ((512, 32), (512, 16))),
]
BIAS_ACT = [(512, 32), (512, 8)]
CONVOLUTIONS = [(256, 32), (256, 16)]
CALLS, REPLAYS = 10, 7


class Case(NamedTuple):
    """An op at a size: its inputs, and the function of them for `impl` native or torch."""

    name: str
    inputs: list[torch.Tensor]
    call: Callable[..., torch.Tensor]
    kept: int  # tensors of the size of an image that backward reads beside the gradient


class Timed(NamedTuple):
    """Microseconds of a call: on the device, and on the host."""

    device: float
    host: float


def timed(function: Callable[[], object]) -> Timed:
    """By a graph of some calls, which have been made before outside of it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            function()
        host = (time.perf_counter() - start) / CALLS
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            function()
    times = []
    for _ in range(REPLAYS):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        graph.replay()
        events[1].record()
        events[1].synchronize()
        times.append(events[0].elapsed_time(events[1]) * 1e3 / CALLS)
    return Timed(statistics.median(times), host * 1e6)


def copied(moved: int) -> float:
    """Microseconds of a device copy that reads and writes `moved` bytes in all."""
    source = torch.empty(max(moved // 2, 1), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return timed(lambda: target.copy_(source)).device


def group_norm_silu_cases(batch: int, kind: Callable) -> Iterator[Case]:
    for channels, size, embedding in GROUP_NORM_SILU:
        x = kind(batch, channels, size, size)
        parameters = [torch.ones(channels, device="cuda"), torch.zeros(channels, device="cuda")]
        rows = [torch.randn(batch, channels, device="cuda", dtype=x.dtype) for _ in range(1 + (embedding == "scale"))]

        def call(x, weight, bias, *rows, impl):
            names = {"before": rows[0]} if len(rows) == 1 else {"scale": rows[0], "shift": rows[1]}
            return group_norm_silu(x, 32, weight, bias, 1e-6, **names, impl=impl)

        yield Case(f"{embedding}, {channels}×{size}²", [x, *parameters, *rows], call, 1)


def upfirdn2d_cases(batch: int, kind: Callable) -> Iterator[Case]:
    f = setup_filter([1, 3, 3, 1], device="cuda")
    for up, down, padding, gain, channels, size in UPFIRDN2D:

        def call(x, impl, options=(f, up, down, padding, False, gain)):
            return upfirdn2d(x, *options, impl=impl)

        name = "up 2" if up == 2 else "down 2" if down == 2 else "same size"
        yield Case(f"{name}, {channels}×{size}²", [kind(batch, channels, size, size)], call, 0)


def bias_act_cases(batch: int, kind: Callable) -> Iterator[Case]:
    for channels, size in BIAS_ACT:
        x = kind(batch, channels, size, size)

        def call(x, b, impl):
            return bias_act(x, b, act="lrelu", impl=impl)

        yield Case(f"lrelu, {channels}×{size}²", [x, torch.randn(channels, device="cuda", dtype=x.dtype)], call, 1)


OPS = {"group_norm_silu": group_norm_silu_cases, "upfirdn2d": upfirdn2d_cases, "bias_act": bias_act_cases}


def rows_of(case: Case) -> Iterator[dict[str, object]]:
    """Forward, and forward with gradients to all inputs."""
    with torch.no_grad():
        y = case.call(*case.inputs, impl="torch")
    dy = torch.randn_like(y)
    images = (case.inputs[0].numel() + y.numel()) * y.element_size()
    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in case.inputs]
    kept = case.kept * y.numel() * y.element_size()

    def forward(impl):
        with torch.no_grad():
            return case.call(*case.inputs, impl=impl)

    def backward(impl):
        return torch.autograd.grad(case.call(*leaves, impl=impl), leaves, dy)

    for way, function, moved in (("forward", forward, images), ("+ backward", backward, 2 * images + kept)):
        native, plain = timed(lambda f=function: f("native")), timed(lambda f=function: f("torch"))
        yield {
            "pass": way,
            "µs": native.device,
            "GB/s": moved / native.device / 1e3,
            "× copy": copied(moved) / native.device,
            "× torch": plain.device / native.device,
            "host µs": native.host,
            "torch's": plain.host,
        }


def convolution_rows(batch: int) -> Iterator[dict[str, object]]:
    """torch's own, in both layouts: what --precision makes of them. "× torch" is contiguous over channels_last."""
    allowed = torch.backends.cudnn.allow_tf32
    for dtype, tf32 in ((torch.bfloat16, False), (torch.float16, False), (torch.float32, True), (torch.float32, False)):
        torch.backends.cudnn.allow_tf32 = tf32
        for channels, size in CONVOLUTIONS:
            taken = {}
            for layout, memory_format in LAYOUTS.items():
                x = torch.randn(batch, channels, size, size, device="cuda", dtype=dtype)
                w = torch.randn(channels, channels, 3, 3, device="cuda", dtype=dtype)
                x, w = (t.contiguous(memory_format=memory_format).requires_grad_() for t in (x, w))

                def step(x=x, w=w):
                    return torch.autograd.grad(F.conv2d(x, w, padding=1), [x, w], x)

                taken[layout] = timed(step)
                yield {
                    "op": "conv2d 3×3",
                    "size": f"{channels}×{size}²",
                    "dtype": "tf32" if tf32 else str(dtype).removeprefix("torch."),
                    "layout": layout,
                    "pass": "+ backward",
                    "µs": taken[layout].device,
                    "× torch": taken["contiguous"].device / taken[layout].device,
                }
    torch.backends.cudnn.allow_tf32 = allowed


def measure(only: str = "", batch: int = 64) -> Iterator[dict[str, object]]:
    """Rows of the table; one that fails says why instead of its figures.

    Args:
        only: An op; others are left out.
        batch: Images.
    """
    for op, (dtype, layout) in itertools.product([op for op in OPS if only in op], KINDS):

        def kind(*size, dtype=dtype, layout=layout):
            return torch.randn(size, device="cuda").to(dtype).contiguous(memory_format=LAYOUTS[layout])

        for case in OPS[op](batch, kind):
            about = {"op": op, "size": case.name, "dtype": str(dtype).removeprefix("torch."), "layout": layout}
            try:
                for row in rows_of(case):
                    yield {**about, **row}
            except RuntimeError as error:
                yield {**about, "pass": f"failed: {str(error).splitlines()[0][:200]}"}
    if not only:
        yield from convolution_rows(batch)


def table(rows: list[dict[str, object]]) -> str:
    """Markdown."""
    heads = list(max(rows, key=len))
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [row.get(head, "") for head in heads]
        cells = [f"{cell:.3g}" if isinstance(cell, float) and cell < 1000 else cell for cell in cells]
        lines.append(f"| {' | '.join(f'{cell:.0f}' if isinstance(cell, float) else str(cell) for cell in cells)} |")
    return "\n".join(lines)


@click.command(help=__doc__.split("\n\n")[0], context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", type=click.Choice([*OPS, ""]), default="", help="One op.")
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True)
def main(only: str, batch: int) -> None:
    if not torch.cuda.is_available():
        raise click.ClickException("there is no CUDA device; expected one (benchmarks/ops.py measures on a CPU)")
    start = time.perf_counter()
    copy = 2 * 2**28 / copied(2 * 2**28) / 1e3
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, batch {batch}; a copy of 256 MB: {copy:.0f} GB/s\n")
    print(table(list(measure(only, batch))))
    print(f"\n{time.perf_counter() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
