"""The programs on a CUDA device, as people start them: each in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
PAIR = ("--gan=digits-gan", "--teacher=digits-teacher-2")
SHORT = ("--preset=demo", "--adversarial=0.5", "--kimg=0.128", "--bank=64", "--snap=1")


def run(root: Path, *command: str) -> str:
    done = subprocess.run([sys.executable, *command], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "options", [(), ("--precision=bf16",), ("--batch-gpu=16", "--objective=ikl+sid"), ("--device=cuda:0",)]
)
def test_a_run_with_metrics(root, tmp_path, options):
    metrics = ("--metrics=fd200-digits", "--ref=digits-reference")
    run(root, "refine.py", *PAIR, *SHORT, *metrics, *options, f"--outdir={tmp_path}")
    rows = [json.loads(line) for path in tmp_path.glob("*/metric-*.jsonl") for line in path.read_text().splitlines()]
    assert len(rows) >= 2 and all(row["results"]["fd_digits"] < 20 for row in rows)
    assert list(tmp_path.glob("*/network-snapshot-best.safetensors"))


def test_a_run_goes_on(root, tmp_path):
    run(root, "refine.py", *PAIR, *SHORT, "--metrics=none", f"--outdir={tmp_path}")
    run(root, "refine.py", "--resume=latest", "--kimg=0.192", f"--outdir={tmp_path}")
    assert list(tmp_path.glob("*/network-snapshot-000000.192.safetensors"))


def test_one_step(root, tmp_path):
    options = ("--preset=one-step-demo", "--kimg=0.064", "--metrics=none")
    run(root, "refine.py", "--gan=one-step", PAIR[1], *options, f"--outdir={tmp_path}")


def test_images_and_comparison(root, tmp_path):
    run(root, "generate.py", "--network=digits-gan", "--seeds=0-19", f"--outdir={tmp_path}/images")
    assert len(list((tmp_path / "images").glob("*.png"))) == 20
    two = ("--before=digits-gan", "--after=digits-gan-long", "--ref=digits-reference")
    run(root, "compare_fid.py", *two, "--num=200", f"--outdir={tmp_path}/report")
    assert (tmp_path / "report" / "report.html").is_file()
