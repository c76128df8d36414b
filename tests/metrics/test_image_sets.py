"""Images on disk: what is read, how it becomes 8 bits, which image is named when one is bad."""

import io
import json
import re
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from refine.images import save_png
from refine.metrics import references
from refine.metrics.evaluate import evaluate
from refine.metrics.image_sets import ImageSet, SampleArray
from refine.metrics.references import Looking, load_reference
from refine.metrics.sampling import sample_images
from tests.metrics.networks import PixelDetector, PlainGenerator

PIXELS = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("REFINE_CACHE", str(tmp_path_factory.mktemp("cache")))


def png(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return buffer.getvalue()


def only(tmp_path, picture, **options):
    picture.save(tmp_path / "x.png", **options)
    return ImageSet(tmp_path).read(0)


def test_kinds_of_png(tmp_path):
    rgb = Image.fromarray(PIXELS)
    assert torch.equal(only(tmp_path, rgb), torch.from_numpy(PIXELS.transpose(2, 0, 1).copy()))
    grey = PIXELS[..., 0]
    assert torch.equal(only(tmp_path, Image.fromarray(grey)), torch.from_numpy(grey)[None])
    deep = grey.astype(np.uint16) * 256 + 77
    assert torch.equal(only(tmp_path, Image.fromarray(deep)), torch.from_numpy(grey)[None])  # 16 bits: the high byte
    palette = rgb.quantize(256)
    assert torch.equal(only(tmp_path, palette), torch.from_numpy(np.array(palette.convert("RGB")).transpose(2, 0, 1)))
    assert only(tmp_path, Image.fromarray(grey > 60)).unique().tolist() == [0, 255]
    opaque = Image.fromarray(np.dstack([PIXELS, np.full([4, 4], 255, np.uint8)]))
    assert torch.equal(only(tmp_path, opaque), torch.from_numpy(PIXELS.transpose(2, 0, 1).copy()))
    grey_alpha = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(np.full([4, 4], 255, np.uint8))])
    assert torch.equal(only(tmp_path, grey_alpha), torch.from_numpy(grey)[None])


def test_transparent_images_are_refused_by_name(tmp_path):
    alpha = np.full([4, 4], 255, np.uint8)
    alpha[1, 1] = 254
    for picture in (Image.fromarray(np.dstack([PIXELS, alpha])), Image.fromarray(PIXELS).quantize(8)):
        options = {"transparency": 0} if picture.mode == "P" else {}
        with pytest.raises(ValueError, match=r"x\.png has transparent pixels"):
            only(tmp_path, picture, **options)


def data_set(path, images, labels=None, damage=None):
    with zipfile.ZipFile(path, "w") as archive:
        for index, image in enumerate(images):
            archive.writestr(f"00000/img{index:08d}.png", png(image))
        if labels is not None:
            archive.writestr("dataset.json", json.dumps({"labels": labels}))
    if damage:
        data = bytearray(path.read_bytes())
        at = data.index(b"IDAT", data.index(damage.encode()))
        data[at + 6] ^= 0xFF
        path.write_bytes(data)
    return path


def pictures(count):
    return [Image.fromarray(np.roll(PIXELS, index, axis=0)) for index in range(count)]


def test_nvidias_data_set(tmp_path):
    names = [f"00000/img{index:08d}.png" for index in range(5)]
    labels = [[name, index % 2] for index, name in enumerate(names)]
    images = ImageSet(data_set(tmp_path / "d.zip", pictures(5), labels[::-1]))
    assert images.names == names and images.classes.tolist() == [0, 1, 0, 1, 0]
    batches = list(images.batches(2))
    assert [len(batch.images) for batch in batches] == [2, 2, 1] and batches[1].classes.tolist() == [0, 1]
    assert ImageSet(data_set(tmp_path / "n.zip", pictures(2))).classes is None


NAMES = ["00000/img00000000.png", "00000/img00000001.png", "00000/img00000002.png"]


@pytest.mark.parametrize(
    "labels, classes",
    [
        ([[name, 2] for name in NAMES], [2, 2, 2]),
        ([[NAMES[1], 1.0], [NAMES[0], 0], [NAMES[2], 3.0], ["another.png", 1.5]], [0, 1, 3]),
        ({name: index for index, name in enumerate(NAMES)}, [0, 1, 2]),
        ([[name, text] for name, text in zip(NAMES, ["dog", "cat", "dog"], strict=True)], [1, 0, 1]),
        ([[name, [0, 0, 1]] for name in NAMES], [2, 2, 2]),
        ([[name, [1.0, 0.0]] for name in NAMES], [0, 0, 0]),
        (None, None),
        ([], None),
    ],
)
def test_forms_of_labels(tmp_path, labels, classes, capsys):
    images = ImageSet(data_set(tmp_path / "d.zip", pictures(3), labels or []))
    assert images.no_classes is None
    assert images.classes is None if classes is None else images.classes.tolist() == classes
    said = capsys.readouterr().err
    assert ("numbered by their names: 0 = cat, 1 = dog\n" in said) if "cat" in str(labels) else said == ""


