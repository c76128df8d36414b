"""URL → file in the cache: downloaded once, whole or not at all, and the same bytes ever after.

    $REFINE_CACHE (else the platform's cache folder, ~/.cache/gan-refine on Linux)
        host/path/of/the/url/net.pkl          as `wget -x` would lay it out, so files can be put there by hand
        host/path/of/the/url/net.pkl.json     sha256 and size at first sight; what comes later must agree
        host/path/of/the/url/.net.pkl.part/   a download under way; left by a killed process, it goes at the next use
        .locks/                               one process downloads a file, others wait for it

pooch does the caching: a temporary file, a checksum, a move. What is added here: broken transfers are resumed, silent
servers are given up, and an HTML page or half a file is refused before it gets into the cache.
"""

import contextlib
import hashlib
import json
import math
import os
import queue
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import SplitResult, urlsplit

from refine import dnnlib
from refine.checkpoints.sniff import check_readable_file, sniff

if TYPE_CHECKING:
    import requests
    from tqdm import tqdm

CONNECT_TIMEOUT = 10.0  # seconds
STALL_TIMEOUT = 25.0  # seconds without a byte, or at less than MIN_RATE on average
PATIENCE = 50.0  # seconds in which no try comes farther by a piece of MIN_RATE · STALL_TIMEOUT bytes
MAX_SECONDS = 6 * 3600.0  # of all tries of a file together, however steadily it drips
MIN_RATE = 1024  # bytes per second
WAITS = (1.0, 2.0, 4.0)  # seconds before each further try
MAX_REDIRECTS = 10
MAX_BYTES = 16 << 30  # a server that never stops must not fill the disk
_MAX_RECORD_BYTES = 1 << 16

# Kinds of `sniff` that are never a network or statistics: error pages, archives, pictures, halves of files.
_REFUSED = {"empty", "html", "text", "lfs", "image", "hdf5", "gguf", "pdf", "npy", "binary"}
_REFUSED |= {"gzip", "bzip2", "xz", "zstd", "7z", "rar", "tar", "zip", "broken-safetensors", "broken-zip"}


class DownloadError(ValueError):
    """A download that failed for good, or brought no network; one sentence, without secrets of the URL."""


class _TryAgain(Exception):
    """A try that failed in a way that may pass: a 5xx answer, silence, a connection that broke."""


