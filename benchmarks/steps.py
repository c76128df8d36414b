"""Whole iterations at CIFAR-10's sizes on a GPU: precision × CUDA graphs, milliseconds, memory, share of the peak.

    python benchmarks/steps.py [--precisions=fp32,tf32,bf16] [--batch=64] [--seconds=4] [--critic] [--json=FILE]

Times are those of CUDA events around `Trainer.step`, the median of all that fit into the seconds after everything has
been tuned, warmed up and recorded. Memory is the peak that torch's allocator had in use, and had reserved, in these
iterations. The share is that of the fastest large product of matrices in bfloat16 on this GPU; FLOPs are counted on
tensors without memory (convolutions, linear layers and attention; a multiply-add as 2).
"""

import copy
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.iteration import cifar10_pair
from benchmarks.naive import NaiveIteration
from refine.config import PRECISIONS, RefineConfig
from refine.training.adversary import Others
from refine.training.graphs import WARM_UP
from refine.training.trainer import Trainer


def make_trainer(pair: tuple, device: torch.device | str, batch: int, critic: bool, **options: Any) -> Trainer:
    config = RefineConfig(
        "student", "teacher", batch=batch, adversarial=0.5 * critic, aux_steps=1, metrics=(), **options
    )
    others = None
    if critic:
        images = torch.randint(256, [1000, 3, 32, 32], dtype=torch.uint8)
        others = Others(images, torch.arange(1000) % 10, 10, torch.device(device))
    return Trainer(config, *pair, device, others)


def flops(pair: tuple, batch: int, critic: bool) -> int:
    """Of one iteration, without the critic's penalty, which comes every fourth time."""
    trainer = make_trainer(pair, "meta", batch, critic, precision="fp32")
    trainer.nimg = batch  # no penalty
    for optimizer in trainer.optimizers.values():  # Adam knows real devices only
        optimizer.apply = lambda: torch.zeros([], device="meta")  # type: ignore[method-assign]
    with FlopCounterMode(display=False) as counter:
        trainer.step()
    return counter.get_total_flops()


def milliseconds(step: Any, seconds: float, least: int = 8) -> list[float]:
    """GPU time of each call, for so many seconds; the GPU always has work waiting."""
    events, began = [torch.cuda.Event(enable_timing=True)], time.perf_counter()
    events[0].record()
    while len(events) <= least or time.perf_counter() - began < seconds:
        step()
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()
        if len(events) > 3:
            events[-3].synchronize()  # no more than two calls ahead
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in itertools.pairwise(events)]


