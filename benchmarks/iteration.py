"""What one Diff-Instruct iteration costs, and where the time goes.

    python benchmarks/iteration.py [--batch-demo=32] [--batch-cifar=2] [--json=FILE]

Two pairs: the shipped digits pair, and CIFAR-10's official sizes (StyleGAN2-ADA cond, EDM DDPM++ cond) with random
weights. The whole iteration is `Trainer.step`; the parts are timed alone, best of several repeats, so that their sum
differs from the whole by what surrounds them (drawing noise, optimisers, statistics, moving average).
"""

import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refine.checkpoints import load_generator, load_teacher
from refine.config import RefineConfig
from refine.diff_instruct import aux_loss
from refine.networks.edm import EDMPrecond
from refine.networks.stylegan2 import Generator
from refine.trainer import Trainer


def demo_pair():
    return load_generator("digits-gan"), load_teacher("digits-teacher")


def cifar10_pair():
    """Official sizes: 20.2 M and 55.7 M parameters."""
    synthesis = {"channel_base": 32768, "channel_max": 512, "conv_clamp": 256}
    G = Generator(512, 10, 512, 32, 3, {"num_layers": 2}, synthesis)
    kwargs = {"model_type": "SongUNet", "channel_mult": [2, 2, 2], "augment_dim": 9, "dropout": 0.13}
    return G.eval(), EDMPrecond(32, 3, 10, **kwargs).eval()


def best_seconds(function: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Wall seconds of the fastest call after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def measure(name: str, pair: tuple, batch: int, repeats: int, device: torch.device) -> dict:
    config = RefineConfig("student", "teacher", batch=batch)
    trainer = Trainer(config, *pair, device=device)
    G, aux, teacher = trainer.G, trainer.aux, trainer.teacher
    z, c = trainer._latents()
    x = trainer._images(z, c).detach()
    sigma = trainer.sigma.sample(batch, device)

    def student():
        G.zero_grad(set_to_none=True)
        trainer._images(z, c).backward(x)

    def denoise(net):
        with torch.no_grad():
            net(x, sigma, c)

    def aux_training():
        aux.zero_grad(set_to_none=True)
        aux_loss(aux, x, c, sigma).mean().backward()

    def student_forward():
        with torch.no_grad():
            trainer._images(z, c)

    parts = {
        "student forward (for the auxiliary step)": student_forward,
        "student forward + backward": student,
        "teacher forward": lambda: denoise(teacher),
        "auxiliary forward": lambda: denoise(aux),
        "auxiliary forward + backward": aux_training,
    }
    seconds = {key: best_seconds(function, repeats, device) for key, function in parts.items()}
    whole = best_seconds(trainer.step, repeats, device)
    parameters = {key: sum(p.numel() for p in net.parameters()) for key, net in (("student", G), ("teacher", teacher))}
    return {"pair": name, "batch": batch, "parameters": parameters, "seconds": seconds, "iteration": whole}


def show(result: dict) -> None:
    whole, batch = result["iteration"], result["batch"]
    sizes = ", ".join(f"{key} {count / 1e6:.2f} M" for key, count in result["parameters"].items())
    print(f"\n{result['pair']}: batch {batch}, {sizes} parameters")
    print(f"  {'one iteration':<42s}{whole * 1000:9.1f} ms   {batch / whole:8.2f} images/s")
    for key, seconds in result["seconds"].items():
        print(f"  {key:<42s}{seconds * 1000:9.1f} ms   {seconds / whole:8.1%}")
    rest = whole - sum(result["seconds"].values())
    print(f"  {'the rest (noise, optimisers, EMA, statistics)':<42s}{rest * 1000:6.1f} ms   {rest / whole:8.1%}")


@click.command(help=__doc__.split("\n\n")[0], context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--batch-demo", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--batch-cifar", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write the numbers here, too.")
def main(batch_demo, batch_cifar, repeats, device, json_path):
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads")
    results = []
    for label, pair, batch in (("digits", demo_pair, batch_demo), ("CIFAR-10 sizes", cifar10_pair, batch_cifar)):
        torch.manual_seed(0)
        results.append(measure(label, pair(), batch, repeats, device))
        show(results[-1])
    if json_path:
        machine = {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
        Path(json_path).write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
