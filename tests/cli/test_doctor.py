"""`doctor`, `ops` and `--ops`: what they say of this machine, and their exit codes."""

import json
import os
import shutil
import sys

import pytest

from refine import device
from refine.cli import main as cli
from refine.config import OPS_MODES, RefineConfig
from refine.torch_utils.build import custom_ops, doctor, op_cache, toolchain

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def run(capsys, *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(args)
    return caught.value.code, *capsys.readouterr()


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing loaded yet, an empty cache, sources of one line."""
    for name in ("_ready", "_outcomes"):
        monkeypatch.setattr(custom_ops, name, {})
    monkeypatch.setattr(custom_ops, "_mode", None)
    monkeypatch.setattr(custom_ops, "SOURCES", tmp_path / "sources")
    monkeypatch.setenv("REFINE_OPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("REFINE_OPS", "REFINE_CACHE", "XDG_CACHE_HOME"):  # nothing of the user's is seen, or cleaned
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "sources").mkdir()
    for op in custom_ops.OPS["cpu"]:
        (tmp_path / "sources" / f"{op}.cpp").write_text(f'extern "C" int refine_{op}(const void*) {{ return 0; }}')
    return tmp_path


def test_modes_are_the_same_everywhere():
    assert OPS_MODES == custom_ops.MODES
    for mode in OPS_MODES:
        assert RefineConfig(gan="a", teacher="b", ops=mode).ops == mode
    with pytest.raises(ValueError, match="--ops is fast; expected one of auto, native, ref"):
        RefineConfig(gan="a", teacher="b", ops="fast")


@needs_gxx
def test_ops_build_list_clean(capsys, fresh):
    code, out, err = run(capsys, "ops", "build", "--device=cpu", "--portable")
    name, _, path = out.strip().partition(": ")
    assert code == 0 and name == "cpu" and path.startswith(str(fresh / "cache")) and os.path.isfile(path)
    assert len(err.splitlines()) == 1 and "-march=native" not in next((fresh / "cache").glob("*/*.log")).read_text()
    assert json.loads(run(capsys, "ops", "list", "--json")[1]) == [path]
    (fresh / "cache" / "ops-cpu-of-somebody").mkdir()
    assert run(capsys, "ops", "clean")[1] == "1 folders removed\n"
    assert (fresh / "cache" / "ops-cpu-of-somebody").is_dir()
    assert run(capsys, "ops", "list")[1] == "none\n"


def test_ops_build_fails_in_one_line(capsys, fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    code, out, err = run(capsys, "ops", "build", "--device=cpu")
    assert code == 1 and out == "" and err == "cpu: CXX is no-such-compiler, which is not there\n"


def test_native_that_cannot_be_had_is_one_line(capsys, fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    args = ("--network=digits-gan", "--seeds=0", f"--outdir={fresh / 'out'}", "--device=cpu")
    code, out, err = run(capsys, "generate", *args, "--ops=native")
    assert code == 2 and out == ""
    assert err == "Error: --ops=native: CXX is no-such-compiler, which is not there\n"
    assert not (fresh / "out").exists()
    code, _, err = run(capsys, "generate", *args, "--ops=fast")
    assert code == 2 and err.startswith("Error: Invalid value for '--ops'")


def test_choose_ops(fresh, monkeypatch):
    device.choose_ops(None, "cpu")
    assert custom_ops.get_mode() == "auto"
    device.choose_ops("ref", "cuda:1")
    assert custom_ops.get_mode() == "ref" and custom_ops.load() is None
    monkeypatch.setattr(custom_ops, "_mode", None)
    monkeypatch.setenv("REFINE_OPS", "quick")
    with pytest.raises(ValueError, match="REFINE_OPS is 'quick'"):
        device.choose_ops(None, "cpu")


@needs_gxx
def test_doctor_on_this_machine(capsys):
    """The real ops; what they are built into is the user's cache, as in every other test of theirs."""
    code, out, err = run(capsys, "doctor", "--json")
    report = json.loads(out)
    assert code == (0 if report["ok"] else 1), err
    for op in custom_ops.OPS["cpu"]:
        found = report[op]["cpu"]
        assert found["ok"] and found["max_error"] <= doctor.TOLERANCE and os.path.isfile(found["path"]), found
        assert found["speedup"] > 0 and found["speedup_over_reference"] > 0
    assert report["python"].startswith(sys.version.split()[0]) and report["compiler"]["version"]
    text = doctor.as_text(report)
    assert all(f"\n{op:<15} cpu: compiled" in text for op in custom_ops.OPS["cpu"])


@pytest.fixture
def bare_machine(fresh, monkeypatch):
    """No compiler, no ninja, no folder."""
    monkeypatch.setenv("CXX", "")
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.setattr(toolchain, "find_ninja", lambda: None)
    monkeypatch.setattr(toolchain, "nvcc_candidates", lambda: ["/usr/local/cuda/bin/nvcc"])

    def refuse(name=""):
        raise op_cache.CacheError("no folder to keep it in (/x: Read-only file system); set REFINE_OPS_CACHE")

    monkeypatch.setattr(op_cache, "writable_folder", refuse)


def test_doctor_says_what_to_install(bare_machine, capsys):
    code, out, err = run(capsys, "doctor")
    assert code == 1 and err == ""
    for op in custom_ops.OPS["cpu"]:
        assert f"{op:<15} cpu: plain torch is used: no C++ compiler was found" in out
    advice = [line for line in out.splitlines() if line.startswith("→ ")]
    assert "install g++" in advice[0] and "pip install ninja" in advice[1] and "Read-only" in advice[2]
    code, out, _ = run(capsys, "doctor", "--json")
    report = json.loads(out)
    assert code == 1 and report["ok"] is False and not report["bias_act"]["cpu"]["ok"]


def test_doctor_tells_an_op_that_is_wrong(monkeypatch):
    """Numbers off by a thousandth do not agree with the reference."""
    import torch

    values = torch.linspace(-1, 1, 10)
    factor = {"native": 1.001, "torch": 1.0, "ref": 1.0}
    library = custom_ops.Library(None, "x.so", built=False)
    monkeypatch.setattr(custom_ops, "obtain", lambda device: library)
    monkeypatch.setattr(doctor, "_example", lambda op, device, impl: lambda: (values * factor[impl], values))
    result = doctor.try_op("bias_act", "cpu")
    assert not result["ok"] and result["reason"] == "differs from the reference by 1.0e-03 of the largest value"


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"driver": "12.4"}, "torch is a CPU build"),
        ({"driver": "12.4", "runtime": "13.0"}, "install a newer driver"),
        (
            {"driver": "13.0", "runtime": "12.8", "gpus": True, "problem": "no compiler for GPUs"},
            "no compiler for GPUs",
        ),
    ],
)
def test_advice_on_cuda(facts, says):
    cuda = {"driver": None, "runtime": None, "compiler": None} | {k: v for k, v in facts.items() if k != "gpus"}
    report = {
        "cuda": cuda,
        "gpus": [{}] if "gpus" in facts else [],
        "compiler": {},
        "ninja": "x",
        "cache": {"writable": 1},
    }
    (line,) = doctor._advice(report)
    assert says in line
