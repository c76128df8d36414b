"""Set-up files say the same thing: pyproject.toml, constraints.txt, environment.yml, Makefile, .ci/run, README."""

import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import refine

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def make(*args: str, cwd) -> subprocess.CompletedProcess:
    """make as a person would start it, also when these tests were started by make."""
    environ = {
        key: value
        for key, value in os.environ.items()
        if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "VENV", "PYTHON")
    }
    return subprocess.run(["make", *args], cwd=cwd, env=environ, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def project(root):
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pins(root) -> list[Requirement]:
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def wanted(project) -> list[Requirement]:
    extras = project["project"]["optional-dependencies"]
    return [Requirement(text) for text in [*project["project"]["dependencies"], *extras["dev"], *extras["recipes"]]]


def in_force(requirement: Requirement, python: str | None = None) -> bool:
    environment = default_environment() | {"extra": ""}
    if python is not None:
        environment |= {"python_version": python, "python_full_version": f"{python}.0"}
    return requirement.marker is None or requirement.marker.evaluate(environment)


def test_constraints_are_exact(pins):
    for pin in pins:
        assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(pin.specifier)), pin


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_direct_dependency_has_one_pin_that_satisfies_it(pins, wanted, python):
    for requirement in filter(lambda r: in_force(r, python), wanted):
        mine = [pin for pin in pins if canonicalize_name(pin.name) == requirement.name and in_force(pin, python)]
        assert len(mine) == 1, requirement
        version = next(iter(mine[0].specifier)).version
        assert requirement.specifier.contains(version), (requirement, version)


def test_transitive_dependencies_are_pinned(pins, wanted):
    """Follows the metadata of what is installed. The CUDA libraries are pinned by torch itself."""
    pinned = {canonicalize_name(pin.name) for pin in pins if in_force(pin)}
    todo, seen = [canonicalize_name(r.name) for r in wanted if in_force(r)], set()
    while todo:
        name = todo.pop()
        if name in seen or name.startswith(("nvidia-", "cuda-", "triton")):
            continue
        seen.add(name)
        requires = [Requirement(text) for text in importlib.metadata.requires(name) or []]
        todo += [canonicalize_name(r.name) for r in requires if in_force(r)]
    assert len(seen) > 30 and seen - pinned == set()


def test_packages_are_listed_and_exist(project, root):
    folders = project["tool"]["setuptools"]["package-dir"]
    listed = set(project["tool"]["setuptools"]["packages"])
    for package in listed:
        assert (root / folders.get(package, package.replace(".", "/"))).is_dir(), package
    found = {}
    for top in ("dnnlib", "torch_utils", "refine"):
        for path in (root / top).rglob("*.py"):
            package = ".".join(path.parent.relative_to(root).parts)
            found[package if top == "refine" else f"refine.{package}"] = path.parent
    assert set(found) == listed - {"refine.pretrained"}
    for package, folder in found.items():
        assert (folder / "__init__.py").is_file(), package
        assert root / folders.get(package, package.replace(".", "/")) == folder


def test_sources_of_the_compiled_ops_are_packaged(project, root):
    patterns = project["tool"]["setuptools"]["package-data"]["refine.torch_utils.ops"]
    files = [path for path in (root / "torch_utils" / "ops").iterdir() if path.suffix in (".h", ".cpp", ".cu")]
    assert len(files) >= 5 and all(any(path.match(pattern) for pattern in patterns) for path in files)


