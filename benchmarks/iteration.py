"""What one Diff-Instruct iteration costs, where the time goes, and how near the machine's limit it is.

    python benchmarks/iteration.py [--pair=digits,cifar10] [--repeats=3] [--precision=fp32] [--json=FILE]

Two pairs: the shipped digits pair, and CIFAR-10's official sizes (StyleGAN2-ADA cond, EDM DDPM++ cond) with random
weights. The whole iteration is `Trainer.step` with one auxiliary step, the baseline is `naive.NaiveIteration`, and the
machine's limit is what a large plain convolution (forward, and forward with both gradients) and a large product of
matrices reach; all of them take turns, and the best of several repeats counts. With one thread on a CPU the seconds are
those of CPU time, which neighbours on the machine disturb less; otherwise they are of the wall clock.
FLOPs are counted by torch.utils.flop_counter in the iteration as it runs: convolutions, linear layers and attention, a
multiply-add as 2, the depthwise resampling filters included, everything pointwise left out.
"""

import copy
import ctypes
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.naive import NaiveIteration
from refine.checkpoints import load_generator, load_teacher
from refine.config import PRECISIONS, RefineConfig
from refine.diff_instruct import aux_loss
from refine.networks.edm import EDMPrecond
from refine.networks.stylegan2 import Generator
from refine.training.trainer import Trainer


def demo_pair():
    return load_generator("digits-gan"), load_teacher("digits-teacher")


def cifar10_pair():
    """Official sizes: 20.2 M and 55.7 M parameters."""
    synthesis = {"channel_base": 32768, "channel_max": 512, "conv_clamp": 256}
    G = Generator(512, 10, 512, 32, 3, {"num_layers": 2}, synthesis)
    kwargs = {"model_type": "SongUNet", "channel_mult": [2, 2, 2], "augment_dim": 9, "dropout": 0.13}
    return G.eval(), EDMPrecond(32, 3, 10, **kwargs).eval()


def best_in_turn(functions: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Seconds of each function's fastest call after one to warm up; the functions take turns."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    best = dict.fromkeys(functions, float("inf"))
    for turn in range(repeats + 1):
        for name, function in functions.items():
            _wait(device)
            start = clock()
            function()
            _wait(device)
            if turn:
                best[name] = min(best[name], clock() - start)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def limits(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Callable[[], object], int]]:
    """Large plain work and its FLOPs: 256 → 256 channels of 32×32, 3×3; matrices of 2048 (8192 on a GPU)."""
    n, channels, size, side = (4, 256, 32, 2048) if device.type == "cpu" else (256, 256, 32, 8192)
    place = {"device": device, "dtype": dtype}
    x = torch.randn(n, channels, size, size, **place).to(memory_format=torch.channels_last)
    w = torch.randn(channels, channels, 3, 3, **place).to(memory_format=torch.channels_last)
    a, flops = torch.randn(side, side, **place), 2 * n * channels**2 * 9 * size**2
    xg, wg = x.clone().requires_grad_(), w.clone().requires_grad_()

    def training():
        return torch.autograd.grad(F.conv2d(xg, wg, padding=1), [xg, wg], x)

    return {
        "plain convolution": (lambda: F.conv2d(x, w, padding=1), flops),
        "plain convolution, forward + backward": (training, 3 * flops),
        "plain matrix product": (lambda: a @ a, 2 * side**3),
    }


def parts_of(trainer: Trainer) -> dict[str, Callable[[], object]]:
    """The iteration's five passes through a network, alone."""
    G, aux, teacher, n = trainer.G, trainer.aux, trainer.teacher, trainer.config.batch
    z, c = trainer.batches.latents()
    x = trainer._images(trainer.G, z, c).detach()
    sigma = trainer.sigma.sample(n, trainer.device)

    def student():
        G.zero_grad(set_to_none=True)
        trainer._images(trainer.G, z, c).backward(x)

    def aux_training():
        aux.zero_grad(set_to_none=True)
        aux_loss(aux, x, c, sigma, torch.randn_like(x)).mean().backward()

    return {
        "student forward (for the auxiliary step)": torch.no_grad()(lambda: trainer._images(trainer.G, z, c)),
        "student forward + backward": student,
        "teacher forward": torch.no_grad()(lambda: teacher(x, sigma, c)),
        "auxiliary forward": torch.no_grad()(lambda: aux(x, sigma, c)),
        "auxiliary forward + backward": aux_training,
    }


