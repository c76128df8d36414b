"""Names of shipped files: what index.toml says is held, and a changed byte is refused."""

import hashlib
import os
import subprocess
import sys

import pytest

from refine.checkpoints.sources import index

TABLE = """
[{name}]
kind = "generator"
file = "{file}"
bytes = {bytes}
sha256 = "{sha256}"
licence = "Apache-2.0"
what = "something"
made_by = "a command"
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A made-up pretrained/ with one file, `net`, in use instead of the real one."""
    folder = tmp_path / "pretrained"
    folder.mkdir()
    data = b"some weights"
    (folder / "net.bin").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    (folder / "index.toml").write_text(
        "# comment\n" + TABLE.format(name="net", file="net.bin", bytes=len(data), sha256=digest)
    )
    monkeypatch.setenv("REFINE_PRETRAINED", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def refusal(path_or_name) -> str:
    with pytest.raises(ValueError) as caught:
        index.resolve(path_or_name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_name_is_resolved(folder):
    assert index.resolve("net") == folder / "net.bin"
    entry = index.read_index()["net"]
    assert (entry.name, entry.kind, entry.file, entry.bytes) == ("net", "generator", "net.bin", 12)


def test_an_existing_path_wins_over_a_name(folder, tmp_path):
    (tmp_path / "net").write_bytes(b"mine")
    assert index.resolve("net").read_bytes() == b"mine"
    assert index.resolve(folder / "net.bin") == folder / "net.bin"


@pytest.mark.parametrize("spoil", [lambda data: data[:-1] + b"S", lambda data: data + b"!", lambda data: b""])
def test_a_changed_byte_is_refused(folder, spoil):
    path = folder / "net.bin"
    path.write_bytes(spoil(path.read_bytes()))
    message = refusal("net")
    assert "the file was changed" in message and str(path) in message


def test_a_missing_shipped_file(folder):
    (folder / "net.bin").unlink()
    assert "net.bin: no such file" in refusal("net")


def test_what_is_no_name(folder, monkeypatch):
    assert refusal("nte") == "nte is neither a file nor a known name (the names known are net)"
    assert "no such file" in refusal("nte.safetensors")
    assert "no such file" in refusal("a/net")
    assert "is a folder" in refusal("pretrained")
    assert "empty path" in refusal("")
    monkeypatch.setenv("REFINE_PRETRAINED", "nowhere")
    assert "no pretrained/index.toml was found" in refusal("net")


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("[net]", "[net", "not valid TOML"),
        ('kind = "generator"\n', "", "needs 'kind'"),
        ('kind = "generator"', 'kind = "toy"', "has the kind 'toy'"),
        ("bytes = 12", 'bytes = "12"', "needs 'bytes'"),
        ('file = "net.bin"', 'file = "../net.bin"', "expected a name beside the index"),
        ('sha256 = "', 'sha256 = "x', "no sha256 of 'net'"),
        ('what = "something"', 'what = "something"\nmore = 1', "unknown field 'more'"),
        ("[net]", "net = 5\n[other]", "'net' is not a table"),
    ],
)
def test_a_spoilt_index(folder, old, new, what):
    path = folder / "index.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert what in refusal("net")


def test_update_index(folder, root):
    script = [sys.executable, "pretrained/recipes/update_index.py", "--folder", str(folder)]

    def run(*args):
        result = subprocess.run([*script, *args], cwd=root, capture_output=True, text=True, check=False)
        return result.returncode, result.stdout + result.stderr

    assert run("--check") == (0, f"{folder}/index.toml: up to date\n")
    (folder / "net.bin").write_bytes(b"other weights")
    code, output = run("--check")
    assert code == 1 and "out of date" in output and "the file was changed" in refusal("net")
    assert run()[0] == 0 and index.resolve("net").read_bytes() == b"other weights"
    assert (folder / "index.toml").read_text().startswith("# comment\n") and len(os.listdir(folder)) == 2
    (folder / "net.bin").unlink()
    code, output = run()
    assert code == 1 and "missing" in output


def test_what_is_shipped(root):
    """The real index: every file is there, unchanged, small enough for git, and nothing ships that it does not name."""
    folder = root / "pretrained"
    entries = {k: entry for k, entry in index.read_index(folder).items() if isinstance(entry, index.IndexEntry)}
    assert {"digits-gan", "digits-teacher", "digits-classifier", "digits-reference"} <= entries.keys()
    sizes = [index.resolve(name).stat().st_size for name in entries]
    assert max(sizes) <= 12e6 and sum(sizes) <= 30e6
    files = {path.name for path in folder.iterdir() if path.is_file()} - {"index.toml", "README.md"}
    assert files == {entry.file for entry in entries.values()}
    for entry in entries.values():
        script = entry.made_by.split()[1]
        assert entry.made_by.startswith("python ") and (root / script).is_file(), entry.made_by
