"""What a file is, told by its bytes and never by its name; the readers dispatch on it, refusals quote it.

Nothing here imports torch, and only a few kilobytes of the file are read (a safetensors header: at most 4 MiB).
"""

import json
import math
import os
import re
import stat
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEADER_KEY = "gan-refine"  # our JSON lives under this one key of the safetensors `__metadata__`
MAX_HEADER_BYTES = 4 << 20  # of safetensors
MAX_NETWORK_ENTRIES = 6000  # tensors, each of them an entry of a zip; the largest diffusion models have 2000
_MAX_DIRECTORY_BYTES = 96 << 20  # of a zip; ImageNet's 1.3 million images take 86
_ZIP_ENTRY, _ZIP_END_BYTES = b"PK\x01\x02", (1 << 16) + 128  # the end of a zip, with the longest comment

_SAFETENSORS_BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "U8": 8,
    "BOOL": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "C64": 64,
}

_MAGIC = (  # first bytes, kind, what to call it
    (b"\x89PNG\r\n\x1a\n", "image", "a PNG image"),
    (b"\xff\xd8\xff", "image", "a JPEG image"),
    (b"\x1f\x8b", "gzip", "a gzip archive, to be unpacked first"),
    (b"BZh", "bzip2", "a bzip2 archive, to be unpacked first"),
    (b"\xfd7zXZ\x00", "xz", "an xz archive, to be unpacked first"),
    (b"(\xb5/\xfd", "zstd", "a Zstandard archive, to be unpacked first"),
    (b"7z\xbc\xaf'\x1c", "7z", "a 7z archive"),
    (b"Rar!\x1a\x07", "rar", "a RAR archive"),
    (b"\x89HDF\r\n\x1a\n", "hdf5", "an HDF5 file"),
    (b"GGUF", "gguf", "a GGUF file"),
    (b"%PDF-", "pdf", "a PDF document"),
    (b"\x93NUMPY", "npy", "a single NumPy array (.npy)"),
    (b"version https://git-lfs", "lfs", "a Git LFS pointer, not the file itself (run `git lfs pull`)"),
)


# Of protocols 0 and 1, which have no magic number: a table, a list, a tuple, an object.
_OLD_PICKLE = re.compile(rb"\(*(?:[dl]p\d+\n|c[\w.]+\n[\w.]+\n|[\]}]q\x00)")


