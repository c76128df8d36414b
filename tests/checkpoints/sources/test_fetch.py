"""Downloads from a local server that does all that servers do wrong: one clear line each, and nothing half is kept."""

import errno
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from refine.checkpoints import load_teacher
from refine.checkpoints.native import save_networks
from refine.checkpoints.sources import fetch as fetching
from refine.checkpoints.sources import index
from refine.checkpoints.sources.fetch import cache_path, fetch, without_secrets
from refine.cli.main import run_command
from refine.dnnlib import user_cache
from tests.training.test_trainer import make_student, make_teacher

NET = pickle.dumps({"weights": np.random.RandomState(0).bytes(300_000)}, protocol=4)
OTHER = NET.replace(b"weights", b"Weights")
SHA256 = hashlib.sha256(NET).hexdigest()
HTML = b"<!DOCTYPE html><html><body>please log in</body></html>"


class Handler(BaseHTTPRequestHandler):
    """The last word before `.pkl` says how the file of that path is served: /a/b/stall.pkl → `stall`."""

    def do_GET(self):
        name = self.path.split("?")[0].rpartition("/")[2].removesuffix(".pkl")
        count = self.server.counts[name] = self.server.counts[name] + 1
        self.server.requests.append((name, dict(self.headers)))
        getattr(self, name.replace("-", "_"))(count)

    def answer(self, body=NET, status=200, length=None, **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        if length is not False:
            self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def good(self, count):
        self.answer()

    def login(self, count):
        self.answer() if self.headers["Authorization"] == "Basic Ym9iOmh1bnRlcjI=" else self.answer(b"", 401)

    def page(self, count):
        self.answer(HTML, Content_Type="application/octet-stream")

    def empty(self, count):
        self.answer(b"")

    def lfs(self, count):
        self.answer(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")

    def missing(self, count):
        self.answer(b"not here", 404)

    def broken(self, count):
        self.answer(b"oops", 500)

    def broken_twice(self, count):
        self.answer(b"oops", 503) if count <= 2 else self.answer()

    def truncated(self, count):
        self.answer(NET[:1000], length=len(NET))

    def no_length(self, count):  # HTTP/1.0: the end of the connection is the end of the file
        self.answer(NET, length=False)

    def no_length_truncated(self, count):
        self.answer(NET[:1000], length=False)

    def length_too_small(self, count):
        self.answer(NET, length=1000)

    def length_too_large(self, count):
        self.answer(NET, length=len(NET) + 1000)

    def length_absurd(self, count):
        self.answer(NET[:1000], length=1 << 50)

    def length_no_number(self, count):
        self.answer(NET, length="many")

    def stalled(self, count):
        self.answer(NET[:1000], length=len(NET))
        self.wfile.flush()
        self.server.over.wait(20)

    def hanging(self, count):
        self.answer(NET[:100_000], length=len(NET))
        self.wfile.flush()
        self.server.over.wait(20)

    def silent(self, count):
        self.server.over.wait(20)

    def trickling(self, count):
        self.answer(b"", length=len(NET))
        for byte in NET[:1000]:
            self.wfile.write(bytes([byte]))
            if self.server.over.wait(0.05):
                break

    def drip(self, start, byte):
        self.wfile.write(start)
        while not self.server.over.wait(0.05):
            self.wfile.write(byte)

    def dripping_header(self, count):
        self.drip(b"HTTP/1.1 200 OK\r\nX-A: ", b"x")

    def dripping_chunk(self, count):
        self.drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0")

    def endless_chunk(self, count):
        self.drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0" * 100_000)

    def endless_headers(self, count):
        self.drip(b"HTTP/1.1 200 OK\r\n" + b"X-A: y\r\n" * 100_000, b"X-A: y\r\n")

    def endless(self, count):
        """A body without a length, fast enough never to count as slow."""
        self.drip(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 4096)

    def negative_length(self, count):
        self.answer(NET[:1000], length=-5)

    def reset(self, count):
        self.connection.close()

    def moved(self, count):
        self.answer(b"", 302, Location="/good.pkl")

    def circle(self, count):
        self.answer(b"", 302, Location="/circle.pkl")

    def elsewhere(self, count):
        self.answer(b"", 302, Location="ftp://127.0.0.1/net.pkl")

    def half(self, count):
        """Breaks off in the middle the first time, then serves what was asked for."""
        start = int((self.headers["Range"] or "bytes=0-")[6:-1])
        if count == 1:
            self.answer(NET[:100_000], length=len(NET), ETag='"one"')
        elif start and self.headers["If-Range"] == '"one"':
            part = f"bytes {start}-{len(NET) - 1}/{len(NET)}"
            self.answer(NET[start:], 206, Content_Range=part, ETag='"one"')
        else:
            self.answer()

    def half_of_another(self, count):
        """Another file by the time of the second try, so there is nothing to go on with."""
        if count == 1:
            self.answer(OTHER[:100_000], length=len(NET), ETag='"one"')
        else:
            self.answer(NET, ETag='"two"')

    def wrong_part(self, count):
        if count == 1:
            self.answer(NET[:100_000], length=len(NET), ETag='"one"')
        else:
            self.answer(NET[:10], 206, Content_Range=f"bytes 0-9/{len(NET)}")

    def changing(self, count):
        self.answer(NET if count == 1 else OTHER)

    def slow(self, count):
        self.answer(NET[:1000], length=len(NET))
        time.sleep(1)
        self.wfile.write(NET[1000:])

    def student(self, count):
        self.answer(self.server.bodies["student"])

    def teacher(self, count):
        self.answer(self.server.bodies["teacher"])

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.handle_error = lambda *args: None  # clients that leave are what is tested
        server.daemon_threads, server.over = True, threading.Event()
        server.counts, server.requests, server.bodies = Counter(), [], {}
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


@pytest.fixture
def url(server, monkeypatch, tmp_path):
    """url('good') is where the server serves `good`; trying again at once, and with a cache of its own."""
    server.counts.clear()
    server.requests.clear()
    monkeypatch.setenv("REFINE_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fetching, "WAITS", (0.01, 0.01, 0.01))
    return lambda name: f"http://127.0.0.1:{server.server_port}/nets/{name}.pkl"


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")


def refusal(call) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_download_once(url, server, tmp_path, capsys):
    path = fetch(url("good"))
    assert path.read_bytes() == NET and path == cache_path(url("good"))
    assert path.relative_to(tmp_path / "cache").parts[1:] == ("nets", "good.pkl")
    record = json.loads((path.parent / "good.pkl.json").read_text())
    assert (record["sha256"], record["bytes"], record["url"]) == (SHA256, len(NET), url("good"))
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o644 & ~umask  # for reading, a cache may be shared
    output = capsys.readouterr()
    assert output.out == "" and f"downloading {url('good')} to {path}" in output.err
    assert fetch(url("good")) == path and server.counts["good"] == 1
    assert capsys.readouterr().err == ""
    assert files(tmp_path) == ["good.pkl", "good.pkl.json"]


@pytest.mark.parametrize("name", ["broken-twice", "moved", "no-length", "length-no-number", "half", "half-of-another"])
def test_servers_that_can_be_put_up_with(url, server, name, tmp_path, capsys):
    assert fetch(url(name)).read_bytes() == NET
    assert files(tmp_path) == [f"{name}.pkl", f"{name}.pkl.json"]
    assert server.counts[name] == {"broken-twice": 3, "half": 2, "half-of-another": 2}.get(name, 1)
    assert ("trying again" in capsys.readouterr().err) == (server.counts[name] > 1)


def test_a_broken_transfer_goes_on_where_it_ended(url, server):
    fetch(url("half"))
    first, second = (headers for name, headers in server.requests)
    assert "Range" not in first and second["Range"] == "bytes=100000-" and second["If-Range"] == '"one"'


@pytest.mark.parametrize(
    ("name", "what", "tries"),
    [
        ("page", "sent is an HTML page", 1),
        ("empty", "sent is an empty file", 1),
        ("lfs", "sent is a Git LFS pointer", 1),
        ("missing", "answered 404 Not Found, not a file", 1),
        ("login", "answered 401 Unauthorized", 1),
        ("broken", "answered 500 Internal Server Error, 4 times", 4),
        ("truncated", f"broke off after 1000 of {len(NET)} bytes, 4 times", 4),
        ("no-length-truncated", "sent is a cut-off pickle", 1),
        ("length-too-small", "sent is a cut-off pickle", 1),
        ("length-too-large", f"broke off after {len(NET)} of {len(NET) + 1000} bytes, 4 times", 4),
        ("length-absurd", "sends more than 16.0 GiB", 1),
        ("stalled", "sent less than 1.00 KiB a second for 0.25 s, 4 times", 4),
        ("silent", "sent no answer for 0.25 s, 4 times", 4),
        ("trickling", "sent less than 1.00 KiB a second for 0.25 s, 4 times", 4),
        ("dripping-header", "sent no answer for 0.25 s, 4 times", 4),
        ("dripping-chunk", "sent less than 1.00 KiB a second for 0.25 s, 4 times", 4),
        ("endless-chunk", "broke off after 0 bytes, 4 times", 4),
        ("endless-headers", "broke off after 0 bytes, 4 times", 4),
        ("negative-length", "sent is a cut-off pickle", 1),
        ("reset", "broke off after 0 bytes, 4 times", 4),
        ("circle", "redirects in circles", 11),
        ("elsewhere", "leads to an address that is not http or https", 1),
        ("wrong-part", "answered with another part of the file", 2),
    ],
)
def test_servers_that_are_refused(url, server, name, what, tries, tmp_path, monkeypatch):
    if "0.25 s" in what:  # the others are refused for what they say, however long a busy machine takes for it
        monkeypatch.setattr(fetching, "STALL_TIMEOUT", 0.25)
    message = refusal(lambda: fetch(url(name)))
    assert what in message and url(name) in message and server.counts[name] == tries
    assert message.endswith(f"a file fetched by other means belongs at {cache_path(url(name))}")
    assert files(tmp_path) == []


@pytest.mark.parametrize("name", ["silent", "dripping-header", "stalled", "trickling", "dripping-chunk"])
def test_a_server_that_brings_nothing_is_left_within_a_minute(url, name, monkeypatch):
    """With the limits cut to a fortieth; what is beyond them has to be far below the 10 s that make 60."""
    assert fetching.PATIENCE == 50
    monkeypatch.setattr(fetching, "PATIENCE", 1.25)
    monkeypatch.setattr(fetching, "STALL_TIMEOUT", 0.625)
    start = time.monotonic()
    assert re.search(r" (answer|a second) for 0\.\d+ s, [23] times", refusal(lambda: fetch(url(name))))
    assert time.monotonic() - start < 1.25 + 2


def test_a_server_that_never_ends_is_left(url, server, monkeypatch, tmp_path):
    """Fast enough never to count as slow, a body without a length would go on until it has filled 16 GiB."""
    assert fetching.MAX_SECONDS == 6 * 3600
    monkeypatch.setattr(fetching, "MAX_SECONDS", 1.5)
    start = time.monotonic()
    assert re.search(r"sent only [\d.]+ KiB in 0.00042 hours", refusal(lambda: fetch(url("endless"))))
    assert time.monotonic() - start < 3 and server.counts["endless"] == 1 and files(tmp_path) == []


def test_without_a_network(url, tmp_path, monkeypatch):
    """No server: told at once, with the place for a file brought by hand, which is then taken."""
    closed = "http://127.0.0.1:1/net.pkl"
    message = refusal(lambda: fetch(closed))
    target = cache_path(closed)
    assert message == f"{closed} cannot be reached; a file fetched by other means belongs at {target}"
    assert files(tmp_path) == []
    target.write_bytes(HTML)
    assert "is an HTML page" in refusal(lambda: fetch(closed))
    target.write_bytes(NET)
    assert fetch(closed) == target and files(tmp_path) == ["net.pkl", "net.pkl.json"]
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "")
    assert "the proxy for" in refusal(lambda: fetch("http://example.invalid/net.pkl"))


def test_a_changed_file_in_the_cache(url, server):
    path = fetch(url("good"))
    path.write_bytes(OTHER)
    message = refusal(lambda: fetch(url("good")))
    assert str(path) in message and "recorded at first sight" in message and "delete it" in message
    path.unlink()
    assert fetch(url("good")).read_bytes() == NET and server.counts["good"] == 2


def test_a_changed_file_on_the_server(url):
    path = fetch(url("changing"))
    assert fetch(url("changing")) == path
    path.unlink()
    message = refusal(lambda: fetch(url("changing")))
    assert "it changed" in message and SHA256[:12] in message and f"{path}.json" in message
    assert files(path.parent) == ["changing.pkl.json"]


def test_a_known_checksum(url, tmp_path):
    message = refusal(lambda: fetch(url("good"), sha256="0" * 64))
    assert "000000000000… (pretrained/index.toml): it changed" in message and files(tmp_path) == []
    path = fetch(url("good"), sha256=SHA256)
    assert "pretrained/index.toml says" in refusal(lambda: fetch(url("good"), sha256="0" * 64))
    (path.parent / "good.pkl.json").write_text("{")
    assert "is not a record of a checksum" in refusal(lambda: fetch(url("good")))


@pytest.mark.parametrize("where", ["mkstemp", "disk"])
def test_a_full_disk(url, where, tmp_path, monkeypatch):
    if where == "disk":  # told before anything is transferred
        monkeypatch.setattr(fetching.shutil, "disk_usage", lambda path: type("", (), {"free": 1000}))
        assert "needs 293 KiB, but" in refusal(lambda: fetch(url("good")))
    else:  # a write that fails

        def fail(self, answer, file, bar):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(fetching._Downloader, "_copy", fail)
        with pytest.raises(OSError, match="No space left"):
            fetch(url("good"))
    assert files(tmp_path) == []


def test_interrupted(url, tmp_path, monkeypatch):
    def interrupt(self, answer, file, bar):
        file.write(answer.next(5, "too late"))
        raise KeyboardInterrupt

    monkeypatch.setattr(fetching._Downloader, "_copy", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(url("good"))
    assert files(tmp_path) == []


def test_https_is_not_left(monkeypatch):
    answer = type("", (), {"status_code": 200, "reason": "OK", "url": "http://h/n.pkl"})
    downloader = fetching._Downloader("https://h/n.pkl", Path("n.pkl"))
    assert "redirects from https to http" in refusal(lambda: downloader._check_answer(answer))


def test_what_a_killed_download_leaves_goes_at_the_next_use(url, tmp_path):
    """But not while the process lives that writes it."""
    command = [sys.executable, "-c", f"from refine.checkpoints.sources.fetch import fetch; fetch({url('hanging')!r})"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    part, end = fetching._part_folder(cache_path(url("hanging"))), time.monotonic() + 30
    while not any(path.stat().st_size for path in part.glob("*")) and time.monotonic() < end:
        time.sleep(0.02)
    fetch(url("good"))
    assert process.poll() is None and any(path.stat().st_size for path in part.iterdir())
    process.kill()
    process.wait()
    assert part.is_dir()
    fetch(url("good"))  # which is in the cache already
    assert not part.exists() and files(tmp_path) == ["good.pkl", "good.pkl.json"]


def test_two_processes_at_once(url, server, tmp_path):
    """Each gets the whole file; one of them downloads it, the other waits."""
    code = "import sys; from refine.checkpoints.sources.fetch import fetch; print(fetch(sys.argv[1]))"
    command = [sys.executable, "-c", code, url("slow")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    outputs = [process.communicate(timeout=30) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    path = cache_path(url("slow"))
    assert [out for out, _ in outputs] == [f"{path}\n"] * 2 and path.read_bytes() == NET
    assert server.counts["slow"] == 1 and files(tmp_path) == ["slow.pkl", "slow.pkl.json"]


def test_secrets_are_sent_but_not_told(url, tmp_path, capfd):
    secret = url("login").replace("//", "//bob:hunter2@")
    path = fetch(secret)
    assert path.read_bytes() == NET and path == cache_path(url("login"))
    token = url("missing").replace("//", "//bob:hunter2@") + "?token=hunter2"
    message = refusal(lambda: fetch(token)) + refusal(lambda: fetch("https://bob:hunter2@h:x/n"))
    told = message + "".join(capfd.readouterr()) + (path.parent / "login.pkl.json").read_text()
    assert "hunter2" not in told and "bob" not in told
    assert without_secrets("https://bob:a@b@host:8/x.pkl?key=1#2") == "https://host:8/x.pkl?…"


def test_cache_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("REFINE_CACHE", str(tmp_path))

    def at(url):
        return str(cache_path(url).relative_to(tmp_path))

    assert at("https://Host.org/a/b/net.pkl") == "host.org/a/b/net.pkl"
    assert at("http://host.org:80/net.pkl") == "http+host.org_80/net.pkl"
    assert at("https://host.org/../../x/./net.pkl").startswith("host.org/__/__/x/_/net-")
    assert at("https://host.org/%2e%2e/net.pkl") == "host.org/%2e%2e/net.pkl"
    others = [
        "https://h/get?id=1",
        "https://h/get?id=2",
        "https://h/get",
        "https://h/gét",
        "https://h/g\\t",
        "https://h/g_t",
    ]
    assert len({at(url) for url in others}) == len(others)
    assert len(Path(at("https://h/" + "x" * 5000 + ".pkl")).name) < 255
    monkeypatch.delenv("REFINE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    for named in ("relative", ""):  # which the specification of these folders says to ignore
        monkeypatch.setenv("XDG_CACHE_HOME", named)
        assert cache_path("https://h/net.pkl").is_relative_to(tmp_path / user_cache().relative_to(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert "gan-refine" in str(cache_path("https://h/net.pkl"))


def test_a_cache_that_others_can_write_to(url, tmp_path):
    path = fetch(url("good"))
    for bad in (path, path.parent, tmp_path / "cache"):
        mode = bad.stat().st_mode
        bad.chmod(mode | 0o002)
        message = refusal(lambda: fetch(url("good")))
        assert message.startswith(f"{bad} can be written to by others") and "REFINE_CACHE" in message
        bad.chmod(mode)
    real = path.rename(tmp_path / "real.pkl")
    path.symlink_to(real)
    assert "is a link" in refusal(lambda: fetch(url("good")))
    path.unlink()
    os.mkfifo(path)
    assert "is no regular file" in refusal(lambda: fetch(url("good")))
    path.unlink()
    real.rename(path)
    record = path.with_name("good.pkl.json")
    record.unlink()
    os.mkfifo(record)
    assert "is not a record of a checksum" in refusal(lambda: fetch(url("good")))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("ftp://host/net.pkl", "a ftp:// URL"),
        ("file:///etc/passwd", "a file:// URL"),
        ("https:///net.pkl", "without a host"),
        ("https://host", "without a file"),
        ("https://host/", "without a file"),
        ("https://host:99999/net.pkl", "impossible host or port"),
        ("https://[::1/net.pkl", "impossible host or port"),
        ("https://host/a net.pkl", "white space"),
        ("https://host/\x1b[2Jnet.pkl", "control characters"),
    ],
)
def test_what_is_no_url(text, what):
    message = refusal(lambda: index.resolve(text))
    assert what in message and message.endswith("expected https://host/path/file")


@pytest.fixture
def names(url, tmp_path, monkeypatch):
    """An index of one published generator, `net`, and one teacher, `judge`, whose checksum is known."""
    table = 'kind = "{}", url = "{}", resolution = 32, classes = 10, fid = 2.5, licence = "none"'
    lines = [
        f"net = {{ {table.format('generator', url('good'))} }}",
        f'judge = {{ {table.format("teacher", url("moved"))}, sha256 = "{SHA256}" }}',
    ]
    (tmp_path / "index.toml").write_text("\n".join(lines))
    monkeypatch.setenv("REFINE_PRETRAINED", str(tmp_path))
    return url


def test_names_and_urls_are_resolved(names, server):
    assert index.resolve("net") == index.resolve(names("good")) == cache_path(names("good"))
    assert index.resolve("judge", "teacher").read_bytes() == NET
    assert server.counts["good"] == 2 and server.counts["moved"] == 1  # one of them redirected
    entry = index.read_index()["net"]
    assert (entry.kind, entry.resolution, entry.classes, entry.fid, entry.sha256) == ("generator", 32, 10, 2.5, None)


def test_the_wrong_kind_is_not_downloaded(names, server):
    assert refusal(lambda: load_teacher("net")) == "net is a generator; expected a teacher"
    assert server.counts["good"] == 0


def test_names_do_not_import_torch(names, tmp_path):
    code = (
        "import sys; from refine.checkpoints import resolve\n"
        "slow = {'torch', 'pooch', 'requests'} & set(sys.modules); resolve('net')\n"
        "assert not slow and 'torch' not in sys.modules, slow"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)


def test_refine_from_urls(url, server, tmp_path, capfd):
    """Passwords in --gan and --teacher go nowhere; what a run notes are the files in the cache."""
    for name, networks in {"student": {"G_ema": make_student()}, "teacher": {"ema": make_teacher()}}.items():
        save_networks(tmp_path / name, networks, provenance={})
        server.bodies[name] = (tmp_path / name).read_bytes()
    gan, teacher = (url(name).replace("//", "//bob:hunter2@") for name in ("student", "teacher"))
    options = [f"--gan={gan}", f"--teacher={teacher}", f"--outdir={tmp_path / 'runs'}", "--dry-run", "--json"]
    with pytest.raises(SystemExit) as stop:
        run_command("refine", options)
    captured = capfd.readouterr()
    assert stop.value.code == 0, captured.err
    told = json.loads(captured.out)
    assert (told["gan"], told["teacher"]) == (str(cache_path(gan)), str(cache_path(teacher)))
    assert "student-teacher" in told["run_dir"] and "hunter2" not in captured.out + captured.err
    assert server.counts == {"student": 1, "teacher": 1}


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("resolution = 32", 'resolution = "32"', "needs 'resolution', a int"),
        ("fid = 2.5", "fid = 2", "needs 'fid', a float"),
        ("classes = 10", "classes = true", "needs 'classes', a int"),
        ("classes = 10", "size = 10", "unknown field 'size'"),
        (SHA256, "abc", "not 64 hexadecimal digits"),
    ],
)
def test_a_spoilt_entry(names, tmp_path, old, new, what):
    path = tmp_path / "index.toml"
    path.write_text(path.read_text().replace(old, new))
    assert what in refusal(lambda: index.resolve("net"))


def test_the_published_files(root):
    """The real index: plain https URLs, each once, and plausible facts."""
    index_of = index.read_index(root / "pretrained")
    entries = [entry for entry in index_of.values() if isinstance(entry, index.RemoteEntry)]
    detector = index_of["inception-2015-12-05"]
    assert detector.kind == "classifier" and cache_path(detector.url).name == "pt_inception-2015-12-05-6726825d.pth"
    entries = [entry for entry in entries if entry.kind != "classifier"]
    assert {"stylegan2-ada-cifar10-cond", "stylegan2-ada-cifar10-uncond", "edm-cifar10-cond-vp"} <= index_of.keys()
    assert all(entry.url or entry.where for entry in entries), "where to get it"
    entries = [entry for entry in entries if entry.url]
    assert len({entry.url for entry in entries}) == len(entries) > 100
    for entry in entries:
        assert entry.url.startswith("https://") and cache_path(entry.url).suffix in (".pkl", ".npz", ".pt"), entry
        assert entry.resolution in (16, 32, 64, 128, 256, 512, 1024) and entry.licence, entry
        assert entry.classes in ((None,) if entry.kind == "reference" else (0, 10, 1000)), entry
        assert (entry.classes == 0) == ("uncond" in entry.name) or not entry.name.startswith("edm-"), entry
        assert entry.fid is None or 0.5 < entry.fid < 30, entry
    assert "near to it: edm-cifar10-cond-vp" in refusal(lambda: index.resolve("edm-cifar10-cond-vq"))
    assert "shipped are digits-gan" in refusal(lambda: index.resolve("xyz"))
