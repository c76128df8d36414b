"""How much the compiled ops and the modulated convolution gain, as ratios measured side by side in one run.

    python benchmarks/ops.py [--device=cpu] [--batch=8] [--threads=2] [--only=upfirdn2d] [--match=512x32] [--json=FILE]

Every row times its variants in turns, for half a second and at least twice, and keeps the fastest of each. "best torch"
is the fastest of the plain-torch forms known here. A row that misses its goal says so. All of it takes some minutes
on two quiet cores; on a busy machine --cpu-time (processor seconds of one thread) is steadier than the clock.
Memory that is given back is used again, as in a training loop: else the system's page faults, which differ from process
to process, are what is measured (--fresh-memory shows them).
On a GPU the ops are also compared with a device copy of the same bytes.
"""

import copy
import ctypes
import functools
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refine.networks import stylegan3, stylegan3_layers
from refine.networks.stylegan2 import Generator
from refine.networks.stylegan3 import schedule
from refine.networks.stylegan3_layers import SynthesisLayer
from refine.torch_utils.build import custom_ops
from refine.torch_utils.ops.bias_act import bias_act
from refine.torch_utils.ops.conv3x3 import conv3x3
from refine.torch_utils.ops.filtered_lrelu import composed, filtered_lrelu
from refine.torch_utils.ops.group_norm_silu import group_norm_silu
from refine.torch_utils.ops.upfirdn2d import setup_filter, upfirdn2d

Variants = dict[str, Callable[[], None]]

