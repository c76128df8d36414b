"""Images on disk → uint8 batches: folders, zip files (NVIDIA's data sets with a dataset.json), .npz of samples.

An image keeps its pixels; what is stored otherwise becomes 8 bits a channel: palettes are looked up, 16 bits keep the
high byte, an opaque alpha channel is dropped. An image that is broken or transparent is named, and ends the reading.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from refine.checkpoints import archives
from refine.checkpoints.pickles.inert import Refused, shown
from refine.checkpoints.sniff import check_readable_file
from refine.dnnlib import sha256_of_file
from refine.metrics.natural import natural_order
from refine.metrics.sampling import Batch
from refine.metrics.zips import ZipList

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM")  # of those names; Pillow has readers for many more
MAX_PIXELS = 1 << 24  # 4096x4096; a few hundred kilobytes can unpack to gigapixels
MAX_IMAGE_BYTES = 128 << 20  # of a file; the largest picture takes 96 MiB without compression
_BROKEN: tuple[type[Exception], ...] = (*archives.BROKEN, Image.DecompressionBombError, MemoryError)
MAX_SORTED, MAX_SORTED_TEXT = 300_000, 8 << 20  # images in a zip, and characters of their names; more take seconds
_MAX_CLASSES = 1 << 20
_MAX_LABEL_BYTES, _LABEL_BYTES = 16 << 20, 32  # of a dataset.json, and for each image
_READERS = 4  # threads that decode


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
        self.path = path
        try:
            if path.is_dir():
                self._files: FolderList | ZipList = FolderList(path)
            else:
                check_readable_file(path)  # a pipe or a device would never end
                self._files = ZipList(path)
        except Refused as error:
            raise ValueError(f"{path} {error}") from None
        names = self._files.names
        entries = [index for index, name in enumerate(names) if name.lower().endswith(SUFFIXES)]
        self._entries = entries  # of the images, among all files
        self.names = [names[index] for index in entries] if len(entries) < len(names) else names
        short = len(self.names) <= MAX_SORTED and sum(map(len, self.names)) <= MAX_SORTED_TEXT
        if short or isinstance(self._files, FolderList):
            order = natural_order(self.names)
            self._entries, self.names = [entries[index] for index in order], [self.names[index] for index in order]
        if not self.names:
            raise ValueError(f"{path} holds no images; expected files ending in {', '.join(SUFFIXES[:3])} …")

    @cached_property
    def classes(self) -> torch.Tensor | None:
        """Of the images, int64 [N], from dataset.json, or None.

        Raises:
            ValueError: dataset.json does not fit the images.
        """
        return self._read_classes()

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
        name = shown(self.names[index])
        where = f"{self.path}: {name}" if isinstance(self._files, ZipList) else f"{self.path / name}"
        try:
            picture = Image.open(io.BytesIO(self._files.read(self._entries[index], MAX_IMAGE_BYTES)), formats=_FORMATS)
            if picture.width * picture.height > MAX_PIXELS:
                size = f"{picture.width}x{picture.height} pixels"
                raise Refused(f"has {size}; expected at most {MAX_PIXELS >> 20} million")
            picture.load()
            pixels = _pixels(picture)
        except Refused as error:
            raise ValueError(f"{where} {error}") from None
        except _BROKEN:
            raise ValueError(f"{where} is broken or no image") from None
        return torch.from_numpy(pixels)

    def batches(self, batch: int, indices: Sequence[int] | None = None) -> Iterator[Batch]:
        """Images in batches of one size; where all of a batch are grey they have one channel, otherwise three."""
        indices = range(len(self)) if indices is None else indices
        with ThreadPoolExecutor(_READERS) as pool:
            for start in range(0, len(indices), batch):
                part = indices[start : start + batch]
                images = list(pool.map(self.read, part))
                for low, high in _equal_sizes(images):
                    classes = None if self.classes is None else self.classes[list(part[low:high])]
                    yield Batch(_stacked(images[low:high]), classes)

    def _read_classes(self) -> torch.Tensor | None:
        parts = self.names[0].split("/")[:-1]
        members = ("/".join([*parts[:depth], "dataset.json"]) for depth in range(len(parts) + 1))
        member = next((member for member in members if member in self._files.names), None)
        if member is None:
            return None
        folder, listed = member.removesuffix("dataset.json"), shown(member)
        try:
            limit = _MAX_LABEL_BYTES + _LABEL_BYTES * len(self.names)
            text = self._files.read(self._files.names.index(member), limit)
            if text.count(b"[") + text.count(b"{") > 4 * len(self.names) + 1000:
                raise Refused("many more lists than images")  # of which each takes a hundred bytes
            labels = json.loads(text).get("labels")
        except _BROKEN:
            raise ValueError(f"{self.path}: {listed} is broken; expected a table with 'labels'") from None
        if labels is None:
            return None
        try:
            table = {folder + str(name): label for name, label in labels}
        except (TypeError, ValueError):
            raise ValueError(f"{self.path}: {listed} has labels that are not a list of [name, class]") from None
        found = [table.get(name) for name in self.names]
        if all(isinstance(label, list) for label in found):
            return None  # labels that are vectors are no classes
        for name, label in zip(self.names, found, strict=True):
            if type(label) is not int or not 0 <= label < _MAX_CLASSES:
                raise ValueError(
                    f"{self.path}: {listed} has no class for {shown(name)}; "
                    f"expected a number from 0, below {_MAX_CLASSES}, for every image"
                )
        return torch.tensor(found, dtype=torch.int64)


class FolderList:
    """What a folder and its subfolders hold; links to folders are not followed. See `ZipList`."""

    def __init__(self, path: Path):
        self._path, self.names = path, list(_files(str(path), ""))

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
