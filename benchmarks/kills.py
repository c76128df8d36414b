"""Kill a demo run again and again, and compare what it ends with to the run that was left alone.

    python benchmarks/kills.py [--kills=20] [--ranks=2] [--then=1] [--outdir=kills-out] [--seed=0]

The run measures a metric at every snapshot. One of its processes is sent SIGKILL, which nothing can catch: every other
time at a random moment, and every other time while a training state is being written, which is waited for. The others
are to end by themselves. The same command line goes on each time (--resume=auto). A third run is stopped once and goes
on with another number of processes (--then); its additions have another order, so its weights are compared within a
tolerance. The last line is for scripts; the exit code is 1 unless the last snapshots are equal byte for byte.
"""

import hashlib
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import click
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
RUN = ("--gan=digits-gan", "--teacher=digits-teacher", "--preset=demo", "--desc=kills", "--device=cpu", "--resume=auto")
# Snapshots come often, and the warm-up is short: kills shall fall into everything that a run does.
METRIC = ("--metrics=fd200-digits", "--ref=digits-reference", "--tick=0.16", "--snap=1", "--aux-warmup-kimg=0.16")


class Processes:
    """One start of a run, by as many processes as torchrun would start."""

    def __init__(self, log: Path, ranks: int, *args: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        launcher["LOCAL_WORLD_SIZE"] = str(ranks)
        command = [sys.executable, str(ROOT / "refine.py"), *RUN, *METRIC, *args]
        with open(log, "a") as file:
            self.all = [
                subprocess.Popen(
                    command,
                    stdout=file,
                    stderr=file,
                    cwd=ROOT,
                    env={**os.environ, **(launcher if ranks > 1 else {}), "RANK": str(r), "LOCAL_RANK": str(r)},
                )
                for r in range(ranks)
            ]

    def run(self) -> bool:
        return all(process.poll() is None for process in self.all)

    def wait(self, seconds: float | None = None) -> list[int]:
        return [process.wait(seconds) for process in self.all]


def being_written(run: Path) -> bool:
    return any(run.glob(".training-state-*.tmp"))


def kill(processes: Processes, run: Path, draw: random.Random, while_saving: bool, longest: float) -> str | None:
    """Kill one process at its moment; returns where the run was, or None if it had come to its end before."""
    for leftover in run.glob(".training-state-*.tmp"):  # of the start before: not to be taken for this one's
        leftover.unlink()
    deadline = time.monotonic() + draw.uniform(3, longest)
    while processes.run() and time.monotonic() < deadline:
        time.sleep(0.02)
    while while_saving and processes.run() and not being_written(run):
        time.sleep(0.0005)
    if not processes.run():
        if any(processes.wait(90)):
            raise click.ClickException("a process failed that nobody killed; see the log")
        return None
    victim = 0 if while_saving else draw.randrange(len(processes.all))  # rank 0 is the one that writes
    processes.all[victim].kill()
    processes.wait(90)
    return "while saving" if being_written(run) else "elsewhere"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--kills", default=20, show_default=True, help="How often the run is killed.")
@click.option("--ranks", default=2, show_default=True, help="Processes of the run.")
@click.option("--then", default=1, show_default=True, help="Processes that a stopped run goes on with.")
@click.option("--longest", default=9.0, show_default=True, help="Seconds that a process lives at most until then.")
@click.option("--seed", default=0, show_default=True, help="Random seed of the moments.")
@click.option("--outdir", default="kills-out", show_default=True, metavar="DIR")
@click.option("--kimg", type=float, help="Length of the run.  [default: preset demo]")
def main(kills: int, ranks: int, then: int, longest: float, seed: int, outdir: str, kimg: float | None) -> None:
    """Kill a demo run again and again; its last snapshot is to equal that of a run that was left alone."""
    folder = Path(outdir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    options = [f"--kimg={kimg}"] if kimg else []
    before = time.monotonic()
    if any(Processes(folder / "whole.txt", ranks, *options, f"--outdir={folder}/whole").wait()):
        raise click.ClickException(f"the run failed; see {folder}/whole.txt")
    whole_seconds, before = time.monotonic() - before, time.monotonic()
    again = [*options, f"--outdir={folder}/killed", "--state-minutes=0"]
    draw, places, log = random.Random(seed), [], folder / "killed.txt"
    processes = Processes(log, ranks, *again)
    while len(places) < kills:
        runs = sorted((folder / "killed").glob("0*"))  # a start that was killed early leaves a folder without a state
        place = kill(processes, runs[-1] if runs else folder, draw, len(places) % 2 == 1, longest)
        if place is None:
            break
        places.append(place)
        click.echo(f"kill {len(places)}: {place}", err=True)
        processes = Processes(log, ranks, *again)
    if any(processes.wait()):
        raise click.ClickException(f"the run failed; see {log}")
    killed_seconds = time.monotonic() - before
    error = go_on_with_others(folder, ranks, then, options)
    compare(folder, places, whole_seconds, killed_seconds, f"{ranks} then {then} processes: error {error:.1e}")


def go_on_with_others(folder: Path, ranks: int, then: int, options: list[str]) -> float:
    """Largest error of weights, in units of their tensor's norm, after a stop and a start with `then` processes."""
    log, outdir = folder / "others.txt", f"--outdir={folder}/others"
    processes = Processes(log, ranks, *options, outdir, "--state-minutes=0")
    while processes.run() and not list((folder / "others").glob("0*/training-state-*.pt")):
        time.sleep(0.05)
    for process in processes.all:
        process.terminate()
    processes.wait(90)
    if any(Processes(log, then, *options, outdir).wait()):
        raise click.ClickException(f"the run failed; see {log}")
    ours, theirs = load_file(last_snapshot(folder / "others")), load_file(last_snapshot(folder / "whole"))
    return max(((ours[n] - x).norm() / x.norm().clamp_min(1e-12)).item() for n, x in theirs.items())


def last_snapshot(outdir: Path) -> Path:
    return sorted(outdir.glob("*/network-snapshot-0*.safetensors"))[-1]


def compare(folder: Path, places: list[str], whole_seconds: float, killed_seconds: float, others: str) -> None:
    last = [last_snapshot(folder / name) for name in ("whole", "killed")]
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in last]
    equal = sums[0] == sums[1] and last[0].name == last[1].name
    click.echo(
        f"kills: {len(places)} of which {places.count('while saving')} while saving; {last[0].name} "
        f"whole {sums[0][:16]} killed {sums[1][:16]} equal={'yes' if equal else 'no'}; {others}; "
        f"{whole_seconds:.0f} s and {killed_seconds:.0f} s on {os.cpu_count()} cores"
    )
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    main()
