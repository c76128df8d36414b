"""Kernels of GPUs without a GPU: NVRTC compiles every one, and a driver that is not there is told to start them."""

import ctypes
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import types
from pathlib import Path

import pytest
import torch

from refine.torch_utils import ops
from refine.torch_utils.build import device_code, driver, nvrtc, op_builder, op_cache, toolchain
from refine.torch_utils.ops import bias_act, native, upfirdn2d

TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
for ops_module in pkgutil.iter_modules(ops.__path__, f"{ops.__name__}."):
    importlib.import_module(ops_module.name)  # which makes its kernels known
KERNELS = sorted((op, name) for (op, _), names in device_code.KERNELS.items() for name in names)
SPILLS = 64  # bytes, of a thread that has 64 registers or more


@pytest.fixture(scope="module")
def compiler() -> nvrtc.Nvrtc:
    path = nvrtc.find(torch.version.cuda)
    if path is None:
        pytest.skip("no NVRTC; it comes with `pip install nvidia-cuda-nvrtc`")
    return nvrtc.Nvrtc(path)


@pytest.fixture
def own_cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("REFINE_OPS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# NVRTC.


@pytest.mark.parametrize("first", range(len(TARGETS)), ids=TARGETS)
def test_nvrtc_compiles_every_kernel(compiler, first):
    """Every kernel for one of the targets; benchmarks/kernels.py does all for all."""
    target = TARGETS[first]
    if target not in compiler.targets:
        pytest.skip(f"NVRTC {compiler.version} does not know {target}")
    for op, name in KERNELS[first :: len(TARGETS)]:
        source = device_code.read(op)
        image, said = compiler.compile(source.name, source.texts, name, target)
        assert image[:4] == b"\x7fELF", said
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill stores", said)))
        assert "warning" not in said and "Used" in said and (spilled <= SPILLS or "double" in name), said
        mangled = driver.entry_of(image)
        template = name.partition("<")[0].removeprefix("refine::")
        assert mangled.startswith(f"_ZN6refine{len(template)}{template}I") and mangled in said


@pytest.mark.parametrize(
    "op, name", [case for case in KERNELS if re.search("tile_kernel<2,1,4,float>|lrelu_kernel<2,2,float>", case[1])]
)
def test_float_kernels_compute_in_float(compiler, op, name):
    """Double precision takes 64 times as long on most GPUs, and slips in with one unsuffixed number."""
    source = device_code.read(op)
    image, _ = compiler.compile(source.name, source.texts, name, "ptx_80")
    assert driver.entry_of(image) in image.decode()
    assert set(re.findall(r"\b(\w+)(?:\.\w+)*\.f64", image.decode())) <= {"cvt", "ld", "mov"}


def test_what_nvrtc_does_not_like_is_one_line_with_a_log(compiler, own_cache, monkeypatch, capsys):
    texts = {"x.cu": b'#include "y.h"\n', "y.h": b"__device__ int x = no_such_name;\n"}
    source = device_code.Source("x.cu", texts, "ops-cuda-test")
    monkeypatch.setattr(device_code, "read", lambda op: source)
    monkeypatch.setattr(device_code, "open_compiler", lambda: compiler)
    with pytest.raises(op_builder.BuildFailed, match=r'^y.h\(1\): error: identifier "no_such_name" is') as caught:
        device_code.obtain("x", ["refine::kernel<int>"], (9, 0))
    log = Path(str(caught.value).rpartition("log: ")[2])
    assert "\n" not in str(caught.value) and "no_such_name" in log.read_text() and log.is_relative_to(own_cache)
    assert not list(own_cache.glob("*/*.image")) and not list(own_cache.glob("*/.build-*"))


def test_images_are_kept_and_found_without_a_compiler(compiler, own_cache, monkeypatch, capsys):
    monkeypatch.setattr(device_code, "open_compiler", lambda: compiler)
    names = ["refine::direct_kernel<float>", "refine::direct_kernel<double>"]
    paths, built = device_code.obtain("upfirdn2d", names, (9, 0))
    assert built and [path.name.partition(".")[0] for path in paths] == ["direct_kernel-float", "direct_kernel-double"]
    assert "compiling 2 kernels of upfirdn2d for sm_90 by NVRTC, once … done in" in capsys.readouterr().err
    monkeypatch.setattr(device_code, "open_compiler", lambda: pytest.fail("a compiler is looked for"))
    assert device_code.obtain("upfirdn2d", names, (9, 0)) == (paths, False)
    assert capsys.readouterr().err == ""
    with pytest.raises(pytest.fail.Exception):  # code for another GPU is not for this one
        device_code.obtain("upfirdn2d", names, (8, 0))
    paths[0].write_bytes(paths[0].read_bytes()[:-100])
    monkeypatch.setattr(device_code, "open_compiler", lambda: compiler)
    again, built = device_code.obtain("upfirdn2d", names, (9, 0))
    assert built and again[1] == paths[1] and driver.entry_of(again[0].read_bytes())
    assert len(list(own_cache.glob("*/*.image"))) == 2


def test_nvrtc_is_not_looked_for_where_others_may_write(tmp_path, monkeypatch):
    """Neither in the current folder, nor in LD_LIBRARY_PATH, nor below a relative CUDA_HOME."""
    for folder in (".", "lib64", "nvidia/cu13/lib"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "libnvrtc.so.13").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LD_LIBRARY_PATH", f".:{tmp_path}")
    monkeypatch.setenv("CUDA_HOME", ".")
    monkeypatch.syspath_prepend("")
    assert all(os.path.isabs(path) and str(tmp_path) not in path for path in nvrtc.candidates())
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert str(tmp_path / "lib64" / "libnvrtc.so.13") in nvrtc.candidates()


def test_nvrtc_of_torch_s_cuda_is_taken(monkeypatch):
    paths = ["/a/libnvrtc.so.12", "/b/libnvrtc.so.13", "/c/libnvrtc-672ee683.so.11.2"]
    monkeypatch.setattr(nvrtc, "candidates", lambda: paths)
    found = [nvrtc.find(cuda) for cuda in ("13.0", "12.8", "11.8", "14.0", None)]
    assert found == [paths[1], paths[0], paths[2], None, paths[0]]
    assert nvrtc._major("/x/libnvrtc-builtins.so.13.0") is None


def test_a_library_that_is_no_nvrtc(tmp_path):
    path = tmp_path / "libnvrtc.so.13"
    path.write_bytes(b"not a library")
    with pytest.raises(toolchain.Missing, match=rf"NVRTC in {path} cannot be used"):
        nvrtc.Nvrtc(str(path))


# The driver.


@pytest.fixture(scope="module")
def fake_library(tmp_path_factory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    path = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    source = Path(__file__).with_name("fake_driver.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", path, source], check=True)
    return path


@pytest.fixture
def cuda(fake_library, monkeypatch):
    """The driver, and torch as if there were two GPUs, the second busy with a stream of number 0x70."""
    true = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name: true(str(fake_library) if name == "libcuda.so.1" else name))
    for cached in (driver.library, driver._context):
        cached.cache_clear()
    library = driver.library()
    library.told.restype = ctypes.c_char_p
    library.forget()
    streams = types.SimpleNamespace(cuda_stream=0), types.SimpleNamespace(cuda_stream=0x70)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[device])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(native, "_kernels", {})
    yield library
    for variable in ("fail_launch", "fail_attribute"):
        ctypes.c_int.in_dll(library, variable).value = 0
    assert library.open_contexts() == 0
    for cached in (driver.library, driver._context):
        cached.cache_clear()


