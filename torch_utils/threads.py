"""How many threads torch should use on a CPU."""

import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch


def set_threads() -> None:
    """Give torch `sensible_threads`, where that is fewer than it chose by itself."""
    torch.set_num_threads(min(torch.get_num_threads(), sensible_threads()))


def sensible_threads(environ: Mapping[str, str] = os.environ, cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Threads for this process: what the user says, else its share of the processors that it may run on.

    torch counts the machine's cores. In a container with a quota, threads beyond it only wait for each other; several
    processes on one machine (torchrun) share its cores.

    Args:
        environ: OMP_NUM_THREADS wins, if it is a number; LOCAL_WORLD_SIZE is torchrun's number of processes here.
        cgroup: Where Linux shows the process's control group, version 2 (`cpu.max`) or 1 (`cpu/cpu.cfs_*_us`).
    """
    if (asked := environ.get("OMP_NUM_THREADS", "")).isdecimal() and int(asked) > 0:
        return int(asked)
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(affinity, _quota(cgroup))
    processes = environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(cores) // (int(processes) if processes.isdecimal() and int(processes) else 1))


def _quota(cgroup: Path) -> float:
    """Processors that the control group may use, at least one; infinite without a limit."""
    try:
        if (file := cgroup / "cpu.max").exists():
            quota, period = file.read_text().split()
        else:
            quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        share = float(quota) / float(period)  # "max" in version 2, −1 in version 1: no limit
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
    return max(1.0, share) if share > 0 else math.inf
