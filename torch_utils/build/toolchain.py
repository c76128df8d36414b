"""What there is to compile with: compilers, ninja, the CUDA toolkit and its limits, the driver, the GPUs.

Only the standard library at import. Names are cheap (`find_*` looks at files, nothing is run); `CudaToolkit.probe` runs
nvcc. Nothing here changes the environment.
"""

import ctypes
import functools
import glob
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CXX_NAMES = ("g++", "c++", "clang++")

# NVIDIA's names for architectures, as torch accepts them in TORCH_CUDA_ARCH_LIST.
_ARCH_NAMES = {
    "Maxwell": "5.0;5.2",
    "Pascal": "6.0;6.1",
    "Volta": "7.0",
    "Turing": "7.5",
    "Ampere": "8.0;8.6",
    "Ada": "8.9",
    "Hopper": "9.0",
    "Blackwell": "10.0;12.0",
}
# One target per generation of GPUs, for a build without a GPU; those that the compiler knows are taken.
_COMMON_TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


class Missing(RuntimeError):
    """Something to build with is missing or does not fit; one line for people."""


@dataclass(frozen=True)
class Compiler:
    """A compiler's command."""

    command: tuple[str, ...]

    @functools.cached_property
    def version(self) -> str:
        """First line of --version; '' if it cannot be run."""
        text = output_of([*self.command, "--version"])
        return text.strip().splitlines()[0] if text.strip() else ""

    def __str__(self) -> str:
        return shlex.join(self.command)


def output_of(command: list[str], limit: float = 20) -> str:
    """stdout and stderr of a short command; '' where it cannot be run or takes too long."""
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=limit
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout + result.stderr


def find_cxx() -> Compiler | None:
    """`$CXX` where it is set, otherwise the first C++ compiler on the PATH; None = there is none."""
    if os.environ.get("CXX"):
        command = tuple(shlex.split(os.environ["CXX"]))
        return Compiler(command) if shutil.which(command[0]) else None
    found = next(filter(None, map(shutil.which, CXX_NAMES)), None)
    return Compiler((found,)) if found else None


def find_ninja() -> str | None:
    """ninja from its Python package, beside this Python, or on the PATH."""
    try:
        import ninja

        folders = [getattr(ninja, "BIN_DIR", "")]
    except ImportError:
        folders = []
    folders += [sysconfig.get_path("scripts"), os.path.dirname(sys.executable)]
    return shutil.which("ninja", path=os.pathsep.join(filter(None, folders))) or shutil.which("ninja")


def nvcc_candidates() -> list[str]:
    """Paths where nvcc may be, likeliest first."""
    roots = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    paths = [os.path.join(root, "bin", "nvcc") for root in roots if root]
    if not paths:  # a toolkit that the user names is the only one that counts
        paths += filter(None, [shutil.which("nvcc")])
        numbered = glob.glob("/usr/local/cuda-*") + glob.glob("/opt/cuda*")
        newest_first = sorted(numbered, key=lambda p: [int(n) for n in re.findall(r"\d+", p)], reverse=True)
        paths += [os.path.join(root, "bin", "nvcc") for root in ("/usr/local/cuda", *newest_first)]
        paths += sorted(glob.glob(os.path.join(sysconfig.get_path("purelib"), "nvidia", "*", "bin", "nvcc")))
    return list(dict.fromkeys(paths))


def find_nvcc(torch_cuda: str | None) -> Compiler | None:
    """The nvcc to use: of several, one of torch's CUDA major where the folder's name says so."""
    paths = tuple(path for path in nvcc_candidates() if os.access(path, os.X_OK))
    major = (torch_cuda or "").split(".")[0]
    fitting = tuple(path for path in paths if major and re.search(rf"cuda-{major}\b", os.path.realpath(path)))
    return Compiler((fitting or paths)[0:1]) if paths else None


