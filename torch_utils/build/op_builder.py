"""Source → shared library: the commands, ninja, the log, and what a failed build says.

Works in a folder that the caller gives and puts nothing anywhere else.
"""

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from refine.torch_utils.build import toolchain
from refine.torch_utils.build.toolchain import Compiler, CudaToolkit, Missing

# No -std: the sources ask for what every compiler of today has by default. No -ffast-math: a NaN has to stay one.
# -O2 builds in two thirds of the time of -O3, and its code is as fast; traps: or no loop with a choice vectorises.
CXX_FLAGS = ("-O2", "-ftree-vectorize", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
# Taken where the compiler knows them; without OpenMP the ops run on one thread.
OPTIONAL_CXX_FLAGS = ("-fopenmp", "-fvect-cost-model=dynamic")
NVCC_FLAGS = ("-O3", "-Xcompiler=-fPIC", "--threads=0")

# The first that fits an error message explains it.
_DIAGNOSES = [
    (
        r"unsupported GNU version|unsupported clang version",
        "the host compiler is too new for nvcc: set NVCC_CCBIN",
    ),
    (r"cannot execute .?cc1plus|cc1plus.*No such file", "the C++ compiler is only half installed: install g++"),
    (r"fatal error: cuda\S*: No such file", "the CUDA toolkit has no headers: install cuda-cudart-dev"),
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


def cpu_commands(op: str, compiler: Compiler, target: str, folder: Path) -> list[list[str]]:
    """Compile and link `op`.cpp to `op`.so, with as many of the optional flags as the compiler takes.

    Args:
        op: Name of the source.
        compiler: The C++ compiler.
        target: One of `toolchain.cpu_targets`.
        folder: Where the source lies.
    """
    wanted = [*toolchain.march(target), *OPTIONAL_CXX_FLAGS]
    if not _compiles(compiler, wanted, folder):
        wanted = [flag for flag in wanted if _compiles(compiler, [flag], folder)]
    command = [*compiler.command, *CXX_FLAGS, *wanted]
    return [[*command, "-c", f"{op}.cpp", "-o", f"{op}.o"], [*command, "-shared", f"{op}.o", "-o", f"{op}.so"]]


def _compiles(compiler: Compiler, flags: Sequence[str], folder: Path) -> bool:
    (folder / "probe.cpp").write_text("int probe() { return 0; }\n", encoding="utf-8")
    command = [*compiler.command, *flags, "-shared", "-fPIC", "probe.cpp", "-o", "probe.so"]
    try:
        result = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return result.returncode == 0


def cuda_commands(op: str, toolkit: CudaToolkit, targets: list[str]) -> list[list[str]]:
    """Compile and link `op`.cu to `op`.so. The CUDA runtime goes in statically: it meets torch's in the driver only, so
    the toolkit need not be of torch's version.

    Raises:
        Missing: No host compiler that nvcc takes.
    """
    ccbin = toolkit.host_compiler()
    command = [*toolkit.nvcc.command, *NVCC_FLAGS, *([f"-ccbin={ccbin}"] if ccbin else [])]
    code = toolchain.gencode(targets)
    compile_command = [*command, *code, "-c", f"{op}.cu", "-o", f"{op}.o"]
    return [compile_command, [*command, *code, "-shared", "-cudart=static", f"{op}.o", "-o", f"{op}.so"]]


def check_driver(toolkit: CudaToolkit) -> None:
    """Raises Missing if the driver is older than the toolkit: its kernels would not run."""
    driver, major = toolchain.driver_version(), int(toolkit.version.split(".")[0])
    if driver is not None and driver[0] < major:
        tried = ", ".join(toolchain.nvcc_candidates())
        raise Missing(
            f"the driver runs CUDA {driver[0]}.{driver[1]}, the toolkit in {toolkit.root} is {toolkit.version}; install"
            f" CUDA {driver[0]} or set CUDA_HOME (looked at {tried})"
        )


def run(commands: list[list[str]], folder: Path, log: Path, limit: float, ninja: str | None) -> None:
    """Runs the commands one after the other in `folder`, by ninja where there is one; everything goes into `log`.

    Raises:
        BuildFailed: A command failed or the limit (seconds) was reached.
    """
    if ninja:
        _write_ninja_file(commands, folder / "build.ninja")
        todo = [[ninja, "-v", "-C", str(folder)]]
    else:
        todo = commands
    deadline = time.monotonic() + limit
    with open(log, "w", encoding="utf-8", errors="replace") as file:
        for command in commands:
            file.write(f"$ {shlex.join(command)}\n")
        for command in todo:
            file.flush()
            try:
                code = _run_one(command, folder, file, deadline - time.monotonic())
            except subprocess.TimeoutExpired:
                raise BuildFailed(f"the compiler was stopped after {limit:g} s; log: {log}") from None
            except OSError as error:
                raise BuildFailed(f"{command[0]} cannot be run: {error.strerror}; log: {log}") from None
            if code:
                raise BuildFailed(describe(log, code))


def _run_one(command: list[str], folder: Path, file, limit: float) -> int:
    """Exit code. The compiler's own children end with it, also at Ctrl-C."""
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
            os.killpg(process.pid, signal.SIGKILL)
            raise


def _write_ninja_file(commands: list[list[str]], path: Path) -> None:
    lines = ["rule run", "  command = $command"]
    for command in commands:
        source = command[command.index("-o") - 1]
        lines += [
            f"build {command[-1]}: run {source}",
            f"  command = {shlex.join(command).replace('$', '$$')}",
        ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


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
