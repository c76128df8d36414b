"""docs/security.md: each promise names the test that would fail if it were broken."""

import ast
import re


def test_every_promise_names_a_test_that_is_there(root):
    text = (root / "docs" / "security.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 30
    for path, name in named:
        tree = ast.parse((root / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{path}::{name}"
    heads = ("| Promise |", "| What could")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(heads)]
    assert rows and all("::test_" in row for row in rows)
