"""Building and loading the compiled ops: every fault for real, in processes of their own, with sources of a few lines.

The processes get a stand-in for torch (its import would cost seconds); the compilers are the machine's, or scripts.
"""

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from refine.torch_utils.build import op_builder, op_cache, toolchain

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

PRELUDE = """
import os, sys, types
torch = sys.modules["torch"] = types.ModuleType("torch")
torch.__version__ = os.environ.get("TORCH", "2.13.0")
torch.version = types.SimpleNamespace(cuda=None, hip=None)
torch.cuda = types.SimpleNamespace(is_available=lambda: False)
from pathlib import Path
from refine.torch_utils.build import custom_ops, device_code, nvrtc
custom_ops.SOURCES = device_code.SOURCES = Path(os.environ["SOURCES"])
nvrtc.candidates = lambda: []
custom_ops.OPS = dict.fromkeys(("cpu", "cuda"), tuple(os.environ.get("OPS", "bias_act").split()))
"""
LOAD = """
try:
    library = custom_ops.load(os.environ.get("DEVICE", "cpu"))
    print("plain torch" if library is None else f"native {library.refine_bias_act(None)}")
except custom_ops.NativeUnavailable as error:
    print("unavailable:", error)
"""
HIDE_NINJA = "import sysconfig; sysconfig.get_path = lambda name: ''; sys.executable = ''\n"
SOURCE = '#include "kernels.h"\nextern "C" int refine_bias_act(const void*) { return ANSWER; }\n'


class Place:
    """A folder with sources, a cache, and a PATH of its own."""

    def __init__(self, folder: Path, root: Path):
        self.folder, self.root = folder, root
        self.sources, self.cache, self.bin = folder / "sources", folder / "cache", folder / "bin"
        self.sources.mkdir()
        self.bin.mkdir()
        self.write_source("#define ANSWER 1\n")
        (self.sources / "bias_act.cpp").write_text(SOURCE)
        for tool in ("sh", "env", "sleep", "cat", "touch", "mount", "as", "ld"):
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.link("g++")

    def write_source(self, header: str) -> None:
        (self.sources / "kernels.h").write_text(header)

    def link(self, tool: str) -> None:
        (self.bin / tool).symlink_to(shutil.which(tool))

    def script(self, name: str, text: str) -> None:
        """An executable of that name; `$REAL` is the true one."""
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/sh\nREAL={shutil.which(name)}\n{text}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def environ(self, **more: str) -> dict[str, str]:
        environ = {
            "PATH": str(self.bin),
            "HOME": str(self.folder / "home"),
            "TMPDIR": str(self.folder / "tmp"),
            "SOURCES": str(self.sources),
            "REFINE_OPS_CACHE": str(self.cache),
            "REFINE_OPS_TIMEOUT": "30",
            "PYTHONPATH": str(self.root),
            "LANG": "C.UTF-8",
        }
        (self.folder / "tmp").mkdir(exist_ok=True)
        return environ | more

    def start(self, code: str = LOAD, prefix: tuple[str, ...] = (), **environ: str) -> subprocess.Popen:
        command = [shutil.which(prefix[0]), *prefix[1:]] if prefix else []
        return subprocess.Popen(
            [*command, sys.executable, "-X", "utf8", "-c", PRELUDE + code],
            env=self.environ(**environ),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, code: str = LOAD, prefix: tuple[str, ...] = (), **environ: str) -> tuple[str, str]:
        """(stdout, stderr) of a process that ends well."""
        with self.start(code, prefix, **environ) as process:
            out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        return out.strip(), err.strip()

    def libraries(self) -> list[Path]:
        return sorted(self.cache.glob("*/*.so"))

    def hide_ninja(self, hide: bool = True) -> dict[str, str]:
        """A stand-in for the ninja package that has no ninja; the other places are for `HIDE_NINJA`."""
        if not hide:
            return {}
        (self.folder / "none").mkdir(exist_ok=True)
        (self.folder / "none" / "ninja.py").write_text("BIN_DIR = ''\n")
        return {"PYTHONPATH": os.pathsep.join([str(self.folder / "none"), str(self.root)])}


