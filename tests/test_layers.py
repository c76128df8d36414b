"""Imports run one way: an upper layer may import lower ones, never the reverse; imports inside functions count too."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# From the bottom up. A module belongs to the longest name here that it equals or lies under ("refine" only to itself).
# Modules of one layer may import each other, but not in a circle.
LAYERS = [
    ("refine.dnnlib",),
    ("refine.torch_utils",),
    ("refine.errors",),
    ("refine.device", "refine.processes", "refine.config"),
    ("refine.networks",),
    ("refine.noise", "refine.images", "refine.guidance", "refine.pair"),
    ("refine.diff_instruct", "refine.objectives"),
    ("refine.checkpoints", "refine"),  # `refine` is the lazy front door to refine.api, see FRONT_DOOR
    ("refine.metrics",),
    ("refine.evaluation", "refine.training"),  # neither imports the other, see APART
    ("refine.api",),
    ("refine.cli", "refine.__main__"),
    ("scripts",),  # refine.py, compare_fid.py, generate.py, benchmarks/, pretrained/recipes/
]
LEVEL = {prefix: level for level, prefixes in enumerate(LAYERS) for prefix in prefixes}
FRONT_DOOR = ("refine", "refine.api")  # the first opens the second lazily, when a name of it is used
APART = [("refine.evaluation", "refine.training")]

# Folder of a checkout -> package. `dnnlib` and `torch_utils` are never imported under their own names, which NVIDIA's
# programs use for packages of theirs.
PACKAGES = {"dnnlib": "refine.dnnlib", "torch_utils": "refine.torch_utils", "refine": "refine"}
SCRIPTS = ("*.py", "benchmarks/**/*.py", "pretrained/recipes/**/*.py")

# Modules that may import less than their layer allows: these names and what is under them, beside the standard library.
ONLY = {
    "refine.dnnlib": ("refine.dnnlib",),
    "refine.diff_instruct": ("torch", "refine.noise"),
    "refine.objectives": ("torch", "refine.noise", "refine.diff_instruct", "refine.objectives"),
    "refine.checkpoints.sniff": ("refine.dnnlib",),
    "refine.checkpoints.foreign.diffusers_folder": ("refine.dnnlib",),
    "refine.checkpoints.sources.index": (
        *("refine.dnnlib", "refine.checkpoints.sniff", "refine.checkpoints.sources.fetch"),
        *("refine.checkpoints.foreign.diffusers_folder", "tomli"),
    ),
    "refine.checkpoints.sources.fetch": (
        *("refine.dnnlib", "refine.checkpoints.sniff"),
        *("filelock", "pooch", "requests", "urllib3", "tqdm"),
    ),
}


def sources(root: Path) -> Iterator[tuple[str, Path]]:
    """(module name, file) of everything that the rule is for; a script `x.py` is called `scripts.x`."""
    for folder, package in PACKAGES.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = (package, *path.relative_to(root / folder).with_suffix("").parts)
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path
    for pattern in SCRIPTS:
        for path in sorted(root.glob(pattern)):
            yield f"scripts.{path.stem}", path


def imports(module: str, path: Path) -> Iterator[tuple[int, str]]:
    """(line, full name) of every import anywhere in a file, also relative ones and import_module of a literal name."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            yield from ((node.lineno, arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def level_of(module: str) -> int | None:
    """Layer of a module of ours; None for other people's. Names inside a module (`refine.noise.Weighting`) are fine."""
    name = module
    while name:
        if name in LEVEL and (name != "refine" or module == "refine"):
            return LEVEL[name]
        name = name.rpartition(".")[0]
    return None


def under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def violations(root: Path) -> list[str]:
    found = []
    for module, path in sources(root):
        mine = level_of(module)
        if mine is None:
            found.append(f"{module} has no place in LAYERS")
            continue
        allowed = next((ONLY[prefix] for prefix in ONLY if under(module, (prefix,))), None)
        for line, name in imports(module, path):
            where = f"{path.relative_to(root)}:{line}"
            if module == FRONT_DOOR[0] and under(name, FRONT_DOOR[1:]):
                continue
            if under(name, ("dnnlib", "torch_utils")):
                found.append(f"{where} imports {name}; expected refine.{name}")
            elif allowed is not None:
                if name.split(".")[0] not in sys.stdlib_module_names and not under(name, allowed):
                    found.append(f"{where} imports {name}; {module} may import {', '.join(allowed)} only")
            elif any(under(module, (a,)) and under(name, (b,)) for pair in APART for a, b in (pair, pair[::-1])):
                found.append(f"{where} imports {name}; {module} is to stand without it")
            else:
                if name == "refine" or (name.startswith("refine.") and level_of(name) is None):
                    theirs = LEVEL["refine"]  # a name of the front door: refine.load_generator, refine.__version__
                else:
                    theirs = level_of(name)
                if theirs is not None and theirs > mine:
                    found.append(f"{where} imports {name}, which is above {module}")
    return found


