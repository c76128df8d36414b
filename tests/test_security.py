"""docs/security.md: each promise names the test that would fail if it were broken, and no document promises more."""

import ast
import re

import pytest

ABSOLUTE = re.compile(r"\b(never|always|within (\w+ )?(s|seconds?|minutes?))\b", re.IGNORECASE)


def test_every_promise_names_a_test_that_is_there(root):
    text = (root / "docs" / "security.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 80
    for path, name in named:
        tree = ast.parse((root / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{path}::{name}"
    heads = ("| Promise |", "| What could")
    promises = re.sub(r"^### What was measured\n.*?(?=^## )", "", text, flags=re.DOTALL | re.MULTILINE)
    rows = [line for line in promises.splitlines() if line.startswith("| ") and not line.startswith(heads)]
    assert rows and all("::test_" in row for row in rows)


def sentences(path):
    """Sentences and cells of tables, in one line each, without what is only meant for machines."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n", text):
        yield from re.split(r"(?<=[.!?;])\s|\s\|\s", " ".join(paragraph.split()))


def absolute_sentences(root):
    for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        if path.name not in ("security.md", "options.md"):  # what is chosen by an option is no promise
            yield from (f"{path.name}: {part}" for part in sentences(path) if ABSOLUTE.search(part))


def test_what_is_promised_without_exception_is_in_the_table(root):
    promised = re.findall(r'^\| "([^"]+)"', (root / "docs" / "security.md").read_text(encoding="utf-8"), re.MULTILINE)
    found = list(absolute_sentences(root))
    assert not [sentence for sentence in found if not any(words in sentence for words in promised)]
    assert not [words for words in promised if not any(words in sentence for sentence in found)]


@pytest.mark.parametrize("text", ["It never does.", "It\nends within 60 seconds.", "| x | Always |", "within 5 s"])
def test_such_sentences_are_found(text, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(text)
    assert len(list(absolute_sentences(tmp_path))) == 1
