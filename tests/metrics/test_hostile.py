"""References and sets of images that ask for gigabytes, or that hold what is no statistics: one line, soon."""

import io
import json
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from refine.metrics import references
from refine.metrics.detectors import load_detector
from refine.metrics.image_sets import ImageSet
from refine.metrics.references import Looking, load_reference
from tests.limits import outcome, zip_of
from tests.metrics.networks import PixelDetector


def read(path):
    return load_reference(path, PixelDetector(), Looking(cache=False, batch=4))


def read_alone(path):
    return load_reference(path)


def classes(path):
    """Where classes are needed, labels that are of no use are refused."""
    if reason := ImageSet(path).no_classes:
        raise ValueError(reason)


def npy(descr, shape, data=b""):
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (10 + len(header)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def save_zip(path, method=zipfile.ZIP_DEFLATED, **members):
    """A zip of members; a member that is a number is so many zeros behind the header of an array."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                if isinstance(data, int):
                    entry.write(npy("<f8", f"({data // 8},)"))
                    for _ in range(data >> 24):
                        entry.write(b"\0" * (1 << 24))
                else:
                    entry.write(data)
    return path


MU, SIGMA = np.zeros(4), np.eye(4)
ARRAYS = {
    "longdouble": ({"mu": MU.astype(np.longdouble)}, "float128"),
    "half of sigma": ({"sigma": np.eye(3)}, "expected [D] and [D, D]"),
    "not a number": ({"mu": np.full(4, np.nan)}, "NaN or infinity in mu"),
    "huge": ({"sigma": np.diag([1.0, 1.0, 1e300, 1.0])}, "numbers beyond 1e+30 in sigma"),
    "huge features": ({"features": np.full((3, 4), -1e40)}, "numbers beyond 1e+30 in features"),
    "numbers": ({"mu": np.float64(1), "sigma": np.float64(1)}, "expected [D] and [D, D]"),
    "negative num": ({"num": np.int64(-5)}, "a num of -5"),
    "num zero": ({"num": np.int64(0)}, "a num of 0"),
    "num beyond": ({"num": np.uint64(1 << 63), "sigma": -SIGMA}, "negative eigenvalues"),
    "negative sigma": ({"sigma": -SIGMA}, "negative eigenvalues"),
    "one negative eigenvalue": ({"sigma": np.diag([1.0, 1.0, 1.0, -0.01])}, "negative eigenvalues"),
    "sigma not symmetric": ({"sigma": np.triu(np.ones((4, 4)))}, "not symmetric"),
    "no features": ({"features": np.zeros((0, 4)), "classes": np.zeros(0, np.int64)}, "N at least 2"),
    "no classes": ({"features": np.ones((3, 4)), "classes": np.zeros(0, np.int64)}, "has classes that are not"),
    "many classes": ({"features": np.ones((3, 4)), "classes": np.array([0, 1, 1 << 40])}, "has classes that are not"),
    "objects": ({"mu": np.array([1, "a"], dtype=object)}, "not a plain array"),
    "complex": ({"mu": MU.astype(complex)}, "complex"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_that_are_no_statistics(case, tmp_path):
    arrays, message = ARRAYS[case]
    np.savez(tmp_path / "x.npz", **{"mu": MU, "sigma": SIGMA, **arrays})
    assert message in outcome(read, tmp_path / "x.npz")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_either_byte_order_is_read(order, dtype, tmp_path):
    np.savez(tmp_path / "x.npz", mu=np.arange(4).astype(order + dtype), sigma=SIGMA.astype(order + dtype))
    reference = read(tmp_path / "x.npz")
    assert reference.mu.tolist() == [0, 1, 2, 3] and torch.equal(reference.sigma, torch.eye(4, dtype=torch.float64))


def test_a_sigma_of_single_precision_may_be_a_little_below_zero(tmp_path):
    values = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).float()  # fewer images than features
    np.savez(tmp_path / "x.npz", mu=values.mean(0).numpy(), sigma=np.cov(values.numpy(), rowvar=False).astype("f4"))
    assert load_reference(tmp_path / "x.npz").sigma.shape == (64, 64)


ZEROS = npy("<f8", "(4, 4)", b"\0" * 128)
HEADERS = {
    "a shape beyond memory": npy("<f8", f"({1 << 45},)"),
    "text beyond memory": npy("<U2000000000", "()"),
    "a product beyond integers": npy("<f8", f"({1 << 62}, {1 << 62})"),
    "a negative shape": npy("<f8", "(-1,)"),
    "a shape that is no tuple": npy("<f8", "[1]"),
    "a call": npy("<f8", "__import__('os')"),
    "no header": b"",
    "no array": b"hello",
    "too few numbers": npy("<f8", "(4,)", b"\0" * 24),
    "too many numbers": npy("<f8", "(4,)", b"\0" * 40),
}


@pytest.mark.parametrize("case", HEADERS)
def test_arrays_whose_header_lies(case, tmp_path):
    assert "not a whole .npz" in outcome(read, save_zip(tmp_path / "x.npz", mu=HEADERS[case], sigma=ZEROS))


@pytest.mark.parametrize("name", ["mu", "features", "another", "arr_0"])
def test_arrays_that_inflate(name, tmp_path):
    members = {"mu": ZEROS[:0] + npy("<f8", "(4,)", b"\0" * 32), "sigma": ZEROS, name: 1 << 28}
    assert os.path.getsize(save_zip(tmp_path / "x.npz", **members)) < 4 << 20
    refusal = outcome(read, tmp_path / "x.npz")
    assert "many times the memory" in refusal or name == "arr_0"  # samples are read piece by piece, or not at all


def test_arrays_without_end(tmp_path):
    members = {f"a{index}": npy("<f4", "(1,)", b"\0" * 4) for index in range(5900)}
    refusal = outcome(read, save_zip(tmp_path / "x.npz", zipfile.ZIP_STORED, **members))
    assert refusal.endswith("holds a0, a1, a10, a100, a1000, …, expected mu and sigma")
    path = save_zip(tmp_path / "x.npz", zipfile.ZIP_STORED, **members, **{f"b{index}": b"" for index in range(200)})
    assert "not a whole .npz" in outcome(read, path)


def test_statistics_of_more_features_than_a_detector_has(tmp_path):
    np.savez(tmp_path / "x.npz", mu=np.zeros(4097, np.float16), sigma=np.eye(4097, dtype=np.float16))
    assert "is of 4097 features, expected at most 4096" in outcome(read, tmp_path / "x.npz")


def test_statistics_of_as_many_features_as_a_detector_has(tmp_path):
    np.savez(tmp_path / "x.npz", mu=np.zeros(4096, np.float16), sigma=np.eye(4096, dtype=np.float16))
    assert outcome(read_alone, tmp_path / "x.npz") == ""


def test_features_that_are_packed_or_named_often(tmp_path):
    """Their covariance would take minutes, whatever the file's size."""
    np.savez_compressed(tmp_path / "x.npz", feats=np.zeros((4000, 4096), np.float16))
    torch.save({"all_features": [torch.ones(100, 4096)] * 5000}, tmp_path / "x.pt")
    for name, num in (("x.npz", 4000), ("x.pt", 500_000)):
        assert f"holds {num} times 4096 features" in outcome(read_alone, tmp_path / name)


def test_features_take_little_memory_beyond_theirs(tmp_path):
    np.savez(tmp_path / "x.npz", feats=np.ones((1 << 22, 16), np.float32))  # 256 MiB; in float64 thrice as many more
    assert outcome(read_alone, tmp_path / "x.npz") == ""


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_give_out_gigabytes_at_once(method, tmp_path):
    save_zip(tmp_path / "x.npz", method, mu=1 << 24, sigma=ZEROS)
    assert "compressed in an unusual way" in outcome(read, tmp_path / "x.npz")
    save_zip(tmp_path / "y.npz", method, arr_0=npy("|u1", "(4, 8, 8, 3)", b"\0" * 768))
    assert "broken arr_0" in outcome(read, tmp_path / "y.npz")


@pytest.mark.parametrize("shape", ["(1000000000000, 16, 16, 3)", "(4, 100000, 100000, 3)", "(1, 0, 16, 3)", "(9,)"])
def test_samples_whose_header_lies(shape, tmp_path):
    save_zip(tmp_path / "x.npz", arr_0=npy("|u1", shape, b"\0" * 1000))
    assert " arr_0" in outcome(read, tmp_path / "x.npz")


@pytest.mark.parametrize("table", ["raw", "features"])
def test_a_table_that_names_one_array_often(table, tmp_path):
    """A cache of StyleGAN's whose list holds the same megabytes a thousand times, and features without end."""
    value = {"all_features": [torch.ones(2, 1 << 17)] * 1000} if table == "features" else {
        "raw_mean": torch.ones(4), "raw_cov": torch.ones(4, 4), "num_items": 5, "x": [torch.ones(1 << 17)] * 5000
    }  # fmt: skip
    torch.save(value, tmp_path / "x.pt")
    refusal = outcome(read, tmp_path / "x.pt")
    assert "of 131072 features" in refusal if table == "features" else "eigenvalues" in refusal or refusal == ""


def png(width, height, mode="RGB", data=None):
    """A PNG of zeros that says how large it is, without its pixels ever having been in memory."""
    kinds = {"L": (0, 1), "RGB": (2, 3), "RGBA": (6, 4)}

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    packer = zlib.compressobj(1)
    row = b"\0" * (1 + width * kinds[mode][1])
    body = data or b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, kinds[mode][0], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def image_zip(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            with archive.open(name.replace("_", "."), "w", force_zip64=True) as entry:
                for _ in range(data >> 24 if isinstance(data, int) else 0):
                    entry.write(b"\0" * (1 << 24))
                entry.write(b"" if isinstance(data, int) else data)
    return path


def test_pictures_of_many_pixels(tmp_path):
    for size in ((13_000, 13_000), (4097, 4096)):
        data = png(*size, data=zlib.compress(b"\0" * 100))
        path = image_zip(tmp_path / "x.zip", a_png=data, b_png=data)
        assert f"a.png has {size[0]}x{size[1]} pixels; expected at most 16 million" in outcome(read, path)
    large = png(4096, 4096, "RGBA")
    path = image_zip(tmp_path / "x.zip", a_png=large, b_png=large)
    assert "a.png has transparent pixels" in outcome(lambda file: ImageSet(file).read(0), path)


def test_members_of_many_megabytes(tmp_path):
    path = image_zip(tmp_path / "x.zip", a_png=3 << 26, b_png=3 << 26)
    assert "a.png has 201326592 bytes; expected at most" in outcome(read, path)
    path = image_zip(tmp_path / "y.zip", a_png=png(4, 4), b_png=png(4, 4), dataset_json=1 << 26)
    assert "dataset.json has 67108864 bytes; expected at most" in outcome(classes, path)


def test_labels_that_take_memory(tmp_path):
    """A dataset.json that is much longer than labels are, and one of lists in lists."""
    for text in (b'{"labels": [' + b"1.5," * (5 << 20), b'{"labels": [' + b"[[[[[[[[]]]]]]]]," * 100_000):
        path = image_zip(tmp_path / "x.zip", a_png=png(4, 4), b_png=png(4, 4), dataset_json=text + b"0]}")
        assert "dataset.json" in outcome(classes, path) and outcome(read, path) == ""


def test_labels_that_take_time(tmp_path, monkeypatch):
    """500,000 of them in disorder took 1.5 s together with opening the file."""
    pairs = [["a.png", 1], ["b.png", 0]]
    for disorder in (pairs[::-1], dict(pairs), [["a.png", [0, 1]], ["b.png", [1, 0]]]):
        data = json.dumps({"labels": disorder}).encode()
        path = image_zip(tmp_path / "x.zip", a_png=png(4, 4), b_png=png(4, 4), dataset_json=data)
        assert outcome(classes, path) == "" and ImageSet(path).classes.tolist() == [1, 0]
        with monkeypatch.context() as patch:
            patch.setattr("refine.metrics.image_sets.MAX_LOOKED_UP", 1)
            patch.setattr("refine.metrics.image_sets.BYTES_PER_FURTHER_LABEL", 1 << 20)
            refusal = outcome(classes, path)
            assert "dataset.json is of 2 images, and not one list of [name, number] in their order" in refusal
            assert "at most 1 in a zip file of that size, or a folder" in refusal and outcome(read, path) == ""
            for data in (json.dumps({"labels": pairs}), '{"labels":[["a.png",1],["b.png",0]]}', "{}"):
                image_zip(path, a_png=png(4, 4), b_png=png(4, 4), dataset_json=data.encode())
                assert outcome(classes, path) == ""
    for data, found in (("[" + "1,[]," * 2_600_000, "values"), (json.dumps([str(n) for n in range(9000)]), "names")):
        path = image_zip(tmp_path / "y.zip", a_png=png(4, 4), dataset_json=data.encode()[: 15 << 20])
        assert f"many more {found} than there are images" in outcome(classes, path) or found == "values"


IN_ORDER = '{"labels": [["a.png", 1], ["b.png", 0], ["c.png", 12]]}'


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        *(("", "", [1, 0, 12]), ("12", "7", [1, 0, 7]), ("}", "}\n", [1, 0, 12]), ("12", "12.0", [1, 0, 12])),
        *((", 0", ",  0", [1, 0, 12]), ('{"labels"', '{"x": 3, "labels"', [1, 0, 12]), ("0]", "]", "is broken")),
        *((" 12", "", "is broken"), ("0]", "0 1]", "is broken"), ("0", '"0"', "several kinds"), ("0", "-1", "but -1")),
        *(("0]", "0, 1]", "a list of [name"), ("a.png", "d.png", "no class for a.png"), ("]}", "", "is broken")),
        *(("1]", "]", "is broken"), ("b.png", "a.png", "no class for b.png"), ("12", "9" * 30, "but 1e+30")),
        *(("a.png", "\\u0061.png", [1, 0, 12]), ("b.png", "b\\.png", "is broken"), ("labels", "x", None)),
    ],
)  # fmt: skip
def test_labels_in_order_are_read_as_any_json(old, new, expected, tmp_path):
    text = IN_ORDER.replace(old, new, 1) if old else IN_ORDER
    members = {f"{name}_png": png(4, 4) for name in "abc"}
    images = ImageSet(image_zip(tmp_path / "x.zip", **members, dataset_json=text.encode()))
    if isinstance(expected, str):
        assert images.classes is None and expected in images.no_classes
    else:
        assert (images.classes is None) == (expected is None) and images.no_classes is None
        assert expected is None or images.classes.tolist() == expected


