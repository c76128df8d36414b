"""What every test can rely on: one thread (tests may run beside each other), fixed seeds, no network of the user's."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported anywhere
os.environ.pop("REFINE_PRETRAINED", None)
os.environ.pop("REFINE_DEBUG", None)

import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from refine.training import fakes

ROOT = Path(__file__).resolve().parents[1]


LONG = ("test_silence.py", "test_iteration.py", "test_shipped.py", "test_device_code.py", "test_distributed.py")
PICTURE = fakes.WIDTH, fakes.HEIGHT


def pytest_configure() -> None:
    torch.set_num_threads(1)
    fakes.WIDTH = fakes.HEIGHT = 1  # 28 images in the pictures of a run, not 1024, which would cost most of its time


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """For `-n auto`: one more than there are cores, for whose tests wait for something together a minute or two."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)  # first, so that no worker is left alone with one
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """In torch's default a GPU's convolutions round to TF32, and a run in another precision leaves its switches behind:
    what is compared with a reference in float32 is not to depend on either."""
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def full_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of a run as users have them."""
    monkeypatch.setattr(fakes, "WIDTH", PICTURE[0])
    monkeypatch.setattr(fakes, "HEIGHT", PICTURE[1])


@pytest.fixture(scope="session")
def root() -> Path:
    """The source checkout."""
    return ROOT


class Distributions(NamedTuple):
    """What the build backend makes of a copy of the checkout."""

    source: Path
    wheel: Path
    editable: Path
    sdist: Path


@pytest.fixture(scope="session")
def distributions(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """Wheel, editable wheel and source distribution, built in seconds by the calls that pip makes, without network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("refine", "dnnlib", "torch_utils", "pretrained", "benchmarks", "docs", "tests", ".ci"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.work"))
    for path in root.iterdir():
        if path.suffix in (".py", ".toml", ".md", ".txt", ".yml", ".in") or path.name in ("LICENSE", "Makefile"):
            shutil.copy(path, source)
    code = (
        "import sys; from setuptools.build_meta import build_editable, build_sdist, build_wheel\n"
        "out = sys.argv[1]\n"  # they change it
        "print(build_wheel(out), build_editable(out), build_sdist(out), sep='\\n')"
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", code, str(out)]
    result = subprocess.run(command, cwd=source, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return Distributions(source, *(out / name for name in result.stdout.splitlines()[-3:]))
