"""The recipes of the shipped networks: killed (SIGKILL) and started again, each ends with the very same network."""

import importlib
import os
import signal
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from refine.checkpoints.native import load_networks
from tests.launch import CONTEXT, wait

# Recipe → the method that a step is, the step in which it is killed, and options that make it short.
RECIPES = {
    "train_gan": ("GANTraining.step", 8, ["--kimg=0.04", "--batch=4", "--vae-kimg=0.02", "--snap-kimg=0.02"]),
    "train_teacher": ("TeacherTraining.step", 3, ["--kimg=0.1", "--batch=32", "--snap-kimg=0.05"]),
    "train_classifier": ("DetectorTraining.step", 3, ["--epochs=4", "--batch=20"]),
}


def killed(paths, name, args):
    """Runs a recipe up to its kill; in another process, because it does not survive."""
    sys.path[:0] = paths
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    recipe = shortened(name, setattr)
    method, last, _ = RECIPES[name]
    cls, method = getattr(recipe, method.split(".")[0]), method.split(".")[1]
    step, count = getattr(cls, method), []

    def counted(*given):
        count.append(0)
        return os.kill(os.getpid(), signal.SIGKILL) if len(count) == last else step(*given)

    setattr(cls, method, counted)
    recipe.main(args)


def shortened(name, setattr):
    """The module of a recipe with 110 random images of each class in place of the digits, and without pictures."""
    recipe = importlib.import_module(name)
    images = np.random.RandomState(0).randint(0, 256, (1100, 1, 32, 32)).astype(np.uint8)
    setattr(recipe, "load_digits", lambda: (images, np.arange(1100) % 10))
    torch.set_num_threads(1)
    if name == "train_gan":
        setattr(recipe, "draw", lambda *args: None)
    if name == "train_teacher":
        setattr(recipe, "sample", lambda net: torch.zeros(10, 1, 32, 32))
    return recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_killed_run_goes_on_to_the_same_network(name, root, tmp_path, monkeypatch):
    paths = [str(root), str(root / "pretrained" / "recipes")]
    for path in reversed(paths):
        monkeypatch.syspath_prepend(path)
    recipe, options = shortened(name, monkeypatch.setattr), RECIPES[name][2]
    process = CONTEXT.Process(target=killed, args=(paths, name, [*options, f"--out={tmp_path / 'killed'}"]))
    process.start()
    assert wait([process]) == [-9]
    assert not (tmp_path / "killed").exists()
    for out in ("killed", "straight"):
        result = CliRunner().invoke(recipe.main, [*options, f"--out={tmp_path / out}"])
        assert result.exit_code == 0, result.output
        assert ("going on" in result.output) == (out == "killed")
    for a, b in zip(*(load_networks(tmp_path / out).values() for out in ("killed", "straight")), strict=True):
        for key, value in a.state_dict().items():
            assert torch.equal(value, b.state_dict()[key]), key

    other = ["--seed=7", *options, f"--out={tmp_path / 'killed'}"]  # into the same folder
    result = CliRunner().invoke(recipe.main, other)
    assert isinstance(result.exception, ValueError) and "with --seed=0, but this run asks for" in str(result.exception)


def test_a_step_is_not_the_identity(root, monkeypatch, tmp_path):
    """So equality above means something: another seed gives another network."""
    monkeypatch.syspath_prepend(str(root / "pretrained" / "recipes"))
    recipe, networks = shortened("train_classifier", monkeypatch.setattr), []
    for seed in ("--seed=0", "--seed=1"):
        out = tmp_path / seed
        assert CliRunner().invoke(recipe.main, ["--epochs=1", "--batch=20", seed, f"--out={out}"]).exit_code == 0
        networks.append(load_networks(out)["detector"])
    assert not torch.equal(networks[0].embed.weight, networks[1].embed.weight)


def test_the_loop_reports_and_makes_snapshots_at_every_multiple(root, monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(root / "pretrained" / "recipes"))
    loop = importlib.import_module("loop")

    class Counting(loop.Training):
        PARTS = ()

        def step(self):
            self.nimg += 300
            return {"early" if self.nimg < 2000 else "late": self.nimg / 1000}

    seen, training = [], Counting({"seed": 0}, {})
    loop.train(training, tmp_path, 3000, lambda name: seen.append((name, training.nimg)), 1)
    assert seen == [("000001", 1200), ("000002", 2100), ("000003", 3000)]
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("kimg 0.3 / 3  ") and "early 0.3000" in first
    assert last.startswith("kimg 3.0 / 3  ") and last.endswith("early 1.2000  late 2.5500  0s to go")
    again = Counting({"seed": 0}, {})
    loop.train(again, tmp_path, 3000)
    assert again.nimg == 3000 and capsys.readouterr().err == "going on at 3.0 kimg\n"
    with pytest.raises(ValueError, match="another network than the recipe's"):
        loop.train(Counting({"seed": 0}, {"width": 2}), tmp_path, 3000)