@dataclass(frozen=True)
class Sniffed:
    """What a file is.

    Attributes:
        kind: 'native', 'safetensors', 'pickle', 'torch', 'torchscript', 'npz', 'zip', 'html', 'lfs', 'text', 'empty',
            'broken-safetensors', or another short word for what no reader takes.
        description: The same for people, with an article: 'an HTML page (…)'.
        header: See `read_safetensors_header`; None of other files.
    """

    kind: str
    description: str
    header: "tuple[dict[str, TensorInfo], dict[str, str]] | None" = None


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a safetensors header tells of it: `dtype` in safetensors' spelling ('F32'), `shape`, byte range in
    the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def numel(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n


class BrokenHeader(ValueError):
    """A file that begins like safetensors but is none; the message says why, ready to follow 'a safetensors file …'."""


def check_readable_file(path: str | os.PathLike) -> int:
    """Size in bytes of a regular file that can be opened.

    Raises:
        ValueError: missing, a folder, not a regular file (a pipe would block for ever), or not readable.
    """
    path = Path(path)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ValueError(f"{path} is a folder; expected a file")
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is not a regular file")
        with open(path, "rb"):
            return status.st_size
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from None


def sniff(path: str | os.PathLike) -> Sniffed:
    """Tells what the file is.

    Raises:
        ValueError: there is no readable regular file at `path`.
    """
    size = check_readable_file(path)
    with open(path, "rb") as file:
        head = file.read(4096)
    if not head:
        return Sniffed("empty", "an empty file")
    for magic, kind, description in _MAGIC:
        if head.startswith(magic):
            return Sniffed(kind, description)
    if head[257:262] == b"ustar":
        return Sniffed("tar", "a tar archive")
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return _sniff_zip(path)
    if _looks_like_safetensors(head, size):
        return _sniff_safetensors(path)
    if head[0] == 0x80 and len(head) > 1 and head[1] in (2, 3, 4, 5):
        return Sniffed("pickle", f"a Python pickle (protocol {head[1]})")
    if _OLD_PICKLE.match(head):
        return Sniffed("pickle", "a Python pickle of protocol 0 or 1")
    return _sniff_text(head)


def read_safetensors_header(path: str | os.PathLike) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensor infos and `__metadata__` of a safetensors file, checked against each other and against the file's size.

    The checks are those of the format: every byte range is as long as dtype and shape say, ranges neither overlap nor
    leave gaps, and together they end where the file ends. So memory needed for the tensors is bounded by the file.

    Raises:
        BrokenHeader: the header is not that of a whole safetensors file.
        ValueError: there is no readable regular file at `path`.
    """
    size = check_readable_file(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise BrokenHeader(f"that is cut off in its header ({size} bytes in all)")
        if length > MAX_HEADER_BYTES:
            raise BrokenHeader(f"whose header claims {length} bytes, more than the {MAX_HEADER_BYTES} allowed")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        raise BrokenHeader("whose header is not valid JSON") from None
    if not isinstance(header, dict):
        raise BrokenHeader("whose header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BrokenHeader("whose metadata is not a table of strings")
    if len(header) > MAX_NETWORK_ENTRIES:
        raise BrokenHeader(f"of {len(header)} tensors; expected at most {MAX_NETWORK_ENTRIES}")
    tensors = {name: _tensor_info(name, entry, 8 + length) for name, entry in header.items()}
    position = 8 + length
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != position:
            raise BrokenHeader(f"in which the bytes of {name!r} overlap others or leave a gap")
        position = info.end
    if position > size:
        raise BrokenHeader(f"that is cut off: {size} of {position} bytes are there")
    if position < size:
        raise BrokenHeader(f"with {size - position} bytes too many at its end")
    return tensors, metadata


def _tensor_info(name: str, entry: Any, data_start: int) -> TensorInfo:
    def is_size(value: Any) -> bool:
        return type(value) is int and 0 <= value < 1 << 48

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise BrokenHeader(f"whose header has no dtype, shape and data_offsets for {name!r}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SAFETENSORS_BITS:
        raise BrokenHeader(f"whose tensor {name!r} has the unknown dtype {str(dtype)[:20]!r}")
    if not isinstance(shape, list) or len(shape) > 16 or not all(is_size(value) for value in shape):
        raise BrokenHeader(f"whose tensor {name!r} has an impossible shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_size(value) for value in offsets):
        raise BrokenHeader(f"whose tensor {name!r} has impossible offsets")
    info = TensorInfo(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])
    if info.end - info.start != info.numel * _SAFETENSORS_BITS[dtype] // 8:
        raise BrokenHeader(
            f"whose tensor {name!r} has {info.end - info.start} bytes, not what {dtype} {list(shape)} needs"
        )
    return info


def _looks_like_safetensors(head: bytes, size: int) -> bool:
    # Eight bytes of header length, then JSON. A length beyond the file counts too: a truncated file is called one.
    return len(head) > 8 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") < max(size, 1 << 32)


def _sniff_safetensors(path: str | os.PathLike) -> Sniffed:
    try:
        header = read_safetensors_header(path)
    except BrokenHeader as error:
        return Sniffed("broken-safetensors", f"a safetensors file {error}")
    if HEADER_KEY in header[1]:
        return Sniffed("native", "a native file of this toolkit", header)
    return Sniffed("safetensors", "a safetensors file of another program", header)


def zip_entries(file: Any) -> float:
    """How many entries a zip archive has at most; infinity where its list of them is longer than anybody's.

    Python's reader makes an object of each, at 10 µs and half a kilobyte, before it tells how many there are. It takes
    the length of the list from the archive and nothing from the number that is stated there, so they are counted.

    Args:
        file: A path or an open file, which is left where it is.
    """
    if isinstance(file, str | os.PathLike):
        with open(file, "rb") as opened:
            return zip_entries(opened)
    before = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _ZIP_END_BYTES))
    length = _zip_directory_bytes(file.read(_ZIP_END_BYTES), size)
    count, end = 0, b""
    if length <= _MAX_DIRECTORY_BYTES:
        file.seek(max(0, size - _ZIP_END_BYTES - length))
        while data := file.read(1 << 20):
            count += (end + data).count(_ZIP_ENTRY)
            end = data[1 - len(_ZIP_ENTRY) :]
    file.seek(before)
    return count if length <= _MAX_DIRECTORY_BYTES else math.inf


def _zip_directory_bytes(tail: bytes, size: int) -> int:
    """How long the list of entries is by what the end of an archive of `size` bytes says."""
    claims = [0]
    for magic, start, end in ((b"PK\x05\x06", 12, 16), (b"PK\x06\x06", 40, 48)):  # of 4 GiB at most, and of more
        position = tail.find(magic)
        while position >= 0:  # several may be there, and readers differ in which one they take
            claims.append(int.from_bytes(tail[position + start : position + end], "little"))
            position = tail.find(magic, position + 1)
    return max(claim for claim in claims if claim <= size)


def _sniff_zip(path: str | os.PathLike) -> Sniffed:
    if zip_entries(path) > MAX_NETWORK_ENTRIES:
        return Sniffed("zip", "a zip archive of very many files")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return Sniffed("broken-zip", "a broken or cut-off zip archive")
    inner = {name.split("/", 1)[-1] for name in names}
    if "data.pkl" in inner:
        if "constants.pkl" in inner:
            return Sniffed("torchscript", "a TorchScript file")
        return Sniffed("torch", "a PyTorch file written by torch.save")
    if names and all(name.endswith(".npy") for name in names):
        return Sniffed("npz", "a NumPy archive (.npz)")
    if "dataset.json" in inner:
        return Sniffed("zip", "a zip archive with a dataset.json, that is, a data set")
    if len(names) == 1 and names[0].endswith((".pkl", ".pt", ".pth", ".ckpt", ".safetensors")):
        return Sniffed("zip", "a zip archive with a checkpoint in it, to be unpacked first")
    return Sniffed("zip", "a zip archive")


def _sniff_text(head: bytes) -> Sniffed:
    text = head.decode("utf-8", errors="ignore").lstrip("\ufeff \t\r\n").lower()
    if text.startswith(("<!doctype html", "<html", "<head", "<body")) or (text.startswith("<") and "<html" in text):
        return Sniffed("html", "an HTML page (a download that failed?)")
    if b"\x00" not in head and sum(byte < 32 and byte not in b"\t\r\n\f\x1b" for byte in head) == 0:
        try:
            head[:-3].decode("utf-8") if len(head) == 4096 else head.decode("utf-8")
            return Sniffed("text", "a text file")
        except UnicodeDecodeError:
            pass  # neither ASCII nor UTF-8: a binary file after all
    return Sniffed("binary", "a binary file of an unknown kind")
