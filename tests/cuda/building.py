"""Compiles the device that is not there (fake_device.cpp), and the CUDA kernels for the host (on_host.h)."""

import re
import shutil
import subprocess
from pathlib import Path

import torch

from refine.torch_utils.build import device_code
from refine.torch_utils.ops import bias_act, filtered_lrelu, upfirdn2d  # noqa: F401 - they note their kernels

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "torch_utils" / "ops"
FLAGS = ["-O1", "-w", "-std=c++20", "-fPIC", "-shared"]


class CannotBuild(Exception):
    """One line that says why not."""


def build(folder: Path) -> None:
    """Makes libdevice.so and libkernels.so in a folder; 14 seconds of processor time. Raises CannotBuild."""
    if torch.version.cuda or torch.version.hip:
        raise CannotBuild("this torch is built for GPUs, of which no other may be made")
    if shutil.which("g++") is None:
        raise CannotBuild("there is no g++")
    home = Path(torch.__file__).parent
    includes = [f"-I{home}/include", f"-I{home}/include/torch/csrc/api/include"]
    libraries = [f"-L{home}/lib", "-lc10", "-ltorch_cpu", "-ltorch", f"-Wl,-rpath,{home}/lib"]
    kernels = []
    for op in sorted({op for op, _ in device_code.KERNELS}):
        kernels.append(folder / f"{op}.cpp")
        kernels[-1].write_text(for_host(op, (KERNELS / f"{op}.cu").read_text(), device_code.kernels_of(op)))
    commands = [
        [*includes, str(HERE / "fake_device.cpp"), *libraries, "-o", str(folder / "libdevice.so")],
        [f"-I{HERE}", f"-I{KERNELS}", *map(str, kernels), "-o", str(folder / "libkernels.so")],
    ]
    running = [
        subprocess.Popen(["g++", *FLAGS, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    for process, what in zip(running, ("the device does not fit this torch", "the kernels"), strict=True):
        errors = [line for line in process.communicate()[1].splitlines() if "error" in line]
        if process.returncode:
            raise CannotBuild(f"g++ fails, {what}: {errors[0] if errors else 'without a word'}")


def for_host(op: str, source: str, expressions: list[str]) -> str:
    """A .cu file as C++, with dynamic shared memory as a pointer, and a function that starts any of its kernels."""
    source, arrays = re.subn(r"extern __shared__ double (\w+)\[\];", r"double* \1 = on_host::shared_memory();", source)
    assert arrays == source.count("shared_memory()") and "extern __shared__" not in source, "the sources have changed"
    start = "return on_host::launch(&{0}, blocks, threads, bytes, record, length);"
    cases = "".join(f'    if (name == "{name}") {start.format(name)}\n' for name in expressions)
    parameters = "const char* text, unsigned blocks, int threads, size_t bytes, const void* record, size_t length"
    launch = f"const std::string name = text;\n{cases}    return on_host::kUnknown;"
    return f'#include "on_host.h"\n{source}\nextern "C" int launch_{op}({parameters}) {{\n    {launch}\n}}\n'