def peak_rate(device: torch.device) -> float:
    """FLOP/s of a product of matrices of 8192 in bfloat16."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    return 2 * 8192**3 / min(milliseconds(lambda: a @ a, 0.3)) * 1e3


def measure(
    precision: str, graphs: bool, pair: tuple | None = None, batch: int = 64, critic: bool = False, seconds: float = 4.0
) -> dict[str, Any]:
    """One configuration.

    Args:
        precision: As --precision.
        graphs: As --cuda-graphs.
        pair: Student and teacher, see `iteration.cifar10_pair`, which takes a second to make; None = make them.
        batch: Images per step.
        critic: With the adversarial part.
        seconds: How long to measure, after about as long to get ready.

    Returns:
        `ms` (median), `ms_best`, `images_per_s`, `peak_gib`, `reserved_gib`, `ready_s` (until all steps were warm),
        `graphs_made`, `told` (lines on parts without a graph).
    """
    device, began, told = torch.device("cuda"), time.perf_counter(), []
    trainer = make_trainer(pair or cifar10_pair(), device, batch, critic, precision=precision, cuda_graphs=graphs)
    trainer.graphs.say = told.append
    for _ in range(WARM_UP + 3):
        trainer.step()
    if critic:  # until its penalty has been recorded, too
        for _ in range(4 * (WARM_UP + 1)):
            trainer.step()
    torch.cuda.synchronize()
    ready = time.perf_counter() - began
    torch.cuda.reset_peak_memory_stats()
    times = milliseconds(trainer.step, seconds)
    median = statistics.median(times)
    result = {
        "precision": trainer.precision,
        "graphs": graphs,
        "batch": batch,
        "critic": critic,
        "ms": median,
        "ms_best": min(times),
        "iterations": len(times),
        "images_per_s": batch / median * 1e3,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "ready_s": ready,
        "graphs_made": trainer.graphs.made,
        "told": told,
    }
    trainer.graphs.forget()
    del trainer
    torch.cuda.empty_cache()
    return result


def plain_step(pair: tuple, batch: int) -> Callable[[], object]:
    """`naive.NaiveIteration.step`, warm."""
    config, device = RefineConfig("student", "teacher", batch=batch, metrics=()), torch.device("cuda")
    G, teacher = (copy.deepcopy(network).to(device) for network in pair)
    G, G_ema, aux = G.train().requires_grad_(True), copy.deepcopy(G), copy.deepcopy(teacher).requires_grad_(True)
    naive = NaiveIteration(config, G, G_ema, aux, teacher.eval().requires_grad_(False), device)
    naive.step()
    return naive.step


def table(results: list[dict[str, Any]], work: int, peak: float) -> str:
    """Markdown."""
    lines = ["| precision | graphs | ms | images/s | TFLOP/s | share of peak | peak GiB (reserved) | ready after |"]
    lines += ["|---" * 8 + "|"]
    for row in results:
        rate = work / row["ms"] * 1e3
        memory = f"{row['peak_gib']:.1f} ({row['reserved_gib']:.1f})"
        kind = f"{row['graphs_made']}" if row["graphs"] else "off"
        lines += [
            f"| {row['precision']} | {kind} | {row['ms']:.1f} | {row['images_per_s']:.0f} | {rate / 1e12:.1f} "
            f"| {rate / peak:.1%} | {memory} | {row['ready_s']:.1f} s |"
        ]
    return "\n".join(lines)


@click.command(help=__doc__.split("\n\n")[0], context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--precisions", default="fp32,tf32,bf16", show_default=True, help="Which, comma-separated.")
@click.option("--batch", type=click.IntRange(min=2), default=64, show_default=True)
@click.option("--seconds", type=float, default=4.0, show_default=True, help="Of measuring, for each row.")
@click.option("--critic", is_flag=True, help="With the adversarial part.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write the numbers here, too.")
def main(precisions: str, batch: int, seconds: float, critic: bool, json_path: str | None) -> None:
    chosen = precisions.split(",")
    if unknown := set(chosen) - {"auto", *PRECISIONS}:
        raise click.BadParameter(f"found {', '.join(sorted(unknown))}; expected {', '.join(('auto', *PRECISIONS))}")
    if not torch.cuda.is_available():
        raise click.ClickException("this machine has no CUDA device")
    torch.manual_seed(0)
    pair = cifar10_pair()
    work, peak = flops(pair, batch, critic), peak_rate(torch.device("cuda"))
    results = []
    for precision, graphs in itertools.product(chosen, (False, True)):
        try:
            results.append(measure(precision, graphs, pair, batch, critic, seconds))
        except RuntimeError as error:  # too large for this GPU, say: the others count nevertheless
            print(f"{precision}, graphs {'on' if graphs else 'off'}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        for line in results[-1]["told"]:
            print(f"{precision}: {line}", file=sys.stderr)
    naive = statistics.median(milliseconds(plain_step(pair, batch), seconds, least=3))
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, batch {batch}: {work / 1e9:.0f} GFLOP an iteration; "
          f"a product of matrices in bfloat16 reaches {peak / 1e12:.0f} TFLOP/s\n")  # fmt: skip
    print(table(results, work, peak))
    rate = f"{naive:.1f} ms, {batch / naive * 1e3:.0f} images/s"
    print(f"\nA plain port of the same iteration (benchmarks/naive.py), fp32: {rate}.")
    if json_path:
        found = {"device": name, "torch": torch.__version__, "gflop": work / 1e9, "peak": peak, "results": results}
        Path(json_path).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