@pytest.fixture
def place(tmp_path, root) -> Place:
    return Place(tmp_path, root)


def one_line(err: str) -> str:
    assert len(err.splitlines()) == 1, err
    return err


def test_built_once_then_loaded_without_tools_or_a_word(place):
    out, err = place.run()
    assert out == "native 1"
    assert one_line(err).startswith("ops (cpu): compiling, once … done in ") and str(place.cache) in err
    (library,) = place.libraries()
    assert place.run() == ("native 1", "")
    assert place.run(PATH=str(place.folder / "nowhere")) == ("native 1", "")  # neither compiler nor ninja
    assert place.libraries() == [library]
    assert not list(place.cache.glob("*/.build-*"))
    assert "g++" in next(place.cache.glob("*/*.log")).read_text()


def test_nothing_happens_at_import_and_once_per_process(place):
    place.script("g++", f"echo x >> {place.folder}/calls; exit 1")
    assert place.run("") == ("", "") and not (place.folder / "calls").exists()
    place.run()
    calls = (place.folder / "calls").read_text()
    out, err = place.run(LOAD * 3)
    assert out == "plain torch\nplain torch\nplain torch" and one_line(err)
    assert (place.folder / "calls").read_text() == calls * 2


def test_modes(place):
    assert place.run(REFINE_OPS="ref") == ("plain torch", "")
    assert not place.cache.exists()
    place.bin.joinpath("g++").unlink()
    out, err = place.run(LOAD * 2, REFINE_OPS="native")
    first, second = out.splitlines()
    assert first == second and first.startswith("unavailable: no C++ compiler was found") and err == ""
    code = "custom_ops.set_mode('native')" + LOAD + "custom_ops.set_mode('auto')" + LOAD + "custom_ops.set_mode('ref')"
    out, err = place.run(code + LOAD)
    assert [line.split(":")[0] for line in out.splitlines()] == ["unavailable", "plain torch", "plain torch"]
    assert "install g++ or set CXX" in one_line(err)
    out, _ = place.run("try: custom_ops.load()\nexcept ValueError as error: print(error)", REFINE_OPS="fast")
    assert out == "REFINE_OPS is 'fast'; expected one of auto, native, ref"


@pytest.mark.parametrize("device", ["mps", "meta"])
def test_other_devices_have_no_compiled_ops(place, device):
    assert place.run(DEVICE=device) == ("plain torch", "")
    assert place.run(DEVICE=device, REFINE_OPS="native")[0].startswith("unavailable: there are no compiled ops for")


def test_two_processes_at_once_compile_once(place):
    place.script("g++", f'case "$*" in *bias_act.cpp*) echo x >> {place.folder}/calls; sleep 1;; esac\nexec $REAL "$@"')
    processes = [place.start(LOCAL_RANK=rank) for rank in "012"]
    results = [process.communicate(timeout=60) for process in processes]
    assert [out.strip() for out, _ in results] == ["native 1"] * 3
    assert (place.folder / "calls").read_text() == "x\n" and len(place.libraries()) == 1
    assert one_line(results[0][1].strip()) and [err for _, err in results[1:]] == ["", ""]


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def slow_compiler(place: Place, seconds: float) -> Path:
    """A g++ that touches the returned file when it begins to compile, and takes its time."""
    begun = place.folder / "begun"
    place.script("g++", f'case "$*" in *bias_act.cpp*) touch {begun}; sleep {seconds};; esac\nexec $REAL "$@"')
    return begun


def test_who_waits_says_for_whom_and_not_for_ever(place):
    begun = slow_compiler(place, 4)
    builder = place.start()
    wait_for(begun)
    out, err = place.run(REFINE_OPS_TIMEOUT="0.2")
    assert out == "plain torch" and f"waiting for process {builder.pid} on " in one_line(err) and "for 0.2 s" in err
    assert builder.poll() is None
    out, err = place.run()
    assert out == "native 1" and one_line(err).endswith("compiles them … done")
    assert builder.communicate(timeout=60)[0].strip() == "native 1"