def circles(root: Path) -> list[str]:
    """Modules that import each other, directly or through others; a package's own `__init__` is left out."""
    files = {module: path for module, path in sources(root) if path.name != "__init__.py"}
    graph = {module: {owner for _, name in imports(module, path) if (owner := _owner(name, files))}
             for module, path in files.items()}  # fmt: skip
    while free := [module for module, needed in graph.items() if not needed & graph.keys() - {module}]:
        graph = {module: needed for module, needed in graph.items() if module not in free}
    return sorted(graph)


def _owner(name: str, modules: dict[str, Path]) -> str | None:
    """The module that holds a name."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def test_imports_run_one_way(root):
    assert violations(root) == []


def test_no_modules_import_each_other_in_a_circle(root):
    assert circles(root) == []


def test_a_circle_is_found(tmp_path):
    (tmp_path / "refine/networks").mkdir(parents=True)
    code = {
        "a": "def f():\n    from refine.networks.b import g",
        "b": "from refine.networks import c",
        "c": "from .a import f",
    }
    for name, text in {**code, "d": "from .a import f"}.items():
        (tmp_path / f"refine/networks/{name}.py").write_text(text)
    assert circles(tmp_path) == [f"refine.networks.{name}" for name in "abcd"]  # d hangs on it


def test_the_root_of_the_package_is_small(root):
    assert len(list((root / "refine").glob("*.py"))) <= 12


def test_there_is_something_to_hold(root):
    names = {name for name, _ in sources(root)}
    assert {
        "refine.dnnlib.util",
        "refine.diff_instruct",
        "refine.networks.stylegan2",
        "refine.cli.main",
        "scripts.refine",
    } <= names


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("dnnlib/x.py", "import torch"),
        ("dnnlib/x.py", "import numpy as np"),
        ("torch_utils/ops/x.py", "from refine.networks import edm"),
        ("refine/networks/x.py", "def f():\n    from refine.training.trainer import Trainer"),
        ("refine/networks/x.py", "from ..checkpoints import native"),
        ("refine/networks/__init__.py", "from ..metrics import evaluate"),
        ("refine/networks/x.py", "from .. import load_generator"),
        ("refine/checkpoints/x.py", "from refine import metrics"),
        ("refine/checkpoints/sniff.py", "import torch"),
        ("refine/metrics/x.py", "import refine.training.trainer as t"),
        ("refine/training/x.py", "from refine.evaluation import report"),
        ("refine/evaluation/x.py", "import refine.training.loop"),
        ("refine/training/x.py", "from torch_utils import misc"),
        ("refine/training/x.py", "import dnnlib.util"),
        ("refine/metrics/x.py", "import importlib\nm = importlib.import_module('refine.cli.main')"),
        ("refine/training/trainer.py", "from refine.cli.main import main"),
        ("refine/diff_instruct.py", "from refine.networks.edm import EDMPrecond"),
        ("refine/diff_instruct.py", "import dnnlib"),
        ("refine/surprise.py", "import os"),
        ("refine/evaluation/x.py", "from refine import api"),
        ("refine/__init__.py", "from refine.cli import main"),
    ],
)
def test_a_violation_is_found(tmp_path, file, code):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("dnnlib/x.py", "import os\nfrom refine.dnnlib.util import EasyDict\nfrom . import util"),
        ("refine/networks/x.py", "import torch\nfrom .edm import SongUNet\nimport refine.torch_utils.ops.bias_act"),
        ("refine/diff_instruct.py", "import torch\nfrom refine.noise import Weighting"),
        ("refine/training/trainer.py", "from refine import diff_instruct\nfrom ..metrics import evaluate"),
        ("benchmarks/x.py", "from refine.cli import main\nimport refine"),
        ("refine/__init__.py", "from refine.api import sample"),
    ],
)
def test_a_right_import_is_not_called_wrong(tmp_path, file, code):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    assert violations(tmp_path) == []