def told(library) -> list[str]:
    lines = library.told().decode().splitlines()
    library.forget()
    return lines


class WritesPtx:
    """A compiler whose images say which kernel they are."""

    name, version, path, targets = "pen", "1.0", "/pen", ("sm_80", "sm_90")
    refused = ""

    def __init__(self):
        self.jobs = []

    def compile(self, source, headers, expression, target):
        self.jobs.append((expression, target))
        return f".entry {re.sub(r'[^a-z0-9]', '_', expression)}() {self.refused}".encode(), ""


@pytest.fixture
def pen(monkeypatch, own_cache) -> WritesPtx:
    compiler = WritesPtx()
    monkeypatch.setattr(device_code, "open_compiler", lambda: compiler)
    return compiler


def on(device: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(device=f"cuda:{device}", get_device=lambda: device)


def test_a_launch_tells_the_driver_all_it_must(cuda, pen):
    name, together = "refine::tile_kernel<0,0,0,float>", sorted(device_code.KERNELS["upfirdn2d", "float"])
    native.launch("upfirdn2d", on(1), name, 2**31 - 1, 256, 1000, b"all of the record")
    launched = "launch 6101 in 1101: (2147483647 1 1) (256 1 1) 1000 B, stream 0x70, all of the record"
    lines = told(cuda)
    # What is compiled together is loaded together.
    assert lines[0] == "retain 101" and lines.count("load in 1101") == len(together)
    assert "function refine__tile_kernel_0_0_0_float_" in lines and lines[-1] == launched
    assert sorted(name for name, _ in pen.jobs) == together
    assert {target for _, target in pen.jobs} == {"sm_90"}
    native.launch("upfirdn2d", on(1), name, 3, 64, 0, b"second")
    native.launch("upfirdn2d", on(1), "refine::direct_kernel<float>", 3, 64, 0, b"third")
    second, third = told(cuda)
    assert second == "launch 6101 in 1101: (3 1 1) (64 1 1) 0 B, stream 0x70, second" and third.endswith("third")
    native.launch("upfirdn2d", on(0), name, 1, 1, 0, b"elsewhere")
    lines = told(cuda)
    assert lines[0] == "retain 100" and lines[-1] == "launch 6100 in 1100: (1 1 1) (1 1 1) 0 B, stream (nil), elsewhere"
    assert len(pen.jobs) == len(together)  # the other GPU is of the same kind


def test_more_shared_memory_than_is_granted_is_asked_for_once(cuda, pen):
    def launch(shared):
        native.launch("x", on(0), "refine::big<float>", 1, 32, shared, b"r")
        return [line for line in told(cuda) if line.startswith("attribute")]

    device_code.read.cache_clear()
    pen_source = device_code.Source("x.cu", {"x.cu": b""}, "ops-cuda-x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_code, "read", lambda op: pen_source)
        found = [launch(shared) for shared in (48 * 1024, 100_000, 90_000, 200_000)]
    assert found == [[], ["attribute 8 = 100000 of 6100"], [], ["attribute 8 = 200000 of 6100"]]


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (1, "cuLaunchKernel failed with CUDA_ERROR_INVALID_VALUE: invalid argument"),
        (999, "cuLaunchKernel failed with CUDA error 999"),
    ],
)
def test_what_the_driver_reports_is_one_line(cuda, pen, status, says):
    ctypes.c_int.in_dll(cuda, "fail_launch").value = status
    with pytest.raises(RuntimeError) as caught:
        native.launch("bias_act", on(1), "refine::sum_kernel<2,float>", 1, 1, 0, b"r")
    assert str(caught.value) == f"bias_act on cuda:1: {says}"


