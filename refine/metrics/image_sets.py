"""Images on disk → uint8 batches: folders, zip files (NVIDIA's data sets with a dataset.json), .npz of samples.

An image keeps its pixels; what is stored otherwise becomes 8 bits a channel: palettes are looked up, 16 bits keep the
high byte, an opaque alpha channel is dropped. An image that is broken or transparent is named, and ends the reading.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from refine.checkpoints import archives
from refine.checkpoints.pickles.inert import Refused, shown
from refine.checkpoints.sniff import check_readable_file
from refine.dnnlib import sha256_of_file
from refine.metrics.sampling import Batch

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM")  # of those names; Pillow has readers for many more
MAX_PIXELS = 1 << 24  # 4096x4096; a few hundred kilobytes can unpack to gigapixels
MAX_IMAGE_BYTES = 128 << 20  # of a file; the largest picture takes 96 MiB without compression
_BROKEN: tuple[type[Exception], ...] = (*archives.BROKEN, Image.DecompressionBombError, MemoryError)
_MAX_CLASSES = 1 << 20
_NUMBER, _MAX_NUMBERS = re.compile("[0-9]+"), 16  # of a name
_READERS = 4  # threads that decode


class ImageSet:
    """Images of a folder or a zip file, in the natural order of their names (seed2 before seed10).

    Args:
        path: Folder, searched with its subfolders, or zip file.

    Attributes:
        names: Names of the images, relative to the path.
        classes: int64 [N] from dataset.json, or None.

    Raises:
        ValueError: There are no images, or dataset.json does not fit them.
    """

    def __init__(self, path: Path):
        self.path = path
        self._archive: zipfile.ZipFile | None = None
        if path.is_dir():
            names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
        else:
            check_readable_file(path)  # a pipe or a device would never end
            try:
                archives.check_images(path)
                self._archive = zipfile.ZipFile(path)
                names = [name for name in self._archive.namelist() if not name.endswith("/")]
            except Refused as error:
                raise ValueError(f"{path} {error}") from None
            except archives.BROKEN:
                raise ValueError(f"{path} is a broken or cut-off zip archive; expected one of images") from None
        self.names = sorted((name for name in names if name.lower().endswith(SUFFIXES)), key=_natural)
        if not self.names:
            raise ValueError(f"{path} holds no images; expected files ending in {', '.join(SUFFIXES[:3])} …")
        self.classes = self._read_classes(names)

    def __len__(self) -> int:
        return len(self.names)

    def sha256(self) -> str:
        """Checksum of the zip file, or, for a folder, over the names and contents of its images."""
        if self._archive is not None:
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
        where = f"{self.path}: {name}" if self._archive else f"{self.path / name}"
        try:
            picture = Image.open(io.BytesIO(self._bytes(self.names[index], MAX_IMAGE_BYTES)), formats=_FORMATS)
            if picture.width * picture.height > MAX_PIXELS:
                size = f"{picture.width}x{picture.height} pixels"
                raise _Unusable(f"has {size}; expected at most {MAX_PIXELS >> 20} million")
            picture.load()
            pixels = _pixels(picture)
        except _Unusable as error:
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

    def _bytes(self, name: str, limit: int) -> bytes:
        """A file of the set, of at most so many bytes."""
        info = None if self._archive is None else self._archive.getinfo(name)
        size = (self.path / name).stat().st_size if info is None else info.file_size
        if size > limit:
            raise _Unusable(f"has {size} bytes; expected at most {limit}")
        if self._archive is None or info is None:
            return (self.path / name).read_bytes()
        return archives.read_member(self._archive, info, limit)

    def _read_classes(self, names: list[str]) -> torch.Tensor | None:
        member = next((name for name in names if name.rpartition("/")[2] == "dataset.json"), None)
        if member is None:
            return None
        folder, listed = member.removesuffix("dataset.json"), shown(member)
        try:
            labels = json.loads(self._bytes(member, (1 << 20) + 300 * len(self.names))).get("labels")
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


class _Unusable(ValueError):
    """An image that is whole, but cannot be measured."""


def _pixels(picture: Image.Image) -> np.ndarray:
    if picture.mode in ("LA", "RGBA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("LA" if picture.mode in ("L", "LA", "La") else "RGBA")
        if np.asarray(picture.getchannel("A")).min() < 255:
            raise _Unusable("has transparent pixels; expected opaque images")
        picture = picture.convert("L" if picture.mode == "LA" else "RGB")
    if picture.mode == "1":
        picture = picture.convert("L")
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise _Unusable("has grey levels beyond 16 bits; expected 8 or 16 bits a channel")
        return (values >> 8).astype(np.uint8)[None]
    if picture.mode == "F":
        raise _Unusable("has floating-point grey levels; expected 8 or 16 bits a channel")
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


def _natural(name: str) -> str:
    """For sorting, the first numbers by their value: by how many digits they have, then by these."""
    return _NUMBER.sub(_digits, name, count=_MAX_NUMBERS)


def _digits(number: re.Match[str]) -> str:
    digits = number[0].lstrip("0")
    return f"\0{len(digits):05d}{digits}"  # \0, which no name has, sorts before any text that may be there instead
