"""The kernels of GPUs: each is one image (machine code, or PTX), found in the cache or compiled at its first use.

    load("upfirdn2d", "refine::plane_kernel<2,1,4,float>", device=0)

NVRTC compiles, nvcc where it is missing. An image that is in the cache needs neither.
"""

import functools
import hashlib
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from refine.torch_utils.build import driver, nvrtc, op_builder, op_cache, toolchain
from refine.torch_utils.build.progress import line

SOURCES = Path(__file__).parents[1] / "ops"
KERNELS: dict[tuple[str, str], list[str]] = {}  # (op, type of numbers) → name expressions, noted by the ops' modules
PROBE = ("bias_act", ["refine::point_kernel<2,0,float>"])  # shows whether a compiler works; StyleGAN2 has it anyway

Compiler = nvrtc.Nvrtc | toolchain.CudaToolkit
Job = tuple[str, str]  # expression, target


@dataclass(frozen=True)
class Source:
    """The .cu of an op with all that it includes, and the folder for what is made of them."""

    name: str
    texts: dict[str, bytes]
    folder: str


@functools.cache
def read(op: str) -> Source:
    """Raises toolchain.Missing if a file is not there."""
    texts: dict[str, bytes] = {}
    wanted = [f"{op}.cu"]
    for name in wanted:
        try:
            texts[name] = (SOURCES / name).read_bytes()
        except OSError as error:
            raise toolchain.Missing(f"{SOURCES / name}: {error.strerror}; this installation is not complete") from None
        included = re.findall(rb'^#include "(.+)"', texts[name], re.MULTILINE)
        wanted += [name.decode() for name in included if name.decode() not in wanted]
    facts = (torch.version.cuda, nvrtc.OPTIONS, op_builder.NVCC_FLAGS, sorted(texts.items()))
    return Source(wanted[0], texts, f"ops-cuda-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}")


def load(op: str, expression: str, device: int) -> dict[str, driver.Kernel]:
    """A kernel on a device, with those that are compiled together with it: all that the op has noted for the same
    type of numbers.

    Args:
        op: Name of the .cu.
        expression: The kernel as C++ names it.
        device: Index of a GPU.

    Raises:
        toolchain.Missing, op_builder.BuildFailed, op_cache.CacheError, driver.Failed, OSError: One line.
    """
    family = next((names for (name, _), names in KERNELS.items() if name == op and expression in names), [expression])
    capability, refused = torch.cuda.get_device_capability(device), dict[Path, str]()
    kernels: dict[str, driver.Kernel] = {}
    for name in family:
        for path in _find(read(op), name, capability, refused):
            try:
                kernels[name] = driver.Kernel(path.read_bytes(), device)
                break
            except driver.Failed as error:
                refused[path] = f"{path}: {error}"
    if missing := [name for name in family if name not in kernels]:
        paths, _ = obtain(op, missing, capability, refused)
        for name, path in zip(missing, paths, strict=True):
            kernels[name] = driver.Kernel(path.read_bytes(), device)
    return kernels


def obtain(
    op: str, expressions: Sequence[str], capability: tuple[int, int], refused: dict[Path, str] | None = None
) -> tuple[list[Path], bool]:
    """Images for a GPU, those that are missing compiled.

    Args:
        op: Name of the .cu.
        expressions: The kernels.
        capability: Of the GPU.
        refused: Files of the cache that cannot be used, and why.

    Returns:
        An image for each expression; whether this process compiled any.
    """
    source, refused = read(op), {} if refused is None else refused
    found = [_find(source, name, capability, refused)[:1] for name in expressions]
    missing = [name for name, paths in zip(expressions, found, strict=True) if not paths]
    if not missing:
        return [path for (path,) in found], False
    compiler = open_compiler()
    target = toolchain.choose_target(compiler.targets, capability)
    _, built = _compile(op, [(name, target) for name in missing], compiler, refused)
    return [_find(source, name, capability, {})[0] for name in expressions], built


def kernels_of(op: str) -> list[str]:
    """All expressions that an op has noted."""
    return [name for (owner, _), names in KERNELS.items() if owner == op for name in names]


def build() -> list[Path]:
    """Compiles what is missing of all kernels that the ops have noted.

    For the targets of TORCH_CUDA_ARCH_LIST, else for the GPUs here, else for one of each generation.

    Returns:
        The folders of the images.
    """
    compiler = open_compiler()
    if text := os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip():
        targets = toolchain.parse_arch_list(text)
    else:
        gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
        targets = toolchain.choose_targets(compiler.targets, [torch.cuda.get_device_capability(gpu) for gpu in gpus])
    return [
        _compile(op, [(name, target) for name in kernels_of(op) for target in targets], compiler, {})[0]
        for op in sorted({op for op, _ in KERNELS})
    ]


