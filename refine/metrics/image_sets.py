"""Images on disk → uint8 batches: folders, zip files (NVIDIA's data sets with a dataset.json), .npz of samples.

An image keeps its pixels; what is stored otherwise becomes 8 bits a channel: palettes are looked up, 16 bits keep the
high byte, an opaque alpha channel is dropped. An image that is broken or transparent is named, and ends the reading.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import compress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from refine.checkpoints import archives
from refine.checkpoints.pickles.inert import Refused, shown
from refine.checkpoints.sniff import check_readable_file
from refine.dnnlib import sha256_of_file
from refine.errors import describe_os_error
from refine.metrics import labels
from refine.metrics.natural import natural_order
from refine.metrics.sampling import Batch
from refine.metrics.zips import ZipList
from refine.torch_utils import distributed

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM")  # of those names; Pillow has readers for many more
_HIDDEN = re.compile(r"(?:^|/)(?:__MACOSX/|\.(?!\.?/))")  # what begins with a dot, and what a Mac adds to its zips
MAX_PIXELS = 1 << 24  # 4096x4096; a few hundred kilobytes can unpack to gigapixels
MAX_IMAGE_BYTES = 128 << 20  # of a file; the largest picture takes 96 MiB without compression
_BROKEN: tuple[type[Exception], ...] = (*archives.BROKEN, Image.DecompressionBombError, MemoryError)
MAX_SORTED, MAX_SORTED_TEXT = 300_000, 8 << 20  # images in a zip, and characters of their names; more take seconds
MAX_LOOKED_UP, BYTES_PER_FURTHER_LABEL = 500_000, 1 << 14  # labels in another order than the images
_TABLE = "dataset.json"
_READERS = 4  # threads that decode
_ORIENTATION = 0x0112  # of EXIF; 1 = upright
_TRAITS = {
    "turned": "say in their EXIF data that they are to be turned; they are taken as they are stored",
    "moving": "hold several pictures; the first is taken",
    "dark": "of 16 bits use at most 14 of them, and are nearly black, since the high byte is taken; "
    "expected levels up to 65535",
}


class ImageSet:
    """Images of a folder or a zip file, in the natural order of their names (seed2 before seed10).

    Zip files of more than `MAX_SORTED` images, or with very long names, keep their own order.

    Args:
        path: Folder, searched with its subfolders, or zip file.

    Attributes:
        names: Names of the images, relative to the path.

    Raises:
        ValueError: There are no images.
    """

    def __init__(self, path: Path):
        self.path, self._told = path, set[str]()
        try:
            if path.is_dir():
                self._files: FolderList | ZipList = FolderList(path)
            else:
                check_readable_file(path)  # a pipe or a device would never end
                self._files = ZipList(path)
        except Refused as error:
            raise ValueError(f"{path} {error}") from None
        names = self._files.names
        wanted = self._files.ending(SUFFIXES)
        if hidden := _hidden(names, wanted):
            some = shown(names[hidden[0]])
            _tell(f"{path}: {len(hidden)} hidden files are left out, of the names of images ({some})")
            wanted[hidden] = False
        entries = np.flatnonzero(wanted).tolist()
        self._entries = entries  # of the images, among all files
        self.names = list(compress(names, wanted)) if len(entries) < len(names) else names
        few = len(self.names) <= MAX_SORTED and len(names) <= 2 * MAX_SORTED
        short = few and sum(map(len, self.names)) <= MAX_SORTED_TEXT
        if short or isinstance(self._files, FolderList):
            order = natural_order(self.names)
            self._entries, self.names = [entries[index] for index in order], [self.names[index] for index in order]
        if not self.names:
            raise ValueError(f"{path} holds no images; expected files ending in {', '.join(SUFFIXES[:3])} …")

    @property
    def classes(self) -> torch.Tensor | None:
        """Of the images, int64 [N], from dataset.json; None where there is none, or `no_classes` says why not."""
        return self._labels[0]

    @property
    def no_classes(self) -> str | None:
        """In words, why a dataset.json that is there gives no classes."""
        return self._labels[1]

    @cached_property
    def _labels(self) -> tuple[torch.Tensor | None, str | None]:
        member = self._table()
        if member is None:
            return None, None
        folder = member.removesuffix(_TABLE)
        names = [name.removeprefix(folder) for name in self.names] if folder else self.names
        try:
            limit = labels.MAX_BYTES + labels.BYTES_PER_IMAGE * len(names)
            text = self._files.read(self._files.names.index(member), limit)
            classes, named = labels.read_classes(text, names, self._most_looked_up)
        except (Refused, labels.Unusable, OSError) as error:
            reason = f"{self.path}: {shown(member)} {describe_os_error(error) if isinstance(error, OSError) else error}"
            _tell(f"no classes are used, because {reason}")
            return None, reason
        if named:
            some = ", ".join(f"{number} = {shown(name)}" for number, name in enumerate(named[:3]))
            _tell(f"{self.path}: classes are numbered by their names: {some}{' …' if len(named) > 3 else ''}")
        return classes, None

    def _table(self) -> str | None:
        """The name of the dataset.json of the first image: the highest one above it."""
        tables = compress(self._files.names, self._files.ending((".json",)))
        folders = {name.removesuffix(_TABLE): name for name in tables if name.endswith(_TABLE)}
        above = (folder for folder in folders if folder[-1:] in ("", "/") and self.names[0].startswith(folder))
        return folders.get(min(above, key=len, default="\0"))

    @property
    def _most_looked_up(self) -> float:
        """For as many labels time is left in a zip file, whose bytes take their time as well."""
        if isinstance(self._files, FolderList):
            return math.inf
        return MAX_LOOKED_UP + self.path.stat().st_size // BYTES_PER_FURTHER_LABEL

    def __len__(self) -> int:
        return len(self.names)

    def sha256(self) -> str:
        """Checksum of the zip file, or, for a folder, over the names and contents of its images."""
        if isinstance(self._files, ZipList):
            return sha256_of_file(self.path)
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(f"{name}\0{sha256_of_file(self.path / name)}\n".encode())
        return digest.hexdigest()

    def read(self, index: int) -> torch.Tensor:
        """One image, uint8 [1 or 3, H, W].

        Raises:
            ValueError: It is broken, transparent or of a kind without defined grey levels.
        """
        return self._read(index)[0]

    @property
    def resolution(self) -> int:
        """The longer side of the first image."""
        return max(self.read(0).shape[1:])

    def batches(self, batch: int, indices: Sequence[int] | None = None) -> Iterator[Batch]:
        """Images in batches of one size; where all of a batch are grey they have one channel, otherwise three."""
        indices = range(len(self)) if indices is None else indices
        traits: Counter[str] = Counter()
        with ThreadPoolExecutor(_READERS) as pool:
            for start in range(0, len(indices), batch):
                part = indices[start : start + batch]
                read = list(pool.map(self._read, part))
                images = [image for image, _ in read]
                traits.update(trait for _, found in read for trait in found)
                for low, high in _equal_sizes(images):
                    classes = None if self.classes is None else self.classes[list(part[low:high])]
                    yield Batch(_stacked(images[low:high]), classes)
        self._tell_traits(traits)

    def _read(self, index: int) -> tuple[torch.Tensor, list[str]]:
        """An image as `read` gives it, and what people should know of it: keys of `_TRAITS`."""
        name = shown(self.names[index])
        where = f"{self.path}: {name}" if isinstance(self._files, ZipList) else f"{self.path / name}"
        try:
            data = self._files.read(self._entries[index], MAX_IMAGE_BYTES)
            picture = Image.open(io.BytesIO(data), formats=_FORMATS)
            if picture.width * picture.height > MAX_PIXELS:
                size = f"{picture.width}x{picture.height} pixels"
                raise Refused(f"has {size}; expected at most {MAX_PIXELS >> 20} million")
            traits = _traits(picture)
            picture.load()
            pixels = _pixels(picture)
        except Refused as error:
            raise ValueError(f"{where} {error}") from None
        except _BROKEN:
            raise ValueError(f"{where} is broken or no image") from None
        if "deep" in traits and pixels.max() < 64:
            traits.append("dark")
        return torch.from_numpy(pixels), traits

    def _tell_traits(self, traits: Counter[str]) -> None:
        """Once, and the first process what it saw."""
        for trait, text in _TRAITS.items():
            count = traits[trait]
            if count and trait not in self._told and (trait != "dark" or count == traits["deep"]):
                self._told.add(trait)
                _tell(f"{self.path}: {count} images {text}")


class FolderList:
    """What a folder and its subfolders hold; links to folders are not followed. See `ZipList`."""

    def __init__(self, path: Path):
        self._path, self.names = path, list(_files(str(path), ""))

    def ending(self, suffixes: tuple[str, ...]) -> np.ndarray:
        """Which names end in one of these, in small letters or capitals: bool [N]."""
        return np.array([name.lower().endswith(suffixes) for name in self.names], bool)

    def read(self, index: int, limit: int) -> bytes:
        """The contents of a file, of at most so many bytes."""
        path = self._path / self.names[index]
        if (size := path.stat().st_size) > limit:
            raise Refused(f"has {size} bytes; expected at most {limit}")
        return path.read_bytes()


class SampleArray:
    """Images in an .npz as ADM's tools write them: `arr_0`, uint8 [N, H, W, C], read piece by piece.

    Raises:
        ValueError: The array does not hold images.
    """

    classes = None

    def __init__(self, path: Path, key: str = "arr_0"):
        self.path, self._member = path, f"{key}.npy"
        try:
            with archives.opened(path) as archive, archive.open(self._member) as stream:
                self._shape, fortran, dtype = archives.npy_header(stream)
                found = archive.getinfo(self._member).file_size - stream.tell()
                archives.check_method(archive.getinfo(self._member))
        except archives.BROKEN:
            raise ValueError(f"{path} has a broken {key}; expected uint8 images [N, H, W, 3]") from None
        plain = dtype == np.uint8 and not fortran and len(self._shape) == 4 and self._shape[3] in (1, 3)
        if not plain or min(self._shape) < 1 or self._shape[1] * self._shape[2] > MAX_PIXELS:
            raise ValueError(
                f"{path} has {key} of shape {list(self._shape)} and dtype {dtype}; expected uint8 images [N, H, W, 3]"
            )
        if found != math.prod(self._shape):
            raise ValueError(f"{path} has {found} bytes of {key}, not what its shape {list(self._shape)} says")

    def __len__(self) -> int:
        return self._shape[0]

    @property
    def resolution(self) -> int:
        """The longer side of the images."""
        return max(self._shape[1:3])

    def sha256(self) -> str:
        return sha256_of_file(self.path)

    def batches(self, batch: int, indices: range | None = None) -> Iterator[Batch]:
        """As those of `ImageSet`, of a range of steps 1."""
        indices = range(len(self)) if indices is None else indices
        _, height, width, channels = self._shape
        size = height * width * channels
        with zipfile.ZipFile(self.path) as archive, archive.open(self._member) as stream:
            try:
                archives.npy_header(stream)
                stream.seek(indices.start * size, io.SEEK_CUR)
                for start in range(0, len(indices), batch):
                    count = min(batch, len(indices) - start)
                    data = np.frombuffer(stream.read(count * size), np.uint8).reshape(count, height, width, channels)
                    yield Batch(torch.from_numpy(np.ascontiguousarray(data.transpose(0, 3, 1, 2))), None)
            except (zlib.error, zipfile.BadZipFile, EOFError, ValueError):
                raise ValueError(f"{self.path} is damaged: not all of its {len(self)} images can be read") from None


def _tell(text: str) -> None:
    if distributed.is_main():
        print(text, file=sys.stderr)


def _hidden(names: list[str], wanted: np.ndarray) -> list[int]:
    """Which of the wanted names are hidden; most often none, which is soon seen."""
    joined = "\n".join(["", *names])
    if not any(mark in joined for mark in ("\n.", "/.", "__MACOSX/")):
        return []
    return [index for index in np.flatnonzero(wanted).tolist() if _HIDDEN.search(names[index])]


def _traits(picture: Image.Image) -> list[str]:
    """What `_TRAITS` is about, of a picture whose pixels are not yet read; 'deep' = of 16 bits a channel."""
    traits = []
    if "exif" in picture.info and picture.getexif().get(_ORIENTATION, 1) in range(2, 9):
        traits.append("turned")
    if getattr(picture, "is_animated", False):
        traits.append("moving")
    if picture.mode.startswith("I") or any("16" in str(tile[3]) for tile in getattr(picture, "tile", ())):
        traits.append("deep")
    return traits


def _pixels(picture: Image.Image) -> np.ndarray:
    if picture.mode in ("LA", "RGBA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("LA" if picture.mode in ("L", "LA", "La") else "RGBA")
        if np.asarray(picture.getchannel("A")).min() < 255:
            raise Refused("has transparent pixels; expected opaque images")
        picture = picture.convert("L" if picture.mode == "LA" else "RGB")
    if picture.mode == "1":
        picture = picture.convert("L")
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise Refused("has grey levels beyond 16 bits; expected 8 or 16 bits a channel")
        return (values >> 8).astype(np.uint8)[None]
    if picture.mode == "F":
        raise Refused("has floating-point grey levels; expected 8 or 16 bits a channel")
    if picture.mode not in ("L", "RGB"):
        picture = picture.convert("RGB")
    pixels = np.array(picture)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _equal_sizes(images: list[torch.Tensor]) -> Iterator[tuple[int, int]]:
    low = 0
    for high in range(1, len(images) + 1):
        if high == len(images) or images[high].shape[1:] != images[low].shape[1:]:
            yield low, high
            low = high


def _stacked(images: list[torch.Tensor]) -> torch.Tensor:
    channels = max(image.shape[0] for image in images)
    return torch.stack([image.expand(channels, -1, -1) for image in images])


def _files(folder: str, name: str) -> Iterator[str]:
    """Names of the files in a folder, which is called `name` or is at the top."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files(entry.path, f"{name}{entry.name}/")
            elif entry.is_file():
                yield name + entry.name