def test_images_are_sorted_by_the_numbers_in_their_names(tmp_path):
    names = ["a", "a1", "a2/b9", "a2/b10", "a10", "a010b", "ab", "b", "9" * 5000, "a9999999999999999999"]
    names += ["1 2 3 4 5 6 7 8 9 10", "1 2 3 4 5 6 7 8 9 9"]
    images = ImageSet(zip_of(tmp_path / "x.zip", [f"{name}.png".encode() for name in names]))
    assert [name.removesuffix(".png")[:20] for name in images.names] == [
        *("1 2 3 4 5 6 7 8 9 9", "1 2 3 4 5 6 7 8 9 10", "9" * 20, "a1", "a2/b9", "a2/b10", "a10", "a010b"),
        *("a9999999999999999999", "a", "ab", "b"),
    ]


@pytest.mark.parametrize("name", ["9" * 5000 + ".png", "a\nb\x1b[2J.png", "é" * 200 + ".png", "../x.png"])
def test_names_of_images(name, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(name, b"x")
        archive.writestr("b.png", b"x")
    assert "broken or no image" in outcome(lambda path: ImageSet(path).read(0), tmp_path / "x.zip")


@pytest.mark.parametrize("labels", ["[" * 100_000, json.dumps({"labels": [["a.png", 1 << 30], ["b.png", 0]]})])
def test_labels(labels, tmp_path):
    path = image_zip(tmp_path / "x.zip", a_png=png(4, 4), b_png=png(4, 4), dataset_json=labels.encode())
    assert "dataset.json" in outcome(classes, path) and outcome(read, path) == ""


def test_other_programs_pictures_are_not_opened(tmp_path):
    """Pillow guesses by content; of its fifty readers those of the names that are looked for are asked."""
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "gif")
    path = image_zip(tmp_path / "x.zip", a_png=picture.getvalue(), b_png=png(4, 4))
    assert "a.png is broken or no image" in outcome(read, path)