def test_a_killed_builder_leaves_nothing_in_the_way(place):
    begun = slow_compiler(place, 3)
    builder = place.start()
    wait_for(begun)
    builder.send_signal(signal.SIGKILL)
    builder.communicate(timeout=60)
    assert list(place.cache.glob("*/.build-*")) and list(place.cache.glob("*/.lock"))
    place.bin.joinpath("g++").unlink()
    place.link("g++")
    start = time.monotonic()
    out, err = place.run()
    assert out == "native 1" and "waiting" not in one_line(err) and time.monotonic() - start < 20
    assert not list(place.cache.glob("*/.build-*"))


def test_a_failure_is_shared_by_those_who_wait(place):
    begun = place.folder / "begun"
    text = f"touch {begun}; echo x >> {place.folder}/calls; sleep 1; echo 'bias_act.cpp:1: error: broken'; exit 1"
    place.script("g++", f'case "$*" in *bias_act.cpp*) {text};; esac\nexec $REAL "$@"')
    first = place.start()
    wait_for(begun)
    out, err = place.run()
    assert out == "plain torch" and "error: broken" in one_line(err)
    assert first.communicate(timeout=60)[0].strip() == "plain torch"
    assert (place.folder / "calls").read_text() == "x\n"


def test_stale_locks_do_not_matter(place):
    place.run()
    (library,) = place.libraries()
    library.unlink()
    (library.parent / ".lock").write_text("12345")  # as other tools leave them
    (library.parent / "lock").touch()
    (library.parent / ".builder").write_text("process 1 on elsewhere")
    out, err = place.run()
    assert out == "native 1" and "waiting" not in one_line(err)


@pytest.mark.parametrize("obstacle", ["a file", "/proc"])
def test_a_cache_that_cannot_be_written_has_successors(place, obstacle):
    """Root may write everywhere but into a file and into /proc."""
    bad = str(place.folder / "file") if obstacle == "a file" else "/proc/cache"
    (place.folder / "file").touch()
    out, err = place.run(REFINE_OPS_CACHE=bad)
    assert out == "native 1" and f"kept in {place.folder / 'home' / '.cache' / 'gan-refine' / 'ops'}" in one_line(err)
    assert place.run(REFINE_OPS_CACHE=bad) == ("native 1", "")
    out, err = place.run(REFINE_OPS_CACHE=bad, HOME=bad, REFINE_CACHE=bad)
    assert out == "native 1" and f"kept in {place.folder / 'tmp' / 'gan-refine-ops-'}" in one_line(err)
    out, err = place.run(REFINE_OPS_CACHE=bad, HOME=bad, XDG_CACHE_HOME=bad, TORCH="2.14")
    assert out == "native 1" and one_line(err)


def test_no_folder_at_all(place):
    bad = str(place.folder / "file")
    (place.folder / "file").touch()
    code = "import tempfile; tempfile.tempdir = '/proc'\n" + LOAD
    out, err = place.run(code, REFINE_OPS_CACHE=bad, HOME=bad)
    assert out == "plain torch" and "no folder to keep them in" in one_line(err) and "set REFINE_OPS_CACHE" in err


READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'


def test_a_filled_cache_may_be_read_only(place):
    """A mount for reading only, seen by one process: root may write to any other folder."""
    place.run()
    prefix = ("unshare", "--map-root-user", "--mount", "sh", "-c", READ_ONLY, str(place.cache))
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no mounts of one's own here")
    assert place.run(prefix=prefix) == ("native 1", "")
    place.write_source("#define ANSWER 2\n")
    out, err = place.run(prefix=prefix)
    assert out == "native 2" and f"kept in {place.folder / 'home'}" in one_line(err)
    assert len(place.libraries()) == 1


def test_a_folder_of_somebody_else_below_tmp_is_not_trusted(place):
    shared = place.folder / "tmp" / f"gan-refine-ops-{os.getuid()}"
    bad = str(place.folder / "file")
    (place.folder / "file").touch()
    place.run(REFINE_OPS_CACHE=bad, HOME=bad)
    assert place.run(REFINE_OPS_CACHE=bad, HOME=bad) == ("native 1", "")
    shared.chmod(0o777)
    out, err = place.run(REFINE_OPS_CACHE=bad, HOME=bad)
    assert out == "plain torch" and "can be written to by others" in one_line(err)