def test_an_image_that_the_driver_refuses_is_compiled_again_once(cuda, pen, own_cache):
    pen.refused = "refuse me"
    launch = (native.launch, "bias_act", on(0), "refine::sum_kernel<2,float>", 1, 1, 0, b"r")
    with pytest.raises(RuntimeError) as caught:
        launch[0](*launch[1:])
    says = "bias_act on cuda:0: cuModuleLoadData failed with CUDA_ERROR_INVALID_PTX: a PTX JIT compilation failed"
    assert str(caught.value) == says and len(pen.jobs) == 10
    pen.refused = ""
    launch[0](*launch[1:])
    assert len(pen.jobs) == 20 and told(cuda)[-1].startswith("launch 6100")
    assert len(list(own_cache.glob("*/*.image"))) == 10


def test_no_kernel_is_loaded_while_a_graph_is_captured(cuda, pen, monkeypatch):
    native.launch("bias_act", on(0), "refine::sum_kernel<2,float>", 1, 1, 0, b"r")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    native.launch("bias_act", on(0), "refine::point_kernel<-1,2,float>", 1, 1, 0, b"r")
    with pytest.raises(RuntimeError, match="bias_act on cuda:0: refine::sum_kernel<2,double> is not loaded yet"):
        native.launch("bias_act", on(0), "refine::sum_kernel<2,double>", 1, 1, 0, b"r")


