"""`python -m refine models`, and what `inspect` says of a name whose file is not here."""

import json
import re

import pytest

from refine.checkpoints.sources import fetch, index
from refine.cli.main import run_command


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """An empty cache; nothing may be downloaded."""
    monkeypatch.setenv("REFINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "_download", lambda *_: pytest.fail("a download"))


def run(capsys, command, *args):
    with pytest.raises(SystemExit) as caught:
        run_command(command, [str(arg) for arg in args])
    return caught.value.code, *capsys.readouterr()


def test_a_table_with_a_line_for_every_name(capsys):
    code, out, err = run(capsys, "models")
    lines = out.splitlines()
    assert code == 0 and err == "" and {line.split()[0] for line in lines[1:]} == set(index.read_index())
    assert len(lines) == len(index.read_index()) + 1
    places = [line.rpartition("  ")[2] for line in lines[1:]]
    assert "shipped" not in places[places.index("to be downloaded") :]  # they stand first
    by_name = {line.split()[0]: re.split(r"  +", line) for line in lines}
    assert lines[0].split() == ["name", "kind", "size", "classes", "published", "FID", "licence", "file"]
    assert by_name["adm-lsun-cat"][1:] == [
        "teacher",
        "256×256",
        "none",
        "5.57",
        "MIT, for research",
        "to be downloaded",
    ]
    assert by_name["adm-imagenet64"][4] == f"2.07 ({index.read_index()['adm-imagenet64'].fid_with})"
    assert by_name["digits-gan"][1:4] == ["generator", "32×32", "10"]
    assert by_name["digits-gan"][-1] == "shipped" and by_name["r3gan-ffhq-64"][-1] == "by hand"


def test_json_says_what_is_here(capsys):
    url = index.read_index()["adm-lsun-cat"].url
    fetch.cache_path(url).parent.mkdir(parents=True)
    fetch.cache_path(url).write_bytes(b"x")
    code, out, _ = run(capsys, "models", "--json", "--kind=teacher")
    table = {entry["name"]: entry for entry in json.loads(out)}
    assert code == 0 and {entry["kind"] for entry in table.values()} == {"teacher"}
    assert table["adm-lsun-cat"]["place"] == "cached" and table["adm-lsun-horse"]["place"] == "to be downloaded"
    assert table["edm2-img64-s-autog-fid"]["guidance"] == 1.7 and table["edm2-img64-s-autog-fid"]["fid"] == 1.01


def test_inspecting_a_name_downloads_nothing(capsys):
    code, out, _ = run(capsys, "inspect", "edm2-img64-s-autog-fid")
    assert code == 0 and "meant with  --guide=edm2-img64-xs-autog-fid --guidance=1.7\n" in out
    assert "FID         1.01 (its guide), as published\n" in out and "file        to be downloaded" in out
    code, out, _ = run(capsys, "inspect", "adm-imagenet256-uncond", "--json")
    known = json.loads(out)["index"]
    assert code == 0 and known["sha256"].startswith("a37c32fffd31") and known["classes"] == 0
    code, out, _ = run(capsys, "inspect", "r3gan-cifar10")
    assert code == 0 and "get it      the README of github.com/brownvc/R3GAN" in out


def test_inspecting_a_shipped_name_says_both(capsys):
    report = json.loads(run(capsys, "inspect", "digits-gan", "--json")[1])
    assert report["index"]["place"] == "shipped" and report["networks"]["G_ema"]["kind"] == "generator"


def test_what_only_the_index_knows_of_a_file_that_is_here_is_said(capsys):
    code, out, _ = run(capsys, "inspect", "digits-gan")
    assert code == 0 and [line.split() for line in out.splitlines()[-3:]] == [
        ["name", "digits-gan"],
        ["licence", "Apache-2.0"],
        ["place", "shipped"],
    ]


def test_a_name_without_an_address_says_where_to_get_it():
    with pytest.raises(
        ValueError, match=r"r3gan-cifar10 has to be fetched by hand: the README of .*; then give the fil"
    ):
        index.resolve("r3gan-cifar10", "generator")


def test_teachers_that_are_meant_with_a_guide_name_one_of_the_index():
    entries = index.read_index()
    for entry in entries.values():
        if getattr(entry, "guide", None):
            guide = entries[entry.guide]
            assert (guide.kind, guide.resolution, guide.classes) == ("teacher", entry.resolution, entry.classes)
            assert entry.guidance > 1
