"""The folder of one run, as users of NVIDIA's tools know it.

00003-desc/
    training_options.json               everything that was used
    log.txt                             what was printed
    stats.jsonl                         one line per tick
    metric-<name>.jsonl                 one line per snapshot
    fakes_init.png, fakes000123.png     fixed latents, before and at 123 kimg
    network-snapshot-000123.safetensors G_ema and G
    network-snapshot-best.safetensors   a copy of the best one by the first metric
    training-state-000123.pt            what --resume needs
    events.out.tfevents…                TensorBoard
"""

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from dnnlib import replaced_atomically


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


def latest_training_state(path: str | os.PathLike) -> Path:
    """The newest training state in a run folder, or in the newest run of an `outdir` that has one.

    Raises:
        ValueError: There is none.
    """
    path = Path(path)
    states = sorted(path.glob("training-state-*.pt")) or sorted(path.glob("[0-9]*/training-state-*.pt"))
    if not states:
        raise ValueError(f"{path} holds no training-state-*.pt; expected a run folder, or a folder of runs")
    return states[-1]


class RunDir:
    """Writes the files of a run folder that exists. Text grows line by line, other files are replaced atomically."""

    def __init__(self, path: str | os.PathLike, quiet: bool = False):
        self.path = Path(path)
        self.quiet = quiet

    def log(self, line: str) -> None:
        """One line to stdout and to log.txt."""
        if not self.quiet:
            print(line, flush=True)
        self._append("log.txt", line)

    def write_json(self, name: str, value: Any) -> None:
        with replaced_atomically(self.path / name) as temporary:
            temporary.write_text(json.dumps(value, indent=2) + "\n")

    def append_stats(self, stats: dict[str, Any]) -> None:
        self._append("stats.jsonl", json.dumps({**stats, "timestamp": time.time()}))

    def append_metric(self, name: str, results: dict[str, Any], snapshot: str, kimg: float) -> None:
        line = {"results": results, "metric": name, "snapshot": snapshot, "kimg": kimg, "timestamp": time.time()}
        self._append(f"metric-{name}.jsonl", json.dumps(line))

    def _append(self, name: str, line: str) -> None:
        with open(self.path / name, "a") as file:
            file.write(line + "\n")

    def trim_after(self, kimg: float) -> None:
        """Drop lines of .jsonl files past `kimg`: a resumed run writes them again."""
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
