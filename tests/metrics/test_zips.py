"""Zips of images are read as Python's `zipfile` reads them, or refused."""

import io
import random
import struct
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refine.checkpoints.pickles.inert import Refused
from refine.metrics.zips import ZipList

LIMIT = 1 << 16
FILES = {
    "00000/img00000000.png": b"one" * 50,
    "00000/": b"",
    "é/ü.png": b"two",
    "empty.png": b"",
    "random.png": random.Random(0).randbytes(300),
}


def packed(method=zipfile.ZIP_DEFLATED, files=FILES, comment=b"", before=b"", zip64=False):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.comment = comment
        for name, data in files.items():
            with archive.open(name, "w", force_zip64=zip64) as entry:
                entry.write(data)
    return before + buffer.getvalue()


def longer(data):
    """The same archive with the end that those of more than 4 GiB or 65,535 entries have."""
    count, _, length, start = struct.unpack("<HHII", data[-14:-2])
    end64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, start)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, len(data) - 22, 1)
    return data[:-22] + end64 + locator + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, *[0xFFFF] * 2, *[0xFFFFFFFF] * 2, 0)


def cut_short(data, at):
    """The sizes and the position of the first entry in the list moved to its extra field."""
    start = struct.unpack("<I", data[-6:-2])[0]
    entry = data[start : start + 46]
    sizes = struct.unpack("<II", entry[20:28])
    assert at == struct.unpack("<I", entry[42:46])[0]
    extra = struct.pack("<HH3x", 7, 3) + struct.pack("<HHQQQ", 1, 24, sizes[1], sizes[0], at)
    name_end = start + 46 + struct.unpack("<H", entry[28:30])[0]
    entry = entry[:20] + b"\xff" * 8 + entry[28:30] + struct.pack("<H", len(extra)) + entry[32:42] + b"\xff" * 4
    length = struct.unpack("<I", data[-10:-6])[0] + len(extra)
    return data[:start] + entry + data[start + 46 : name_end] + extra + data[name_end:-10] + struct.pack(
        "<IIH", length, start, 0
    )  # fmt: skip


def by_zipfile(path):
    with zipfile.ZipFile(path) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def by_us(path):
    listed = ZipList(path)
    return [(name, listed.read(index, LIMIT)) for index, name in enumerate(listed.names)]


ORDINARY = {
    "deflated": packed(),
    "stored": packed(zipfile.ZIP_STORED),
    "comment": packed(comment=b"hello PK\3\4 " * 20),
    "something before": packed(before=b"#!/bin/sh\n"),
    "streamed": packed(zip64=True),
    "long end": longer(packed()),
    "long end behind something": b"#!" + longer(packed()),
    "long numbers": cut_short(packed(), 0),
    "old names": packed(files={"a.png": b"x"}).replace(b"a.png", b"\x81.png"),
    "one name twice": packed(files={"a.png": b"x", "b.png": b"y"}).replace(b"b.png", b"a.png"),
    "absolute and above": packed(files={"/etc/a.png": b"x", "../../b.png": b"y", "c:\\d.png": b"z"}),
    "nothing": packed(files={}),
}


@pytest.mark.parametrize("case", ORDINARY)
def test_what_is_read_equals_zipfiles(case, tmp_path):
    (tmp_path / "x.zip").write_bytes(ORDINARY[case])
    assert by_us(tmp_path / "x.zip") == by_zipfile(tmp_path / "x.zip")


def test_names_are_told_apart_by_their_endings(tmp_path):
    names = ["a.png", "B.PnG", "png", ".png", "x", "a.jpeg", "jpeg", "a.jpg.", "ü.JPG", "a.p\x0eng", "a.jpg/", "ajpeg"]
    crossing = b"a.png".ljust(0x2E, b"-")  # so that the byte before a short name is that of a dot
    for comment in (b"", b"."):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            for name in [*names, crossing.decode()]:
                info = zipfile.ZipInfo(name)
                info.comment = comment
                archive.writestr(info, b"")
        listed = ZipList(tmp_path / "x.zip")
        suffixes = (".png", ".jpg", ".jpeg")
        assert listed.ending(suffixes).tolist() == [name.lower().endswith(suffixes) for name in listed.names]


def altered(data, at, value):
    return data[:at] + value + data[at + len(value) :]


TWO = packed(zipfile.ZIP_STORED, {"a.png": b"abc", "b.png": b"xyz"})
LIST = TWO.index(b"PK\1\2")
STRANGE = {
    "no zip": (b"hello" * 10, "broken"),
    "empty": (b"", "broken"),
    "cut off": (TWO[:-1], "broken"),
    "begins in the middle": (TWO[5:], "broken"),
    "another list in its comment": (
        altered(TWO, len(TWO) - 2, struct.pack("<H", 22)) + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0, 0, 9, 9, 0),
        "broken",
    ),
    "the mark of an entry in a name": (TWO.replace(b"a.png", b"PK\1\2."), "broken"),
    "a list that is longer than the file": (altered(TWO, len(TWO) - 10, b"\xff" * 4), "broken"),
    "encrypted": (altered(TWO, LIST + 8, b"\1\0"), "is encrypted"),
    "another method": (altered(TWO, LIST + 10, b"\x0c\0"), "compressed in an unusual way"),
    "another name than in the list": (altered(TWO, LIST + 46, b"c"), "broken"),
    "another checksum": (altered(TWO, LIST + 16, b"\0" * 4), "broken"),
    "beyond the file": (altered(TWO, LIST + 42, b"\0\0\0\x7f"), "broken"),
    "of gigabytes": (altered(TWO, LIST + 20, b"\0\0\0\x7f" * 2), "expected at most"),
    "of another size": (altered(TWO, LIST + 24, b"\2"), "broken"),
    "a newer version": (altered(TWO, LIST + 6, b"\x50"), "broken"),
    "no text in a name": (altered(altered(TWO, LIST + 8, b"\0\x08"), LIST + 46, b"\xff"), "broken"),
    "several disks": (longer(TWO).replace(b"PK\6\7\0", b"PK\6\7\1"), "broken"),
    "a zero byte in a name": (packed(files={"a.png.x": b"x"}).replace(b"a.png.x", b"a.png\0x"), "broken"),
    "a bomb": (packed(files={"a.png": bytes(LIMIT + 1)}), "expected at most"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_what_is_refused(case, tmp_path):
    data, message = STRANGE[case]
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(Refused, match=message):
        by_us(tmp_path / "x.zip")


def test_a_deflated_entry_gives_out_no_more_than_it_says(tmp_path):
    data = packed(files={"a.png": bytes(1 << 24)})
    start = data.index(b"PK\1\2")
    (tmp_path / "x.zip").write_bytes(altered(data, start + 24, struct.pack("<I", 20_000)))
    with pytest.raises(Refused, match="broken"):
        by_us(tmp_path / "x.zip")


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(ORDINARY)),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=3),
    st.booleans(),
)
def test_what_is_changed_is_read_alike_or_refused(tmp_path_factory, case, changes, in_list):
    data = bytearray(ORDINARY[case])
    first = data.find(b"PK\1\2") if in_list and b"PK\1\2" in data else 0
    for place, value in changes:
        data[first + place % (len(data) - first)] = value
    path = tmp_path_factory.getbasetemp() / "changed.zip"
    path.write_bytes(data)
    try:
        ours = by_us(path)
    except Refused:
        return
    assert ours == by_zipfile(path)
