"""Names for files: `pretrained/index.toml` says which file or URL a short name means and what its bytes must be."""

import difflib
import os
import re
import sys
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from refine import dnnlib
from refine.checkpoints.foreign.diffusers_folder import find_weights
from refine.checkpoints.sniff import check_readable_file
from refine.checkpoints.sources.fetch import cache_path, fetch, is_url

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KINDS = ("generator", "teacher", "classifier", "reference")


@dataclass(frozen=True)
class IndexEntry:
    """One shipped file.

    Attributes:
        name: The short name that command lines and `load_*` take.
        kind: One of `KINDS`.
        file: File name beside the index.
        bytes: Its size.
        sha256: Its checksum.
        licence: Licence of the file, SPDX.
        what: What it is, and from what data.
        made_by: The command that makes it again.
        resolution, classes: Of a network, as in `RemoteEntry`.
    """

    name: str
    kind: str
    file: str
    bytes: int
    sha256: str
    licence: str
    what: str
    made_by: str
    resolution: int | None = None
    classes: int | None = None


@dataclass(frozen=True)
class RemoteEntry:
    """One file that others published.

    Attributes:
        name: The short name that command lines and `load_*` take.
        kind: One of `KINDS`.
        url: Where it is; '' where nobody knows an address that stays.
        resolution: Side of its images, in pixels.
        licence: Licence of the file, as far as its publisher says.
        classes: Number of classes, 0 for an unconditional network; None for statistics.
        fid: Published Fréchet inception distance of 50,000 images, None where none is known.
        sha256: Its checksum, None where none is known: then that of the first download is recorded.
        fid_with: What else that number was measured with, such as 'classifier guidance'.
        where: Where a user can get it, if there is no url.
        guide, guidance: Of a teacher that was published with another network that guides it: that one's name, and the
            strength.
    """

    name: str
    kind: str
    resolution: int
    licence: str
    url: str = ""
    classes: int | None = None
    fid: float | None = None
    sha256: str | None = None
    fid_with: str | None = None
    where: str | None = None
    guide: str | None = None
    guidance: float | None = None

    @property
    def published(self) -> str:
        """The FID, with what else it was measured with; '' where none is known."""
        number = "" if self.fid is None else f"{self.fid:.2f}"
        return f"{number} ({self.fid_with})" if self.fid_with else number

    @property
    def is_cached(self) -> bool:
        return bool(self.url) and cache_path(self.url).is_file()


def pretrained_dir() -> Path | None:
    """The folder with index.toml, or None where there is none.

    `$REFINE_PRETRAINED` where it is set; otherwise that of an installed wheel or of the source checkout.
    """
    package = Path(__file__).resolve().parents[2]
    candidates = [package / "pretrained", package.parent / "pretrained"]
    if os.environ.get("REFINE_PRETRAINED"):
        candidates = [Path(os.environ["REFINE_PRETRAINED"])]
    return next((folder for folder in candidates if (folder / "index.toml").is_file()), None)


def read_index(folder: Path | None = None) -> dict[str, IndexEntry | RemoteEntry]:
    """All entries of `folder/index.toml` by name; empty where there is no such folder.

    Args:
        folder: None = `pretrained_dir()`.

    Raises:
        ValueError: the index is not valid TOML, or an entry lacks a field or has an impossible one.
    """
    folder = folder or pretrained_dir()
    if folder is None:
        return {}
    path = folder / "index.toml"
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    return {name: _entry(name, table, path) for name, table in tables.items()}


