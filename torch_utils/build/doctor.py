"""What this machine has, whether the compiled ops work on it, what to install otherwise."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from refine.torch_utils.build import custom_ops, device_code, op_cache, toolchain
from refine.torch_utils.build.progress import line
from refine.torch_utils.ops.bias_act import bias_act
from refine.torch_utils.ops.conv3x3 import conv3x3
from refine.torch_utils.ops.filtered_lrelu import filtered_lrelu
from refine.torch_utils.ops.group_norm_silu import group_norm_silu
from refine.torch_utils.ops.upfirdn2d import setup_filter, upfirdn2d

ROUNDS = 7
TOLERANCE = 1e-5  # of the largest value; float32 sums in another order differ by 1e-6


def examine() -> dict[str, Any]:
    """Facts about the machine, and under each op's name what it does per device.

    Returns:
        python, torch, cuda, gpus, compiler, ninja, cache; one entry per op, device → result of `try_op`; advice, a list
        of lines; ok.
    """
    facts = {
        "python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        "torch": torch.__version__,
        "cuda": _cuda_facts(),
        "gpus": _gpus(),
        "compiler": _compiler_facts(),
        "ninja": toolchain.find_ninja(),
        "cache": _cache_facts(),
        "mode": custom_ops.get_mode(),
    }
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    has = custom_ops.OPS
    ops = {op: {device: try_op(op, device) for device in devices if op in has[device]} for op in has["cpu"]}
    ok = all(result["ok"] for results in ops.values() for result in results.values())
    return {**facts, **ops, "advice": _advice(facts), "ok": ok}


def _cuda_facts() -> dict[str, Any]:
    """CUDA of torch and of the driver, and what compiles for GPUs: None for what is not there."""
    driver = toolchain.driver_version()
    facts: dict[str, Any] = {"runtime": torch.version.cuda, "driver": driver and "{}.{}".format(*driver)}
    try:
        compiler = device_code.open_compiler()
    except (toolchain.Missing, OSError) as error:
        return facts | {"compiler": None, "problem": str(error)}
    found = {"name": compiler.name, "version": compiler.version, "path": compiler.path}
    return facts | {"compiler": found | {"targets": list(compiler.targets)}}


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [{"name": p.name, "capability": f"{p.major}.{p.minor}", "bytes": p.total_memory} for p in found]


def _compiler_facts() -> dict[str, str] | None:
    compiler = toolchain.find_cxx()
    return None if compiler is None else {"command": str(compiler), "version": compiler.version}


def _cache_facts() -> dict[str, Any]:
    """Where libraries are looked for, and which of these folders is written to."""
    folders = [str(folder) for folder in op_cache.cache_folders()]
    try:
        return {"folders": folders, "writable": str(op_cache.writable_folder())}
    except op_cache.CacheError as error:
        return {"folders": folders, "writable": None, "problem": str(error)}


def try_op(op: str, device: str) -> dict[str, Any]:
    """Builds or loads an op and compares it with the reference.

    Returns:
        ok; path and built, or reason; max_error, of value and gradient, relative to the largest one; speedup and
        speedup_over_reference of forward and backward, plain torch's best form and the reference being 1.
    """
    start = time.perf_counter()
    try:
        library = custom_ops.obtain(device)
        path, built = library.path, library.built
        if device == "cuda":
            kernels, capability = device_code.KERNELS[op, "float"], torch.cuda.get_device_capability()
            (path, *_), built = device_code.obtain(op, kernels, capability)
    except custom_ops.FAILURES as problem:
        line.break_off()
        return {"ok": False, "reason": " ".join(str(problem).split())}
    facts = {"path": str(path), "built": built, "load_seconds": round(time.perf_counter() - start, 4)}
    mode = custom_ops.get_mode()
    custom_ops.set_mode("auto")
    try:
        forms = {impl: _example(op, device, impl) for impl in ("native", "torch", "ref")}
        error = _max_error(forms["native"](), forms["ref"]())
        seconds = _median_seconds(forms, device)
    except RuntimeError as problem:  # what a kernel or CUDA says
        return {"ok": False, "reason": " ".join(str(problem).split())[:300], **facts}
    finally:
        custom_ops.set_mode(mode)
    result = {"ok": error <= TOLERANCE, **facts, "max_error": error}
    if not result["ok"]:
        result["reason"] = f"differs from the reference by {error:.1e} of the largest value"
    for name, impl in (("speedup", "torch"), ("speedup_over_reference", "ref")):
        result[name] = round(seconds[impl] / seconds["native"], 2)
    return result


def _example(op: str, device: str, impl: str) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """A typical call at 64×64, forward and backward: returns value and gradient of x."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device)

    x, b, w = randn(4, 64, 64, 64).requires_grad_(), randn(64), randn(64, 64, 3, 3)
    dy, f = randn(4, 64, *([128, 128] if op == "upfirdn2d" else [64, 64])), setup_filter([1, 3, 3, 1], device=device)
    taps = setup_filter([1, 3, 6, 10, 13, 15, 15, 13, 10, 6, 3, 1], device=device, separable=True)
    call: Callable[[], torch.Tensor] = {
        "bias_act": lambda: bias_act(x, b, act="lrelu", impl=impl),
        "filtered_lrelu": lambda: filtered_lrelu(x, taps, taps, b, 2, 2, (11, 10, 11, 10), impl=impl),
        "group_norm_silu": lambda: group_norm_silu(x, 16, 1 + b, b, impl=impl),
        "conv3x3": lambda: conv3x3(x, w, b, impl=impl),
        "upfirdn2d": lambda: upfirdn2d(x, f, up=2, padding=(2, 1, 2, 1), gain=4, impl=impl),
    }[op]

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        y = call()
        return y.detach(), torch.autograd.grad(y, x, dy)[0]

    return run


