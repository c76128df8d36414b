"""A run outlives what it prints to."""

import errno
import functools
import os
import signal
import subprocess
import sys

import pytest

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


@pytest.mark.parametrize("prepare", [reader_that_left, full_disk, nothing_is_left])
def test_a_run_whose_output_is_lost_comes_to_its_end(pair, tmp_path, prepare):  # noqa: F811
    log = tmp_path / "log.txt"
    assert wait([launch([*pair, *OPTIONS, f"--outdir={tmp_path}/out"], log, prepare=prepare)]) == [0], log.read_text()
    run_dir = tmp_path / "out" / "00000-x"
    text = (run_dir / "log.txt").read_text()
    assert "tick 7" in text and text.splitlines()[-1].startswith("done;")
    assert load_training_state(training_states(run_dir)[0])["nimg"] == 60
    assert log.read_text().count("stdout is lost") == (prepare is not nothing_is_left)
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


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequests() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_state_is_there_before_the_line_of_its_tick(pair, tmp_path):  # noqa: F811
    """A reader that does not read stops the run at a line; what came before it is saved."""
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


def test_nothing_complains_at_exit():
    code = "import sys\nfrom refine.training.streams import lasting_streams\nwith lasting_streams():\n    print('x')"
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert result.returncode == 0 and result.stderr.splitlines()[-1].startswith("stdout is lost (No space left"), result