@pytest.mark.parametrize(
    "labels, message",
    [
        ([[NAMES[0], 1]], "has no class for 00000/img00000001.png; expected one for every image"),
        ([[NAMES[0], -1], [NAMES[1], 1], [NAMES[2], 1]], "no class for 00000/img00000000.png, but -1; expected"),
        (
            [[name, 20230001] for name in NAMES],
            "img00000000.png, but 20230001; expected a whole number .* below 1048576",
        ),
        ([[name, 0.5] for name in NAMES], "but 0.5"),
        ([[name, float("nan")] for name in NAMES], "but nan"),
        ([[name, True] for name in NAMES], "of several kinds"),
        ([[NAMES[0], 1], [NAMES[1], "cat"], [NAMES[2], 1]], "of several kinds"),
        ([[name, [0.5, 0.5]] for name in NAMES], "vectors"),
        ([[name, [0, 1, 1]] for name in NAMES], "vectors"),
        ([[name, []] for name in NAMES], "vectors"),
        ([[NAMES[0], [0, 1]], [NAMES[1], [0, 1]], [NAMES[2], [1]]], "vectors"),
        ([1, 2], "not a list of"),
        ([[[], 1]], "not a list of"),
        ("x", "not a list of"),
    ],
)
def test_labels_that_say_no_class_cost_no_number(tmp_path, labels, message, capsys):
    images = ImageSet(data_set(tmp_path / "d.zip", pictures(3), labels))
    assert re.search(f"d.zip: dataset.json .*{message}", images.no_classes) and images.classes is None
    assert capsys.readouterr().err == f"no classes are used, because {images.no_classes}\n"
    reference = load_reference(images.path, PixelDetector())
    assert reference.num == 3 and reference.classes is None


def test_hidden_files_are_no_images(tmp_path, capsys):
    """A zip made on a Mac has a second file for each, and folders have what programs keep of them."""
    path = data_set(tmp_path / "d.zip", pictures(3), [["img.png", 1]])
    with zipfile.ZipFile(path, "a") as archive:
        for name in ("__MACOSX/00000/._img00000000.png", "00000/._img00000001.png", ".thumbs/a.png", "a/Thumbs.db"):
            archive.writestr(name, b"\0\5\x16\7" + bytes(90))
        archive.writestr("./dots..and/b.c.png", png(pictures(1)[0]))
    images = ImageSet(path)
    assert images.names == [*NAMES, "./dots..and/b.c.png"]
    err = capsys.readouterr().err
    assert err == f"{path}: 3 hidden files are left out, of the names of images (__MACOSX/00000/._img00000000.png)\n"
    assert [len(batch.images) for batch in images.batches(4)] == [4]
    folder = tmp_path / ".set" / "f"
    folder.mkdir(parents=True)
    for name in ("a.png", ".a.png", ".DS_Store", "Thumbs.db"):
        pictures(1)[0].save(folder / name, "png")
    assert ImageSet(folder).names == ["a.png"] and "1 hidden files" in capsys.readouterr().err


def test_what_people_should_know_of_their_images_is_told_once(tmp_path, capsys):
    grey = PIXELS[..., 0].astype(np.uint16)
    Image.fromarray(grey * 16).save(tmp_path / "12 bits.png")
    Image.fromarray(grey * 16 + 1).save(tmp_path / "12 bits too.png")
    images = ImageSet(tmp_path)
    for _ in range(2):
        list(images.batches(1))
    err = capsys.readouterr().err
    assert err.startswith(f"{tmp_path}: 2 images of 16 bits use at most 14") and err.count("\n") == 1
    Image.fromarray(grey * 256).save(tmp_path / "16 bits.png")  # among which dark ones may be
    turned = Image.Exif()
    turned[0x0112] = 6
    first, second = Image.fromarray(PIXELS[:, :2]), Image.fromarray(PIXELS[:, 2:])
    first.save(tmp_path / "turned.jpg", exif=turned, quality=100, subsampling=0)
    first.save(tmp_path / "upright.jpg", exif=Image.Exif())
    for name in ("a.png", "b.webp", "c.tiff"):
        first.save(tmp_path / name, save_all=True, append_images=[second], lossless=True)
    images = ImageSet(tmp_path)
    shapes = {name: tuple(images.read(index).shape) for index, name in enumerate(images.names)}
    assert shapes["turned.jpg"] == (3, 4, 2)  # not turned
    for name in ("a.png", "b.webp", "c.tiff"):
        assert torch.equal(
            images.read(images.names.index(name)), torch.from_numpy(PIXELS[:, :2].transpose(2, 0, 1).copy())
        )
    list(images.batches(5))
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path}: 1 images say in their EXIF data that they are to be turned; they are taken as they are stored",
        f"{tmp_path}: 3 images hold several pictures; the first is taken",
    ]


