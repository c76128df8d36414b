"""docs/refine.ipynb: its cells run, and its outputs are those of such a run."""

import ast
import base64
import contextlib
import io
import json

import pytest
from PIL import Image


@pytest.fixture(scope="module")
def cells(root):
    notebook = json.loads((root / "docs/refine.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_cell(source, names):
    """What a cell prints, and the value of its last line where that is an expression, as in a notebook."""
    tree, value, printed = ast.parse(source), None, io.StringIO()
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "cell", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    return printed.getvalue(), value


def test_the_cells_run_and_the_outputs_are_those_of_a_run(cells):
    names = {"__name__": "__main__"}
    for cell in cells:
        printed, value = run_cell("".join(cell["source"]), names)
        outputs = {}
        for output in cell["outputs"]:
            assert output["output_type"] in ("stream", "execute_result") and output.get("name") != "stderr"
            outputs |= output.get("data") or {"stdout": "".join(output["text"])}
        assert ("stdout" in outputs) == bool(printed)
        assert isinstance(value, Image.Image) == ("image/png" in outputs)
        if isinstance(value, Image.Image):
            shown = Image.open(io.BytesIO(base64.b64decode(outputs["image/png"])))
            assert shown.size == value.size and shown.convert("L").getextrema() == (0, 255)
        if printed:
            assert [len(line.split()) for line in printed.splitlines()][:2] == [
                len(line.split()) for line in outputs["stdout"].splitlines()
            ][:2]
    comparison, result = names["comparison"], names["result"]
    assert comparison.verdict == "better" and comparison.ratio < 0.8
    assert result.history[-1].values["fd_digits"] < result.history[0].values["fd_digits"]


def test_the_shipped_outputs_show_a_gain_and_no_place_of_a_machine(root):
    text = (root / "docs/refine.ipynb").read_text(encoding="utf-8")
    assert len(text) < 300_000 and "The second network is better" in text
    assert not any(word in text for word in ("/home/", "/tmp/", "/root/", "Traceback"))
