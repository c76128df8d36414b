"""What the programs of `inside` find, each run once in a session however many tests and workers ask."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.cuda import building


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cuda"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def found(root: Path, shared_folder: Path) -> Callable[[str], Any]:
    """name → what `inside/NAME.py` prints, which runs in a process of its own."""

    def run(name: str) -> Any:
        with FileLock(shared_folder / "build.lock"):
            reason = once(shared_folder / "build.json", lambda: why_not_built(shared_folder))
        if reason:
            pytest.skip(f"no device can be made: {reason}")
        with FileLock(shared_folder / f"{name}.lock"):
            done = once(shared_folder / f"{name}.json", lambda: run_inside(root, shared_folder, name))
        if "error" in done:
            pytest.fail(done["error"])
        return done["result"]

    return run


def once(path: Path, make: Callable[[], Any]) -> Any:
    if not path.exists():
        path.write_text(json.dumps(make()))
    return json.loads(path.read_text())


def why_not_built(folder: Path) -> str:
    try:
        building.build(folder)
    except building.CannotBuild as error:
        return str(error)
    return ""


def run_inside(root: Path, libraries: Path, name: str) -> dict[str, Any]:
    env = {**os.environ, "FAKE_CUDA": str(libraries), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"tests.cuda.inside.{name}"]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False, timeout=900)
    if done.returncode:
        return {"error": f"{name} ended with {done.returncode}:\n{done.stderr[-4000:]}"}
    return {"result": json.loads(done.stdout.splitlines()[-1])}