def _find(source: Source, expression: str, capability: tuple[int, int], refused: dict[Path, str]) -> list[Path]:
    """Images of a kernel for a GPU: machine code before PTX, that for the nearest architecture first."""
    pattern = f"{_stem(expression)}.*.*.image"
    found = op_cache.find(source.folder, pattern, lambda target: toolchain.serves([target], capability), refused)
    usable = (path for path in found if path not in refused)
    return sorted(usable, key=lambda path: _preference(op_cache.target_of(path)), reverse=True)


def _preference(target: str) -> tuple[bool, int]:
    kind, _, number = target.partition("_")
    return kind == "sm", int(number.rstrip("af"))


def _stem(expression: str) -> str:
    """A kernel's part in a file name."""
    return re.sub(r"\W", "-", expression.replace("refine::", "").replace(" ", "")).rstrip("-")


# ----------------------------------------------------------------------------------------------------------------------
# Compilers.


def find_compiler() -> str | None:
    """Path of what would compile, found without running anything; None = nothing."""
    if library := nvrtc.find(torch.version.cuda):
        return library
    nvcc = toolchain.find_nvcc(torch.version.cuda)
    return nvcc.command[0] if nvcc else None


@functools.cache
def open_compiler() -> Compiler:
    """Raises toolchain.Missing if there is none."""
    path = nvrtc.find(torch.version.cuda)
    if path is not None:
        return nvrtc.Nvrtc(path)
    nvcc = toolchain.find_nvcc(torch.version.cuda)
    if nvcc is None:
        tried = ", ".join(toolchain.nvcc_candidates())
        raise toolchain.Missing(
            f"no compiler for GPUs was found, neither NVRTC, which comes with torch's CUDA packages, nor {tried}; "
            f"pip install nvidia-cuda-nvrtc{'-cu12' if (torch.version.cuda or '').startswith('12.') else ''}"
        )
    toolkit = toolchain.CudaToolkit.probe(nvcc)
    op_builder.check_driver(toolkit)
    return toolkit


def _compile(op: str, jobs: Sequence[Job], compiler: Compiler, refused: dict[Path, str]) -> tuple[Path, bool]:
    """Compiles what no other process has compiled meanwhile: (folder of the images, whether there was anything)."""
    source, limit = read(op), toolchain.time_limit()
    entry = op_cache.writable_folder(source.folder)
    with op_cache.locked(entry, limit, lambda who: line.begin("cuda", f"waiting for {who}, which compiles {op}")):
        missing = [job for job in jobs if not _has(entry, job, refused)]
        if not missing:
            line.finish()
            return entry, False
        targets = ", ".join(sorted({target for _, target in missing}))
        why = "".join(f" (not used: {reason})" for reason in refused.values())
        line.begin("cuda", f"compiling {len(missing)} kernels of {op} for {targets} by {compiler.name}, once{why}")
        start = time.monotonic()
        try:
            with op_cache.build_folder(entry) as folder:
                _run(source, missing, compiler, folder, entry / "compiler.log", limit)
        except KeyboardInterrupt:
            line.break_off()
            raise
        line.end("cuda", f"done in {time.monotonic() - start:.1f} s; kept in {entry}")
    return entry, True


def _has(entry: Path, job: Job, refused: dict[Path, str]) -> bool:
    expression, target = job
    found = op_cache.find(entry.name, f"{_stem(expression)}.{target}.*.image", lambda _: True, {})
    return any(path.parent == entry and path not in refused for path in found)


def _run(source: Source, jobs: list[Job], compiler: Compiler, folder: Path, log: Path, limit: float) -> None:
    """Compiles the jobs side by side, in threads or by ninja, and puts what comes out into the cache."""
    if isinstance(compiler, toolchain.CudaToolkit):
        for name, text in source.texts.items():
            (folder / name).write_bytes(text)
        steps = op_builder.cuda_steps(source.name, jobs, compiler, folder)
        op_builder.run(steps, folder, log, limit, toolchain.find_ninja())
        images = [(folder / step.output).read_bytes() for step in steps]
    else:

        def one(job: Job) -> bytes:
            image, said = compiler.compile(source.name, source.texts, *job)
            if not image:
                log.write_text(f"{compiler.path}, {job}\n{said}", encoding="utf-8")
                raise op_builder.BuildFailed(op_builder.describe(log, 1))
            return image

        with ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
            try:
                images = list(pool.map(one, jobs))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    for (expression, target), image in zip(jobs, images, strict=True):
        driver.entry_of(image)  # what is not one kernel does not get into the cache
        path = folder / "kept.image"
        path.write_bytes(image)
        op_cache.keep(path, log.parent, f"{_stem(expression)}.{target}")