@dataclass(frozen=True)
class CudaToolkit:
    """What an nvcc says about itself."""

    name = "nvcc"
    nvcc: Compiler
    root: Path  # the toolkit's own folder, also where `nvcc` is a wrapper script elsewhere
    version: str  # '13.0'
    targets: tuple[str, ...]  # 'sm_75', …, oldest first

    @property
    def path(self) -> str:
        return str(self.nvcc)

    @classmethod
    def probe(cls, nvcc: Compiler) -> "CudaToolkit":
        """Asks nvcc. Raises Missing if it does not answer."""
        release = re.search(r"release (\d+\.\d+)", output_of([*nvcc.command, "--version"]))
        if not release:
            raise Missing(f"{nvcc} does not answer to --version")
        codes = re.findall(r"\bsm_(\d+)\b", output_of([*nvcc.command, "--list-gpu-code"]))
        # a dry run prints the folder that nvcc itself takes for its own; the file need not exist
        here = re.search(r"^#\$ TOP=(.+)$", output_of([*nvcc.command, "--dryrun", "-c", "x.cu"]), re.MULTILINE)
        root = here[1].strip() if here else os.path.dirname(os.path.dirname(os.path.realpath(nvcc.command[0])))
        targets = tuple(f"sm_{number}" for number in sorted({int(code) for code in codes}))
        return cls(nvcc, Path(os.path.realpath(root)), release[1], targets)

    def newest_gcc(self) -> int | None:
        """The newest major version of gcc that this toolkit takes, from its own header; None = not said."""
        header = self.root / "include" / "crt" / "host_config.h"
        try:
            bound = re.search(r"gcc versions later than (\d+)", header.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            return None
        return int(bound[1]) if bound else None

    def host_compiler(self) -> str | None:
        """What to pass as -ccbin; None = nvcc's own choice is right.

        Raises:
            Missing: Only compilers that are too new; names the bound.
        """
        given = os.environ.get("NVCC_CCBIN") or os.environ.get("CXX")
        if given:
            return shlex.split(given)[-1]
        default, bound = shutil.which("g++"), self.newest_gcc()
        major = gcc_major(default) if default else None
        if default and (bound is None or major is None or major <= bound):
            return None
        fitting = (shutil.which(f"g++-{number}") for number in range(bound or 15, 6, -1))
        found = next(filter(None, fitting), None) or shutil.which("clang++")
        if found:
            return found
        has = f"g++ is {major}" if default else "no g++ was found"
        limit = f"at most {bound}" if bound else "one"
        raise Missing(f"nvcc {self.version} takes g++ {limit}, {has}; install an older one or set NVCC_CCBIN")


def time_limit() -> float:
    """Seconds for a build, or for waiting for one. Raises Missing if REFINE_OPS_TIMEOUT is no number."""
    text = os.environ.get("REFINE_OPS_TIMEOUT", "300")
    try:
        return float(text)
    except ValueError:
        raise Missing(f"REFINE_OPS_TIMEOUT is {text!r}; expected seconds") from None


def gcc_major(path: str) -> int | None:
    """Major version of a gcc; None for another compiler."""
    text = output_of([path, "-dumpversion"])
    return int(text.split(".")[0]) if re.match(r"\d+(\.\d+)*\s*$", text) else None


@functools.cache
def driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the installed driver runs, (13, 0); None = no driver."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        number = ctypes.c_int()
        failed = library.cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return None
    return None if failed else (number.value // 1000, number.value % 1000 // 10)


def parse_arch_list(text: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST → targets: '8.0;9.0+PTX' → ['sm_80', 'sm_90', 'ptx_90'].

    Raises:
        Missing: A word that is no architecture.
    """
    targets = []
    for word in re.split(r"[;,\s]+", text.strip()):
        name, plus, suffix = word.partition("+")
        for number in _ARCH_NAMES.get(name, name).split(";"):
            if not re.fullmatch(r"\d+\.\d[af]?", number) or (plus and suffix != "PTX"):
                raise Missing(f"TORCH_CUDA_ARCH_LIST holds {word!r}; expected e.g. 8.0;9.0+PTX")
            targets.append("sm_" + number.replace(".", ""))
        if plus:
            targets.append(targets[-1].replace("sm", "ptx"))
    return list(dict.fromkeys(targets))


def choose_target(known: Sequence[str], capability: tuple[int, int]) -> str:
    """What to compile for.

    Args:
        known: The compiler's targets.
        capability: Of the GPU.

    Returns:
        The GPU's own target where the compiler knows it, else the newest before it within its major version, else PTX,
        which the driver compiles.

    Raises:
        Missing: A GPU older than the compiler knows.
    """
    numbers, wanted = sorted(int(target[3:]) for target in known), 10 * capability[0] + capability[1]
    if wanted < numbers[0]:
        raise Missing(f"the compiler's oldest target is sm_{numbers[0]}, the GPU is sm_{wanted}; an older one knows it")
    best = max(number for number in numbers if number <= wanted)
    return f"{'sm' if best // 10 == capability[0] else 'ptx'}_{best}"


def choose_targets(known: Sequence[str], capabilities: Sequence[tuple[int, int]]) -> list[str]:
    """What to compile for ahead of time: `choose_target` of the GPUs here; none = every common target, and PTX for what
    comes later. Raises Missing as that does."""
    if capabilities:
        return sorted({choose_target(known, capability) for capability in capabilities})
    return [t for t in _COMMON_TARGETS if t in known] + [f"ptx_{max(int(target[3:]) for target in known)}"]


def serves(targets: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for these targets runs on a GPU: machine code of its major version, or older PTX."""
    gpu = 10 * capability[0] + capability[1]
    for target in targets:
        kind, _, number = target.partition("_")
        if number[-1] in "af":  # code for one architecture exactly
            if int(number[:-1]) == gpu:
                return True
        elif int(number) <= gpu and (kind == "ptx" or int(number) // 10 == capability[0]):
            return True
    return False


@functools.cache
def cpu_features() -> str | None:
    """What -march=native depends on, as one text; None = not known here, so nothing may depend on it."""
    names = ("flags", "Features", "CPU implementer", "CPU part", "isa", "cpu")
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            first = file.read(16384).split("\n\n")[0]  # of a hundred processors one is enough
    except OSError:
        return None
    lines = [line for line in first.splitlines() if line.partition(":")[0].strip() in names]
    return "\n".join(" ".join(sorted(line.split())) for line in lines) or None


# What x86-64-v3 needs (Haswell and Zen, 2013 to 2017, and later), in the words of /proc/cpuinfo; abm is lzcnt.
_X86_64_V3 = {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}


def cpu_targets() -> list[str]:
    """What a library may be compiled for to run here, best first; the last runs on other machines, too.

    'native-' and a digest of the processor's features; 'x86-64-v3' where it has those; otherwise 'baseline'.
    """
    features = cpu_features()
    if features is None:
        return ["baseline"]
    native = f"native-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
    return [native, "x86-64-v3" if set(features.split()) >= _X86_64_V3 else "baseline"]


def march(target: str) -> list[str]:
    """The compiler's option for a CPU target."""
    if target.startswith("native-"):
        return ["-march=native"]
    return [] if target == "baseline" else [f"-march={target}"]