def is_url(text: str) -> bool:
    """Whether `text` is meant as a URL, of whatever scheme."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def without_secrets(url: str) -> str:
    """The URL for messages and logs: without user:password@, without what follows `?` or `#`.

    Raises:
        ValueError: not a URL that can be fetched.
    """
    parts = _split(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}{'?…' if parts.query else ''}"


def cache_dir() -> Path:
    """`$REFINE_CACHE` where it is set, otherwise the platform's cache folder.

    Raises:
        ValueError: There is neither.
    """
    try:
        return dnnlib.named_folder("REFINE_CACHE") or dnnlib.user_cache()
    except RuntimeError:
        raise ValueError("no home folder is known for a cache; set REFINE_CACHE to a folder of your own") from None


def cache_path(url: str) -> Path:
    """Where the file of this URL is or will be: cache folder, host, path. Credentials do not count.

    Raises:
        ValueError: not a URL that can be fetched.
    """
    parts = _split(url)
    host = parts.netloc.rpartition("@")[2].lower()
    raw = [host if parts.scheme == "https" else f"http+{host}", *filter(None, parts.path.split("/"))]
    safe = [re.sub(r"[^A-Za-z0-9._~%+=@,-]", "_", part)[-150:] for part in raw]
    safe = ["_" * len(part) if set(part) == {"."} else part for part in safe]
    if parts.query or safe[1:] != raw[1:]:  # the path alone would not tell two URLs apart
        name = Path(safe[-1])
        digest = hashlib.sha256(f"{parts.path}?{parts.query}".encode()).hexdigest()[:10]
        safe[-1] = f"{name.stem}-{digest}{name.suffix}"
    return cache_dir().joinpath(*safe)


def fetch(url: str, sha256: str | None = None) -> Path:
    """The file of a URL, from the cache or else downloaded into it.

    Args:
        url: http or https; user:password@ is sent to the server, and appears in no message.
        sha256: Checksum that the file must have; None = the one recorded when the file was first seen, if it was.

    Returns:
        Path in the cache, with the bytes that were there at first sight.

    Raises:
        ValueError: not such a URL; the download failed for good; what came is no network file; the bytes are not those
            of the checksum; or others can write to the cache. One sentence. No partial file is left.
        OSError: the cache folder cannot be written, or the disk is full.
    """
    target = cache_path(url)
    if reason := dnnlib.distrust(target, cache_dir()):
        raise ValueError(f"{reason}, so nothing is loaded from there; set REFINE_CACHE to a folder of your own")
    _remove_leftovers()
    with contextlib.nullcontext() if target.exists() else _locked(target):
        if not target.exists():  # another process may just have put it there
            _download(url, target, sha256)
        _verify(url, target, sha256)
    return target


def _split(url: str) -> SplitResult:
    # no message here quotes the URL: what cannot be split may have a password anywhere
    wanted = "expected https://host/path/file"
    if not re.fullmatch(r"[^\s\x00-\x1f\x7f]+", url):
        raise ValueError(f"a URL with white space or control characters in it; {wanted}")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError(f"a URL with an impossible host or port; {wanted}") from None
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"a {parts.scheme}:// URL; {wanted}")
    if not parts.hostname or port == 0 or not parts.path.strip("/"):
        raise ValueError(f"a URL without {'a file' if parts.hostname and port != 0 else 'a host'}; {wanted}")
    return parts


@contextmanager
def _locked(target: Path, wait: bool = True) -> Iterator[None]:
    """Keeps other processes from downloading the same file; the system frees the lock of a process that died.

    Raises:
        filelock.Timeout: another process has the lock, and `wait` is False.
    """
    import filelock

    folder = cache_dir() / ".locks"
    dnnlib.make_folder(folder)
    lock = filelock.FileLock(folder / f"{hashlib.sha256(str(target).encode()).hexdigest()[:16]}.lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        if not wait:
            raise
        _note(f"waiting for another process that downloads {target.name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _part_folder(target: Path) -> Path:
    """Where a file is downloaded to, by whoever has its lock."""
    return target.with_name(f".{target.name}.part")


def _remove_leftovers() -> None:
    """Removes what killed processes had downloaded of files; what a living one downloads is under its lock."""
    import filelock

    for folder in list(cache_dir().rglob(".?*.part")):
        target = folder.with_name(folder.name[1:].removesuffix(".part"))
        with contextlib.suppress(filelock.Timeout, OSError), _locked(target, wait=False):
            shutil.rmtree(folder)


def _download(url: str, target: Path, sha256: str | None) -> None:
    import pooch

    pooch.get_logger().setLevel("WARNING")  # its notes would print passwords in URLs
    shown, part = without_secrets(url), _part_folder(target)
    known = sha256 or (_read_record(target) or {}).get("sha256")
    dnnlib.make_folder(part)
    _note(f"downloading {shown} to {target}")
    try:
        file = pooch.retrieve(url, known, fname=target.name, path=part, downloader=_Downloader(shown, target))
        dnnlib.keep_from_others(Path(file))
        os.replace(file, target)
    except DownloadError as error:
        raise DownloadError(f"{error}; a file fetched by other means belongs at {target}") from None
    except ValueError:  # pooch: not the checksum
        origin = "pretrained/index.toml" if sha256 else f"recorded at first sight in {_record_path(target)}"
        what = f"a file without the sha256 {str(known)[:12]}… ({origin})"
        raise ValueError(f"{shown} now sends {what}: it changed") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _verify(url: str, target: Path, sha256: str | None) -> None:
    """Checks a file of the cache, downloaded or put there by hand, and records its checksum when it is new."""
    record = _read_record(target)
    if record is None:
        _check_contents(target, str(target))
    digest = dnnlib.sha256_of_file(target)
    known = sha256 or (record or {}).get("sha256", digest)
    if digest != known:
        origin = "pretrained/index.toml says" if sha256 else "was recorded at first sight"
        advice = "it was changed; delete it, and it is downloaded again"
        raise ValueError(f"{target} has sha256 {digest[:12]}…, but {known[:12]}… {origin}: {advice}")
    if record is None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        record = {"url": without_secrets(url), "sha256": digest, "bytes": target.stat().st_size, "first_seen": now}
        try:
            with dnnlib.replaced_atomically(_record_path(target)) as temporary:
                temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        except OSError as error:  # a cache for reading only, filled by hand, is still a cache
            _note(f"the checksum of {target} cannot be recorded ({error.strerror or error})")


def _check_contents(path: Path, name: str) -> None:
    """Refuses, by their bytes, files that are certainly not networks: error pages, the first half of a pickle."""
    found = sniff(path)
    if found.kind in _REFUSED:
        raise DownloadError(f"{name} is {found.description}; expected a file of networks or statistics")
    if found.kind == "pickle":
        with open(path, "rb") as file:
            head = file.read(12)
            file.seek(-1, os.SEEK_END)
            # Every pickle ends with the opcode STOP. Only files of torch < 1.6 (magic number) have more after it.
            if file.read() != b"." and head[2:] != b"\x8a\nl\xfc\x9cF\xf9 j\xa8":
                raise DownloadError(f"{name} is a cut-off pickle; expected a whole file of networks")


def _record_path(target: Path) -> Path:
    return target.with_name(f"{target.name}.json")


def _read_record(target: Path) -> dict[str, Any] | None:
    path = _record_path(target)
    if not path.exists():
        return None
    try:
        known = check_readable_file(path) <= _MAX_RECORD_BYTES
        record = json.loads(path.read_text(encoding="utf-8")) if known else None
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not re.fullmatch(r"[0-9a-f]{64}", str(record.get("sha256"))):
        raise ValueError(f"{path} is not a record of a checksum; delete it if {target.name} beside it is to be trusted")
    return record


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _Answer:
    """A server's answer, read by a thread of its own: a server that drips bytes keeps the thread waiting, not us.

    The timeouts of sockets are for each byte. A thread that was left ends with its connection, or with the program.

    Args:
        session, url, headers: What is asked, and how.
    """

    def __init__(self, session: "requests.Session", url: str, headers: dict[str, str]):
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=8)
        self._left = threading.Event()
        threading.Thread(target=self._read, args=(session, url, headers), daemon=True).start()

    def next(self, seconds: float, otherwise: str) -> Any:
        """The response first, then its bytes, then b"".

        Raises:
            _TryAgain: Nothing came within so many seconds; says `otherwise`.
            Exception: What the connection raised.
        """
        try:
            item = self._queue.get(timeout=max(seconds, 0))
        except queue.Empty:
            raise _TryAgain(otherwise) from None
        if isinstance(item, Exception):
            raise item
        return item

    def leave(self) -> None:
        self._left.set()

    def _read(self, session: "requests.Session", url: str, headers: dict[str, str]) -> None:
        try:
            with session.get(
                url, headers=headers, stream=True, timeout=(CONNECT_TIMEOUT, 2 * STALL_TIMEOUT)
            ) as response:
                self._put(response)
                while not self._left.is_set():
                    chunk = response.raw.read1(1 << 18)  # what is there, at most so much: a slow server is noticed
                    self._put(chunk)
                    if not chunk:
                        break
        except Exception as error:  # noqa: BLE001 - raised where the bytes are waited for
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._left.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=0.1)
                return


class _Downloader:
    """Puts the file of a URL into a temporary file of pooch, with further tries, each going on where the last ended.

    Args:
        shown: The URL as messages may show it.
        target: Where the file will be.
    """

    def __init__(self, shown: str, target: Path):
        self._shown = shown
        self._target = target
        self._began = time.monotonic()
        self._moved, self._most = self._began, 0  # when the last new piece was there, and the bytes until then
        self._total: int | None = None  # bytes of the whole file, where the server tells
        self._validator: str | None = None  # a later part belongs to the same file if the server still gives this

    def __call__(self, url: str, output_file: str, _pooch: object) -> None:
        import requests
        import urllib3
        from tqdm import tqdm

        Path(output_file).unlink()  # mkstemp made it private to the user, but a cache may be shared
        every = 0.2 if sys.stderr.isatty() else 30.0  # seconds; few lines in a log file
        style = {"desc": self._target.name, "unit": "B", "unit_scale": True, "unit_divisor": 1024, "leave": False}
        bar = tqdm(**style, mininterval=every, delay=every)
        with open(output_file, "wb") as file, requests.Session() as session, bar:
            session.max_redirects = MAX_REDIRECTS
            for number, wait in enumerate((*WAITS, math.inf), 1):
                try:
                    self._try(session, url, file, bar)
                    break
                except (_TryAgain, requests.RequestException, urllib3.exceptions.HTTPError) as error:
                    problem = str(error) if isinstance(error, _TryAgain) else self._what_failed(error, file.tell())
                if wait > self._patience():
                    raise DownloadError(f"{problem}, {number} times")
                bar.write(f"{problem}; trying again in {wait:g} s", file=sys.stderr)
                time.sleep(wait)
        _check_contents(Path(output_file), f"what {self._shown} sent")

    def _try(self, session: "requests.Session", url: str, file: BinaryIO, bar: "tqdm") -> None:
        headers = {"Accept-Encoding": "identity", "User-Agent": "gan-refine"}
        if file.tell() and self._validator:
            headers |= {"Range": f"bytes={file.tell()}-", "If-Range": self._validator}
        answer = _Answer(session, url, headers)
        try:
            limit = min(STALL_TIMEOUT, self._patience())
            response = answer.next(limit, f"{self._shown} sent no answer for {limit:.2g} s")
            self._check_answer(response)
            self._place(response, file)
            bar.total = self._total
            bar.n = bar.initial = bar.last_print_n = file.tell()
            self._copy(answer, file, bar)
        finally:
            answer.leave()
        if self._total is not None and file.tell() < self._total:
            raise _TryAgain(self._broke_off(file.tell()))

    def _check_answer(self, response: "requests.Response") -> None:
        status = f"{response.status_code} {response.reason or ''}".strip()
        if response.status_code == 416:
            self._validator = None  # the part that was asked for is not there: from the start then
        if response.status_code >= 500 or response.status_code in (408, 416, 429):
            raise _TryAgain(f"{self._shown} answered {status}")
        if response.status_code not in (200, 206):
            raise DownloadError(f"{self._shown} answered {status}, not a file")
        if self._shown.startswith("https:") and not response.url.startswith("https:"):
            raise DownloadError(f"{self._shown} redirects from https to http, where anybody could change the file")

    def _place(self, response: "requests.Response", file: BinaryIO) -> None:
        """Sets `file` to where the body of the answer belongs, and notes what the headers say of the whole file."""
        part = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        length = response.headers.get("Content-Length", "")
        if response.status_code == 206 and part and int(part[1]) == file.tell():
            self._total = int(part[2])
        elif response.status_code == 206:
            raise DownloadError(f"{self._shown} answered with another part of the file than was asked for")
        else:
            file.seek(0)
            file.truncate()
            self._total = int(length) if re.fullmatch(r"\d{1,18}", length) else None
        etag = response.headers.get("ETag", "")
        self._validator = etag if etag.startswith('"') else response.headers.get("Last-Modified")
        self._check_size(self._total or 0)
        missing, free = (self._total or 0) - file.tell(), shutil.disk_usage(self._target.parent).free
        if missing > free:
            needed, there = dnnlib.format_bytes(missing), dnnlib.format_bytes(free)
            raise DownloadError(f"{self._shown} needs {needed}, but {self._target.parent} has {there} left")

    def _copy(self, answer: "_Answer", file: BinaryIO, bar: "tqdm") -> None:
        limit, since, size = min(STALL_TIMEOUT, self._patience()), time.monotonic(), file.tell()
        slow = f"{self._shown} sent less than {dnnlib.format_bytes(MIN_RATE)} a second for {limit:.2g} s"
        while chunk := answer.next(since + limit - time.monotonic(), slow):
            file.write(chunk)
            bar.update(len(chunk))
            self._check_size(file.tell())
            if time.monotonic() > self._began + MAX_SECONDS:
                came = dnnlib.format_bytes(file.tell())
                raise DownloadError(f"{self._shown} sent only {came} in {MAX_SECONDS / 3600:.2g} hours")
            if file.tell() - size >= MIN_RATE * STALL_TIMEOUT:
                limit, since, size = STALL_TIMEOUT, time.monotonic(), file.tell()
                if size > self._most:
                    self._moved, self._most = since, size

    def _patience(self) -> float:
        """Seconds that are left for tries that bring nothing new."""
        return max(0.0, self._moved + PATIENCE - time.monotonic())

    def _check_size(self, size: int) -> None:
        if size > MAX_BYTES:
            raise DownloadError(f"{self._shown} sends more than {dnnlib.format_bytes(MAX_BYTES)}")

    def _what_failed(self, error: Exception, size: int) -> str:
        """What may pass, in words of our own: the error's text may hold the URL with its secrets.

        Raises:
            DownloadError: It will not pass.
        """
        import requests
        import urllib3

        for_good = {
            requests.TooManyRedirects: f"{self._shown} redirects in circles (more than {MAX_REDIRECTS} times)",
            requests.exceptions.SSLError: f"{self._shown} has no certificate that is trusted here",
            urllib3.exceptions.SSLError: f"{self._shown} has no certificate that is trusted here",
            requests.exceptions.ProxyError: f"the proxy for {self._shown} does not answer",
            requests.ConnectTimeout: f"{self._shown} cannot be reached",
            urllib3.exceptions.NewConnectionError: f"{self._shown} cannot be reached",
            requests.exceptions.InvalidURL: f"{self._shown} leads to an address that is not http or https",
            requests.exceptions.InvalidSchema: f"{self._shown} leads to an address that is not http or https",
        }
        reason = getattr(error.args[0], "reason", None) if error.args else None
        for kind, text in for_good.items():
            if isinstance(error, kind) or isinstance(reason, kind):
                raise DownloadError(text) from None
        return self._broke_off(size)

    def _broke_off(self, size: int) -> str:
        of = "" if self._total is None else f" of {self._total}"
        return f"{self._shown} broke off after {size}{of} bytes"