def flops_of(function: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def peak_above_rest(function: Callable[[], object], device: torch.device) -> float:
    """GiB that a call needs at its peak beside what is there before it; NaN where the system does not tell."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**30
    try:  # Linux
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, so that it counts when it is needed again
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _resident("VmRSS")
        function()
        return (_resident("VmHWM") - before) / 2**20
    except (OSError, AttributeError):
        return float("nan")


def _resident(field: str) -> int:
    """A line of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def measure(name: str, pair: tuple, batch: int, repeats: int, device: torch.device, options: dict) -> dict:
    config = RefineConfig("student", "teacher", batch=batch, adversarial=0.0, aux_steps=1, **options)
    trainer = Trainer(config, *pair, device=device)
    G, teacher = (copy.deepcopy(network).to(device) for network in pair)
    teacher.eval().requires_grad_(False)
    G, G_ema, aux = G.train().requires_grad_(True), copy.deepcopy(G), copy.deepcopy(teacher).requires_grad_(True)
    naive = NaiveIteration(config, G, G_ema, aux, teacher, device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision, torch.float32)
    plain = limits(device, dtype)
    whole = {"iteration": trainer.step, "naive": naive.step, **{key: work for key, (work, _) in plain.items()}}
    flops = flops_of(trainer.step)
    seconds = best_in_turn(whole, repeats, device)
    memory = {key: peak_above_rest(whole[key], device) for key in ("iteration", "naive")}
    return {
        "pair": name,
        "batch": batch,
        "options": options,
        "parameters": {"student": _count(trainer.G), "teacher": _count(trainer.teacher)},
        "seconds": {key: seconds[key] for key in ("iteration", "naive")},
        "parts": best_in_turn(parts_of(trainer), repeats, device),
        "gflop": flops / 1e9,
        "gflop_per_s": flops / seconds["iteration"] / 1e9,
        "limits_gflop_per_s": {key: count / seconds[key] / 1e9 for key, (_, count) in plain.items()},
        "peak_gib": memory,
    }


def _count(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def show(result: dict) -> None:
    whole, batch, naive = result["seconds"]["iteration"], result["batch"], result["seconds"]["naive"]
    sizes = ", ".join(f"{key} {count / 1e6:.2f} M" for key, count in result["parameters"].items())
    print(f"\n{result['pair']}: batch {batch}, {sizes} parameters")
    print(f"  {'one iteration':<42s}{whole * 1000:9.1f} ms   {batch / whole:8.2f} images/s")
    print(f"  {'the same, naive':<42s}{naive * 1000:9.1f} ms   {batch / naive:8.2f} images/s   {naive / whole:.2f} ×")
    for key, seconds in result["parts"].items():
        print(f"  {key:<42s}{seconds * 1000:9.1f} ms   {seconds / whole:8.1%}")
    rest = whole - sum(result["parts"].values())
    print(f"  {'the rest (noise, optimisers, EMA, statistics)':<42s}{rest * 1000:6.1f} ms   {rest / whole:8.1%}")
    rate = result["gflop_per_s"]
    print(f"  {'arithmetic of one iteration':<42s}{result['gflop']:9.1f} GFLOP{rate:9.1f} GFLOP/s")
    for key, limit in result["limits_gflop_per_s"].items():
        print(f"  {key:<42s}{limit:9.1f} GFLOP/s   the iteration reaches {rate / limit:.0%}")
    memory = ", ".join(f"{key} {value:.2f} GiB" for key, value in result["peak_gib"].items())
    print(f"  {'peak memory above that between iterations':<44s}{memory}")


@click.command(help=__doc__.split("\n\n")[0], context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--pair", "pairs", default="digits,cifar10", show_default=True, help="Which, comma-separated.")
@click.option("--batch-demo", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--batch-cifar", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="As the option of refine.py.")
@click.option("--reuse-batch", is_flag=True, help="As the option of refine.py.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write the numbers here, too.")
def main(pairs, batch_demo, batch_cifar, repeats, precision, compiled, reuse_batch, device, json_path):
    known = {"digits": (demo_pair, batch_demo), "cifar10": (cifar10_pair, batch_cifar)}
    if unknown := set(pairs.split(",")) - set(known):
        raise click.BadParameter(
            f"found {', '.join(sorted(unknown))}; expected {', '.join(known)}", param_hint="--pair"
        )
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads")
    results = []
    for label in pairs.split(","):
        pair, batch = known[label]
        torch.manual_seed(0)
        options = {"precision": precision, "compile": compiled, "reuse_batch": reuse_batch}
        results.append(measure(label, pair(), batch, repeats, device, options))
        show(results[-1])
    if json_path:
        machine = {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
        Path(json_path).write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
