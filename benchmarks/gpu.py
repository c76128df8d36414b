"""Everything that wants to be known of a GPU, in ten minutes: one Markdown page.

    python benchmarks/gpu.py --out=gpu.md        # also: make gpu
    python benchmarks/gpu.py --only=ops,tests

Each part is a program of its own, with a limit; one that fails or takes too long is told of on the page, and the next
one begins. What a part measures is said at the top of its file.
"""

import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click
import torch

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Part:
    """A program and its page: its output, of which `keep` says which lines; `limit` in seconds."""

    title: str
    command: tuple[str, ...]
    limit: int
    lines: int | None = None  # from the end
    keep: str = ""  # what they contain, a pattern


TESTS = ("-m", "pytest", "-v", "-m", "gpu", "-n", "4", "--tb=line", "tests")  # each is told of as it ends
PARTS = {
    "doctor": Part("Compiled ops", ("-m", "refine", "doctor"), 120),
    "ops": Part("Ops, against plain torch and device copies", ("benchmarks/gpu_ops.py",), 90),
    "iteration": Part("One iteration at CIFAR-10's official sizes", ("benchmarks/steps.py",), 120),
    "metrics": Part("Images per second of metrics", ("benchmarks/metrics.py", "--quick"), 90),
    "tests": Part("Tests that need a GPU", TESTS, 400, lines=60, keep=r"(^|\] )(FAILED|ERROR) | (passed|failed)[ ,]"),
    "demo": Part("The demo", ("-m", "refine.cli.demo", "--outdir={scratch}"), 240, lines=16),
}


def measured(part: Part, scratch: str) -> str:
    """The section of a part."""
    command = [sys.executable, *(word.format(scratch=scratch) for word in part.command)]
    start = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=part.limit)
        output, outcome = done.stdout, "" if done.returncode == 0 else f", **ended with {done.returncode}**"
        if done.returncode:
            output += "\n".join(done.stderr.splitlines()[-8:])
    except subprocess.TimeoutExpired as stopped:
        output, outcome = (stopped.stdout or b"").decode(errors="replace"), f", **stopped after {part.limit} s**"
    lines = output.strip().splitlines()
    shown = [line for line in lines if re.search(part.keep, line)] or lines[-8:]
    shown = shown[-(part.lines or 0) :]
    body = "\n".join(shown) if any(line.startswith("|") for line in shown) else "\n".join(["```", *shown, "```"])
    typed = " ".join(["python", *part.command])
    return f"## {part.title}\n\n`{typed}`, {time.monotonic() - start:.0f} s{outcome}\n\n{body}\n"


def machine() -> str:
    """What was measured on."""
    gpu = torch.cuda.get_device_properties(0)
    facts = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
    software = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return f"# Measured on one {gpu.name}\n\n{facts}; {software}; Python {platform.python_version()}.\n"


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="The page.  [default: stdout]")
@click.option("--only", help=f"Parts, comma-separated: {', '.join(PARTS)}.  [default: all]")
def main(out: Path | None, only: str | None) -> None:
    names = only.split(",") if only else list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        raise click.BadParameter(f"found {', '.join(unknown)}; expected {', '.join(PARTS)}", param_hint="--only")
    if not torch.cuda.is_available():
        raise click.ClickException("torch finds no CUDA device")
    page = [machine()]
    for name in names:
        click.echo(f"{name} (at most {PARTS[name].limit} s) ...", err=True)
        with tempfile.TemporaryDirectory() as scratch:
            page.append(measured(PARTS[name], scratch))
        if out:
            out.write_text("\n".join(page), encoding="utf-8")  # what is there, whatever comes
    if not out:
        click.echo("\n".join(page))


if __name__ == "__main__":
    main()
