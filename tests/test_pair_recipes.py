"""The recipes that make networks for pairs that differ: without training, or without labels."""

import importlib

import pytest
import torch
from click.testing import CliRunner

from refine.checkpoints import load_generator, load_teacher
from refine.networks.edm import EDMPrecond
from tests.test_recipes import shortened

SIZES = {"img_resolution": 8, "img_channels": 1, "label_dim": 3, "model_channels": 8, "channel_mult": [1, 2]}


@pytest.fixture
def recipe(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "pretrained" / "recipes"))
    return importlib.import_module


@pytest.mark.parametrize("model_type", ["SongUNet", "DhariwalUNet"])
def test_a_teacher_without_classes_is_the_old_one_without_a_label(recipe, model_type):
    torch.manual_seed(0)
    teacher = EDMPrecond(**SIZES, model_type=model_type, num_blocks=1, label_dropout=0.1).eval()
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.3 * torch.randn_like(p))  # the last layers begin near zero, where nothing would show
    free = recipe("drop_classes").drop_classes(teacher)
    sigma = torch.tensor([0.01, 0.1, 1.0, 10.0]).reshape(-1, 1, 1, 1)
    x = torch.randn(4, 1, 8, 8) * (sigma + 0.5)
    expected = teacher(x, sigma)
    assert free.label_dim == 0 and (free(x, sigma) - expected).abs().max() < 2e-6 * expected.abs().max()
    labelled = teacher(x, sigma, torch.eye(3)[[0, 1, 2, 0]])
    assert (labelled - expected).abs().max() > 1e-3 * expected.abs().max()  # labels do count in this network


def test_the_shipped_teacher_without_classes(recipe, tmp_path):
    out = tmp_path / "uncond.safetensors"
    result = CliRunner().invoke(recipe("drop_classes").main, ["--teacher=digits-teacher", f"--out={out}"])
    assert result.exit_code == 0, result.output
    before, after = load_teacher("digits-teacher"), load_teacher(str(out))
    sigma = torch.tensor([0.05, 0.5, 5.0]).reshape(-1, 1, 1, 1)
    x = torch.randn(3, 1, 32, 32) * (sigma + 0.5)
    assert after.label_dim == 0 and (before(x, sigma) - after(x, sigma)).abs().max() < 2e-6


@pytest.mark.parametrize(("kwargs", "problem"), [({}, "without label dropout"), ({"label_dim": 0}, "has no classes")])
def test_a_teacher_that_knows_no_missing_label_is_refused(recipe, kwargs, problem):
    with pytest.raises(ValueError, match=problem):
        recipe("drop_classes").drop_classes(EDMPrecond(**{**SIZES, **kwargs}))


@pytest.mark.usefixtures("recipe")
def test_a_gan_trained_without_classes(tmp_path, monkeypatch):
    train_gan = shortened("train_gan", monkeypatch.setattr)
    options = ["--no-classes", "--kimg=0.02", "--batch=4", "--vae-kimg=0.01", "--snap-kimg=0.02"]
    result = CliRunner().invoke(train_gan.main, [*options, f"--out={tmp_path / 'gan'}"])
    assert result.exit_code == 0, result.output
    G = load_generator(str(tmp_path / "gan"))
    assert G.c_dim == 0 and G(torch.randn(2, G.z_dim), None).shape == (2, 1, 32, 32)
