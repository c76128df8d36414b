"""Kill a demo run again and again, and compare what it ends with to the run that was left alone.

    python benchmarks/kills.py [--kills=20] [--outdir=kills-out] [--seed=0]

Each process of the killed run is sent SIGKILL, which nothing can catch: every other time at a random moment, and every
other time while a training state is being written, which is waited for. The next one goes on with --resume=latest. The
last line is for scripts; the exit code is 1 unless the last snapshots are equal byte for byte.
"""

import hashlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
PAIR = ("--gan=digits-gan", "--teacher=digits-teacher", "--preset=demo", "--desc=kills")


def start(log: Path, *args: str) -> subprocess.Popen:
    with open(log, "a") as file:
        return subprocess.Popen([sys.executable, str(ROOT / "refine.py"), *args], stdout=file, stderr=file, cwd=ROOT)


def being_written(run: Path) -> bool:
    return any(run.glob(".training-state-*.tmp"))


def kill(process: subprocess.Popen, run: Path, draw: random.Random, while_saving: bool, longest: float) -> str | None:
    """Kill a process at its moment; returns where it was, or None if it had come to its end before."""
    for leftover in run.glob(".training-state-*.tmp"):  # of the process before: not to be taken for this one's
        leftover.unlink()
    deadline = time.monotonic() + draw.uniform(3, longest)
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    while while_saving and process.poll() is None and not being_written(run):
        time.sleep(0.0005)
    if process.poll() is not None:
        return None
    process.kill()
    process.wait()
    return "while saving" if being_written(run) else "elsewhere"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--kills", default=20, show_default=True, help="How often the run is killed.")
@click.option("--longest", default=9.0, show_default=True, help="Seconds that a process lives at most until then.")
@click.option("--seed", default=0, show_default=True, help="Random seed of the moments.")
@click.option("--outdir", default="kills-out", show_default=True, metavar="DIR")
@click.option("--kimg", type=float, help="Length of the run.  [default: preset demo]")
def main(kills: int, longest: float, seed: int, outdir: str, kimg: float | None) -> None:
    """Kill a demo run again and again; its last snapshot is to equal that of a run that was left alone."""
    folder = Path(outdir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    options = [*PAIR, *([f"--kimg={kimg}"] if kimg else [])]
    before = time.monotonic()
    if start(folder / "whole.txt", *options, f"--outdir={folder}/whole").wait():
        raise click.ClickException(f"the run failed; see {folder}/whole.txt")
    whole_seconds, before = time.monotonic() - before, time.monotonic()
    draw, places, log = random.Random(seed), [], folder / "killed.txt"
    run = folder / "killed" / "00000-kills"
    process = start(log, *options, f"--outdir={folder}/killed", "--state-minutes=0")
    while len(places) < kills:
        place = kill(process, run, draw, len(places) % 2 == 0, longest)
        if place is None:
            break
        places.append(place)
        click.echo(f"kill {len(places)}: {place}", err=True)
        resume = run.is_dir() and any(run.glob("training-state-*.pt"))
        again = ["--resume=latest"] if resume else [*options, "--state-minutes=0"]
        process = start(log, *again, f"--outdir={folder}/killed")
    if process.wait():
        raise click.ClickException(f"the run failed; see {log}")
    compare(folder, places, whole_seconds, time.monotonic() - before)


def compare(folder: Path, places: list[str], whole_seconds: float, killed_seconds: float) -> None:
    last = [sorted((folder / name).glob("*/network-snapshot-0*.safetensors"))[-1] for name in ("whole", "killed")]
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in last]
    equal = sums[0] == sums[1] and last[0].name == last[1].name
    click.echo(
        f"kills: {len(places)} of which {places.count('while saving')} while saving; {last[0].name} "
        f"whole {sums[0][:16]} killed {sums[1][:16]} equal={'yes' if equal else 'no'}; "
        f"{whole_seconds:.0f} s and {killed_seconds:.0f} s on {os.cpu_count()} cores"
    )
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
