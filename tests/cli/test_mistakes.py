"""docs/mistakes.md is true: its commands give its messages."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from refine.cli.main import run_command
from tests.cli import mistakes

DOCUMENT = (Path(__file__).parents[2] / "docs/mistakes.md").read_text(encoding="utf-8")
MISTAKES = re.findall(r"```console\n\$ python (.+)\n((?:.+\n)*?)```", DOCUMENT)
SCRIPTS = {"refine.py": "refine", "generate.py": "generate", "compare_fid.py": "compare"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("mistakes")
    mistakes.make(place)
    return place


@pytest.mark.parametrize(("typed", "told"), MISTAKES, ids=[typed for typed, _ in MISTAKES])
def test_a_mistake_is_answered_as_the_document_says(folder, capsys, monkeypatch, typed, told):
    if "--device=cuda" in typed and torch.cuda.is_available():
        pytest.skip("on this machine it is none")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("REFINE_CACHE", str(folder / "cache"))
    program, *args = shlex.split(typed.removeprefix("-m refine "))
    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.setattr(sys.modules["__main__"], "__package__", None)  # click looks there for the program's name
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run_command(SCRIPTS.get(program, program), args)
    out, err = capsys.readouterr()
    assert err == told
    assert stop.value.code == 2 and out == "" and sorted(folder.rglob("*")) == before


def test_the_document_has_them_all():
    assert len(MISTAKES) == DOCUMENT.count("```console") >= 25
    assert all(told.startswith("Error: ") and told.count("\n") == 1 for _, told in MISTAKES)
