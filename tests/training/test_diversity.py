"""The term that keeps pairwise distances, and the end of a run whose recall falls."""

import pytest
import torch

from refine.training.diversity import distance_gradient
from tests.training.test_trainer import make_run, run


def potential(x, x_start):
    d, d_start = (torch.cdist(images.flatten(1), images.flatten(1)) for images in (x, x_start))
    off_diagonal = ~torch.eye(len(x), dtype=torch.bool)
    return ((d_start - d)[off_diagonal].clamp_min(0) ** 2).sum() / (4 * (len(x) - 1))


def test_it_is_the_derivative_of_its_potential():
    x_start = torch.randn(5, 2, 3, 3, dtype=torch.float64)
    x = (0.6 * x_start + 0.3 * torch.randn_like(x_start)).requires_grad_(True)
    (expected,) = torch.autograd.grad(potential(x, x_start), x)
    assert expected.abs().max() > 0.01
    assert torch.allclose(distance_gradient(x, x_start), expected, atol=1e-12)


def test_it_is_zero_at_the_start_for_images_farther_apart_and_for_a_single_one():
    x = torch.randn(4, 1, 3, 3)
    assert distance_gradient(x, x).abs().max() < 1e-5
    assert distance_gradient(2 * x, x).abs().max() == 0
    assert distance_gradient(x[:1], -x[:1]).abs().max() == 0


def test_it_drives_collapsed_images_apart():
    x_start = torch.randn(4, 1, 3, 3)
    x = 0.1 * x_start
    moved = x - 0.5 * distance_gradient(x, x_start)
    assert potential(moved, x_start) < 0.5 * potential(x, x_start)


def test_identical_images_stay_finite():
    x = torch.zeros(3, 1, 2, 2)
    assert distance_gradient(x, torch.randn(3, 1, 2, 2)).isfinite().all()


def test_a_run_with_it_differs_and_resumes(tmp_path):
    plain = run(make_run(tmp_path / "plain", lr=0.01))
    kept = run(make_run(tmp_path / "kept", lr=0.01, keep_distances=5.0))
    assert any(not torch.equal(p, q) for p, q in zip(plain.G.parameters(), kept.G.parameters(), strict=True))
    assert "Loss/distances" in (tmp_path / "kept" / "stats.jsonl").read_text()


class FallingRecall:
    name, key, direction = "fake", "fd", "lower"

    def __init__(self):
        self.calls = 0

    def measure(self, G, device, progress=False):
        self.calls += 1
        return {"fd": 10.0 - self.calls, "recall": 1.0 - 0.2 * (self.calls - 1)}  # 1.0 at the start, then 0.8, 0.6


@pytest.mark.parametrize(("share", "nimg", "best"), [(0.0, 24, 0.024), (0.7, 16, 0.008), (0.9, 8, None)])
def test_a_run_ends_when_too_much_recall_is_lost(tmp_path, share, nimg, best):
    options = {"keep_recall": share, "ref": "r", "average": "ema"} | ({"metric_names": ("fake",)} if share else {})
    training = make_run(tmp_path, metrics=[FallingRecall()], **options)
    trainer = run(training)
    assert trainer.nimg == nimg
    assert getattr(training.snapshots.standing.best, "kimg", None) == best
    resumed = make_run(tmp_path / "resumed", metrics=[FallingRecall()], **options)
    resumed.load_state_dict(training.state_dict())
    assert run(resumed).nimg == nimg  # the end stays the end


def test_keep_recall_needs_a_metric(tmp_path):
    with pytest.raises(ValueError, match="--keep-recall"):
        make_run(tmp_path, keep_recall=0.9)
