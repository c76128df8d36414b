"""Processes that are stopped, strangers on the port, processes that were not started alike: all end, and say why."""

import contextlib
import functools
import math
import multiprocessing.connection
import os
import signal
import socket
import threading
import time
from datetime import timedelta

import pytest

from refine.torch_utils import distributed
from refine.torch_utils.pulse import within
from tests.launch import free_port, launch_ranks, wait
from tests.torch_utils.test_distributed import STEPS, pair, texts  # noqa: F401 - a fixture

SHORT = timedelta(seconds=4)


def be_impatient():
    distributed.TIMEOUT = distributed.ROLL_CALL = distributed.SILENCE = SHORT


def stop_in_step(rank):
    from refine.training.trainer import Trainer

    be_impatient()
    step = Trainer.step

    def stopped(self):
        if self.nimg == 8 and os.environ["RANK"] == rank:
            os.kill(os.getpid(), signal.SIGSTOP)
        step(self)

    Trainer.step = stopped


def stop_rank_0():
    stop_in_step("0")


def stop_rank_1():
    stop_in_step("1")


def stop_rank_0_while_saving():
    """Where the others wait without a limit."""
    from refine.training import snapshots

    be_impatient()
    if os.environ["RANK"] == "0":
        snapshots.save_networks = lambda *_, **__: os.kill(os.getpid(), signal.SIGSTOP)


def be_slow_to_save():
    from refine.training import snapshots

    be_impatient()
    save = snapshots.save_networks

    def slow(*args, **kwargs):
        time.sleep(2.5 * SHORT.total_seconds())
        save(*args, **kwargs)

    snapshots.save_networks = slow


def test_a_stopped_rank_ends_the_others(pair, tmp_path):  # noqa: F811
    """With the limit of 44 s cut to 8 s; what is beyond it has to be far below the 16 s that make 60. All at once."""
    started = []
    for prepare, stopped in [(stop_rank_0, 0), (stop_rank_1, 1), (stop_rank_0_while_saving, 0)]:
        folder = tmp_path / prepare.__name__
        folder.mkdir()
        started.append((stopped, *launch_ranks([*pair, *STEPS, f"--outdir={folder}"], folder, 2, prepare)))
    for stopped, processes, logs in started:
        other = processes[1 - stopped]
        other.join(60)
        code = other.exitcode
        os.kill(processes[stopped].pid, signal.SIGCONT)
        codes = wait(processes, 30)
        assert code == 2 and codes[stopped] not in (None, 0), texts(logs)
        last = logs[1 - stopped].read_text().splitlines()[-1]
        assert last.startswith(f"Error: rank {1 - stopped} lost another process"), texts(logs)


def tell_when_waiting(folder):
    meet, rank = distributed._meet, os.environ["RANK"]

    def told(*args):
        (folder / f"rank{rank}.waiting").touch()
        return meet(*args)

    distributed._meet = told


def die_at_the_door(folder):
    """Rank 1 is there, and is gone before it counts in the store; rank 2 comes late."""
    tell_when_waiting(folder)
    if os.environ["RANK"] == "1":
        connected = distributed._connected

        def die(mine):
            connected(mine).set("here/1", "")
            os.kill(os.getpid(), signal.SIGKILL)

        distributed._connected = die
    if os.environ["RANK"] == "2":
        time.sleep(30)


def seconds_waited(processes, waiting):
    """How long each of some processes lived after it touched its file, until all have ended."""
    left, seconds = {process.sentinel: file for process, file in zip(processes, waiting, strict=True)}, {}
    deadline = time.monotonic() + 150
    while left and time.monotonic() < deadline:
        for sentinel in multiprocessing.connection.wait(list(left), 1):
            file = left.pop(sentinel)
            seconds[file] = time.time() - file.stat().st_mtime
    return [seconds.get(file, math.inf) for file in waiting]


