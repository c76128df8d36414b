"""Images on disk: what is read, how it becomes 8 bits, which image is named when one is bad."""

import io
import json
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


@pytest.mark.parametrize(
    "labels, message",
    [
        ([["00000/img00000000.png", 1]], "no class for 00000/img00000001.png"),
        ([["00000/img00000000.png", -1], ["00000/img00000001.png", 1]], "no class for 00000/img00000000.png"),
        ([1, 2], "not a list of"),
        ("x", "not a list of"),
    ],
)
def test_labels_that_do_not_fit(tmp_path, labels, message):
    with pytest.raises(ValueError, match=message):
        _ = ImageSet(data_set(tmp_path / "d.zip", pictures(2), labels)).classes


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
