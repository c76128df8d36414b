import hashlib
import os
import subprocess
import sys

import pytest

from refine import dnnlib


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.5, "1m 00s"),
        (185, "3m 05s"),
        (3599.6, "1h 00m 00s"),
        (7449, "2h 04m 09s"),
        (86400 + 3 * 3600 + 20 * 60 + 59, "1d 03h 20m"),
        (-0.2, "0s"),
    ],
)
def test_format_time(seconds, text):
    assert dnnlib.format_time(seconds) == text


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1])
@pytest.mark.parametrize("function", [dnnlib.format_time, dnnlib.format_bytes])
def test_formats_refuse_what_has_no_meaning(function, bad):
    with pytest.raises(ValueError, match="finite and not negative"):
        function(bad)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.50 KiB"),
        (1024 * 1024 - 1, "1.00 MiB"),
        (12.3 * 2**20, "12.3 MiB"),
        (226 * 2**20, "226 MiB"),
        (5 * 2**60, "5120 PiB"),
    ],
)
def test_format_bytes(count, text):
    assert dnnlib.format_bytes(count) == text


def test_kimg():
    assert dnnlib.format_kimg(123_456) == "000123"
    assert dnnlib.format_kimg(12_345_678_000) == "12345678"
    with pytest.raises(ValueError, match="negative"):
        dnnlib.format_kimg(-1)


def test_sha256(tmp_path):
    data = bytes(range(256)) * 10_000
    (tmp_path / "f").write_bytes(data)
    assert dnnlib.sha256_of_file(tmp_path / "f") == hashlib.sha256(data).hexdigest()
    os.mkfifo(tmp_path / "pipe")  # which would be waited for
    with pytest.raises(OSError, match="no regular file"):
        dnnlib.sha256_of_file(tmp_path / "pipe")


def test_dnnlib_never_imports_torch(root):
    code = "import sys, dnnlib; print([m for m in ('torch', 'numpy', 'click') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True).strip() == "[]"


def test_text_of_a_file_that_may_come_from_anywhere(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"\xef\xbb\xbfa\xc3\xbc")
    assert dnnlib.read_text(path, 6) == "aü"
    os.mkfifo(tmp_path / "pipe")
    for file, most, message in (
        *((path, 5, "longer than 5 bytes"), (tmp_path / "pipe", 9, "not a regular file")),
        *(("/dev/zero", 9, "not a regular file"), (tmp_path / "latin", 9, "not text in UTF-8")),
    ):
        (tmp_path / "latin").write_bytes(b"\xfc")
        with pytest.raises(ValueError, match=message):
            dnnlib.read_text(file, most)
    with pytest.raises(IsADirectoryError):
        dnnlib.read_text(tmp_path, 9)


@pytest.mark.parametrize("below", ["", "x", "x/y"])
def test_links_that_lead_nowhere_are_no_folder(tmp_path, below):
    for name, target in [("loop", "loop"), ("dangling", "nowhere")]:
        (tmp_path / name).symlink_to(target)
        with pytest.raises(ValueError, match=f"{name} is a link that leads nowhere; expected a folder"):
            dnnlib.check_outdir(tmp_path / name / below)
    assert dnnlib.check_outdir(tmp_path / "new" / "er") == tmp_path / "new" / "er"
