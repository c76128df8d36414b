"""Options, presets, and what the command line makes of them."""

import json

import pytest

from refine.cli.refine_cmd import make_config
from refine.config import PRESETS, RefineConfig, SigmaOptions


def config(**kwargs):
    return RefineConfig(gan="g", teacher="t", **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "flag"),
    [
        ({"kimg": 0.0}, "--kimg"),
        ({"kimg": float("nan")}, "--kimg"),
        ({"batch": -1}, "--batch"),
        ({"batch_gpu": 0}, "--batch-gpu"),
        ({"lr": -1.0}, "--lr"),
        ({"aux_lr": float("inf")}, "--aux-lr"),
        ({"betas": (0.5, 1.0)}, "--betas"),
        ({"aux_steps": 0}, "--aux-steps"),
        ({"ema_rampup": 0.0}, "--ema-rampup"),
        ({"tick": 0.0}, "--tick"),
        ({"snap": -1}, "--snap"),
        ({"seed": -1}, "--seed"),
        ({"lr_schedule": "step"}, "--lr-schedule"),
        ({"train": "head"}, "--train"),
        ({"noise_mode": "fresh"}, "--noise-mode"),
        ({"metrics": ("fd2k-digits",)}, "--metrics"),
    ],
)
def test_impossible_options_name_their_flag(kwargs, flag):
    with pytest.raises(ValueError, match=f"^{flag}"):
        config(**kwargs)


def test_options_survive_json():
    original = config(sigma=SigmaOptions("karras", rho=5.0), betas=(0.5, 0.9), metrics=("fd1k-digits",), ref="r.npz")
    assert RefineConfig.from_dict(json.loads(json.dumps(original.as_dict()))) == original
    with pytest.raises(ValueError, match="surprise"):
        RefineConfig.from_dict({"gan": "g", "teacher": "t", "surprise": 1})


def test_step_counts_and_schedules():
    c = config(kimg=1.0, batch=300, aux_warmup_kimg=0.5)
    assert (c.num_steps, c.warmup_steps) == (4, 2)
    assert config(kimg=1, lr_schedule="constant").lr_factor(700) == 1
    assert config(kimg=1, lr_schedule="linear").lr_factor(750) == pytest.approx(0.25)
    cosine = config(kimg=1, lr_schedule="cosine")
    assert [cosine.lr_factor(n) for n in (0, 500, 1000, 2000)] == pytest.approx([1, 0.5, 0, 0])
    ramp = config(kimg=10, batch=100, lr_rampup_kimg=1.0)
    assert [ramp.lr_factor(n) for n in (0, 400, 900, 5000)] == pytest.approx([0.1, 0.5, 1, 1])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid(preset):
    c = make_config({"gan": "g", "teacher": "t", "preset": preset})
    assert c.preset == preset
    for name, value in PRESETS[preset].items():
        assert getattr(c, name) == value


def test_given_options_win_over_the_preset():
    c = make_config({"gan": "g", "teacher": "t", "preset": "demo", "batch": 8, "sigma": "karras:5", "metrics": "none"})
    assert (c.batch, c.sigma.name, c.sigma.rho, c.metrics) == (8, "karras", 5.0, ())
    assert c.aux_sigma == PRESETS["demo"]["aux_sigma"]


def test_sigma_options():
    given = {"gan": "g", "teacher": "t"}
    c = make_config({**given, "sigma": "lognormal:-0.5,2", "sigma_range": "0.01,10", "aux_sigma": "loguniform"})
    assert c.sigma == SigmaOptions(P_mean=-0.5, P_std=2.0, sigma_min=0.01, sigma_max=10.0)
    assert c.aux_sigma.name == "loguniform"


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        ({"sigma": "gaussian"}, "--sigma: "),
        ({"sigma": "lognormal:1"}, "--sigma: "),
        ({"aux_sigma": "karras:x"}, "--aux-sigma: "),
        ({"sigma_range": "1"}, "--sigma-range: "),
        ({"betas": "0.9"}, "--betas: "),
    ],
)
def test_words_that_cannot_be_read_name_their_flag(given, flag):
    with pytest.raises(ValueError, match=f"^{flag}"):
        make_config({"gan": "g", "teacher": "t", **given})


@pytest.mark.parametrize("missing", ["gan", "teacher"])
def test_missing_files_are_named(missing):
    given = {"gan": "g", "teacher": "t"}
    del given[missing]
    with pytest.raises(ValueError, match=f"^--{missing} is missing"):
        make_config(given)
