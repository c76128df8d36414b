"""One-step distillation: the teacher's U-Net as a generator."""

import json

import pytest
import torch

from refine import load_generator, load_teacher
from refine.checkpoints import peek
from refine.checkpoints.native import save_networks
from refine.config import RefineConfig
from refine.evaluation.compare import Side, check_same_images
from refine.evaluation.generate import generate
from refine.metrics.sampling import latents_of_seeds
from refine.networks import edm2
from refine.networks.edm import EDMPrecond, VPPrecond, iDDPMPrecond
from refine.networks.one_step import OneStepGenerator
from tests.cli.test_refine import call
from tests.training.test_trainer import make_run, make_teacher, run

KWARGS = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1}


def test_it_is_the_teacher_at_one_noise_level():
    teacher = make_teacher()
    G = OneStepGenerator.from_teacher(teacher, 2.5)
    z, c = torch.randn(3, 1, 8, 8), torch.eye(3)
    expected = teacher(2.5 * z, torch.tensor(2.5), c)
    assert torch.equal(G(z, c), expected)
    assert torch.equal(G(z.flatten(1), c), expected)
    assert (G.z_dim, G.c_dim, G.img_resolution, G.img_channels) == (64, 3, 8, 1)
    assert torch.equal(G.train()(z, c), expected)  # no dropout, whatever the mode
    for p, q in zip(G.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(p, q) and p.data_ptr() != q.data_ptr()


def test_around_a_teacher_it_is_the_same_without_a_copy():
    teacher = make_teacher()
    G, copied = OneStepGenerator.around(teacher, 2.5), OneStepGenerator.from_teacher(teacher, 2.5)
    assert G.denoiser is teacher and not teacher.training
    assert G.init_kwargs == copied.init_kwargs and vars(G).keys() == vars(copied).keys()
    z, c = torch.randn(3, 1, 8, 8), torch.eye(3)
    assert torch.equal(G(z, c), copied(z, c))


@pytest.mark.parametrize(
    "teacher",
    [
        EDMPrecond(8, 1, 0, **KWARGS),
        VPPrecond(8, 3, 2, **KWARGS),
        iDDPMPrecond(8, 1, 0, **KWARGS),
        edm2.Precond(8, 1, 3, model_channels=16, channel_mult=[1], num_blocks=1, attn_resolutions=[]),
    ],
    ids=lambda net: f"{type(net).__module__.rpartition('.')[2]}.{type(net).__name__}",
)
def test_files_give_it_back(tmp_path, teacher):
    G = OneStepGenerator.from_teacher(teacher.eval(), 2.5)
    save_networks(tmp_path / "g.safetensors", {"G_ema": G}, provenance={})
    again = load_generator(tmp_path / "g.safetensors")
    z, _ = latents_of_seeds([0, 1], [G.z_dim])
    c = torch.eye(G.c_dim)[[0, 1]] if G.c_dim else None
    with torch.no_grad():
        assert torch.equal(again(z, c), G(z, c))
    info = peek(tmp_path / "g.safetensors", "generator")
    assert (info.img_resolution, info.img_channels, info.classes) == (8, teacher.img_channels, teacher.label_dim)
    with pytest.raises(ValueError, match="expected a teacher"):
        load_teacher(tmp_path / "g.safetensors")


def test_impossible_noise_levels_are_refused():
    for sigma in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match="sigma_init"):
            OneStepGenerator.from_teacher(make_teacher(), sigma)
    with pytest.raises(ValueError, match="sigma_init is 500"):
        OneStepGenerator.from_teacher(VPPrecond(8, 1, 0, **KWARGS), 500.0)


def test_other_classes_of_networks_are_refused():
    with pytest.raises(ValueError, match="unknown denoiser 'Linear'"):
        OneStepGenerator.from_teacher(torch.nn.Linear(2, 2), 1.0)


def test_a_run_moves_it(tmp_path):
    teacher = make_teacher()
    trainer = run(make_run(tmp_path, OneStepGenerator.from_teacher(teacher, 2.5), teacher))
    pairs = list(zip(trainer.G.parameters(), teacher.parameters(), strict=True))
    assert sum(not torch.equal(p, q) for p, q in pairs) > len(pairs) / 2


def test_from_the_command_to_the_comparison(tmp_path, capsys):
    """refine.py --gan=one-step, then generate and compare's reader on its snapshot; resumed, it has nothing to do."""
    teacher = EDMPrecond(32, 1, 10, **KWARGS)
    torch.nn.init.normal_(teacher.model.dec["32x32_aux_conv"].weight, std=0.05)
    save_networks(tmp_path / "teacher.safetensors", {"ema": teacher}, provenance={})
    options = (
        "--kimg=0.008",
        "--batch=4",
        "--tick=0.004",
        "--snap=1",
        "--lr=0.001",
        "--sigma-init=1.5",
        "--metrics=none",
        "--adversarial=0",
    )
    command = ("--gan=one-step", f"--teacher={tmp_path}/teacher.safetensors", f"--outdir={tmp_path}/runs", *options)
    code, out, err = call(capsys, *command)
    assert code == 0, err
    assert "one-step generator is made here" in out
    folder = tmp_path / "runs" / "00000-one-step-teacher-batch4"
    snapshot = max(folder.glob("network-snapshot-0*.safetensors"))
    G = load_generator(snapshot)
    assert isinstance(G, OneStepGenerator) and G.sigma_init == 1.5
    options = json.loads((folder / "training_options.json").read_text())
    assert options["gan"] == "one-step" and options["files"]["student"]["file"] == "teacher.safetensors"
    assert len(generate(snapshot, [0, 1], tmp_path / "out", progress=False)) == 3
    before, after = (Side(file, "cpu", 2, "random", 1.0) for file in (tmp_path / "teacher.safetensors", snapshot))
    check_same_images(before, after)
    assert (before.sampling, after.sampling) == ("18 Heun steps", "G(z, c)")
    (batch,) = after.sample([0, 1])
    assert batch.images.shape == (2, 1, 32, 32)
    assert call(capsys, "--resume=latest", f"--outdir={tmp_path}/runs")[0] == 0


def test_the_preset_holds_the_published_settings():
    config = RefineConfig("one-step", "t", preset="one-step")
    assert (config.batch, config.lr, config.aux_lr) == (128, 1e-5, 1e-5)
    assert (config.betas, config.aux_betas, config.aux_steps) == ((0.0, 0.999), (0.0, 0.999), 1)
    assert (config.ema_kimg, config.ema_rampup) == (500.0, 0.05)
    assert (config.sigma.P_mean, config.sigma.P_std, config.sigma) == (-1.2, 1.2, config.aux_sigma)
