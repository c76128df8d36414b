"""What the GPU kernels need, from their sources alone: registers, spills, shared memory, and time to compile.

    python benchmarks/kernels.py [--targets=sm_80,sm_90] [--numbers=float,refine::Float16] [--nvrtc=PATH]

Compiles every kernel with NVRTC, one after the other, and reads what the assembler says. Needs neither a GPU nor a CUDA
toolkit, but NVRTC: it comes with torch for CUDA, or as `pip install nvidia-cuda-nvrtc`. Prints Markdown: registers of a
thread, and after a + the bytes that a thread spills, and then the bytes of static shared memory, where there are any.
"""

import re
import sys
import time
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refine.torch_utils.build import device_code, nvrtc
from refine.torch_utils.ops import bias_act, upfirdn2d  # noqa: F401 - they note their kernels


def figures(said: str) -> str:
    """Of one kernel, from the assembler's words."""
    registers = re.search(r"Used (\d+) registers", said)[1]
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
    shared = re.search(r"(\d+) bytes smem", said)
    return registers + (f" + {spilled}" if spilled else "") + (f", {shared[1]} B" if shared else "")


@click.command(help=__doc__)
@click.option("--targets", default="sm_75,sm_80,sm_86,sm_89,sm_90,sm_100,sm_120", show_default=True)
@click.option("--numbers", default="float,refine::Float16", show_default=True, help="C++ types; 'all' = all four.")
@click.option("--nvrtc", "path", help="The library. Default: what the ops are compiled with, else any.")
def main(targets: str, numbers: str, path: str | None) -> None:
    path = path or nvrtc.find(torch.version.cuda)
    if path is None:
        raise click.ClickException("no NVRTC was found; pip install nvidia-cuda-nvrtc")
    compiler, columns = nvrtc.Nvrtc(path), targets.split(",")
    click.echo(f"NVRTC {compiler.version}\n\n| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    seconds = dict.fromkeys(columns, 0.0)
    count = 0
    for (op, number), names in device_code.KERNELS.items():
        if numbers != "all" and number not in numbers.split(","):
            continue
        for name in names:
            cells = []
            for target in columns:
                start, source = time.process_time(), device_code.read(op)
                image, said = compiler.compile(source.name, source.texts, name, target)
                seconds[target] += time.process_time() - start
                if not image:
                    raise click.ClickException(f"{name} for {target}: {said}")
                cells.append(figures(said))
            click.echo(f"| `{name.replace('refine::', '')}` | {' | '.join(cells)} |")
            count += 1
    click.echo(f"| s a kernel | {' | '.join(f'{total / count:.2f}' for total in seconds.values())} |")


if __name__ == "__main__":
    main()