def test_a_rank_that_never_joins_ends_the_others_within_60_seconds(pair, tmp_path):  # noqa: F811
    """With the limits as they are: the second or the first of two was never started; the second of three was killed."""
    args, processes, logs = [*pair, *STEPS, "--batch=6", f"--outdir={tmp_path}/out"], [], []
    for count, ranks, prepare in [(2, [0], tell_when_waiting), (2, [1], tell_when_waiting), (3, None, die_at_the_door)]:
        folder = tmp_path / str(len(logs))
        folder.mkdir()
        started, files = launch_ranks(args, folder, count, functools.partial(prepare, folder), ranks)
        processes += started
        logs += files if ranks is None else [files[rank] for rank in ranks]
    seconds = seconds_waited(processes, [log.with_suffix(".waiting") for log in logs])
    assert max(seconds) < 60, (seconds, texts(logs))
    assert wait(processes, 1) == [2, 2, 2, -9, 2], texts(logs)
    assert "rank 1 of 2 did not come within 40 s" in logs[0].read_text()
    assert "rank 1 got no answer of rank 0" in logs[1].read_text()
    assert all(log.read_text().count("Error: rank") == 1 for log in (logs[2], logs[4])), texts(logs)
    assert not (tmp_path / "out").exists()


def test_a_slow_rank_that_is_alive_is_waited_for(pair, tmp_path):  # noqa: F811
    processes, logs = launch_ranks(
        [*pair, *STEPS, "--kimg=0.016", f"--outdir={tmp_path}"], tmp_path, 2, be_slow_to_save
    )
    assert wait(processes) == [0, 0], texts(logs)


@pytest.mark.parametrize("ranks", [[0, 1], [1]])
def test_a_stranger_on_the_port_is_told(pair, tmp_path, ranks):  # noqa: F811
    """It takes connections and says nothing, as a program that waits for its clients to begin."""
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen(20)
        connections = []

        def accept():
            with contextlib.suppress(OSError):  # closed at the end
                while True:
                    connections.append(stranger.accept())

        threading.Thread(target=accept, daemon=True).start()
        args = [*pair, *STEPS, f"--outdir={tmp_path}/out"]
        processes, logs = launch_ranks(args, tmp_path, 2, be_impatient, ranks, stranger.getsockname()[1])
        codes = wait(processes, 45)
        stranger.shutdown(socket.SHUT_RDWR)
    assert codes == [2] * len(ranks), texts(logs)
    assert "rank 1 got no answer of rank 0" in logs[1].read_text() and "listens there" in logs[1].read_text()
    if 0 in ranks:
        assert "address already in use" in logs[0].read_text().lower()
    assert not (tmp_path / "out").exists()


def launch_unlike(first, second, tmp_path, prepare=be_impatient):
    port = free_port()
    (zero,), logs = launch_ranks(first, tmp_path, 2, prepare, [0], port)
    (one,), _ = launch_ranks(second, tmp_path, 2, prepare, [1], port)
    return wait([zero, one], 45), logs


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("--lr=0.002", "--lr differs between processes: 0.001 on rank 0, 0.002 on rank 1"),
        ("--gan={}", "the sha256 of --gan differs between processes: "),
    ],
)
def test_what_differs_between_processes_is_told_before_training(pair, tmp_path, change, line):  # noqa: F811
    from refine.checkpoints.native import save_networks
    from tests.training.test_trainer import make_student

    save_networks(tmp_path / "other.safetensors", {"G_ema": make_student(seed=9)}, provenance={})
    args = [*pair, *STEPS, f"--outdir={tmp_path}/out"]
    codes, logs = launch_unlike(args, [*args, change.format(tmp_path / "other.safetensors")], tmp_path)
    assert codes == [2, 1], texts(logs)
    (told,) = logs[0].read_text().splitlines()
    assert told.startswith(f"Error: {line}"), told
    assert logs[1].read_text() == "" and not (tmp_path / "out").exists()


def test_what_only_one_rank_finds_wrong_reaches_the_first(pair, tmp_path):  # noqa: F811
    args = [*pair, *STEPS, f"--outdir={tmp_path}/out"]
    codes, logs = launch_unlike(args, [*args, "--device=cuda:77"], tmp_path)
    assert None not in codes and 0 not in codes, texts(logs)
    assert "--device" in logs[1].read_text()
    assert "another process failed; rank 1 on " in logs[0].read_text() and "--device" in logs[0].read_text()


def test_a_call_is_left_to_itself_when_it_takes_too_long():
    assert within(5, lambda: 3) == 3
    with pytest.raises(KeyError):
        within(5, {}.__getitem__, "x")
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="no answer"):
        within(0.1, time.sleep, 5)
    assert time.monotonic() - start < 2
