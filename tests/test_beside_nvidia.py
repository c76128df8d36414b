"""NVIDIA's programs have packages called dnnlib and torch_utils, too: ours work beside them, and theirs stay theirs.

Theirs are stand-ins of a line each. What a user has of us is a checkout on PYTHONPATH, an installed wheel, or an
editable install, each with an interpreter of its own that knows nothing of the others.
"""

import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import refine
from tests.golden import ROOT as GOLDEN

NVIDIA = {
    **dict.fromkeys(("dnnlib/__init__.py", "dnnlib/util.py", "torch_utils/__init__.py"), "OWNER = 'theirs'\n"),
    **dict.fromkeys(("torch_utils/misc.py", "torch_utils/persistence.py"), "OWNER = 'theirs'\n"),
    **dict.fromkeys(("torch_utils/ops/__init__.py", "torch_utils/ops/bias_act.py"), "OWNER = 'theirs'\n"),
    # What nobody here asks for.
    **dict.fromkeys(("legacy.py", "train.py", "generate.py"), "raise RuntimeError('of another program')\n"),
    **dict.fromkeys(("training/__init__.py", "metrics/__init__.py"), "raise RuntimeError('of another program')\n"),
}

PROGRAM = """
import multiprocessing, pickle, sys

import dnnlib, dnnlib.util, torch_utils, torch_utils.misc, torch_utils.persistence
from torch_utils.ops import bias_act

def main():
    theirs = {name: module for name, module in sys.modules.items() if name.split(".")[0] in ("dnnlib", "torch_utils")}
    import refine
    import refine.dnnlib.util, refine.torch_utils.misc
    from refine.torch_utils.ops import bias_act as ours
    G = refine.load_generator("digits-gan")
    import torch
    with torch.no_grad():
        x = G(torch.zeros(1, G.z_dim), torch.eye(G.c_dim)[:1])
        y = ours.bias_act(torch.tensor([[-1.0, 3.0]]), act="relu", gain=1.0)
    assert x.shape == (1, 1, 32, 32) and y.tolist() == [[0.0, 3.0]]
    pickled = refine.load_generator(sys.argv[1])  # names dnnlib.util and torch_utils.persistence
    assert pickled.img_resolution == 16
    assert pickle.loads(pickle.dumps(refine.dnnlib.format_time))(3) == "3s"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(refine.dnnlib.format_time, (3,)) == "3s"
    assert theirs == {n: m for n, m in sys.modules.items() if n.split(".")[0] in ("dnnlib", "torch_utils")}
    assert {module.OWNER for module in theirs.values()} == {"theirs"} == {bias_act.OWNER} and len(theirs) == 7
    assert not hasattr(ours, "OWNER")
    print(refine.dnnlib.__file__, refine.torch_utils.ops.__file__, sep="\\n")

if __name__ == "__main__":
    main()
"""

OURS_FIRST = """
import refine.dnnlib.util, refine.torch_utils
import dnnlib.util, torch_utils.misc
assert dnnlib.OWNER == dnnlib.util.OWNER == torch_utils.misc.OWNER == "theirs"
assert refine.dnnlib.util is not dnnlib.util and refine.dnnlib.format_time(3) == "3s"
"""


def interpreter(folder: Path, wheel: Path | None) -> Path:
    """A virtual environment that sees the packages of this one, but nothing installed by .pth files; with a wheel."""
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python3*/site-packages")
    outer = [path for path in sys.path if path.endswith("-packages")]
    (packages / "outer.pth").write_text("\n".join(outer))
    if wheel is not None:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(packages)
    return folder / "bin" / "python"


@pytest.fixture(scope="module", params=["checkout", "wheel", "editable"])
def start(request, root, tmp_path_factory) -> Callable[..., str]:
    """Run Python in a folder of NVIDIA's, with us as a checkout or installed; returns what was printed."""
    wheel, paths = None, []
    if request.param == "checkout":
        paths = [str(root)]
    else:
        wheel = getattr(request.getfixturevalue("distributions"), request.param)
    python = interpreter(tmp_path_factory.mktemp(request.param) / "venv", wheel)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "REFINE_"))}
    env |= {"REFINE_OPS": "ref", "PYTHONPATH": os.pathsep.join(paths)}
    if request.param == "checkout":
        env["PYTHONDONTWRITEBYTECODE"] = "1"

    def start(folder: Path, *args: str) -> str:
        result = subprocess.run([python, *args], cwd=folder, env=env, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    start.kind = request.param
    return start


@pytest.fixture
def nvidia(tmp_path) -> Path:
    """A folder as a clone of NVIDIA's programs."""
    for name, text in NVIDIA.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_command_line(start, nvidia):
    assert start(nvidia, "-m", "refine", "--version").strip() == f"gan-refine {refine.__version__}"
    assert "--teacher" in start(nvidia, "-m", "refine", "refine", "--help")
    start(nvidia, "-m", "refine", "generate", "--network=digits-gan", "--seeds=0-1", "--outdir=out")
    assert len(list((nvidia / "out").glob("seed*.png"))) == 2


def test_both_in_one_process(start, nvidia, root, request):
    (nvidia / "program.py").write_text(PROGRAM)
    pickled = GOLDEN / "pickles" / "plain_t17_p3.pkl"
    ours = [Path(line) for line in start(nvidia, "program.py", str(pickled)).splitlines()]
    if start.kind == "wheel":
        assert [path.parts[-4:-2] for path in ours] == [("site-packages", "refine"), ("refine", "torch_utils")]
    else:
        place = root if start.kind == "checkout" else request.getfixturevalue("distributions").source
        assert ours == [place / "dnnlib/__init__.py", place / "torch_utils/ops/__init__.py"]
    start(nvidia, "-c", OURS_FIRST)


def test_nothing_else_of_a_checkout_becomes_a_module_of_the_package(start, tmp_path):
    code = "import importlib.util, refine, sys; print(*(importlib.util.find_spec(n) for n in sys.argv[1:]), sep='\\n')"
    names = ("refine.tests", "refine.benchmarks", "refine.docs", "refine.refine", "refine.generate")
    assert start(tmp_path, "-c", code, *names).split() == ["None"] * len(names)


def test_our_packages_can_be_found_and_loaded_again(start, nvidia):
    """As notebooks do with autoreload."""
    code = (
        "import importlib, importlib.util, refine.dnnlib as old, refine.torch_utils, sys\n"
        "assert importlib.reload(old) is old and importlib.util.find_spec('refine.torch_utils.build')\n"
        "for name in [name for name in sys.modules if name.startswith('refine')]: del sys.modules[name]\n"
        "import refine.dnnlib as new\n"
        "assert new is not old and new.__file__ == old.__file__\n"
    )
    start(nvidia, "-c", code)


def test_a_checkout_does_not_mix_with_what_is_installed(start, root, tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import refine.dnnlib.util, refine.torch_utils.ops\n"
        "print(refine.dnnlib.util.__file__, refine.torch_utils.ops.__file__, sep='\\n')"
    )
    files = [Path(line) for line in start(tmp_path, "-c", code, str(root)).splitlines()]
    assert files == [root / "dnnlib/util.py", root / "torch_utils/ops/__init__.py"]


def test_scripts_of_a_checkout_run_in_such_a_folder(root, nvidia):
    env = {**os.environ, "PYTHONPATH": str(nvidia)}
    for script in ("refine.py", "compare_fid.py", "generate.py"):
        command = [sys.executable, str(root / script), "--help"]
        result = subprocess.run(command, cwd=nvidia, env=env, capture_output=True, text=True, check=False)
        assert result.returncode == 0 and "Usage" in result.stdout, result.stderr
