"""A run outlives what it prints to."""

import contextlib
import errno
import functools
import os
import signal
import subprocess
import sys
import termios
import time
import tty

import pytest
from tqdm import tqdm

from refine.training import streams
from refine.training.finding import training_states
from refine.training.state import load_training_state
from refine.training.stopping import StopRequests
from refine.training.streams import lasting_streams
from tests.launch import launch, wait
from tests.training.test_survival import OPTIONS, pair, steps_done, wait_until  # noqa: F401 - a fixture


def reader_that_left():
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)


def full_disk():
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def nothing_is_left():
    reader_that_left()
    os.dup2(1, 2)


def fill(file):
    os.set_blocking(file, False)
    for size in (1000, 1):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(file, b"x" * size)
    os.set_blocking(file, True)


def stopped_reader():
    streams.PATIENCE = 1
    _, write = os.pipe()  # both ends stay open here, and nobody reads
    fill(write)
    os.dup2(write, 1)


def stopped_reader_of_both():
    stopped_reader()
    os.dup2(1, 2)


def stopped_terminal():
    streams.PATIENCE = 1
    _, terminal = os.openpty()
    termios.tcflow(terminal, termios.TCOOFF)  # Ctrl-S
    os.dup2(terminal, 1)
    os.dup2(terminal, 2)


def terminal_that_is_not_read():
    streams.PATIENCE = 1
    _, terminal = os.openpty()
    tty.setraw(terminal)
    fill(terminal)
    os.dup2(terminal, 1)
    os.dup2(terminal, 2)


def reader_that_stops_at_a_line():
    """The signal arrives while that line is being waited for."""
    from refine.training.trainer import Trainer

    _, write = os.pipe()
    os.dup2(write, 1)
    os.dup2(write, 2)
    step = Trainer.step

    def stepped(self):
        step(self)
        fill(write)

    Trainer.step = stepped


STUCK = [stopped_reader, stopped_reader_of_both, stopped_terminal, terminal_that_is_not_read]


@pytest.mark.parametrize("prepare", [reader_that_left, full_disk, nothing_is_left, *STUCK])
def test_a_run_whose_output_is_lost_comes_to_its_end(pair, tmp_path, prepare):  # noqa: F811
    log = tmp_path / "log.txt"
    assert wait([launch([*pair, *OPTIONS, f"--outdir={tmp_path}/out"], log, prepare=prepare)]) == [0], log.read_text()
    run_dir = tmp_path / "out" / "00000-x"
    text = (run_dir / "log.txt").read_text()
    assert "tick 7" in text and text.splitlines()[-1].startswith("done;")
    assert load_training_state(training_states(run_dir)[0])["nimg"] == 60
    assert log.read_text().count("stdout is lost") == (prepare in (reader_that_left, full_disk))
    assert log.read_text().count("stdout is not read") == (prepare is stopped_reader)
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_ctrl_c_that_takes_tee_along_saves_the_state(pair, tmp_path, number, code):  # noqa: F811
    log, run_dir = tmp_path / "log.txt", tmp_path / "out" / "00000-x"
    options = [*pair, *OPTIONS, "--kimg=100", "--snap=0", f"--outdir={tmp_path}/out"]
    process = launch(options, log, prepare=nothing_is_left)
    wait_until(lambda: steps_done(run_dir) > 0, process)
    os.kill(process.pid, number)
    assert wait([process]) == [code], log.read_text()
    assert "stopped; saved at" in (run_dir / "log.txt").read_text().splitlines()[-1]
    assert load_training_state(training_states(run_dir)[0])["nimg"] > 0