# name → (up, down, padding, gain, [(channels, size)]): the sizes of 32×32 and 256×256 generators and discriminators.
# "same" is the filter after an upsampling convolution, whose output is one pixel wider than needed.
UPFIRDN2D = {
    "up 2": (2, 1, (2, 1, 2, 1), 4, [(512, 4), (512, 16), (128, 128), (3, 128)]),
    "down 2": (1, 2, (1, 1, 1, 1), 1, [(512, 8), (512, 32), (128, 256), (3, 256)]),
    "same size": (1, 1, (1, 1, 1, 1), 4, [(512, 9), (512, 33), (128, 257)]),
}
BIAS_ACT = [(512, 32), (128, 256)]
GROUP_NORM_SILU = [(64, 8), (64, 16), (16, 32), (256, 32)]  # of the digits teacher, and of CIFAR-10's
CONV3X3 = [(16, 32), (48, 16), (64, 8), (256, 32), (256, 16)]
# Layers of StyleGAN3 at 256×256, name → (channels, signals before and after as indices of its schedule).
FILTERED_LRELU = {"36²": (512, 1, 1), "36² to 52²": (512, 2, 3), "148²": (512, 8, 8), "276²": (181, 11, 11)}
STYLEGAN3 = {"t": {}, "r": {"conv_kernel": 1, "use_radial_filters": True, "channel_base": 65536, "channel_max": 1024}}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Stopwatch:
    """How long calls take.

    Args:
        device: Where they compute.
        budget: Seconds to spend on a row; two calls of each variant happen in any case.
        cpu_time: Processor seconds instead of the clock's.
    """

    def __init__(self, device: torch.device, budget: float, cpu_time: bool):
        self.device, self.budget = device, budget
        self._now = time.process_time if cpu_time else time.perf_counter

    def fastest(self, variants: Variants) -> dict[str, float]:
        """Seconds of the fastest call of each variant, called in turns."""
        times = {name: [] for name in variants}
        start = time.perf_counter()
        while len(next(iter(times.values()))) < 2 or time.perf_counter() - start < self.budget:
            for name, function in variants.items():
                times[name].append(self.seconds(function))
        return {name: min(values) for name, values in times.items()}

    def seconds(self, function: Callable[[], None]) -> float:
        self._synchronize()
        start = self._now()
        function()
        self._synchronize()
        return self._now() - start

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def keep_memory() -> None:
    """Lets glibc neither map large blocks one by one nor return them to the system."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 256 << 20)):  # M_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD
            libc.mallopt(parameter, value)


def plain_torch_forms(f: torch.Tensor, up: int, down: int, padding: tuple, gain: float) -> dict[str, Callable]:
    """Ways to write upfirdn2d in plain torch: the fallback, and one convolution over planes as a batch."""

    def planes(x):
        y = upfirdn2d(x.reshape(-1, 1, *x.shape[2:]), f, up, down, padding, gain=gain, impl="torch")
        return y.reshape(*x.shape[:2], *y.shape[2:])

    def separable(x):
        return upfirdn2d(x, taps, up, down, padding, gain=gain, impl="torch")

    taps = f.diagonal().sqrt()
    return {
        "depthwise": lambda x: upfirdn2d(x, f, up, down, padding, gain=gain, impl="torch"),
        "planes": planes,
        "two passes": separable,
    }


def with_backward(function: Callable, x: torch.Tensor, *others: torch.Tensor) -> Callable[[], None]:
    dy = torch.randn_like(function(x, *others))
    return lambda: torch.autograd.grad(function(x, *others), [x, *others], dy)


def bench_upfirdn2d(batch: int, watch: Stopwatch, match: str = ""):
    device = watch.device
    f = setup_filter([1, 3, 3, 1], device=device)
    for name, (up, down, padding, gain, shapes) in UPFIRDN2D.items():
        for channels, size in shapes:
            if match not in f"{channels}x{size}":
                continue
            for layout, memory_format in LAYOUTS.items():
                x = torch.randn(batch, channels, size, size, device=device).to(memory_format=memory_format)
                forms = plain_torch_forms(f, up, down, padding, gain)
                call = functools.partial(upfirdn2d, f=f, up=up, down=down, padding=padding, gain=gain)
                forms |= {impl: functools.partial(call, impl=impl) for impl in ("ref", "native")}
                for mode in ("forward", "forward+backward"):
                    if mode == "forward":
                        x = x.detach()
                        variants = {key: functools.partial(form, x) for key, form in forms.items()}
                    else:
                        x = x.detach().requires_grad_()
                        variants = {key: with_backward(form, x) for key, form in forms.items()}
                    times = watch.fastest(variants)
                    torch_forms = {key: value for key, value in times.items() if key not in ("ref", "native")}
                    yield {
                        "row": f"upfirdn2d {name:9} {channels}x{size}² {layout:13} {mode}",
                        "native_ms": times["native"] * 1e3,
                        "vs_ref": times["ref"] / times["native"],
                        "goal_ref": 3.0,
                        "vs_torch": min(torch_forms.values()) / times["native"],
                        "goal_torch": 0.95,
                        "best_torch": min(torch_forms, key=torch_forms.get),
                        **bandwidth(x, forms["native"], times["native"], mode, watch),
                    }


def bandwidth(x, form, native_seconds: float, mode: str, watch: Stopwatch) -> dict:
    """On a GPU: bytes read and written per second, relative to a device copy that moves as many."""
    if watch.device.type != "cuda" or mode != "forward":
        return {}
    moved = (x.numel() + form(x).numel()) * x.element_size()
    source = torch.empty(moved // 2, dtype=torch.uint8, device=watch.device)
    target = torch.empty_like(source)
    copy = min(watch.seconds(lambda: target.copy_(source)) for _ in range(10))
    return {"share_of_copy": copy / native_seconds}


def bench_bias_act(batch: int, watch: Stopwatch, match: str = ""):
    device = watch.device
    for channels, size in BIAS_ACT:
        if match not in f"{channels}x{size}":
            continue
        for layout, memory_format in LAYOUTS.items():
            x = torch.randn(batch, channels, size, size, device=device).to(memory_format=memory_format)
            b = torch.randn(channels, device=device)
            forms = {impl: lambda x, b=b, i=impl: bias_act(x, b, act="lrelu", impl=i) for impl in ("ref", "native")}
            for mode, goal in (("forward", 2.5), ("forward+backward", 1.8)):
                if mode == "forward":
                    x, b = x.detach(), b.detach()
                    variants = {key: functools.partial(form, x) for key, form in forms.items()}
                else:
                    x, b = x.detach().requires_grad_(), b.detach().requires_grad_()
                    variants = {key: with_backward(form, x, b) for key, form in forms.items()}
                times = watch.fastest(variants)
                yield {
                    "row": f"bias_act  lrelu     {channels}x{size}² {layout:13} {mode}",
                    "native_ms": times["native"] * 1e3,
                    "vs_ref": times["ref"] / times["native"],
                    "goal_ref": goal,
                    **bandwidth(x, forms["native"], times["native"], mode, watch),
                }


def bench_group_norm_silu(batch: int, watch: Stopwatch, match: str = ""):
    """With the embedding added ahead, as in the blocks of a SongUNet; there is no kernel for GPUs."""

    def form(x, weight, bias, before, impl):
        return group_norm_silu(x, min(32, len(weight) // 4), weight, bias, 1e-6, before, impl=impl)

    for channels, size in GROUP_NORM_SILU if watch.device.type == "cpu" else ():
        others = [torch.ones(channels), torch.zeros(channels), torch.randn(batch, channels)]
        if match in f"{channels}x{size}":
            yield from cpu_op_rows("group_norm_silu", form, (batch, channels, size), others, watch, goal=1.4)


def bench_conv3x3(batch: int, watch: Stopwatch, match: str = ""):
    """Winograd's filtering against torch's convolution; there is no kernel for GPUs."""
    for channels, size in CONV3X3 if watch.device.type == "cpu" else ():
        others = [torch.randn(channels, channels, 3, 3) / (3 * channels**0.5), torch.zeros(channels)]
        if match in f"{channels}x{size}":
            yield from cpu_op_rows("conv3x3", conv3x3, (batch, channels, size), others, watch, goal=1.25)


def cpu_op_rows(name: str, form: Callable, extent: tuple[int, int, int], others: list, watch: Stopwatch, goal: float):
    """Rows of form(x, *others, impl=…) for x of (N, C, H, H), in both layouts, forward and with backward."""
    batch, channels, size = extent
    forms = {impl: functools.partial(form, impl=impl) for impl in ("ref", "torch", "native")}
    for layout, memory_format in LAYOUTS.items():
        x = torch.randn(batch, channels, size, size).to(memory_format=memory_format)
        others = [t.to(memory_format=memory_format) if t.ndim == 4 else t for t in others]
        for mode in ("forward", "forward+backward"):
            if mode == "forward":
                timed = {key: functools.partial(form, x, *others) for key, form in forms.items()}
            else:
                leaves = [t.detach().requires_grad_() for t in (x, *others)]
                timed = {key: with_backward(form, *leaves) for key, form in forms.items()}
            times = watch.fastest(timed)
            yield {
                "row": f"{name:19} {channels}x{size}² {layout:13} {mode}",
                "native_ms": times["native"] * 1e3,
                "vs_ref": times["ref"] / times["native"],
                "vs_torch": times["torch"] / times["native"],
                "goal_torch": goal,
                "best_torch": "torch",
            }


def bench_filtered_lrelu(batch: int, watch: Stopwatch, match: str = ""):
    """In one pass against the composition of the other compiled ops, and of plain torch; an image at a time."""
    for config, options in STYLEGAN3.items() if watch.device.type == "cpu" else ():
        signals = [(target, kwargs) for _, target, kwargs in schedule(256, 3, **options)]
        for name, (channels, before, after) in FILTERED_LRELU.items():
            if match not in f"{config} {name}":
                continue
            layer = SynthesisLayer(
                1, *(signals[i][0]._replace(channels=1) for i in (before, after)), **signals[after][1]
            )
            x = torch.randn(1, channels, *[layer.source.size + layer.weight.shape[-1] - 1] * 2)
            arguments = (layer.up_filter, layer.down_filter, torch.randn(channels), layer.up, layer.down, layer.padding)
            forms = {
                "native": lambda x, a=arguments: filtered_lrelu(x, *a, clamp=256, impl="native"),
                "composed": lambda x, a=arguments: composed(x, *a, clamp=256),
                "ref": lambda x, a=arguments: composed(x, *a, clamp=256, impl="torch"),
            }
            for mode, goal in (("forward", 2.5), ("forward+backward", 2.0)):
                x = x.detach().requires_grad_(mode != "forward")
                times = watch.fastest(
                    {key: with_backward(form, x) if x.requires_grad else functools.partial(form, x)
                     for key, form in forms.items()}
                )  # fmt: skip
                yield {
                    "row": f"filtered_lrelu {config} {name:10} {channels:3} channels {mode}",
                    "native_ms": times["native"] * 1e3,
                    "vs_ref": times["ref"] / times["native"],
                    "vs_torch": times["composed"] / times["native"],
                    "goal_torch": goal,
                    "best_torch": "composed of compiled ops",
                }


def bench_stylegan3(batch: int, watch: Stopwatch):
    """The whole generator at 256×256, one image."""
    for config, options in STYLEGAN3.items():
        G = (
            stylegan3.Generator(512, 0, 512, 256, 3, {"num_layers": 2}, **options)
            .to(watch.device)
            .requires_grad_(False)
        )
        ws = torch.randn(1, G.num_ws, 512, device=watch.device)

        def run(op, backward, G=G, ws=ws):
            stylegan3_layers.filtered_lrelu = op
            try:
                images = G.synthesis(ws.requires_grad_(backward))
                if backward:
                    torch.autograd.grad(images.sum(), ws)
            finally:
                stylegan3_layers.filtered_lrelu = filtered_lrelu

        for mode in ("forward", "forward+backward to ws"):
            ops = {"native": filtered_lrelu, "composed": composed}
            times = watch.fastest({key: functools.partial(run, op, mode != "forward") for key, op in ops.items()})
            yield {
                "row": f"StyleGAN3-{config} 256² {mode}",
                "native_ms": times["native"] * 1e3,
                "vs_ref": times["composed"] / times["native"],
            }


def bench_generator(batch: int, watch: Stopwatch):
    """Forward and backward of the 32×32 generator (channel_max 512) against its grouped form in plain float32 torch."""
    device = watch.device
    G = Generator(512, 0, 512, 32, 3, {"num_layers": 2}, {"channel_max": 512}).to(device)
    formats = {"contiguous": G, "channels_last": copy.deepcopy(G).to(memory_format=torch.channels_last)}
    ws = torch.randn(batch, G.num_ws, 512, device=device)
    dy = torch.randn(batch, 3, 32, 32, device=device)

    def step(net, fused, ops, amp):
        before = custom_ops.get_mode()
        custom_ops.set_mode(ops)
        try:
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                net.synthesis(ws, noise_mode="const", fused_modconv=fused).backward(dy)
        finally:
            custom_ops.set_mode(before)
            net.zero_grad(set_to_none=True)

    def variant(net="contiguous", fused=False, ops="native", amp=False):
        return lambda: step(formats[net], fused, ops, amp)

    variants = {
        "grouped, plain torch": variant(fused=True, ops="ref"),
        "matrix product, plain torch": variant(ops="ref"),
        "grouped, compiled ops": variant(fused=True),
        "float32": variant(),
        "float32 channels_last": variant("channels_last"),
        "bfloat16": variant(amp=True),
        "bfloat16 channels_last": variant("channels_last", amp=True),
    }
    times = watch.fastest(variants)
    for name, best in times.items():
        goal = {"float32": 1.7, "bfloat16": 2.5}.get(name)
        against = "plain" if device.type == "cuda" and goal else "grouped"
        base = times["matrix product, plain torch" if against == "plain" else "grouped, plain torch"]
        yield {"row": f"generator {name}", "native_ms": best * 1e3, "vs_ref": base / best, "goal_ref": goal}


def misses(row: dict) -> list[str]:
    """What falls short of its goal, in words."""
    goals = ((row["vs_ref"], row.get("goal_ref")), (row.get("vs_torch"), row.get("goal_torch")))
    return [f"{value:.2f} < {goal}" for value, goal in goals if goal is not None and value < goal]


def line(row: dict) -> str:
    text = f"{row['row']:58} {row['native_ms']:9.2f} ms {row['vs_ref']:7.2f} ×"
    if "vs_torch" in row:
        text += f" {row['vs_torch']:7.2f} × {row['best_torch']}"
    if "share_of_copy" in row:
        text += f"  {row['share_of_copy']:.0%} of a copy's bandwidth"
    return text + ("   MISSES " + ", ".join(misses(row)) if misses(row) else "")


BENCHMARKS = {
    "upfirdn2d": bench_upfirdn2d,
    "bias_act": bench_bias_act,
    "group_norm_silu": bench_group_norm_silu,
    "conv3x3": bench_conv3x3,
    "filtered_lrelu": bench_filtered_lrelu,
    "stylegan3": bench_stylegan3,
    "generator": bench_generator,
}


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--device", default="cpu", show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True, help="OpenMP threads on a CPU.")
@click.option("--budget", type=click.FloatRange(min=0), default=0.5, show_default=True, help="Seconds for a row.")
@click.option("--cpu-time", is_flag=True, help="Processor seconds of one thread instead of the clock's.")
@click.option("--fresh-memory", is_flag=True, help="Leave it to the system when memory is given back and faulted in.")
@click.option("--only", type=click.Choice(list(BENCHMARKS)), multiple=True, help="Repeatable; all without it.")
@click.option("--match", default="", help="Only rows of single ops whose size has this in it, e.g. 512x32.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Also write the rows to this file.")
def main(device, batch, threads, budget, cpu_time, fresh_memory, only, match, json_file):
    if not fresh_memory:
        keep_memory()
    threads = 1 if cpu_time else threads
    torch.set_num_threads(threads)
    device = torch.device(device)
    watch = Stopwatch(device, budget, cpu_time)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(
        f"torch {torch.__version__}, {name}, {threads} threads, batch {batch}; × the reference, × the best plain torch"
    )
    rows = []
    for part in only or BENCHMARKS:
        options = {} if part in ("generator", "stylegan3") else {"match": match}
        for row in BENCHMARKS[part](batch, watch, **options):
            rows.append(row)
            print(line(row), flush=True)
    missed = [row["row"] for row in rows if misses(row)]
    print(f"{len(rows)} rows, {len(missed)} miss a goal" + "".join(f"\n  {' '.join(row.split())}" for row in missed))
    if json_file:
        Path(json_file).write_text(
            json.dumps({"torch": torch.__version__, "device": name, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