def _max_error(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


def _median_seconds(forms: dict[str, Callable[[], Any]], device: str) -> dict[str, float]:
    """Seconds of a call, the median of a few that are taken in turns; on a CPU in processor time, which other programs
    on a busy machine disturb less than the clock on the wall, of one thread."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    clock = time.perf_counter if device == "cuda" else time.process_time
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(ROUNDS):
        for name, form in forms.items():
            wait()
            start = clock()
            form()
            wait()
            times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _advice(facts: dict[str, Any]) -> list[str]:
    """What to install, one line each."""
    cuda, lines = facts["cuda"], []
    if facts["compiler"] is None:
        missing = f"CXX={os.environ['CXX']} is not there" if os.environ.get("CXX") else "no C++ compiler"
        lines.append(f"{missing}: install g++ (Debian, Ubuntu: apt install g++; conda: conda install gxx)")
    if facts["ninja"] is None:
        lines.append("no ninja: pip install ninja (ops are compiled without it, too)")
    if facts["cache"]["writable"] is None:
        lines.append(facts["cache"]["problem"])
    if cuda["driver"] and not cuda["runtime"]:
        lines.append(
            f"there is an NVIDIA driver for CUDA {cuda['driver']}, but torch is a CPU build: install one for CUDA"
        )
    if cuda["runtime"] and cuda["driver"] and _major(cuda["driver"]) < _major(cuda["runtime"]):
        lines.append(f"torch is for CUDA {cuda['runtime']}, the driver for {cuda['driver']}: install a newer driver")
    if facts["gpus"] and cuda["compiler"] is None:
        lines.append(cuda["problem"])
    return lines


def _major(version: str) -> int:
    return int(version.split(".")[0])


def as_text(report: dict[str, Any]) -> str:
    """The report for people."""
    cuda, compiler, cache = report["cuda"], report["compiler"], report["cache"]
    gpu_compiler = "none"
    if found := cuda["compiler"]:
        gpu_compiler = f"{found['name']} {found['version']} in {found['path']}, for {' '.join(found['targets'])}"
    gpus = [f"{gpu['name']}, {gpu['bytes'] / 2**30:.0f} GiB, sm_{gpu['capability']}" for gpu in report["gpus"]]
    rows = [
        ("Python", report["python"]),
        ("torch", report["torch"]),
        ("CUDA", f"torch {cuda['runtime'] or 'none'}, driver {cuda['driver'] or 'none'}"),
        ("GPU compiler", gpu_compiler),
        ("GPU", "; ".join(gpus) or "none"),
        ("compiler", f"{compiler['command']}: {compiler['version'] or 'cannot be run'}" if compiler else "none"),
        ("ninja", report["ninja"] or "none"),
        ("cache", cache["writable"] or "none that can be written"),
        ("ops", f"{report['mode']}  (--ops or REFINE_OPS: auto, native, ref)"),
    ]
    for op in custom_ops.OPS["cpu"]:
        rows += [(f"{op}", f"{device}: {_verdict(result)}") for device, result in report[op].items()]
    lines = [f"{name:<15} {text}" for name, text in rows]
    return "\n".join([*lines, *(f"→ {line}" for line in report["advice"])])


def _verdict(result: dict[str, Any]) -> str:
    if not result["ok"]:
        return f"plain torch is used: {result['reason']}"
    origin = f"compiled now in {result['load_seconds']:.1f} s" if result["built"] else "compiled"
    return (
        f"{origin}, agrees with the reference (error {result['max_error']:.0e}), {result['speedup']:.1f} × as fast as "
        f"plain torch, {result['speedup_over_reference']:.1f} × the reference"
    )
