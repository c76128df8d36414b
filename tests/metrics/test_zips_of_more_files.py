"""Zips of as many files as there can be images, and of more: listed and labelled in seconds, or refused."""

import struct
import zipfile

import numpy as np
import pytest

from refine.metrics.image_sets import MAX_SORTED, ImageSet
from refine.metrics.zips import MAX_ENTRIES
from tests.limits import outcome, zip_of

PART = 4  # of the most images there can be; what takes a microsecond each is measured on so many of them


@pytest.mark.parametrize("count", [MAX_ENTRIES // PART, MAX_SORTED])
def test_zips_of_as_many_files_as_there_can_be_images(count, tmp_path):
    """At the limits on what takes a microsecond each, or two where it is sorted, whatever the archive says they are."""
    order = np.random.RandomState(0).permutation(count).tolist()
    sort = count == MAX_SORTED
    assert sort or count > MAX_SORTED
    first = "a" if sort else "ü"  # letters beyond ASCII take time as well

    def whole_set(path):
        images = ImageSet(path)
        assert len(images) == count and images.names[-1] == f"{first}{count - 1 if sort else order[-1]}b1c2.png"

    path = zip_of(tmp_path / "a.zip", [first.encode("cp437") + b"%db1c2.png" % index for index in order])
    assert outcome(whole_set, path, 1 if sort else PART) == ""


def test_zips_of_more_files_than_there_can_be_images(tmp_path, monkeypatch):
    path = zip_of(tmp_path / "a.zip", [b"x" * 65_000] * 1600)  # names of 100 MB
    assert "has a list of entries of" in outcome(ImageSet, path)
    monkeypatch.setattr("refine.metrics.zips.MAX_ENTRIES", 1000)
    assert "has more than 1003 entries in 50" in outcome(ImageSet, zip_of(tmp_path / "b.zip", [b"x.png"] * 1010))
    for count, refused in ((1060, ""), (1070, "has more than 1067 entries in 1.05 MiB")):
        path = zip_of(tmp_path / "c.zip", [b"x.png"] * count, filler=1 << 20)
        assert refused in outcome(ImageSet, path) and (refused or len(ImageSet(path)) == count)


def test_a_first_image_in_very_many_folders(tmp_path):
    """Each of them could have a dataset.json: to look for them took minutes."""
    path = zip_of(tmp_path / "x.zip", [b"a/" * 30_000 + b"x.png", *([b"a/dataset.json"] * 300_000)])
    assert outcome(lambda path: ImageSet(path).classes, path) == ""


def labelled(path, names, text):
    """A zip that lists many images, and holds a dataset.json only."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("dataset.json", text)
    data = path.read_bytes()
    start = data.index(b"PK\x01\x02")
    zip_of(path, names)
    listed = path.read_bytes()[30:-22] + data[start:-22]
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, len(listed), start, 0)
    path.write_bytes(data[:start] + listed + end)
    return path


def test_labels_of_as_many_images_as_there_can_be(tmp_path, monkeypatch):
    """Of ImageNet's number, in their order, in an archive of no size: opened and read in 1.5 s, of a part in a part."""
    monkeypatch.setattr("refine.metrics.image_sets.MAX_LOOKED_UP", 0)  # in another order they would be refused
    names = [b"%05d/img%08d.png" % (index // 1000, index) for index in range(1_281_167 // PART)]
    text = ", ".join(f'["{name.decode()}", {index % 1000}]' for index, name in enumerate(names))
    path = labelled(tmp_path / "x.zip", names, f'{{"labels": [{text}]}}')

    def read_all(path):
        found = ImageSet(path).classes
        assert found is not None and found[[0, 999, -1]].tolist() == [0, 999, 290]

    assert outcome(read_all, path, PART) == ""


def test_names_of_many_numbers(tmp_path):
    path = zip_of(tmp_path / "x.zip", [b"%04d" % index + b"a1" * 30_000 + b".png" for index in range(1500)])
    assert outcome(ImageSet, path) == ""
