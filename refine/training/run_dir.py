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

Names carry whole kimg, as NVIDIA's do. Where snapshots come more than once a kimg, where such a name is taken, and for
training states between two snapshots, they carry the images, too: network-snapshot-000001.600.safetensors is 1600
images.

    events.out.tfevents…                TensorBoard
"""

import contextlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from refine.dnnlib import append_text, replaced_atomically


def next_run_dir(outdir: str | os.PathLike, desc: str) -> Path:
    """The folder that `create_run_dir` would make next: the highest run number in `outdir` plus one. Makes nothing."""
    return Path(outdir) / f"{max(_numbers(Path(outdir)), default=-1) + 1:05d}-{_slug(desc)}"


def create_run_dir(outdir: str | os.PathLike, desc: str) -> Path:
    """Make a new run folder with a number of its own; several runs may start at once.

    Raises:
        OSError: The folder cannot be made or not be written to.
    """
    outdir = Path(outdir)
    outdir.mkdir(parents=True, exist_ok=True)
    for _ in range(1000):
        path = next_run_dir(outdir, desc)
        number = path.name.partition("-")[0]
        claim = outdir / f".{number}.claim"  # the same name for all that want this number: one of them makes it
        try:
            claim.mkdir()
        except FileExistsError:
            if time.time() - _changed_at(claim) > 3:  # left by a process that was killed right here
                _remove_claim(claim)
            time.sleep(0.01)
            continue
        if int(number) in _numbers(outdir):  # claimed, made and given up between our look and our claim
            _remove_claim(claim)
            continue
        try:
            claim.rename(path)
        except FileNotFoundError:  # we slept so long that another process took it for a leftover
            continue
        except OSError:
            _remove_claim(claim)
            raise
        return path
    raise OSError(f"no free run number in {outdir}")


def _numbers(outdir: Path) -> set[int]:
    names = [path.name for path in outdir.iterdir()] if outdir.is_dir() else []
    return {int(match.group()) for name in names if (match := re.match(r"\d+", name))}


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # a moment ago
        return time.time()


def _remove_claim(claim: Path) -> None:
    with contextlib.suppress(OSError):
        claim.rmdir()


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
        """One line to log.txt and to stdout, where there still is one (`refine.training.streams`)."""
        if not self.writes:
            return
        self._append("log.txt", line)
        if not self.quiet:
            print(line, flush=True)

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
        return float(json.loads(line)["kimg"])
    except (ValueError, KeyError, TypeError):  # half a line, left by a kill
        print(f"a broken line was dropped: {line[:60]!r}", file=sys.stderr)
        return float("inf")


def _slug(text: str) -> str:
    """The text as part of a folder's name, which may have 255 bytes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")[:200] or "run"
