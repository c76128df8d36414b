"""What the objectives, and the options that keep diversity, make of the demo pair.

    python benchmarks/objectives.py --out=objectives.json [--variants="ikl;sid"] [--seeds=0,1,2] [--times=1]

Every cell (variant, seed, budget) is a refinement of digits-gan with digits-teacher under --preset=demo, and then the
metrics of G_ema on 2,000 images of the seeds 0-1999. Budgets: `iterations`, as many as the preset has, and `time`, as
many as fit into the time that ikl takes, from the processor seconds of an iteration, which are measured first. A killed
run goes on where it stopped: finished cells are in --out. One thread. Prints the table in Markdown.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refine.checkpoints import load_generator, load_teacher
from refine.config import PRESETS, RefineConfig, SigmaOptions
from refine.dnnlib import replaced_atomically
from refine.metrics.named import NamedMetric
from refine.training.rates import learning_rates
from refine.training.trainer import Trainer

VARIANTS = {
    "ikl": {},
    "dmd": {"objective": "dmd"},
    "sid": {"objective": "sid"},
    "sid-1.2": {"objective": "sid", "sid_alpha": 1.2},
    "sim": {"objective": "sim"},
    "ikl, coarser": {"sigma": SigmaOptions("karras", sigma_max=24.4)},
    "ikl, 2 aux steps": {"aux_steps": 2},
    "ikl, half lr": {"lr": "half"},  # of what it is without the option
    "ikl, distances 0.3": {"keep_distances": 0.3},
    "ikl, distances 1": {"keep_distances": 1.0},
    "ikl, guidance 2": {"guidance": 2.0},
}
NUMBERS = ("fd_digits", "precision", "recall")


def make_trainer(variant: str, seed: int, kimg: float, pair: tuple) -> Trainer:
    given = {"gan": "digits-gan", "teacher": "digits-teacher", "preset": "demo", "seed": seed, "kimg": kimg}
    options = {**VARIANTS[variant]}
    if options.get("lr") == "half":
        options["lr"] = learning_rates(RefineConfig(**given), *pair)[0] / 2
    return Trainer(RefineConfig(**given, **options), *pair)


def seconds_per_step(variant: str, pair: tuple, repeats: int = 5) -> float:
    trainer, times = make_trainer(variant, 0, PRESETS["demo"]["kimg"], pair), []
    for _ in range(repeats + 1):
        start = time.process_time()
        trainer.step()
        times.append(time.process_time() - start)
    return min(times[1:])


def refine(variant: str, seed: int, kimg: float, pair: tuple, metric: NamedMetric) -> dict:
    trainer, start = make_trainer(variant, seed, kimg, pair), time.process_time()
    for _ in range(trainer.config.warmup_steps):
        trainer.warm_up_step()
    for _ in range(trainer.config.num_steps):
        trainer.step()
    seconds = time.process_time() - start
    finite = all(bool(p.isfinite().all()) for p in trainer.G.parameters())
    results = metric.measure(trainer.G_ema, "cpu") if finite else {}
    return {**{name: results.get(name) for name in NUMBERS}, "steps": trainer.config.num_steps, "cpu_seconds": seconds}


def table(results: dict) -> str:
    before = results["before"]
    lines = [
        "| variant | budget | steps | fd_digits | precision | recall | CPU s | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines.append("| before | | | " + " | ".join(f"{before[name]:.3f}" for name in NUMBERS) + " | | |")
    groups: dict[tuple[str, str], list[dict]] = {}
    for cell in results["cells"].values():
        groups.setdefault((cell["variant"], cell["budget"]), []).append(cell)
    for (variant, budget), cells in groups.items():
        numbers = [_mean([cell[name] for cell in cells]) for name in NUMBERS]
        seconds = statistics.mean(cell["cpu_seconds"] for cell in cells)
        seeds = ",".join(str(cell["seed"]) for cell in cells)
        line = [variant, budget, str(cells[0]["steps"]), *numbers, f"{seconds:.0f}", seeds]
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines)


def _mean(values: list) -> str:
    if None in values:
        return "diverged"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--out", type=click.Path(dir_okay=False), required=True, help="JSON of the finished cells.")
@click.option("--variants", default="ikl;dmd;sid;sim", show_default=True, help=f"all, or {'; '.join(VARIANTS)}.")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--budgets", default="iterations,time", show_default=True)
@click.option("--times", type=float, default=1.0, show_default=True, help="Length of the runs, in demos.")
def main(out, variants, seeds, budgets, times):
    torch.set_num_threads(1)
    path, pair = Path(out), (load_generator("digits-gan"), load_teacher("digits-teacher"))
    metric, kimg = NamedMetric("fd2k-digits", "digits-reference"), PRESETS["demo"]["kimg"] * times
    results = json.loads(path.read_text()) if path.is_file() else {"cells": {}, "step_seconds": {}}
    if "before" not in results:
        results["before"] = {name: metric.measure(pair[0], "cpu")[name] for name in NUMBERS}
    names = (
        list(VARIANTS)
        if variants == "all"
        else [name.strip() for name in variants.split(";" if ";" in variants else ",")]
    )
    todo = [(name, budget, int(seed)) for seed in seeds.split(",") for budget in budgets.split(",") for name in names]
    for count, (name, budget, seed) in enumerate(todo, 1):
        key = f"{name}/{budget}/{times:g}/{seed}"
        if key in results["cells"] or (budget == "time" and name == "ikl"):
            continue
        length = kimg
        if budget == "time":
            pace = results["step_seconds"]
            for variant in ("ikl", name):
                pace[variant] = pace.get(variant) or seconds_per_step(variant, pair)
            length = kimg * min(1.0, pace["ikl"] / pace[name])
        cell = refine(name, seed, length, pair, metric)
        results["cells"][key] = {"variant": name, "budget": budget, "seed": seed, "times": times, **cell}
        print(f"{count}/{len(todo)}  {key}  {cell}", file=sys.stderr, flush=True)
        with replaced_atomically(path) as temporary:
            Path(temporary).write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
