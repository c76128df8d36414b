"""Presets: what differs from the defaults for a kind of run, with the reason."""

from typing import Any

from refine.config.kinds import SigmaOptions

# The published distillation settings (Luo et al. 2023). What is published besides are the defaults: Adam (0, 0.999),
# EMA ramp-up 5 %, ln σ ~ N(−1.2, 1.2²), one auxiliary step.
_PUBLISHED: dict[str, Any] = {
    "kimg": 5000.0,  # the length of the runs is not published there
    "batch": 128,
    "lr": 1e-5,
    "aux_lr": 1e-5,
    "average": "ema",
    "ema_kimg": 500.0,
    "tick": 50.0,  # 100 progress lines in so long a run
}

# What every run of the shipped digits takes: it is so short that it needs its own clock, and can measure itself.
_DIGITS: dict[str, Any] = {
    "batch": 32,
    "aux_betas": (0.9, 0.999),
    "aux_sigma": SigmaOptions(P_mean=-0.4),  # digits want coarser noise than photographs
    "lr_schedule": "cosine",  # a short run ends on a small rate
    "average": "ema",  # the settings were found with it
    "ema_rampup": None,  # in so short a run the ramp-up would leave next to no averaging
    "tick": 0.32,
    "snap": 5,
    "metrics": ("fd2k-digits",),
    "ref": "digits-reference",
}

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "cifar10": _PUBLISHED,  # the nearest known proxy for refinement at 32×32
    "one-step": _PUBLISHED,  # for --gan=one-step; the default sigma_init is that of SiD (Zhou et al. 2024)
    "demo": {  # the shipped digits pair
        **_DIGITS,
        "kimg": 2.56,  # precision falls again afterwards (README, "When it does not help")
        "lr": 1.5e-3,  # a small student needs larger rates than a CIFAR-10 one
        "aux_lr": 1.5e-3,
        "sigma": SigmaOptions(P_mean=0.4),  # digits want coarser noise than photographs
        "aux_warmup_kimg": 3.2,  # aux starts as the teacher, and the gradient is worth nothing before it follows
        "ema_kimg": 0.6,
    },
    # For --gan=one-step with the shipped teacher. It starts next to the mean image of a class, and has all its variety
    # to learn. That takes an aux that is ahead of the student: three steps at ten times the rate. With one step recall
    # stays lower; with one step and a student three times as fast, it draws one image per class (docs/objectives.md).
    "one-step-demo": {
        **_DIGITS,
        "kimg": 12.8,
        "aux_lr": 1e-3,
        "aux_steps": 3,
        "aux_warmup_kimg": 1.6,
        "sigma": SigmaOptions("karras", sigma_max=24.4),  # SiD's
        "ema_kimg": 1.2,
    },
}
