"""Options that have no part in a run are told, and only these."""

from types import SimpleNamespace

import pytest
import torch

from refine.config import OPTIONS, RefineConfig
from refine.config.needs import NEEDS

PLAIN = SimpleNamespace(noise_modes=()), torch.nn.Linear(1, 1)
RICH = SimpleNamespace(noise_modes=("none",)), torch.nn.Dropout(0.1)

# Name → a value, options beside it with which it has no part, and those with which it has one.
CASES = {
    "gan_kwargs": ({"x": 1}, {"gan": "one-step"}, {}),
    "sid_alpha": (1.2, {}, {"objective": "ikl:0.5+sid:0.5"}),
    "guide": ("g", {}, {"guidance": 2.0}),
    "bank": (100, {"adversarial": 0.0}, {}),
    "sigma_init": (2.5, {"gan": "one-step-gan.pkl"}, {"gan": "one-step:x.pkl"}),
    "average_lengths": ((0.1,), {"average": "ema"}, {}),
    "ema_kimg": (50.0, {}, {"average": "ema"}),
    "ema_rampup": (0.05, {}, {"preset": "cifar10"}),
    "noise_mode": ("random", {}, {}),
    "dropout": (True, {}, {}),
    "cuda_graphs": (True, {"device": "cpu"}, {}),
    "metrics_batch": (10, {"metrics": ()}, {}),
    "ref": ("x.npz", {"metrics": ("is50k",)}, {}),
    "trust_detector": (True, {"metrics": ()}, {}),
    "patience": (2, {"snap": 0}, {}),
}


def config(**options) -> RefineConfig:
    return RefineConfig(**{"gan": "gan.pkl", "teacher": "t", **options})


@pytest.mark.parametrize("name", NEEDS)
def test_an_option_is_named_where_it_has_no_part_and_only_there(name):
    value, idle, used = CASES[name]
    (line,) = config(**{name: value}, **idle).without_part(*PLAIN)
    assert line.startswith(f"--{name.replace('_', '-')} has no part in this run; it needs {NEEDS[name].words}")
    assert config(**{name: value}, **used).without_part(*RICH) == []


def test_nobody_is_told_of_what_he_did_not_choose():
    assert config(average="ema", adversarial=0.0, objective="ikl", metrics=(), device="cpu").without_part(*PLAIN) == []
    saved = config(preset="demo", metrics=()).as_dict()
    assert RefineConfig.from_dict(saved).without_part(*PLAIN) == []  # as in training_options.json, where all stand
    changed = RefineConfig.from_dict({**saved, "sid_alpha": 1.2, "trust_detector": False})
    assert [line.split()[0] for line in changed.without_part(*PLAIN)] == ["--sid-alpha"]


def test_every_rule_is_of_an_option():
    assert NEEDS.keys() == CASES.keys() <= OPTIONS.keys()