def test_the_bad_image_of_a_zip_is_named(tmp_path):
    path = data_set(tmp_path / "d.zip", pictures(4), damage="img00000002.png")
    with pytest.raises(ValueError, match=r"d\.zip: 00000/img00000002\.png is broken") as caught:
        load_reference(path, PixelDetector())
    assert "\n" not in str(caught.value)
    (tmp_path / "cut.zip").write_bytes(path.read_bytes()[:300])
    (tmp_path / "empty.zip").write_bytes(b"PK\5\6" + bytes(18))
    for name in ("cut.zip", "empty.zip"):
        with pytest.raises(ValueError, match=name):
            load_reference(tmp_path / name, PixelDetector())


def test_folder_and_memory_agree_exactly(tmp_path):
    G = PlainGenerator()
    folder = tmp_path / "png"
    folder.mkdir()
    batches = list(sample_images(G, range(30), batch=10))
    for index, image in enumerate(torch.cat([batch.images for batch in batches])):
        save_png(folder / f"seed{index}.png", image)
    reference = load_reference(folder, PixelDetector(), Looking(batch=10))
    in_memory = evaluate(batches, PixelDetector(), reference)
    from_files = evaluate(ImageSet(folder).batches(10), PixelDetector(), reference)
    assert ImageSet(folder).names[2:4] == ["seed2.png", "seed3.png"] and reference.num == 30
    numbers = [key for key, value in in_memory.items() if isinstance(value, float) and key != "seconds"]
    assert "fd_pixels" in numbers and all(in_memory[key] == from_files[key] for key in numbers)


def test_few_images(tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        load_reference(tmp_path / "none", PixelDetector())
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        for index, picture in enumerate(pictures(count)):
            picture.save(folder / f"{index}.png")
    with pytest.raises(ValueError, match="holds 1 image, expected at least 2"):
        load_reference(tmp_path / "1", PixelDetector())
    assert load_reference(tmp_path / "2", PixelDetector()).num == 2
    with pytest.raises(ValueError, match="need a detector"):
        load_reference(tmp_path / "2")


def test_sizes_and_channels_may_differ_within_a_folder(tmp_path):
    for index, size in enumerate((4, 4, 8)):
        Image.new("RGB" if index == 1 else "L", (size, size), 7 if index != 1 else (7, 7, 7)).save(
            tmp_path / f"{index}.png"
        )
    assert [list(batch.images.shape) for batch in ImageSet(tmp_path).batches(3)] == [[2, 3, 4, 4], [1, 1, 8, 8]]


def test_samples_in_an_npz(tmp_path):
    images = np.random.RandomState(0).randint(0, 256, [5, 4, 6, 3], dtype=np.uint8)
    np.savez(tmp_path / "s.npz", arr_0=images)
    np.savez_compressed(tmp_path / "c.npz", arr_0=images, arr_1=np.zeros(5))
    for name in ("s.npz", "c.npz"):
        parts = [batch.images for batch in SampleArray(tmp_path / name).batches(2, range(1, 5))]
        assert torch.equal(torch.cat(parts), torch.from_numpy(images[1:].transpose(0, 3, 1, 2).copy()))
        assert load_reference(tmp_path / name, PixelDetector()).form == "npz of samples (arr_0)"
    np.savez(tmp_path / "f.npz", arr_0=images.astype(float))
    with pytest.raises(ValueError, match="dtype float64; expected uint8"):
        load_reference(tmp_path / "f.npz", PixelDetector())


def test_cache_by_content(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "png"
    folder.mkdir()
    for index, picture in enumerate(pictures(4)):
        picture.save(folder / f"{index}.png")
    looks = []
    original = references._look
    monkeypatch.setattr(references, "_look", lambda *args: looks.append(1) or original(*args))
    first = load_reference(folder, PixelDetector())
    again = load_reference(folder, PixelDetector())
    assert len(looks) == 1 and torch.equal(first.features, again.features) and again.sha256 == first.sha256
    load_reference(folder, PixelDetector(), Looking(cache=False))
    assert len(looks) == 2
    (cached,) = (references.cache_dir() / "metrics").iterdir()
    for data in (b"", b"hello", cached.read_bytes()[:200]):
        cached.write_bytes(data)
        assert torch.equal(load_reference(folder, PixelDetector()).mu, first.mu)
    assert len(looks) == 5 and "measured again" in capsys.readouterr().err
    Image.fromarray(PIXELS[::-1].copy()).save(folder / "0.png")
    assert load_reference(folder, PixelDetector()).sha256 != first.sha256 and len(looks) == 6
    other = PixelDetector()
    other.sha256 = "1" * 64
    load_reference(folder, other)
    assert len(looks) == 7
