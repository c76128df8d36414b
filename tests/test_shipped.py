"""The shipped digits pair is what the README says, and the demo runs from end to end."""

import json
import re

import pytest
import torch

import refine
from refine.cli.demo import demo_line
from refine.cli.main import run_command
from refine.dnnlib import sha256_of_file
from refine.metrics.detectors import load_detector
from refine.metrics.evaluate import evaluate
from refine.metrics.references import load_reference
from refine.metrics.sampling import latents_of_seeds, sample_images, sample_teacher


@pytest.fixture(scope="module")
def space():
    return load_detector("digits"), load_reference("digits-reference")


def test_the_gan_draws_all_digits_and_different_ones(space):
    G = refine.load_generator("digits-gan")
    result = evaluate(sample_images(G, range(1000)), *space)
    assert min(result["class_histogram"]) > 0.02
    assert result["recall"] > 0.2
    assert result["spread"] > 0.25


def test_the_teacher_is_clearly_better_than_the_gan(space):
    G, T = refine.load_generator("digits-gan"), refine.load_teacher("digits-teacher")
    seeds = range(64)  # the sampler takes 35 evaluations per image
    before = evaluate(sample_images(G, seeds), *space)
    best = evaluate(sample_teacher(T, seeds), *space)
    assert best["fd_digits"] < 0.6 * before["fd_digits"]
    assert best["label_accuracy"] > before["label_accuracy"]


def test_the_public_interface_of_the_pair():
    G, T = refine.load_generator("digits-gan"), refine.load_teacher("digits-teacher")
    z, classes = latents_of_seeds(range(4), [G.z_dim], G.c_dim)
    c = torch.eye(G.c_dim)[classes]
    x = G(z, c, truncation_psi=1.0, noise_mode="const")
    assert x.shape == (4, G.img_channels, G.img_resolution, G.img_resolution) == (4, 1, 32, 32)
    assert x.dtype == torch.float32 and not x.requires_grad
    assert (x.abs() < 1.5).float().mean() > 0.98  # about [-1, 1], not clipped
    D_x = T(x + 0.5 * torch.randn_like(x), torch.full([4], 0.5), class_labels=c)
    assert D_x.shape == x.shape and D_x.dtype == torch.float32
    assert (D_x - x).square().mean() < 0.5 * 0.5**2  # it takes most of the noise away
    assert T.sigma_min < T.sigma_max and (T.label_dim, T.img_resolution) == (10, 32)


def test_demo_from_end_to_end(tmp_path, capsys):
    options = ["--kimg=0.128", "--num=200", f"--outdir={tmp_path}", "--seed=3"]
    with pytest.raises(SystemExit) as stop:
        from refine.cli.demo import demo

        run_command(demo, options)
    out = capsys.readouterr().out
    assert stop.value.code == 0
    number = r"\d+\.\d+"
    pattern = (
        rf"demo: fd_digits before={number} after={number} ratio={number} recall_before={number} recall_after={number}"
    )
    assert re.fullmatch(pattern, out.strip().splitlines()[-1])
    run = tmp_path / "00000-demo-seed3"
    assert (run / "report" / "report.html").stat().st_size > 10_000
    assert "Judged of 00000-demo-seed3: network-snapshot-0" in out and "the best by the run's own metric" in out
    judged = json.loads((run / "report" / "comparison.json").read_text())["after"]
    assert judged["sha256"] == sha256_of_file(run / "network-snapshot-best.safetensors")
    assert json.loads((run / "training_options.json").read_text())["preset"] == "demo"


def test_demo_line():
    before = {"fd_digits": {"mean": 10.0}, "recall": {"mean": 0.5}}
    after = {"fd_digits": {"mean": 4.0}, "recall": {"mean": 0.4}}
    line = "demo: fd_digits before=10.00 after=4.00 ratio=0.400 recall_before=0.500 recall_after=0.400"
    assert demo_line(before, after) == line
