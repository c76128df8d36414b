"""The demo for many times its length: does memory stay flat, does it slow down, does the distance go up again?

    python benchmarks/long_run.py [--times=10] [--patience=0] [--outdir=long-out]

Goes on where it was if it is called again. Draws long-run.png from the run's own stats.jsonl and metric-*.jsonl, and
prints one line for scripts: peak memory and processor seconds a kimg of the first and the last quarter, first, best and
last FD.
"""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refine.config import PRESETS
from refine.training.finding import find_training_states

ROOT = Path(__file__).resolve().parents[1]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def summary(stats: list[dict], distances: list[tuple[float, float]]) -> str:
    """The first quarter without its first tick, which warms up caches, against the last quarter."""
    quarter = max(len(stats) // 4, 1)
    first, last = stats[1 : quarter + 1] or stats, stats[-quarter:]

    def of(part: list[dict], name: str) -> float:
        return median(line[name] for line in part)

    memory = [of(part, "Resources/peak_cpumem_gb") for part in (first, last)]
    speed = [of(part, "Timing/cpu_sec_per_kimg") for part in (first, last)]
    best, end = min(distances[1:], key=lambda pair: pair[1]), distances[-1]
    return (
        f"long run: {stats[-1]['kimg']:.1f} kimg; peak memory {memory[0]:.3f} -> {memory[1]:.3f} GiB "
        f"(x{memory[1] / memory[0]:.3f}); {speed[0]:.1f} -> {speed[1]:.1f} CPU s/kimg (x{speed[1] / speed[0]:.2f}); "
        f"fd before={distances[0][1]:.2f} best={best[1]:.2f} at {best[0]:.1f} kimg last={end[1]:.2f} "
        f"last/best={end[1] / best[1]:.3f}"
    )


def draw(stats: list[dict], distances: list[tuple[float, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.2), layout="constrained")
    kimg = [line["kimg"] for line in stats]
    curves = [
        ("FD-digits", [k for k, _ in distances], [fd for _, fd in distances], "o-"),
        ("processor seconds per kimg", kimg, [line["Timing/cpu_sec_per_kimg"] for line in stats], "-"),
        ("peak memory (GiB)", kimg, [line["Resources/peak_cpumem_gb"] for line in stats], "-"),
    ]
    for axes, (title, x, y, style) in zip(figure.subplots(1, 3), curves, strict=True):
        axes.plot(x, y, style, markersize=3)
        axes.set(title=title, xlabel="kimg", ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--times", default=10.0, show_default=True, help="Length, in lengths of the demo.")
@click.option("--patience", default=0, show_default=True, help="Stop after this many snapshots without a better FD.")
@click.option("--outdir", default="long-out", show_default=True, metavar="DIR")
@click.option("--device", default=None, help="As the option of refine.py.")
def main(times: float, patience: int, outdir: str, device: str | None) -> None:
    """Run the demo for many times its length, draw its course, and print what changed on the way."""
    kimg = PRESETS["demo"]["kimg"] * times
    try:
        find_training_states(outdir)
        args = ["--resume=latest"]
    except ValueError:
        args = ["--gan=digits-gan", "--teacher=digits-teacher", "--preset=demo", "--desc=long"]
    args += [f"--kimg={kimg}", f"--patience={patience}", f"--outdir={outdir}"]
    args += [f"--device={device}"] if device else []
    if code := subprocess.run([sys.executable, str(ROOT / "refine.py"), *args], check=False).returncode:
        sys.exit(code)
    run = find_training_states(outdir)[0].parent
    stats, measured = lines(run / "stats.jsonl"), lines(run / "metric-fd2k-digits.jsonl")
    distances = [(line["kimg"], line["results"]["fd_digits"]) for line in measured]
    draw(stats, distances, Path(outdir) / "long-run.png")
    click.echo(summary(stats, distances))


if __name__ == "__main__":
    main()
