"""The folder of one run, as users of NVIDIA's tools know it.

00003-desc/
    training_options.json               everything that was used
    log.txt                             what was printed
    stats.jsonl                         one line per tick
    metric-<name>.jsonl                 one line per snapshot
    fakes_init.png, fakes000123.png     fixed latents, before and at 123 kimg
    network-snapshot-000123.safetensors G_ema and G
    network-snapshot-best.safetensors   a copy of the best one by the first metric
    training-state-000123.pt            what --resume needs; the newest ones are kept

Names carry whole kimg, as NVIDIA's do. Where snapshots come more than once a kimg, and for training states between two
snapshots, they carry the images, too: network-snapshot-000001.600.safetensors is 1600 images.

    events.out.tfevents…                TensorBoard
"""

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from refine.dnnlib import append_text, format_kimg, replaced_atomically


def next_run_dir(outdir: str | os.PathLike, desc: str) -> Path:
    """The folder that `create` would make next: the highest run number in `outdir` plus one. Makes nothing."""
    outdir = Path(outdir)
    names = [path.name for path in outdir.iterdir()] if outdir.is_dir() else []
    numbers = [int(match.group()) for name in names if (match := re.match(r"\d+", name))]
    return outdir / f"{max(numbers, default=-1) + 1:05d}-{_slug(desc)}"


def create_run_dir(outdir: str | os.PathLike, desc: str) -> Path:
    """Make a new run folder, never one that exists; several runs may start at once.

    Raises:
        OSError: The folder cannot be made or not be written to.
    """
    for _ in range(100):
        path = next_run_dir(outdir, desc)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.mkdir()
        except FileExistsError:  # another run took the number
            continue
        return path
    raise OSError(f"no free run number in {outdir}")


def kimg_name(nimg: int, exact: bool) -> str:
    """The number in the names of snapshots and states: `000123` for 123_456 images, exactly `000123.456`."""
    return f"{format_kimg(nimg)}.{nimg % 1000:03d}" if exact else format_kimg(nimg)


def training_states(folder: str | os.PathLike) -> list[Path]:
    """The training states in a run folder, newest first.

    By whole kimg, and by the time of writing among equal ones (a name without the images may stand for any of them).
    """

    def age(path: Path) -> tuple[str, int]:
        return path.name[len("training-state-") :][:6], path.stat().st_mtime_ns

    return sorted(Path(folder).glob("training-state-*.pt"), key=age, reverse=True)


def find_training_states(path: str | os.PathLike) -> list[Path]:
    """What --resume=PATH means, the state to go on from first and older ones, for when it is damaged, after it.

    Args:
        path: A training state; a snapshot, which has its state beside it; a run folder; or an `outdir`, of which the
            newest run with a state is taken.

    Raises:
        ValueError: There is none.
    """
    path = Path(path)
    if path.is_file() and path.name.startswith("network-snapshot-"):
        number = path.name.removeprefix("network-snapshot-").removesuffix(path.suffix)
        state = path.with_name(f"training-state-{number}.pt")
        if not state.is_file():
            kept = ", ".join(other.name for other in training_states(path.parent)) or "none"
            raise ValueError(f"{path} has no {state.name} beside it; training states that were kept: {kept}")
        return [state]
    if path.is_file():
        return [path]
    runs = sorted((run for run in path.glob("[0-9]*") if run.is_dir()), key=_run_number, reverse=True)
    for folder in (path, *runs):
        if states := training_states(folder):
            return states
    raise ValueError(f"{path} holds no training-state-*.pt; expected a run folder, or a folder of runs")


def _run_number(path: Path) -> int:
    return int(re.split(r"\D", path.name, maxsplit=1)[0])


class RunDir:
    """Writes the files of a run folder that exists. Text grows line by line, other files are replaced atomically.

    Args:
        path: The folder.
        quiet: Nothing to stdout.
        writes: False: nothing at all, in every process of a run but one.
    """

    def __init__(self, path: str | os.PathLike, quiet: bool = False, writes: bool = True):
        self.path = Path(path)
        self.quiet, self.writes = quiet, writes

    def log(self, line: str) -> None:
        """One line to stdout and to log.txt."""
        if not self.writes:
            return
        if not self.quiet:
            print(line, flush=True)
        self._append("log.txt", line)

    def write_json(self, name: str, value: Any) -> None:
        if not self.writes:
            return
        with replaced_atomically(self.path / name) as temporary:
            temporary.write_text(json.dumps(value, indent=2) + "\n")

    def append_stats(self, stats: dict[str, Any]) -> None:
        self._append("stats.jsonl", json.dumps({**stats, "timestamp": time.time()}))

    def append_metric(self, name: str, results: dict[str, Any], snapshot: str, kimg: float) -> None:
        line = {"results": results, "metric": name, "snapshot": snapshot, "kimg": kimg, "timestamp": time.time()}
        self._append(f"metric-{name}.jsonl", json.dumps(line))

    def _append(self, name: str, line: str) -> None:
        if not self.writes:
            return
        append_text(self.path / name, line + "\n")

    def trim_after(self, kimg: float) -> None:
        """Drop lines of .jsonl files past `kimg`, which a resumed run writes again, and what a kill left half-done."""
        if not self.writes:
            return
        for leftover in self.path.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        for path in [self.path / "stats.jsonl", *self.path.glob("metric-*.jsonl")]:
            if path.is_file():
                lines = path.read_text().splitlines()
                kept = [line for line in lines if _kimg_of(line) <= kimg]
                with replaced_atomically(path) as temporary:
                    temporary.write_text("".join(f"{line}\n" for line in kept))


def _kimg_of(line: str) -> float:
    try:
        return json.loads(line)["kimg"]
    except (json.JSONDecodeError, KeyError, TypeError):  # half a line, left by a kill
        print(f"a broken line was dropped: {line[:60]}", file=sys.stderr)
        return float("inf")


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-") or "run"
