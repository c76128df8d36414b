"""Presets: what differs from the defaults for a kind of run, with the reason."""

from typing import Any

from refine.config.kinds import SigmaOptions

# The published distillation settings (Luo et al. 2023), with nothing that was found here.
_PUBLISHED: dict[str, Any] = {
    "kimg": 5000.0,  # the length of the runs is not published there
    "batch": 128,
    "lr": 1e-5,
    "aux_lr": 1e-5,
    "aux_betas": (0.0, 0.999),
    "aux_steps": 1,
    "aux_warmup_kimg": 0.0,
    "sigma": SigmaOptions(),
    "aux_sigma": SigmaOptions(),
    "objective": "ikl",
    "clamp": False,
    "adversarial": 0.0,
    "average": "ema",
    "ema_kimg": 500.0,
    "tick": 50.0,  # 100 progress lines in so long a run
    "snap": 10,
}

# What every run of the shipped digits takes beside the defaults: it is so short that it needs its own clock, and there
# are real digits to measure it by.
_DIGITS: dict[str, Any] = {
    "batch": 32,  # twice the steps for the same time
    "adversarial": 0.0,  # drawing the teacher's images would take longer than the run
    "tick": 0.32,
    "metrics": ("fd2k-digits",),
    "ref": "digits-reference",
}

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "cifar10": _PUBLISHED,  # the nearest known proxy for refinement at 32×32
    "one-step": _PUBLISHED,  # for --gan=one-step; the default sigma_init is that of SiD (Zhou et al. 2024)
    "demo": {**_DIGITS, "kimg": 6.4},  # the shipped digits pair
    # For --gan=one-step with the shipped teacher. It starts next to the mean image of a class, and has all its variety
    # to learn.
    "one-step-demo": {**_DIGITS, "kimg": 12.8},
}