@pytest.mark.parametrize("name", ["REFINE_CACHE", "REFINE_OPS_CACHE"])
@pytest.mark.parametrize("who", ["others may write", "somebody else's"])
def test_a_library_is_run_only_from_a_folder_of_ones_own(place, name, who):
    """Somebody's shared cache with a library of the right name, which would run as soon as it is opened."""
    place.run()
    (library,) = place.libraries()
    evil = library.with_suffix(".c")
    trap = place.folder / "trap"
    evil.write_text(f'#include <stdlib.h>\nvoid __attribute__((constructor)) f(void) {{ system("touch {trap}"); }}')
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, evil], check=True)
    target = library.name.split(".")[0]
    library.rename(library.with_name(f"{target}.{op_cache.checksum(library)}.so"))
    shared = place.folder / "shared"
    place.cache.rename(shared if name == "REFINE_OPS_CACHE" else shared.with_name("ops"))
    if name == "REFINE_CACHE":
        shared.mkdir()
        shared.with_name("ops").rename(shared / "ops")
    folder = shared if name == "REFINE_OPS_CACHE" else shared / "ops"
    if who == "others may write":
        folder.chmod(0o777)
    elif os.getuid() == 0:
        os.chown(folder, 1234, -1)
    else:
        pytest.skip("only root can give a folder away")
    out, err = place.run(**{"REFINE_OPS_CACHE": "", name: str(shared)})
    assert out == "native 1" and not trap.exists()
    assert f"not used: {folder} " in one_line(err) and str(place.folder / "home") in err


def test_a_relative_xdg_cache_home_is_ignored(place):
    out, err = place.run(REFINE_OPS_CACHE="", REFINE_CACHE="", XDG_CACHE_HOME="here")
    assert out == "native 1" and str(place.folder / "home" / ".cache") in one_line(err)
    assert not (place.folder / "here").exists()


def test_what_is_no_library_in_the_cache_is_told(place):
    """A pipe would be waited for, and the system's loader crashes on a library that is cut off."""
    place.run()
    (library,) = place.libraries()
    target, data = library.name.split(".")[0], library.read_bytes()
    library.unlink()
    os.mkfifo(library)
    out, err = place.run()
    assert out == "native 1" and f"not used: {library} is no regular file" in one_line(err)
    library.unlink(missing_ok=True)
    for path in place.libraries():
        path.unlink()
    library.write_bytes(data[:-2000])
    library = library.rename(library.with_name(f"{target}.{op_cache.checksum(library)}.so"))
    out, err = place.run()
    assert out == "native 1" and f"not used: {library} is cut off" in one_line(err)


def test_no_ninja(place):
    out, err = place.run(HIDE_NINJA + LOAD, **place.hide_ninja())
    assert out == "native 1" and "without ninja, which was not found" in one_line(err)


def test_no_compiler(place):
    place.bin.joinpath("g++").unlink()
    out, err = place.run()
    expected = "ops (cpu): plain torch is used, as there are no compiled ops: no C++ compiler was found"
    assert out == "plain torch" and one_line(err).startswith(expected)
    out, err = place.run(CXX="g++-99 -O1")
    assert out == "plain torch" and "CXX is g++-99 -O1, which is not there" in one_line(err)


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo \"g++: fatal error: cannot execute 'cc1plus': No such file\" >&2; exit 1", "only half installed"),
        ("echo 'x.cpp:1: error: No space left on device' >&2; exit 1", "the disk is full"),
        ("kill -9 $$", "log: "),
        ("exit 3", "said nothing"),
        ("exit 0", "left no ops.so"),
        ("sleep 60", "was stopped after 2 s"),
    ],
)
@pytest.mark.parametrize("ninja", [True, False], ids=["ninja", "no ninja"])
def test_a_broken_compiler(place, script, says, ninja):
    place.script("g++", f'case "$*" in *bias_act.cpp*) {script};; esac\nexit 0')
    limit = "2" if "sleep" in script else "30"
    out, err = place.run(HIDE_NINJA * (not ninja) + LOAD, REFINE_OPS_TIMEOUT=limit, **place.hide_ninja(not ninja))
    assert out == "plain torch" and says in one_line(err) and "plain torch is used" in err
    assert not list(place.cache.glob("*/.build-*")) and not place.libraries()


