"""Benchmarks that `make` calls and that nothing else runs."""

import json

from click.testing import CliRunner

from benchmarks.iteration import main


def test_an_iteration_is_timed_beside_a_plain_one(tmp_path):
    path = tmp_path / "numbers.json"
    options = ["--pair=digits", "--batch-demo=2", "--repeats=1", f"--json={path}"]
    done = CliRunner().invoke(main, options, catch_exceptions=False)
    assert done.exit_code == 0 and "the same, naive" in done.output
    text = path.read_text()
    assert json.loads(text) and "NaN" not in text
