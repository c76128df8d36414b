"""Benchmarks that `make` calls and that nothing else runs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks.iteration import main


def test_an_iteration_is_timed_beside_a_plain_one(tmp_path):
    path = tmp_path / "numbers.json"
    options = ["--pair=digits", "--batch-demo=2", "--repeats=1", f"--json={path}"]
    done = CliRunner().invoke(main, options, catch_exceptions=False)
    assert done.exit_code == 0 and "the same, naive" in done.output
    text = path.read_text()
    assert json.loads(text) and "NaN" not in text


@pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="others were not counted")
def test_what_an_iteration_asks_of_a_gpu():
    """Operators beside views, clones, copies between host and device, and waits, at CIFAR-10's sizes."""
    script = Path(__file__).parents[1] / "benchmarks" / "dispatch.py"
    said = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    rows = re.findall(r"^\| (fp32|bf16) \| (\d+) \| (\d+) \| (\d+) \| \d+ \| (\d+) \| (\d+) \|$", said, re.MULTILINE)
    assert [row[0] for row in rows] == ["fp32", "bf16"]
    for _, *numbers in rows:
        operators, views, clones, copies, waits = map(int, numbers)
        assert 1000 < operators - views <= 1800 and clones <= 10 and copies == waits == 0, said