def resolve(path_or_name: str | os.PathLike, kind: str | None = None) -> Path:
    """The file that a path, a URL or a name of the index means; what is not in the cache yet is downloaded.

    A folder of diffusers means the weights in it. A path that exists wins over a name. Only a plain word, without
    folder and suffix, can be a name. A shipped file has been checked against its checksum, a downloaded one against
    that of the index or of its first download.

    Args:
        path_or_name: A path, an http or https URL, or a name.
        kind: One of `KINDS`: a name of another kind is refused, before anything is downloaded. None = any.

    Raises:
        ValueError: neither an existing file nor a name of the index, a file that was changed, or a failed download.
    """
    text = os.fspath(path_or_name)
    if not text:
        raise ValueError("an empty path; expected a file or a name of pretrained/index.toml")
    if is_url(text):
        return fetch(text)
    if os.path.isdir(text):
        return find_weights(text)
    if os.path.lexists(text) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", text):
        check_readable_file(text)
        return Path(text)
    folder = pretrained_dir()
    index = read_index(folder)
    if folder is None or text not in index:
        raise ValueError(f"{text} is neither a file nor a known name ({_known(text, index)})")
    entry = index[text]
    if kind is not None and entry.kind != kind:
        raise ValueError(f"{text} is a {entry.kind}; expected a {kind}")
    if isinstance(entry, IndexEntry):
        return _verified(folder, entry)
    if not entry.url:
        raise ValueError(f"{text} has to be fetched by hand: {entry.where}; then give the file in its place")
    return fetch(entry.url, entry.sha256)


def _known(text: str, index: dict[str, IndexEntry | RemoteEntry]) -> str:
    if not index:
        return "no pretrained/index.toml was found"
    if len(index) <= 10:
        return f"the names known are {', '.join(index)}"
    if near := difflib.get_close_matches(text, index, n=3):
        return f"near to it: {', '.join(near)}"
    shipped = [name for name, entry in index.items() if isinstance(entry, IndexEntry)]
    return f"shipped are {', '.join(shipped)}; {len(index) - len(shipped)} more are in pretrained/index.toml"


def _verified(folder: Path, entry: IndexEntry) -> Path:
    if not re.fullmatch(r"[0-9a-f]{64}", entry.sha256):
        raise ValueError(f"{folder / 'index.toml'} has no sha256 of {entry.name!r}, so its file cannot be checked")
    path = folder / entry.file
    size = check_readable_file(path)
    if size != entry.bytes:
        raise ValueError(
            f"{path} has {size} bytes, but {entry.bytes} were shipped as {entry.name!r}: the file was changed"
        )
    digest = dnnlib.sha256_of_file(path)
    if digest != entry.sha256:
        wanted = f"{entry.sha256[:12]}… was shipped as {entry.name!r}"
        raise ValueError(f"{path} has sha256 {digest[:12]}…, but {wanted}: the file was changed")
    return path


def _entry(name: str, table: Any, path: Path) -> IndexEntry | RemoteEntry:
    if not isinstance(table, dict):
        raise ValueError(f"{path}: {name!r} is not a table")
    remote = "url" in table or "where" in table
    made_of = RemoteEntry if remote else IndexEntry
    known = {field.name: field for field in fields(made_of) if field.name != "name"}
    for key, hint in get_type_hints(made_of).items():
        kind = (*get_args(hint), hint)[0]  # of `int | None`, int
        if key in known and (key in table or known[key].default is MISSING) and type(table.get(key)) is not kind:
            raise ValueError(f"{path}: [{name}] needs {key!r}, a {kind.__name__}")
    unknown = table.keys() - known.keys()
    if unknown:
        raise ValueError(f"{path}: [{name}] has the unknown field {min(unknown)!r}")
    if table["kind"] not in KINDS:
        raise ValueError(f"{path}: [{name}] has the kind {table['kind']!r}; expected one of {', '.join(KINDS)}")
    if remote:
        if not re.fullmatch(r"[0-9a-f]{64}", table.get("sha256", "0" * 64)):
            raise ValueError(f"{path}: [{name}] has a sha256 that is not 64 hexadecimal digits")
        return RemoteEntry(name=name, **table)
    if Path(table["file"]).name != table["file"]:
        raise ValueError(f"{path}: [{name}] names the file {table['file']!r}; expected a name beside the index")
    return IndexEntry(name=name, **table)
