"""How much the compiled ops and the modulated convolution gain, as ratios measured side by side in one run.

    python benchmarks/ops.py [--device=cpu] [--batch=8] [--threads=2] [--only=upfirdn2d,bias_act,generator] [--json=FILE]

Every row times its variants in turns, several rounds, and keeps the fastest of each. "best torch" is the fastest of
the plain-torch forms known here, each in the layout it is given and in channels_last weights. A row that misses its goal says so.
On a GPU the ops are also compared with a device copy of the same bytes.
"""

import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refine.networks.stylegan2 import Generator
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.upfirdn2d import setup_filter, upfirdn2d

Variants = dict[str, Callable[[], None]]

# name → (up, down, padding, gain, [(channels, size)]): the sizes of 32×32 and 256×256 generators and discriminators.
# "same" is the filter after an upsampling convolution, whose output is one pixel wider than needed.
UPFIRDN2D = {
    "up 2": (2, 1, (2, 1, 2, 1), 4, [(512, 16), (128, 128), (3, 128)]),
    "down 2": (1, 2, (1, 1, 1, 1), 1, [(512, 32), (128, 256), (3, 256)]),
    "same size": (1, 1, (1, 1, 1, 1), 4, [(512, 33), (128, 257)]),
}
BIAS_ACT = [(512, 32), (128, 256)]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def fastest(variants: Variants, rounds: int, device: torch.device) -> dict[str, float]:
    """Seconds of the fastest call of each variant; one call to warm up, then rounds in turns."""
    times = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, function in variants.items():
            times[name].append(seconds(function, device))
    return {name: min(values[1:]) for name, values in times.items()}


def seconds(function: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


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
    dy = torch.randn_like(function(x))
    return lambda: torch.autograd.grad(function(x), [x, *others], dy)


def bench_upfirdn2d(batch: int, rounds: int, device: torch.device):
    f = setup_filter([1, 3, 3, 1], device=device)
    for name, (up, down, padding, gain, shapes) in UPFIRDN2D.items():
        for channels, size in shapes:
            for layout, memory_format in LAYOUTS.items():
                x = torch.randn(batch, channels, size, size, device=device).to(memory_format=memory_format)
                forms = plain_torch_forms(f, up, down, padding, gain)
                for impl in ("ref", "native"):
                    forms[impl] = lambda x, i=impl: upfirdn2d(x, f, up, down, padding, gain=gain, impl=i)
                for mode in ("forward", "forward+backward"):
                    if mode == "forward":
                        x.requires_grad_(False)
                        variants = {key: lambda form=form: form(x) for key, form in forms.items()}
                    else:
                        x.requires_grad_()
                        variants = {key: with_backward(form, x) for key, form in forms.items()}
                    times = fastest(variants, rounds, device)
                    torch_forms = {key: value for key, value in times.items() if key not in ("ref", "native")}
                    yield {
                        "row": f"upfirdn2d {name:9} {channels}x{size}² {layout:13} {mode}",
                        "native_ms": times["native"] * 1e3,
                        "vs_ref": times["ref"] / times["native"],
                        "goal_ref": 3.0,
                        "vs_torch": min(torch_forms.values()) / times["native"],
                        "goal_torch": 0.95,
                        "best_torch": min(torch_forms, key=torch_forms.get),
                        **bandwidth(x, forms["native"], times["native"], mode, device),
                    }


def bandwidth(x, form, native_seconds: float, mode: str, device: torch.device) -> dict:
    """On a GPU: bytes read and written per second, relative to a device copy that moves as many."""
    if device.type != "cuda" or mode != "forward":
        return {}
    moved = (x.numel() + form(x).numel()) * x.element_size()
    source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = min(seconds(lambda: target.copy_(source), device) for _ in range(10))
    return {"share_of_copy": copy / native_seconds}


def bench_bias_act(batch: int, rounds: int, device: torch.device):
    for channels, size in BIAS_ACT:
        for layout, memory_format in LAYOUTS.items():
            x = torch.randn(batch, channels, size, size, device=device).to(memory_format=memory_format)
            b = torch.randn(channels, device=device)
            forms = {impl: lambda x, i=impl: bias_act(x, b, act="lrelu", impl=i) for impl in ("ref", "native")}
            for mode, goal in (("forward", 2.5), ("forward+backward", 1.8)):
                if mode == "forward":
                    x.requires_grad_(False), b.requires_grad_(False)
                    variants = {key: lambda form=form: form(x) for key, form in forms.items()}
                else:
                    x.requires_grad_(), b.requires_grad_()
                    variants = {key: with_backward(form, x, b) for key, form in forms.items()}
                times = fastest(variants, rounds, device)
                yield {
                    "row": f"bias_act  lrelu     {channels}x{size}² {layout:13} {mode}",
                    "native_ms": times["native"] * 1e3,
                    "vs_ref": times["ref"] / times["native"],
                    "goal_ref": goal,
                    **bandwidth(x, forms["native"], times["native"], mode, device),
                }


@click.command()
@click.option("--device", default="cpu", show_default=True)
@click.option("--batch", default=8, show_default=True)
@click.option("--threads", default=2, show_default=True, help="OpenMP threads on a CPU.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--only", default="upfirdn2d,bias_act,generator", show_default=True)
@click.option("--match", default="")
@click.option("--json", "json_file", type=click.Path(dir_okay=False))
def main(device, batch, threads, rounds, only, match, json_file):
    torch.set_num_threads(threads)
    device = torch.device(device)
    for part in only.split(","):
        for row in globals()["bench_" + part](batch, rounds, device):
            print(row["row"], f'{row["native_ms"]:.2f} ms ref {row["vs_ref"]:.2f}', f'torch {row.get("vs_torch", 0):.2f} {row.get("best_torch","")}', flush=True)

if __name__ == "__main__":
    main()