def test_a_broken_source_shows_its_first_error_and_the_log(place):
    place.write_source("#define ANSWER no_such_name\n")
    out, err = place.run()
    assert out == "plain torch" and "kernels.h:1:16: error: ‘no_such_name’ was not declared" in one_line(err)
    log = Path(err.rpartition("log: ")[2])
    assert "no_such_name" in log.read_text()


def test_a_failed_build_is_tried_again_by_the_next_process(place):
    place.write_source("#define ANSWER no_such_name\n")
    place.run()
    place.write_source("#define ANSWER 5\n")
    assert place.run()[0] == "native 5"


@pytest.mark.parametrize("missing", ["-fopenmp", "-march=native"])
def test_flags_that_a_compiler_does_not_know_are_left_out(place, missing):
    place.script("g++", f'case "$*" in *{missing}*) echo "unrecognized option" >&2; exit 1;; esac\nexec $REAL "$@"')
    assert place.run()[0] == "native 1"
    log = next(place.cache.glob("*/*.log")).read_text()
    assert missing not in log and ("-fopenmp" in log) != ("-march=native" in log)


def test_a_portable_library_serves_another_processor(place):
    """As an image that is built on one machine and runs, without a compiler, on another."""
    code = "print(custom_ops.obtain(portable=True).path.name.split('.')[0])\n"
    (target,) = toolchain.cpu_targets()[-1:]
    assert place.run(code)[0] == target != toolchain.cpu_targets()[0]
    options = next(place.cache.glob("*/*.log")).read_text()
    assert "-march=native" not in options and (target == "baseline" or f"-march={target}" in options)
    place.bin.joinpath("g++").unlink()
    other = "from refine.torch_utils.build import toolchain; toolchain.cpu_features = lambda: {!r}\n"
    newer = toolchain.cpu_features() + " shiny"
    assert place.run(other.format(newer) + LOAD) == ("native 1", "")
    if target != "baseline":
        out, err = place.run(other.format("flags : fpu sse2") + LOAD)
        assert out == "plain torch" and "no C++ compiler" in one_line(err)


def test_changes_make_a_new_library(place):
    place.run()
    place.write_source("#define ANSWER 2\n")
    out, err = place.run()
    assert out == "native 2" and one_line(err) and len(place.libraries()) == 2
    out, err = place.run(TORCH="2.14.0")
    assert out == "native 2" and one_line(err) and len(place.libraries()) == 3
    other = "from refine.torch_utils.build import toolchain; toolchain.cpu_features = lambda: 'another processor'\n"
    out, err = place.run(other + LOAD)
    assert out == "native 2" and one_line(err) and len(place.libraries()) == 4
    assert place.run() == ("native 2", "")


def test_another_compiler_does_not_matter_to_a_library_that_is_there(place):
    place.run()
    place.script("g++", "echo 'error: broken' >&2; exit 1")
    assert place.run() == ("native 1", "")


