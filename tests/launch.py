"""Processes of their own, forked from one that has imported everything: a tenth of a second each.

The commands import torch when they need it, so that importing one of them is not enough: without what is named here
every process would spend three seconds on it.
"""

import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as `run_command` does before it loads torch

import torch
import torch._dynamo  # torch's optimisers import it

from refine import evaluation  # noqa: F401
from refine.cli.main import run_command
from refine.training import assemble, fakes  # noqa: F401

# On a GPU the first calls of a process load and compile kernels: half a minute with empty caches, more beside others.
PATIENCE = 5 if torch.cuda.is_available() else 1

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.launch"])


def launch(args, log: Path, environment: dict[str, str] | None = None, prepare=None, command: str = "refine"):
    """Start a command, such as `python refine.py *args`; what it prints goes to `log`. `prepare` runs in it before."""
    arguments = (command, [str(arg) for arg in args], str(log), environment or {}, prepare)
    process = CONTEXT.Process(target=_main, args=arguments)
    process.start()
    return process


def launch_ranks(args, folder: Path, count: int, prepare=None, ranks=None, port=None, command: str = "refine"):
    """The processes that torchrun would start on one machine, and the logs they write; `prepare` gets the rank."""
    port = port or free_port()
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    logs = [folder / f"rank{rank}.txt" for rank in range(count)]
    processes = [
        launch(args, logs[rank], {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, prepare, command)
        for rank in (range(count) if ranks is None else ranks)
    ]
    return processes, logs


def wait(processes, seconds: float = 60) -> list[int | None]:
    """Exit codes; None for what still ran after so many seconds (times PATIENCE), and is ended now."""
    deadline = time.monotonic() + PATIENCE * seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.exitcode is None:
            process.kill()
            process.join()
    return codes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _main(command: str, args: list[str], log: str, environment: dict[str, str], prepare) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    fakes.WIDTH = fakes.HEIGHT = 1  # as in tests/conftest.py
    if prepare is not None:
        prepare()
    run_command(command, args)
