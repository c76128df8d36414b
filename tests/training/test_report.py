"""The progress line of a tick, and its scalars."""

import dataclasses
import math

from refine.training.report import TickReport

REPORT = TickReport(
    tick=3,
    nimg=12_000,
    images=4_000,
    remaining=8_000,
    elapsed=120.0,
    seconds=40.0,
    processor_seconds=20.0,
    lr=1e-4,
    aux_lr=2e-4,
    means={"Loss/aux": 55.5, "Gap/class_0": 0.1},
    skipped={"student": 0, "aux": 2},
    memory={"cpumem": 1.5},
)


def test_the_line_says_how_fast_and_how_long():
    line = " ".join(REPORT.line().split())
    assert line == (
        "tick 3 kimg 12.0 time 2m 00s sec/tick 40.0 sec/kimg 10.00 img/s 100.0 ETA 1m 20s loss aux 55.5 cpumem 1.50 "
        "skipped aux steps 2"
    )
    assert "loss aux nan" in dataclasses.replace(REPORT, means={}).line()


def test_scalars_are_the_means_and_what_is_known_of_the_tick():
    assert REPORT.scalars() == {
        "Loss/aux": 55.5,
        "Gap/class_0": 0.1,
        "Progress/lr": 1e-4,
        "Progress/aux_lr": 2e-4,
        "Progress/skipped_student_steps": 0.0,
        "Progress/skipped_aux_steps": 2.0,
        "Timing/img_per_sec": 100.0,
        "Timing/sec_per_tick": 40.0,
        "Timing/total_hours": 120 / 3600,
        "Timing/cpu_sec_per_kimg": 5.0,
        "Resources/peak_cpumem_gb": 1.5,
    }
    assert all(math.isfinite(value) for value in REPORT.scalars().values())