def test_no_driver(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    driver.library.cache_clear()
    with pytest.raises(driver.Failed, match=r"no NVIDIA driver that can be used: libcuda\.so\.1: cannot open"):
        driver.library()


def test_an_image_has_one_kernel():
    for image in (b".entry a() .entry b()", b"", b"\x7fELF" + b"\0" * 100):
        with pytest.raises(driver.Failed, match="expected 1"):
            driver.entry_of(image)


# Records and plans.


def test_records_are_as_long_as_their_structs(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    sizes = {
        "BiasActRecord": bias_act._RECORD.size,
        "Upfirdn2dRecord": upfirdn2d._ADDRESSES.size + upfirdn2d._GEOMETRY.size,
        "TilesRecord": upfirdn2d._ADDRESSES.size + upfirdn2d._GEOMETRY.size + upfirdn2d._TILING.size,
    }
    checks = "".join(f"static_assert(sizeof(refine::{name}) == {size});\n" for name, size in sizes.items())
    done = subprocess.run(
        ["g++", "-fsyntax-only", "-x", "c++", f"-I{device_code.SOURCES}", "-"],
        input=f'#include "kernels.h"\n{checks}',
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_kernels_that_are_planned_are_those_that_are_noted():
    noted = {name for _, name in KERNELS}
    planned = set()
    for dtype in native.DTYPES:
        for f_size in ((4, 4), (7, 3), (300, 300)):
            for up, down in (((1, 1), (1, 1)), ((2, 2), (1, 1)), ((1, 1), (2, 2)), ((3, 2), (1, 2))):
                for layout in (torch.contiguous_format, torch.channels_last):
                    size = (2, 40, 70, 33)
                    plan = upfirdn2d._plan_launch(f_size, size, dtype, layout, up, down)
                    planned.add(plan.expression)
                    assert 1 <= plan.blocks <= native.MOST_BLOCKS and plan.shared <= native.SHARED_BYTES
                    assert bool(plan.tail) == ("tile" in plan.expression) == (f_size[0] < 300)
    assert planned == {name for name in noted if "tile" in name or "direct" in name}


def test_ops_are_built_ahead_of_time_for_several_targets(pen, own_cache, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0+PTX")
    folders, ops = device_code.build(), {op for op, _ in KERNELS}
    images = [path for folder in folders for path in folder.glob("*.image")]
    assert len(images) == len(pen.jobs) == 3 * len(KERNELS) and len(folders) == len(ops)
    assert {op_cache.target_of(path) for path in images} == {"sm_80", "sm_90", "ptx_90"}
    assert device_code.build() == folders and len(pen.jobs) == 3 * len(KERNELS)  # nothing is missing
    found, built = device_code.obtain("upfirdn2d", ["refine::direct_kernel<float>"], (12, 0))
    assert op_cache.target_of(found[0]) == "ptx_90" and not built
    err = capsys.readouterr().err
    assert len(err.splitlines()) == len(ops) and "for ptx_90, sm_80, sm_90 by pen, once … done" in err