def test_a_wheel_is_one_package_with_its_data_and_sources(distributions, project):
    names = set(zipfile.ZipFile(distributions.wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"refine", f"gan_refine-{refine.__version__}.dist-info"}
    source, folders, expected = distributions.source, project["tool"]["setuptools"]["package-dir"], set()
    for package in project["tool"]["setuptools"]["packages"]:
        inside = package.replace(".", "/")
        files = [path for path in (source / folders.get(package, inside)).iterdir() if path.is_file()]
        expected |= {f"{inside}/{path.name}" for path in files}
    assert {name for name in names if name.startswith("refine/")} == expected
    assert {"refine/py.typed", "refine/pretrained/digits-gan.safetensors", "refine/torch_utils/ops/kernels.h"} <= names
    with zipfile.ZipFile(distributions.editable) as editable:
        assert not {"dnnlib", "torch_utils"} & {name.split("/")[0] for name in editable.namelist()}


def test_a_source_distribution_is_the_whole_checkout(distributions):
    with tarfile.open(distributions.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    source = distributions.source
    files = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    made = {"build", "gan_refine.egg-info", "__pycache__"}  # by the build, and by those who import it
    assert {path.as_posix() for path in files if made.isdisjoint(path.parts)} - names == set()


def test_the_readme_of_an_index_page_has_no_link_into_a_checkout(distributions, root):
    """As built, without a public repository; and where there is one."""
    with zipfile.ZipFile(distributions.wheel) as wheel:
        about = wheel.read(f"gan_refine-{refine.__version__}.dist-info/METADATA").decode()
    assert "Description-Content-Type: text/markdown" in about and "# gan-refine" in about
    assert re.findall(r"\]\((?!https://)[^)]*\)", about) == []
    for_an_index = runpy.run_path(str(root / "setup.py"))["for_an_index"]
    text = "![a\npicture](docs/demo.png)\n\n[method](docs/method.md#x), [paper](https://arxiv.org/abs/2305.18455)"
    assert for_an_index(text, "https://example.org/refine/", "1.0") == (
        "![a\npicture](https://example.org/refine/raw/v1.0/docs/demo.png)\n\n"
        "[method](https://example.org/refine/blob/v1.0/docs/method.md#x), [paper](https://arxiv.org/abs/2305.18455)"
    )
    assert for_an_index(text, None, "1.0") == "\n\nmethod, [paper](https://arxiv.org/abs/2305.18455)"


def test_extras_are_in_the_documents(project, root):
    table = (root / "docs/install.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `\[(\w+)\]` \|", table, re.MULTILINE)
    assert set(named) == set(project["project"]["optional-dependencies"])


def test_names_and_versions(project, root):
    about = project["project"]
    assert about["name"] == "gan-refine" and about["scripts"] == {"gan-refine": "refine.cli.main:main"}
    assert about["requires-python"] == ">=3.10" and "torch>=2.6" in about["dependencies"]
    assert about["license"] == "Apache-2.0" and about["version"] == refine.__version__
    assert f"\nversion: {refine.__version__}\n" in (root / "CITATION.cff").read_text(encoding="utf-8")


def test_conda_environment_is_in_step(project, root):
    """`environment.yml` brings Python and pip; pip installs what the Makefile installs, in the same words."""
    lines = [line.strip() for line in (root / "environment.yml").read_text(encoding="utf-8").splitlines()]
    items = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    install = re.search(r"\$\(PIP\) -c (\S+) -e '(\S+)'", makefile)
    assert f"-c {install[1]}" in items and f"-e {install[2]}" in items
    assert set(re.search(r"\[(.+)\]", install[2])[1].split(",")) == {"dev", "recipes"}
    assert {"dev", "recipes"} <= set(project["project"]["optional-dependencies"])  # the others are for those who ask
    assert f"name: {project['project']['name']}" in lines and "pip" in items
    python = next(item for item in items if item.startswith("python="))
    assert Requirement(f"x{project['project']['requires-python']}").specifier.contains(python.removeprefix("python="))
    others = [
        i
        for i in items
        if not i.startswith(("python=", "-c ", "-e ")) and i not in ("pip", "pip:", "make", "conda-forge")
    ]
    assert others == [], "versions belong into constraints.txt"


def test_ci_runs_what_the_readme_says(root):
    script = root / ".ci/run"
    commands = [line for line in script.read_text().splitlines() if line and not line.startswith("#")]
    assert commands[0] == "set -euo pipefail" and commands[-1] == "make test"
    assert os.access(script, os.X_OK)
    assert "make test" in (root / "README.md").read_text(encoding="utf-8")


def test_make_targets(root):
    """`make -n` prints the commands: every target sets itself up first, and a finished set-up is not done twice."""
    fresh = "VENV=no/such/venv"
    for target, command in {
        "test": "pytest -q",
        "demo": "refine.cli.demo",
        "bench": "benchmarks/iteration.py",
        "gpu": "benchmarks/gpu.py",
        "lint": "ruff",
    }.items():
        text = make("-n", target, fresh, cwd=root).stdout
        assert text.index("-m venv") < text.index("-c constraints.txt") < text.index(command)
    assert "python9 -m venv" in make("-n", "setup", fresh, "PYTHON=python9", cwd=root).stdout


def test_a_finished_set_up_is_not_done_again(root, tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((root / name).read_bytes())
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/.installed").touch()
    result = make("-n", "setup", cwd=tmp_path)
    assert result.returncode == 0 and "pip" not in result.stdout


PIP = """#!/bin/sh
# instead of the environment's Python: pip is there, finds only what it is told to find, and speaks much
case "$*" in
  *--version*) exit 0 ;;
  *--index-url=file:/there*) echo "pip says a lot"; exit 0 ;;
  *--index-url=*) echo "no such index"; exit 1 ;;
esac
echo "pip says a lot"
exit ${PIP_FAILS:-0}
"""


@pytest.fixture
def set_up(root, tmp_path):
    """make setup in a copy, where pip is a script."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(root / name, tmp_path)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(PIP)
    python.chmod(0o755)
    return lambda *args: make("setup", *args, cwd=tmp_path)


def test_a_set_up_is_a_line_for_each_step_and_a_log(set_up, tmp_path):
    result = set_up("TORCH_INDEX=file:/there")
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and result.stderr == "" and len(lines) == 3, result
    assert lines[0].startswith("torch without CUDA") and lines[-1].startswith("done: ")
    assert (tmp_path / ".venv/setup.log").read_text() == "pip says a lot\n" * 2
    assert set_up().stdout.splitlines()[-1].startswith("make: ")  # nothing to be done


def test_where_an_index_of_torch_cannot_be_reached_the_usual_one_is_taken(set_up, tmp_path):
    result = set_up("TORCH_INDEX=file:/elsewhere")
    assert result.returncode == 0 and "not to be had from file:/elsewhere" in result.stdout and result.stderr == ""
    assert (tmp_path / ".venv/.installed").exists()


def test_torch_with_cuda_is_asked_for_by_an_empty_index(set_up, tmp_path):
    result = set_up("TORCH_INDEX=")
    assert result.returncode == 0 and "torch" not in result.stdout
    assert (tmp_path / ".venv/setup.log").read_text() == "pip says a lot\n"


def test_a_set_up_that_fails_shows_the_end_of_its_log(set_up, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FAILS", "1")
    result = set_up("TORCH_INDEX=")
    assert result.returncode != 0 and "pip says a lot" in result.stderr and "setup.log" in result.stderr
    assert not (tmp_path / ".venv/.installed").exists()


def test_old_python_is_told_so(root, tmp_path):
    (tmp_path / "python-old").write_text("#!/bin/sh\necho 'Python 3.10 or newer is needed' >&2; exit 1\n")
    (tmp_path / "python-old").chmod(0o755)
    result = make("setup", f"PYTHON={tmp_path}/python-old", f"VENV={tmp_path}/venv", cwd=root)
    assert result.returncode != 0 and "3.10 or newer" in result.stderr and not (tmp_path / "venv").exists()


def test_ruff_and_pytest_are_configured(project):
    assert project["tool"]["ruff"]["line-length"] == 120
    assert project["tool"]["pytest"]["ini_options"]["testpaths"] == ["tests"]


def test_licence_is_complete(root):
    text = (root / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text and len(text.splitlines()) > 190