@pytest.mark.parametrize(
    ("prepare", "number"),
    [
        *((prepare, signal.SIGTERM) for prepare in STUCK),
        *((reader_that_stops_at_a_line, number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)),
    ],
)
def test_one_signal_saves_the_state_and_ends_a_run_whose_output_is_not_read(pair, tmp_path, prepare, number):  # noqa: F811
    log, run_dir = tmp_path / "log.txt", tmp_path / "out" / "00000-x"
    options = [*pair, *OPTIONS, "--kimg=100", "--snap=0", f"--outdir={tmp_path}/out"]
    process = launch(options, log, prepare=prepare)
    wait_until(lambda: steps_done(run_dir), process)
    os.kill(process.pid, number)
    assert wait([process], 30) == [128 + number], log.read_text()
    assert "stopped; saved at" in (run_dir / "log.txt").read_text().splitlines()[-1]
    assert load_training_state(training_states(run_dir)[0])["nimg"] > 0


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequests() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_state_is_there_before_the_line_of_its_tick(pair, tmp_path):  # noqa: F811
    """Whatever happens to a run while it prints the line, such as a SIGKILL: what came before it is saved."""
    from refine.training import run_dir as module
    from tests.training.test_trainer import make_run, run

    seen, training = [], make_run(tmp_path)
    log = module.RunDir.log

    def watched(self, line):
        if line.startswith("tick"):
            nimg = round(float(line.split("kimg")[1].split()[0]) * 1000)
            seen.append((load_training_state(training_states(tmp_path)[0])["nimg"], nimg))
        log(self, line)

    training.run_dir.log = functools.partial(watched, training.run_dir)
    run(training)
    assert [state for state, _ in seen] == [8, 16, 24]


class Broken:
    def __init__(self, error):
        self.error, self.calls = error, 0

    def write(self, text):
        self.calls += 1
        raise self.error

    def flush(self):
        raise self.error

    def fileno(self):
        raise OSError

    def isatty(self):
        return True


@pytest.mark.parametrize(
    "error", [BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError(5, "I/O"), ValueError("closed")]
)
def test_a_lost_stream_is_tried_once(monkeypatch, error):
    broken = Broken(error)
    monkeypatch.setattr(sys, "stdout", broken)
    monkeypatch.setattr(sys, "stderr", Broken(error))
    with lasting_streams():
        for _ in range(3):
            print("line", flush=True)
            print("line", file=sys.stderr, flush=True)
        assert sys.stdout.isatty()
    assert sys.stdout is broken and broken.calls == 1


def test_what_is_read_late_is_told_how_much_it_missed(monkeypatch, capsys):
    monkeypatch.setattr(streams, "PATIENCE", 0.3)
    reader, writer = os.pipe()
    fill(writer)
    with open(writer, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        start = time.monotonic()
        with lasting_streams():
            for line in range(100):
                print(line)
            assert time.monotonic() - start < 2
            os.set_blocking(reader, False)
            with contextlib.suppress(BlockingIOError):
                while os.read(reader, 4096).strip(b"x") != b"0\n":
                    time.sleep(0.001)
            time.sleep(0.1)
            print("on time")
    with open(reader, encoding="utf-8") as stream:
        assert stream.read() == "… 99 lines were not printed …\non time\n"
    assert capsys.readouterr().err.count("stdout is not read: the run goes on") == 1


@pytest.mark.parametrize("unbuffered", [[], ["-u"]])
def test_lines_arrive_whole_and_in_order(unbuffered):
    code = "import sys\nfrom refine.training.streams import lasting_streams\n"
    code += "print('before')\nwith lasting_streams():\n    [print(i) for i in range(50)]\n    print('…', end='')\n"
    code += "print('after')\n"
    env = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, *unbuffered, "-c", code]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", env=env, check=False)
    assert result.stderr == "" and result.stdout.splitlines() == ["before", *map(str, range(50)), "…after"]


def test_a_progress_bar_leaves_its_line_before_the_next_one_is_printed(monkeypatch):
    terminal, writer = os.openpty()
    tty.setraw(writer)
    with os.fdopen(os.dup(writer), "w") as out, os.fdopen(os.dup(writer), "w") as err, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        with lasting_streams():
            with tqdm(total=3, leave=False, ncols=40, nrows=24, disable=None):
                pass
            print("the line", flush=True)
        shown = ""
        while "the line" not in shown:
            shown += os.read(terminal, 4096).decode()
    assert "0/3" in shown and shown.rpartition("\r")[2] == "the line\n"


def test_nothing_complains_at_exit():
    code = "import sys\nfrom refine.training.streams import lasting_streams\nwith lasting_streams():\n    print('x')"
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert result.returncode == 0 and result.stderr.splitlines()[-1].startswith("stdout is lost (No space left"), result
