"""Refinements of several pairs with one setting, and of one pair with each ingredient left out: tables in Markdown.

    python benchmarks/pairs.py --out=pairs                      # five pairs, seeds 0 to 2: hours of one core
    python benchmarks/pairs.py --out=pairs --cells=ablation     # one ingredient at a time, on digits-gan
    python benchmarks/pairs.py --out=pairs --show               # the tables of what is there

A cell is a run of `refine.py`; those that are there are kept, and one that was stopped goes on. Measured on 2,000
images against real digits, at the run's best snapshot. Times are processor seconds of whole runs, with their metrics.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev

import click

ROOT = Path(__file__).resolve().parents[1]
TEACHER = "digits-teacher-2"
COMMON = (f"--teacher={TEACHER}", "--preset=demo", "--adversarial=0.5")
#: Pair → the option that names the student, and the length in kimg. The files of the last two come from recipes.
PAIRS = {
    "digits-gan": ("digits-gan", 6.4),
    "digits-gan-long": ("digits-gan-long", 6.4),
    "without classes": ("digits-gan-uncond.safetensors", 6.4),  # pretrained/recipes/train_gan.py --no-classes
    "64×64 student": ("digits-gan-64.safetensors", 6.4),  # pretrained/recipes/grow_gan.py
    "one-step": ("one-step", 6.4),
}
#: What is changed → length in kimg, which makes the processor time equal, and options, on digits-gan.
ABLATION = {
    "nothing": (3.2, ()),
    "images not clamped": (3.2, ("--no-clamp",)),
    "ikl instead of dmd": (3.2, ("--objective=ikl",)),
    "one auxiliary step": (4.16, ("--aux-steps=1",)),
    "three auxiliary steps": (2.56, ("--aux-steps=3",)),
    "auxiliary steps by measurement": (3.2, ("--aux-steps=auto",)),
    "no auxiliary warm-up": (3.84, ("--aux-warmup-kimg=0",)),
    "the finer noise of EDM": (3.2, ("--sigma=lognormal:-1.2,1.2", "--aux-sigma=lognormal:-1.2,1.2")),
    "no critic": (4.48, ("--adversarial=0",)),
    "half the rates": (3.2, ("--lr=5e-4", "--aux-lr=1.25e-3")),
    "dropout and augmentation in the auxiliary loss": (3.2, ("--aux-dropout=0.13", "--aux-augment=0.12")),
    "exponential average": (3.2, ("--average=ema", "--ema-kimg=0.5")),
    "control: the student is frozen": (0.96, ("--lr=0",)),
    "control: aux stays the teacher, no critic": (3.2, ("--aux-lr=0", "--adversarial=0")),
}
KEYS = ("fd_digits", "precision", "recall", "label_accuracy")


def cells(which: str, seeds: list[int], students: Path) -> Iterator[tuple[str, list[str]]]:
    """Name of a cell, and the options of its run."""
    if which == "pairs":
        for pair, (gan, kimg) in PAIRS.items():
            place = str(students / gan) if gan.endswith(".safetensors") else gan
            for seed in seeds:
                yield f"{pair}, seed {seed}", [f"--gan={place}", f"--kimg={kimg}", f"--seed={seed}"]
    else:
        for name, (kimg, options) in ABLATION.items():
            for seed in seeds:
                yield f"{name}, seed {seed}", ["--gan=digits-gan", f"--kimg={kimg}", f"--seed={seed}", *options]


def run(folder: Path, options: list[str]) -> None:
    """One cell, unless it is there; its processor seconds go into a file beside the run."""
    if (folder / "seconds").is_file():
        return
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, str(ROOT / "refine.py"), *COMMON, *options, f"--outdir={folder}", "--resume=auto"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    (folder / "seconds").write_text(f"{seconds:.0f}")


def results(folder: Path) -> tuple[dict, dict] | None:
    """Numbers before, and at the best snapshot; None if the run is not there."""
    for path in folder.glob("*/metric-fd2k-digits.jsonl"):
        rows = [json.loads(line)["results"] for line in path.read_text().splitlines()]
        if len(rows) > 1:
            return rows[0], min(rows[1:], key=lambda row: row["fd_digits"])
    return None


def shown(values: list[float]) -> str:
    if not values:
        return "–"
    digits = 2 if max(values) >= 0.995 else 3
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def table(out: Path, names: list[str]) -> str:
    """Mean ± standard deviation over the seeds of each group of cells."""
    lines = ["| | seeds | fd_digits | precision | recall | label accuracy | CPU s |", "|" + "---|" * 7]
    groups: dict[str, list[Path]] = {}
    for name in names:
        groups.setdefault(name.rpartition(", seed ")[0], []).append(out / name)
    for group, folders in groups.items():
        there = [(folder, found) for folder in folders if (found := results(folder)) is not None]
        if not there:
            continue
        before, afters = there[0][1][0], [found[1] for _, found in there]
        seconds = [float((folder / "seconds").read_text()) for folder, _ in there if (folder / "seconds").is_file()]
        numbers = [[shown([row[key] for row in rows if key in row]) for key in KEYS] for rows in ([before], afters)]
        lines.append(f"| {group}, before | | {' | '.join(numbers[0])} | |")
        cost = f"{mean(seconds):.0f}" if seconds else ""
        lines.append(f"| {group}, refined | {len(there)} | {' | '.join(numbers[1])} | {cost} |")
    return "\n".join(lines)


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Where the runs go.")
@click.option("--cells", "which", type=click.Choice(["pairs", "ablation"]), default="pairs", show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--students", type=click.Path(path_type=Path), default=Path(), help="Folder of the recipes' students.")
@click.option("--show", is_flag=True, help="Run nothing.")
def main(out: Path, which: str, seeds: str, students: Path, show: bool) -> None:
    chosen = dict(cells(which, [int(seed) for seed in seeds.split(",")], students))
    for name, options in {} if show else chosen.items():
        click.echo(name, err=True)
        run(out / name, options)
    click.echo(table(out, list(chosen)))


if __name__ == "__main__":
    main()