def test_a_cache_that_cannot_be_written_costs_nothing_but_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("REFINE_CACHE", str(tmp_path / "cache"))
    path = image_zip(tmp_path / "x.zip", a_png=png(4, 4), b_png=png(8, 8))
    (tmp_path / "cache").write_text("a file")
    reference = load_reference(path, PixelDetector())
    assert reference.num == 2 and "cannot be kept (" in capsys.readouterr().err
    (tmp_path / "cache").unlink()
    load_reference(path, PixelDetector())
    (kept,) = (tmp_path / "cache" / "metrics").iterdir()
    kept.unlink()
    outside = tmp_path / "outside"
    for make in (lambda: kept.symlink_to(outside), lambda: kept.symlink_to("/dev/full"), lambda: os.mkfifo(kept)):
        make()
        before = os.lstat("/dev/full").st_mode
        assert load_reference(path, PixelDetector()).num == 2
        err = capsys.readouterr().err
        assert "cannot be used: " in err and "cannot be kept (" in err
        assert not outside.exists() and os.lstat("/dev/full").st_mode == before
        kept.unlink()
    (tmp_path / "cache").chmod(0o777)
    assert load_reference(path, PixelDetector()).num == 2 and "by others" in capsys.readouterr().err


def test_detectors_that_inflate(tmp_path):
    """A program of torch.export whose description or weights claim what the file does not hold."""
    for member in ("x/models/model.json", "x/data/weights/weight_0", "x/data/weights/model_weights_config.json"):
        with zipfile.ZipFile(tmp_path / "x.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x/archive_format", "pt2")
            for name in ("x/models/model.json", "x/data/weights/model_weights_config.json"):
                archive.writestr(name, "{}") if name != member else None
            with archive.open(member, "w", force_zip64=True) as entry:
                for _ in range(16):
                    entry.write(b" " * (1 << 24))
        assert outcome(load_detector, tmp_path / "x.pt2")


def test_no_memory_at_all_is_one_line(tmp_path, monkeypatch):
    np.savez(tmp_path / "x.npz", mu=MU, sigma=SIGMA)

    def fail(*args, **options):
        raise MemoryError

    monkeypatch.setattr(references.archives, "read_npy", fail)
    with pytest.raises((ValueError, MemoryError)) as caught:
        read(tmp_path / "x.npz")
    assert isinstance(caught.value, ValueError) and "more memory than there is" in str(caught.value)


@pytest.mark.parametrize("value", [-1.5e304, torch.nan])
def test_features_whose_squares_are_no_numbers(value, tmp_path):
    """Of a pickle or `.pt`, in which no array has a name."""
    features = torch.ones(4, 3, dtype=torch.float64)
    features[1, 2] = value
    torch.save(features, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: features hold (NaN|numbers beyond 1e\+30)"):
        load_reference(tmp_path / "x.pt", None)