@pytest.mark.parametrize("ninja", [True, False], ids=["ninja", "no ninja"])
def test_all_ops_of_a_device_are_one_library(place, ninja):
    """With ninja their compilers run at the same time: each waits for the other to begin."""
    (place.sources / "upfirdn2d.cpp").write_text(SOURCE.replace("bias_act", "upfirdn2d"))
    if ninja:
        both = f"[ -e {place.folder}/bias_act -a -e {place.folder}/upfirdn2d ]"
        meet = f"touch {place.folder}/$op; until {both}; do sleep 0.02; done"
        parts = "".join(f'*"-c {op}.cpp"*) op={op}; {meet};; ' for op in ("bias_act", "upfirdn2d"))
        place.script("g++", f'case "$*" in {parts}esac\nexec $REAL "$@"')
    out, err = place.run(HIDE_NINJA * (not ninja) + LOAD, OPS="bias_act upfirdn2d", **place.hide_ninja(not ninja))
    assert out == "native 1" and one_line(err).startswith("ops (cpu): compiling, once … done")
    assert len(place.libraries()) == 1
    code = "print(custom_ops.obtain().cdll.refine_upfirdn2d(None))"
    assert place.run(code, OPS="bias_act upfirdn2d") == ("1", "")


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_library_is_built_again(place, damage):
    place.run()
    (library,) = place.libraries()
    data = library.read_bytes()
    flipped = data[:300] + bytes([data[300] ^ 1]) + data[301:]
    library.write_bytes({"cut": data[: len(data) // 2], "flipped": flipped, "empty": b""}[damage])
    out, err = place.run()
    assert out == "native 1" and one_line(err)
    assert place.run() == ("native 1", "")
    library.write_bytes(b"")
    out, err = place.run(PATH=str(place.folder / "nowhere"))
    assert out == "plain torch" and "no C++ compiler" in one_line(err)


def test_a_library_that_does_not_load_is_built_again_once(place):
    place.run()
    (library,) = place.libraries()
    target = library.name.split(".")[0]
    for content in (b"not a library", b"another"):  # whole by their checksums
        library.unlink(missing_ok=True)
        library.write_bytes(content)
        library = library.rename(library.with_name(f"{target}.{op_cache.checksum(library)}.so"))
        out, err = place.run()
        assert out == "native 1" and one_line(err)
        (library,) = place.libraries()
    (place.sources / "bias_act.cpp").write_text("void undefined(); void f() { undefined(); }")
    out, err = place.run()
    assert out == "plain torch" and "cannot be loaded: " in one_line(err) and "undefined symbol" in err
    (place.sources / "bias_act.cpp").write_text("int other() { return 1; }")
    out, err = place.run()
    assert out == "plain torch" and "has no function refine_bias_act" in one_line(err)
    assert len(place.libraries()) == 1


def test_an_interrupt_stops_the_compiler(place):
    text = f"touch {place.folder}/begun; sleep 2; touch {place.folder}/survived; sleep 60"
    place.script("g++", f'case "$*" in *bias_act.cpp*) {text};; esac\nexec $REAL "$@"')
    builder = place.start()
    wait_for(place.folder / "begun")
    builder.send_signal(signal.SIGINT)
    _, err = builder.communicate(timeout=30)
    assert builder.returncode != 0 and "KeyboardInterrupt" in err
    assert not list(place.cache.glob("*/.build-*"))
    time.sleep(2.5)
    assert not (place.folder / "survived").exists()


# CUDA: nvcc, where NVRTC is missing. It is a script that answers as the real one; images are PTX that names a kernel.


def fake_nvcc(place: Place, release: str = "12.4", targets: str = "sm_80 sm_90", seconds: float = 0) -> Path:
    """A toolkit with headers and a wrapper script for it on the PATH."""
    root = place.folder / f"toolkit-{release}"
    (root / "bin").mkdir(parents=True)
    (root / "include" / "crt").mkdir(parents=True)
    bound = "#error -- unsupported GNU version! gcc versions later than 13 are not supported!\n"
    (root / "include" / "crt" / "host_config.h").write_text(bound)
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text(
        f"""#!/bin/sh
case "$*" in
--version) echo "Cuda compilation tools, release {release}, V{release}.99";;
--list-gpu-code) for t in {targets}; do echo $t; done;;
*--dryrun*) echo "#$ TOP={root}/bin/.." >&2;;
*) echo "$*" >> {place.folder}/arguments; sleep {seconds}
   while [ "$1" != -o ]; do shift; done; echo ".entry kernel() // $2" > $2;;
esac
"""
    )
    nvcc.chmod(0o755)
    place.script("nvcc", f'exec {nvcc} "$@"')
    (place.sources / "bias_act.cu").write_text('#include "kernels.h"\n')
    return root


OBTAIN = """
device_code.KERNELS[("bias_act", "float")] = ["refine::one<1,float>", "refine::two<-1,float>"]
try:
    for capability in GPUS:
        paths, built = device_code.obtain("bias_act", device_code.KERNELS["bias_act", "float"], capability)
        print(built, *(path.name.rsplit(".", 2)[0] for path in paths))
except custom_ops.FAILURES as error:
    print("unavailable:", error)
"""


def test_nvcc_compiles_where_nvrtc_is_missing(place):
    fake_nvcc(place)
    out, err = place.run("GPUS = [(9, 0), (8, 0), (8, 6), (10, 0)]\n" + OBTAIN)
    images = [f"one-1-float.{target} two--1-float.{target}" for target in ("sm_90", "sm_80", "sm_80", "ptx_90")]
    assert out.splitlines() == [
        f"{built} {names}" for built, names in zip((True, True, False, True), images, strict=True)
    ]
    begins = [f"ops (cuda): compiling 2 kernels of bias_act for {t} by nvcc, once … done" for t in ("sm_90", "sm_80")]
    assert all(map(str.startswith, err.splitlines(), begins))
    arguments = (place.folder / "arguments").read_text()
    assert "-cubin -arch=sm_90" in arguments and "-ptx -arch=compute_90" in arguments
    place.bin.joinpath("nvcc").unlink()
    assert place.run("GPUS = [(9, 0), (8, 9)]\n" + OBTAIN) == (f"False {images[0]}\nFalse {images[1]}", "")


def test_processes_wait_for_one_that_compiles_kernels(place):
    fake_nvcc(place, seconds=1)
    processes = [place.start("GPUS = [(9, 0)]\n" + OBTAIN, LOCAL_RANK=rank) for rank in "012"]
    results = [process.communicate(timeout=60) for process in processes]
    assert sorted(out.split()[0] for out, _ in results) == ["False", "False", "True"]
    assert len((place.folder / "arguments").read_text().splitlines()) == 2
    assert one_line(results[0][1].strip()) and [err for _, err in results[1:]] == ["", ""]


def test_a_kernel_is_run_only_from_a_folder_of_ones_own(place):
    fake_nvcc(place)
    place.run("GPUS = [(9, 0)]\n" + OBTAIN)
    place.cache.chmod(0o777)
    out, err = place.run("GPUS = [(9, 0)]\n" + OBTAIN)
    assert out.startswith("True") and f"not used: {place.cache} can be written to by others" in one_line(err)
    assert f"kept in {place.folder / 'home'}" in err


def test_changes_make_new_kernels(place):
    fake_nvcc(place)
    for change in (lambda: None, lambda: place.write_source("#define ANSWER 2\n")):
        change()
        assert place.run("GPUS = [(9, 0)]\n" + OBTAIN)[0].startswith("True")
    (place.sources / "other.h").write_text("// which no kernel includes")
    assert place.run("GPUS = [(9, 0)]\n" + OBTAIN)[0].startswith("False")
    assert len(list(place.cache.glob("*/*.image"))) == 4


def test_a_kernel_that_nvcc_cannot_compile(place):
    fake_nvcc(place)
    text = 'case "$*" in *cubin*) echo "bias_act.cu(3): error: no such name"; exit 1;; esac'
    nvcc = place.folder / "toolkit-12.4" / "bin" / "nvcc"
    nvcc.write_text(nvcc.read_text().replace("#!/bin/sh\n", f"#!/bin/sh\n{text}\n"))
    out, _ = place.run("GPUS = [(9, 0)]\n" + OBTAIN)
    assert out.startswith("unavailable: bias_act.cu(3): error: no such name; log: ") and "\n" not in out
    assert not list(place.cache.glob("*/*.image"))


def test_a_driver_older_than_the_toolkit_is_told_before_the_build(place):
    root = fake_nvcc(place, "13.1")
    code = "from refine.torch_utils.build import toolchain; toolchain.driver_version = lambda: (12, 4)\n"
    out, _ = place.run(code + "GPUS = [(9, 0)]\n" + OBTAIN)
    assert "unavailable: the driver runs CUDA 12.4" in out and f"{root} is 13.1" in out
    assert not (place.folder / "arguments").exists()


GPU = "torch.cuda = types.SimpleNamespace(get_device_capability=lambda: (9, 0))\n"


def test_no_compiler_for_gpus(place):
    (place.sources / "bias_act.cu").write_text("")
    out, err = place.run(GPU + LOAD, DEVICE="cuda", CUDA_HOME=str(place.folder / "none"))
    tried = place.folder / "none" / "bin" / "nvcc"
    assert out == "plain torch" and "no compiler for GPUs was found, neither NVRTC" in one_line(err)
    assert f"nor {tried}; pip install nvidia-cuda-nvrtc" in err


def test_an_architecture_that_there_is_not(place):
    fake_nvcc(place)
    out, _ = place.run(OBTAIN.replace("for cap", "device_code.build()\n    for cap"), TORCH_CUDA_ARCH_LIST="Hoper")
    assert out == "unavailable: TORCH_CUDA_ARCH_LIST holds 'Hoper'; expected e.g. 8.0;9.0+PTX"


def test_the_toolkit_behind_a_wrapper_and_its_bounds(place, monkeypatch):
    root = fake_nvcc(place)
    monkeypatch.setenv("PATH", str(place.bin))
    for name in ("CUDA_HOME", "CUDA_PATH", "CXX", "NVCC_CCBIN"):
        monkeypatch.delenv(name, raising=False)
    nvcc = toolchain.find_nvcc(None)
    toolkit = toolchain.CudaToolkit.probe(nvcc)
    assert nvcc.command == (str(place.bin / "nvcc"),)
    assert (toolkit.root, toolkit.version, toolkit.targets) == (root, "12.4", ("sm_80", "sm_90"))
    assert toolkit.newest_gcc() == 13
    place.script("g++", "echo 15")
    with pytest.raises(toolchain.Missing, match="takes g\\+\\+ at most 13, g\\+\\+ is 15"):
        toolkit.host_compiler()
    place.script("g++-12", "echo 12")
    assert toolkit.host_compiler() == str(place.bin / "g++-12")
    place.script("g++", "echo 13")
    assert toolkit.host_compiler() is None
    monkeypatch.setenv("NVCC_CCBIN", "/opt/g++")
    assert toolkit.host_compiler() == "/opt/g++"


def test_targets():
    known = ("sm_75", "sm_80", "sm_86", "sm_90")
    assert toolchain.choose_targets(known, [(8, 6), (8, 6)]) == ["sm_86"]
    assert toolchain.choose_target(known, (8, 9)) == "sm_86"
    assert toolchain.choose_target(known, (12, 0)) == "ptx_90"  # newer than the compiler knows
    assert toolchain.choose_targets(known, []) == ["sm_75", "sm_80", "sm_86", "sm_90", "ptx_90"]
    with pytest.raises(toolchain.Missing, match="oldest target is sm_75, the GPU is sm_70"):
        toolchain.choose_target(known, (7, 0))
    assert toolchain.parse_arch_list("Ampere;9.0a+PTX") == ["sm_80", "sm_86", "sm_90a", "ptx_90a"]
    for have, gpu, expected in [
        (["sm_80"], (8, 6), True),
        (["sm_86"], (8, 0), False),
        (["sm_80"], (9, 0), False),
        (["ptx_80"], (12, 0), True),
        (["ptx_90"], (8, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_90a"], (10, 0), False),
    ]:
        assert toolchain.serves(have, gpu) is expected, (have, gpu)


def test_diagnoses_of_real_messages(tmp_path):
    log = tmp_path / "log"
    for text, says in [
        ("#error -- unsupported GNU version! gcc versions later than 15 are not supported!", "set NVCC_CCBIN"),
        ("x.cpp:1:10: fatal error: cmath: No such file or directory", "build-essential"),
        ("nvcc fatal   : Unsupported gpu architecture 'compute_70'", "TORCH_CUDA_ARCH_LIST"),
        ("/usr/bin/ld: cannot find -lgomp: No such file or directory", "a library to link with"),
        ("g++: fatal error: Killed signal terminated program cc1plus", "too little memory"),
    ]:
        log.write_text(f"$ g++ -c x.cpp\n[1/2] g++\nFAILED: x.o\n{text}\nninja: build stopped\n")
        line = op_builder.describe(log, 1)
        assert line.startswith(text) and says in line and line.endswith(f"log: {log}")
