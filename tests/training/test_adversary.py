"""The critic of --adversarial."""

import pytest
import torch
import torch.nn.functional as F

from refine.networks.critic import Critic
from refine.torch_utils.batch_slice import RowsOfBatch
from refine.training.adversary import GAMMA, PENALTY_EVERY, Adversary, Others, _shifted
from refine.training.state import load_training_state
from tests.training.test_trainer import equal_states, make_run, make_student, run, stop_after

CPU = torch.device("cpu")


def levels(count: int, classes: int = 0, size: int = 8) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Images of one grey level each; that of class k is 10 k + 5."""
    labels = torch.arange(count) % max(classes, 1)
    images = (10 * labels + 5)[:, None, None, None].expand(-1, 1, size, size).to(torch.uint8)
    return images, labels if classes else None


def test_images_are_drawn_of_the_classes_that_are_asked_for():
    others = Others(*levels(7, 3), 3, CPU)
    c = F.one_hot(torch.tensor([2, 0, 1, 2, 2]), 3).float()
    x = others.draw(5, c)
    assert x.shape == (5, 1, 8, 8) and torch.equal(((x[:, 0, 0, 0] + 1) * 127.5 / 10).long(), c.argmax(dim=1))
    assert len({float(v) for v in Others(torch.arange(9, dtype=torch.uint8)[:, None, None, None], None, 3, CPU)
                .draw(200, None).flatten()}) == 9  # fmt: skip


def test_a_part_of_a_batch_draws_what_the_whole_would():
    others = Others(torch.arange(100, dtype=torch.uint8)[:, None, None, None], None, 0, CPU)
    torch.manual_seed(1)
    whole = others.draw(8, None)
    torch.manual_seed(1)
    with RowsOfBatch(2, 5, 8):
        assert torch.equal(others.draw(3, None), whole[2:5])


@pytest.mark.parametrize(
    ("classes", "found"), [([0, 2], "no image of class 1"), ([0, 1, 2, 3], "expected 3 classes"), ([], "no image")]
)
def test_classes_that_do_not_fit_are_told(classes, found):
    labels = torch.tensor(classes, dtype=torch.int64)
    with pytest.raises(ValueError, match=found):
        Others(torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8), labels, 3, CPU)


def test_the_critics_loss_is_that_of_its_formula(monkeypatch):
    """With a linear critic f(x) = w · x + label, whose gradient is w everywhere."""
    monkeypatch.setattr("refine.training.adversary.SHIFT", 0.0)
    adversary = Adversary(Others(*levels(1), 0, CPU), 8, 1, CPU)
    w = torch.randn(64) / 8
    adversary.critic.forward = lambda x, c: x.flatten(1) @ w
    x = torch.rand(4, 1, 8, 8) * 2 - 1
    y = torch.full_like(x, 5 / 127.5 - 1)
    expected = F.softplus((x - y).flatten(1) @ w)
    assert torch.allclose(adversary.judge(x, None, penalised=False).loss, expected)
    penalty = PENALTY_EVERY * GAMMA * w.square().sum()  # half of it for each side
    assert torch.allclose(adversary.judge(x, None, penalised=True).loss, expected + penalty)
    slope = torch.sigmoid((y - x).flatten(1) @ w)
    assert torch.allclose(adversary.gradient(x, None).flatten(1), -slope[:, None] * w, atol=1e-6)


def test_moved_images_repeat_their_border_and_pass_gradients(monkeypatch):
    monkeypatch.setattr("refine.training.adversary.SHIFT", 1.0)
    torch.manual_seed(0)
    x = torch.arange(32.0).expand(50, 1, 32, 32).clone().requires_grad_(True)
    moved = _shifted(x)
    first = moved[:, 0, 0, 0].unique()
    assert first.tolist() == [0.0, 1.0, 2.0]  # to the right the border is repeated
    moved.sum().backward()
    assert x.grad.sum() == x.numel()


def test_a_student_is_led_to_the_other_images():
    torch.manual_seed(0)
    adversary = Adversary(Others(torch.full((4, 1, 8, 8), 230, dtype=torch.uint8), None, 0, CPU), 8, 1, CPU)
    x = torch.full((16, 1, 8, 8), -0.8)
    for step in range(60):
        verdict = adversary.judge(x, None, step % PENALTY_EVERY == 0)
        adversary.optimizer.zero_grad()
        verdict.loss.mean().backward()
        adversary.optimizer.step(1e-3)
        x = x - 0.3 * torch.nn.functional.normalize(adversary.gradient(x, None).flatten(1), dim=1).view_as(x)
    assert x.mean() > 0


@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("size", [8, 32, 48])
def test_critics_of_any_size_judge_batches_of_any_size(classes, size):
    critic = Critic(size, 3, classes, width=4)
    for n in (1, 2, 3, 4, 6):
        c = F.one_hot(torch.arange(n) % 3, 3).float() if classes else None
        assert critic(torch.randn(n, 3, size, size), c).shape == (n,)


def test_a_run_with_a_critic_reports_it_and_resumes(tmp_path):
    options = {"adversarial": 0.5, "others": Others(*levels(30, 3), 3, CPU)}
    whole = run(make_run(tmp_path / "whole", kimg=0.032, **options))
    assert {"Loss/critic", "Critic/right", "Grad/critic"} <= set(
        (tmp_path / "whole/stats.jsonl").read_text().split('"')
    )
    stop_after(make_run(tmp_path / "part", kimg=0.032, **options), 16)
    again = make_run(tmp_path / "part", kimg=0.032, **options)
    again.load_state_dict(load_training_state(tmp_path / "part" / "training-state-000000.016.pt"))
    again = run(again)
    for name in ("G", "aux", "critic"):
        assert equal_states(getattr(whole, name), getattr(again, name)), name


def test_micro_batches_give_the_critic_the_same_gradients(tmp_path):
    options = {"adversarial": 0.5, "batch": 8, "others": Others(*levels(30, 3), 3, CPU)}
    trainers = [make_run(tmp_path / str(size), batch_gpu=size, **options).trainer for size in (8, 4)]
    for trainer in trainers:
        torch.manual_seed(3)
        trainer.critic_step()
    a, b = ([p.grad for p in trainer.critic.parameters()] for trainer in trainers)
    # The standard deviation within groups depends on who is in a group; all else is the same.
    assert all((x - y).norm() <= 0.2 * x.norm() + 1e-6 for x, y in zip(a, b, strict=True))


def test_without_a_critic_nothing_is_drawn_for_it(tmp_path):
    assert make_run(tmp_path, make_student()).trainer.adversary is None
