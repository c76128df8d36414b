"""Sources → compiled files: the steps, ninja, the log, and what a failed build says.

Works in a folder that the caller gives and puts nothing anywhere else. ninja compiles the sources side by side, links
what they gave and stops everything at the first error; where it is missing, the same steps run one after the other.
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

from refine.torch_utils.build import toolchain
from refine.torch_utils.build.toolchain import Compiler, CudaToolkit, Missing

# No -std: the sources ask for what every compiler of today has by default. No -ffast-math: a NaN has to stay one.
# -O2 builds in two thirds of the time of -O3, and its code is as fast; traps: or no loop with a choice vectorises.
CXX_FLAGS = ("-O2", "-ftree-vectorize", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
# Taken where the compiler knows them; without OpenMP the ops run on one thread.
OPTIONAL_CXX_FLAGS = ("-fopenmp", "-fvect-cost-model=dynamic")
NVCC_FLAGS = ("--std=c++17",)
LIBRARY = "ops.so"

# The first that fits an error message explains it.
_DIAGNOSES = [
    (
        r"unsupported GNU version|unsupported clang version",
        "the host compiler is too new for nvcc: set NVCC_CCBIN",
    ),
    (r"cannot execute .?cc1plus|cc1plus.*No such file", "the C++ compiler is only half installed: install g++"),
    (r"fatal error: (cuda|crt)\S*: No such file", "the CUDA toolkit has no headers: install cuda-cudart-dev"),
    (r"libnvrtc-builtins", "NVRTC is only half installed: pip install --force-reinstall nvidia-cuda-nvrtc"),
    (r"fatal error: \S+: No such file", "headers of the C++ library are missing: install g++ (build-essential)"),
    (r"No space left on device", "the disk is full"),
    (r"Killed|signal terminated|out of memory|Cannot allocate memory", "there was too little memory to compile"),
    (r"[Uu]nsupported gpu architecture", "nvcc does not know an architecture of TORCH_CUDA_ARCH_LIST"),
    (r"cannot find -l", "a library to link with is missing"),
    (r"unrecognized (command.line )?option|unknown argument|unknown option", "the compiler is too old for this source"),
    (r"Permission denied", "a file may not be read or run"),
]
_ERROR = re.compile(r"\berror\b|undefined reference|cannot find|not found|No such file|Killed|denied", re.IGNORECASE)


class BuildFailed(RuntimeError):
    """One line: first error, diagnosis, path of the log."""


class Step(NamedTuple):
    """A command that makes one file of others."""

    output: str
    inputs: list[str]
    command: list[str]


def cpu_steps(ops: Sequence[str], compiler: Compiler, target: str, folder: Path) -> list[Step]:
    """For the `*.cpp` of the ops, with as many of the optional flags as the compiler takes.

    Args:
        ops: Names of the sources.
        compiler: The C++ compiler.
        target: One of `toolchain.cpu_targets`.
        folder: Where the sources lie.
    """
    wanted = [*toolchain.march(target), *OPTIONAL_CXX_FLAGS]
    taken = [flag for flag in wanted if _compiles(compiler, flag, folder)]
    command = [*compiler.command, *CXX_FLAGS, *taken]
    compiling = [Step(f"{op}.o", [f"{op}.cpp"], [*command, "-c", f"{op}.cpp", "-o", f"{op}.o"]) for op in ops]
    objects = [step.output for step in compiling]
    return [*compiling, Step(LIBRARY, objects, [*command, "-shared", *objects, "-o", LIBRARY])]


def _compiles(compiler: Compiler, flag: str, folder: Path) -> bool:
    (folder / "probe.cpp").write_text("int probe() { return 0; }\n", encoding="utf-8")
    command = [*compiler.command, flag, "-shared", "-fPIC", "probe.cpp", "-o", "probe.so"]
    try:
        result = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return result.returncode == 0


def cuda_steps(source: str, jobs: Sequence[tuple[str, str]], toolkit: CudaToolkit, folder: Path) -> list[Step]:
    """For kernels of a .cu, each in a file of its own, which are written into the folder.

    Args:
        source: Name of the .cu.
        jobs: (name expression of a kernel, target).
        toolkit: Whose nvcc compiles.
        folder: Where the source lies.

    Raises:
        Missing: No host compiler that nvcc takes.
    """
    ccbin = toolkit.host_compiler()
    command = [*toolkit.nvcc.command, *NVCC_FLAGS, *([f"-ccbin={ccbin}"] if ccbin else [])]
    steps = []
    for index, (expression, target) in enumerate(jobs):
        text = f'#include "{source}"\nconst auto kernel = &{expression};\n'
        (folder / f"{index}.cu").write_text(text, encoding="utf-8")
        form = ["-ptx" if target.startswith("ptx") else "-cubin", f"-arch={target.replace('ptx', 'compute')}"]
        steps.append(Step(f"{index}.out", [f"{index}.cu"], [*command, *form, f"{index}.cu", "-o", f"{index}.out"]))
    return steps


def check_driver(toolkit: CudaToolkit) -> None:
    """Raises Missing if the driver is older than the toolkit: its kernels would not run."""
    driver, major = toolchain.driver_version(), int(toolkit.version.split(".")[0])
    if driver is not None and driver[0] < major:
        tried = ", ".join(toolchain.nvcc_candidates())
        raise Missing(
            f"the driver runs CUDA {driver[0]}.{driver[1]}, the toolkit in {toolkit.root} is {toolkit.version}; install"
            f" CUDA {driver[0]} or set CUDA_HOME (looked at {tried})"
        )


def run(steps: list[Step], folder: Path, log: Path, limit: float, ninja: str | None) -> Path:
    """Runs the steps in `folder`, by ninja where there is one; everything goes into `log`.

    Returns:
        What the last step made.

    Raises:
        BuildFailed: A step failed or the limit (seconds) was reached.
    """
    commands = [step.command for step in steps]
    if ninja:
        (folder / "build.ninja").write_text(_ninja_text(steps), encoding="utf-8")
        commands = [[ninja, "-v"]]
    deadline = time.monotonic() + limit
    with open(log, "w", encoding="utf-8", errors="replace") as file:
        file.writelines(f"$ {shlex.join(step.command)}\n" for step in steps)
        for command in commands:
            file.flush()
            try:
                code = _run_one(command, folder, file, deadline - time.monotonic())
            except subprocess.TimeoutExpired:
                raise BuildFailed(f"the compiler was stopped after {limit:g} s; log: {log}") from None
            except OSError as error:
                raise BuildFailed(f"{command[0]} cannot be run: {error.strerror}; log: {log}") from None
            if code:
                raise BuildFailed(describe(log, code))
    if not (folder / steps[-1].output).is_file():
        raise BuildFailed(f"the compiler left no {steps[-1].output}; log: {log}")
    return folder / steps[-1].output


def _run_one(command: list[str], folder: Path, file: IO[str], limit: float) -> int:
    """Exit code. The children end with the command, also at Ctrl-C."""
    with subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=file,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        try:
            return process.wait(timeout=max(limit, 0.01))
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)  # ninja passes it on to compilers, which have groups of their own
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise


def _ninja_text(steps: list[Step]) -> str:
    lines = ["rule run", "  command = $command"]
    for step in steps:
        command = shlex.join(step.command).replace("$", "$$")
        lines += [f"build {step.output}: run {' '.join(step.inputs)}", f"  command = {command}"]
    return "\n".join(lines) + "\n"


def describe(log: Path, code: int) -> str:
    """A failed build in one line: the first compiler error, what it means, where the rest is."""
    text = log.read_text(encoding="utf-8", errors="replace")
    ours = {line[2:] for line in text.splitlines() if line.startswith("$ ")}  # ninja repeats the failed command
    lines = [line.strip() for line in text.splitlines() if not line.startswith(("$ ", "FAILED:", "ninja:", "["))]
    lines = [line for line in lines if line and line not in ours]
    error = next(filter(_ERROR.search, lines), lines[-1] if lines else None)
    error = error[:300] if error else f"the compiler ended with code {code} and said nothing"
    meaning = next((meaning for pattern, meaning in _DIAGNOSES if re.search(pattern, text)), None)
    return f"{error}{f' ({meaning})' if meaning else ''}; log: {log}"
