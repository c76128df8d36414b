"""Options and presets, from Python and from the command line's texts."""

import json
import re

import pytest

from refine.cli.refine_cmd import make_config
from refine.config import CHANGEABLE, OPTIONS, PRESETS, WARMUP_STEPS, RefineConfig, SigmaOptions
from refine.config.option import GROUPS, flag


def config(**kwargs):
    return RefineConfig(gan="g", teacher="t", **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "flag"),
    [
        ({"kimg": 0.0}, "--kimg"),
        ({"kimg": 1e300}, "--kimg"),
        ({"batch": 10**400}, "--batch"),
        ({"label_dist": (1e20, 1.0)}, "--label-dist"),
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
        ({"metrics": ("fd2k-digits",), "ref": None}, "--metrics"),
        ({"metrics": "fd2k-digits", "ref": "r"}, "--metrics"),
        ({"kimg": "many"}, "--kimg"),
        ({"kimg": None}, "--kimg"),
        ({"compile": "yes"}, "--compile"),
        ({"label_dist": (0.0, 0.0)}, "--label-dist"),
        ({"batch": 8, "batch_gpu": 4, "reuse_batch": True}, "--batch-gpu"),
        ({"patience": 1, "metrics": ()}, "--patience"),
        ({"preset": "fast"}, "--preset"),
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


def test_a_run_measures_itself_unless_it_is_told_not_to():
    for preset in ("default", "cifar10", "one-step"):
        c = config(preset=preset)
        assert (c.metrics, c.ref, c.patience) == (("fd2k-teacher",), "teacher", 4)
    assert config(metrics=()).patience == 0 and config(preset="demo").ref == "digits-reference"
    assert config(metrics=("fd1k-digits",)).ref == "teacher"


def test_older_runs_measure_what_they_measured():
    saved = config().as_dict()
    for name in ("metrics", "ref", "patience"):
        del saved[name]
    old = RefineConfig.from_dict(saved)
    assert (old.metrics, old.ref, old.patience) == ((), None, 0)


def test_step_counts_and_schedules():
    assert config(kimg=1.0, batch=300).warmup_steps == 4 and config().warmup_steps == WARMUP_STEPS
    c = config(kimg=1.0, batch=300, aux_warmup_kimg=0.5)
    assert (c.num_steps, c.warmup_steps) == (4, 2)
    assert config(kimg=1, lr_schedule="constant").lr_factor(700) == 1
    assert config(kimg=1, lr_schedule="linear").lr_factor(750) == pytest.approx(0.25)
    cosine = config(kimg=1, lr_schedule="cosine")
    assert [cosine.lr_factor(n) for n in (0, 500, 1000, 2000)] == pytest.approx([1, 0.5, 0, 0])
    ramp = config(kimg=10, batch=100, lr_rampup_kimg=1.0)
    assert [ramp.lr_factor(n) for n in (0, 400, 900, 5000)] == pytest.approx([0.1, 0.5, 1, 1])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid_and_holds_what_differs(preset):
    c = config(preset=preset)
    assert c == make_config({"gan": "g", "teacher": "t", "preset": preset}) and c.preset == preset
    for name, known in OPTIONS.items():
        if name in PRESETS[preset]:
            assert getattr(c, name) == PRESETS[preset][name] != known.default
        elif name not in ("gan", "teacher", "preset"):
            assert getattr(c, name) == known.default


def test_a_given_argument_wins_over_the_preset_even_where_it_is_the_default():
    c = config(preset="demo", batch=64, ema_rampup=0.05, metrics=(), sigma={"sigma_max": 10.0})
    assert (c.batch, c.ema_rampup, c.metrics, c.tick) == (64, 0.05, (), PRESETS["demo"]["tick"])
    assert c.sigma == SigmaOptions(P_mean=OPTIONS["sigma"].default.P_mean, sigma_max=10.0)


def test_a_saved_run_keeps_its_values_when_its_preset_changes_or_goes(monkeypatch):
    saved = json.loads(json.dumps(config(preset="demo", batch=8).as_dict()))
    original = RefineConfig.from_dict(saved)
    monkeypatch.setitem(PRESETS, "demo", {"kimg": 1.0, "keep_distances": 0.5})
    assert RefineConfig.from_dict(saved) == original
    del saved["keep_distances"]  # as if from a version that did not know it
    assert RefineConfig.from_dict(saved) == original
    monkeypatch.setattr("refine.config.PRESETS", {name: PRESETS[name] for name in PRESETS if name != "demo"})
    assert RefineConfig.from_dict(saved) == original


def test_every_option_is_documented_and_known_elsewhere_by_one_name():
    aliases = [alias for known in OPTIONS.values() for alias in known.aliases]
    assert len(aliases) == len(set(aliases)) and not {f"--{alias}" for alias in aliases} & set(map(flag, OPTIONS))
    for name, known in OPTIONS.items():
        assert known.help.endswith(".") and known.group in GROUPS, name


def test_docs_name_what_can_be_changed(root):
    text = (root / "docs" / "runs.md").read_text()
    listed = re.search(r"options can be changed with `--resume`:(.*?); `--outdir`\s+says", text, re.DOTALL).group(1)
    assert set(re.findall(r"`(--[a-z-]+)`", listed)) == set(map(flag, CHANGEABLE))


def test_given_options_win_over_the_preset():
    c = make_config({"gan": "g", "teacher": "t", "preset": "demo", "batch": 8, "sigma": "karras:5", "metrics": "none"})
    assert (c.batch, c.sigma.name, c.sigma.rho, c.metrics) == (8, "karras", 5.0, ())
    assert c.aux_sigma == OPTIONS["aux_sigma"].default and c.tick == PRESETS["demo"]["tick"]


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
        ({"aux_sigma_range": "low,high"}, "--aux-sigma-range: "),
        ({"betas": "0.9"}, "--betas: "),
        ({"kimg": "many"}, "--kimg: "),
        ({"batch": "1.5"}, "--batch: "),
        ({"objective": "ikl+"}, "--objective: "),
        ({"dropout": "perhaps"}, "--dropout: "),
        ({"label_dist": "[[1]]"}, "--label-dist: "),
        ({"time_limit": "1:2:3:4"}, "--time-limit: "),
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
