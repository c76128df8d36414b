"""Dropout and augmentation of the auxiliary step."""

import pytest
import torch

from refine.config import RefineConfig
from refine.networks.bases import Denoiser
from refine.networks.edm import EDMPrecond
from refine.training import regularise
from refine.training.regularise import Augmentation, set_dropout, shift_by_pixels
from refine.training.state import load_training_state
from refine.training.trainer import Trainer
from tests.training.test_trainer import equal_states, make_run, make_student, make_teacher, run, stop_after


def augmenting_teacher(augment_dim=9):
    torch.manual_seed(1)
    kwargs = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1}
    net = EDMPrecond(8, 1, 3, augment_dim=augment_dim, **kwargs)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net.eval()


class Draws:
    """Stands in for torch.rand and randn inside an augmentation: one image, with chosen parameters."""

    def __init__(self, monkeypatch, on, uniform=(0.0, 0.0, 0.5, 0.5), normal=(0.0, 0.0, 0.0, 0.0)):
        self.rows = [torch.tensor([[0.0 if flag else 1.0 for flag in on]]), torch.tensor([uniform])]
        monkeypatch.setattr(regularise.torch, "rand", lambda *_, **__: self.rows.pop(0))
        monkeypatch.setattr(regularise.torch, "randn", lambda *_, **__: torch.tensor([normal]))


def blob(row, column, size=33, width=2.0):
    """A smooth spot around a pixel, (1, 1, size, size)."""
    axis = torch.arange(size, dtype=torch.float32)
    square = (axis[:, None] - row) ** 2 + (axis - column) ** 2
    return (-square / (2 * width**2)).exp()[None, None]


def centre_of(x):
    """(row, column) of the weight of a spot."""
    axis = torch.arange(x.shape[3], dtype=torch.float32)
    weight = x[0, 0] / x.sum()
    return (weight.sum(dim=1) @ axis).item(), (weight.sum(dim=0) @ axis).item()


# on = flip x, flip y, scale, rotate, stretch, shift; uniform = flips and the angles' places in (−π, π); a spot at
# (16, 20), four pixels right of the centre of 33 × 33. 2^(2.5 / 5) = √2, and 33 / 8 = 4.125.
@pytest.mark.parametrize(
    ("on", "uniform", "normal", "expected", "label"),
    [
        ((1, 0, 0, 0, 0, 0), (1.0, 0, 0.5, 0.5), (0, 0, 0, 0), (16, 12), [1, 0, 0, 0, 0, 0, 0, 0, 0]),
        ((0, 1, 0, 0, 0, 0), (0, 1.0, 0.5, 0.5), (0, 0, 0, 0), (16, 20), [0, 1, 0, 0, 0, 0, 0, 0, 0]),
        ((0, 0, 1, 0, 0, 0), (0, 0, 0.5, 0.5), (2.5, 0, 0, 0), (16, 21.657), [0, 0, 2.5, 0, 0, 0, 0, 0, 0]),
        ((0, 0, 0, 1, 0, 0), (0, 0, 0.75, 0.5), (0, 0, 0, 0), (20, 16), [0, 0, 0, -1, 1, 0, 0, 0, 0]),
        ((0, 0, 0, 0, 1, 0), (0, 0, 0.5, 0.5), (0, 2.5, 0, 0), (16, 21.657), [0, 0, 0, 0, 0, 2.5, 0, 0, 0]),
        ((0, 0, 0, 0, 1, 0), (0, 0, 0.5, 0.75), (0, 2.5, 0, 0), (16, 18.828), [0, 0, 0, 0, 0, 0, 2.5, 0, 0]),
        ((0, 0, 0, 0, 0, 1), (0, 0, 0.5, 0.5), (0, 0, -1, 1), (20.125, 15.875), [0, 0, 0, 0, 0, 0, 0, -1, 1]),
        ((0, 0, 0, 0, 0, 0), (1.0, 1.0, 0.75, 0.75), (3, 3, 3, 3), (16, 20), [0] * 9),
    ],
)  # fmt: skip
def test_each_transformation_moves_a_spot_where_its_label_says(monkeypatch, on, uniform, normal, expected, label):
    Draws(monkeypatch, on, uniform, tuple(map(float, normal)))
    moved, labels = Augmentation(0.5, labelled=True)(blob(16, 20))
    assert labels[0].tolist() == pytest.approx(label, abs=1e-6)
    assert centre_of(moved) == pytest.approx(expected, abs=0.1)


def test_images_that_are_not_transformed_keep_every_bit():
    x = torch.randn(64, 2, 8, 8)
    same, labels = Augmentation(0.0, labelled=True)(x)
    assert torch.equal(same, x) and torch.equal(labels, torch.zeros(64, 9))
    moved, labels = Augmentation(0.2, labelled=True)(x)
    untouched = (labels == 0).all(dim=1)
    assert 5 < untouched.sum() < 40 and torch.equal(moved[untouched], x[untouched])
    assert moved.isfinite().all() and not torch.equal(moved, x)


def test_each_transformation_comes_as_often_as_asked():
    _, labels = Augmentation(0.3, labelled=True)(torch.zeros(20_000, 1, 2, 2))
    share = (labels != 0).float().mean(dim=0)
    assert share.tolist() == pytest.approx([0.15, 0.15, *7 * [0.3]], abs=0.02)


def test_without_labels_pixels_are_only_moved():
    x = torch.randn(200, 2, 8, 8)
    moved, labels = Augmentation(0.5, labelled=False)(x)
    assert labels is None
    assert not torch.equal(moved, x)
    assert torch.isin(moved, x).all()  # no value is made up


def test_shifts_are_right_and_down_and_mirror_at_the_edge():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    moved = shift_by_pixels(x, torch.tensor([[1.2, 0.0]]))[0, 0]
    assert torch.equal(moved[:, 1:], x[0, 0, :, :-1]) and torch.equal(moved[:, 0], x[0, 0, :, 0])
    moved = shift_by_pixels(x, torch.tensor([[0.0, -1.0]]))[0, 0]
    assert torch.equal(moved[:-1], x[0, 0, 1:]) and torch.equal(moved[-1], x[0, 0, -1])


def test_only_aux_is_told_and_only_in_its_own_step():
    teacher = augmenting_teacher()
    assert (teacher.augment_dim, make_teacher().augment_dim) == (9, 0)
    trainer = Trainer(
        RefineConfig("g", "t", batch=8, adversarial=0.0, aux_augment=1.0, aux_steps=1), make_student(), teacher
    )
    seen = {"aux": [], "teacher": []}
    for name in seen:
        network = getattr(trainer, name).model
        network.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: seen[name].append(kwargs["augment_labels"]), with_kwargs=True
        )
    trainer.step()
    first, second = seen["aux"]
    assert first.shape == (8, 9) and (first != 0).any()
    assert second is None and seen["teacher"] == [None]


class PlainDenoiser(Denoiser):
    """A call takes what `Denoiser.forward` states, and nothing else."""

    img_resolution, img_channels, label_dim = 8, 1, 3

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x, sigma, class_labels=None):
        return self.scale * x


def test_a_denoiser_without_labels_is_given_none():
    trainer = Trainer(
        RefineConfig("g", "t", batch=4, adversarial=0.0, aux_augment=1.0), make_student(), PlainDenoiser()
    )
    trainer.step()
    assert trainer.aux.scale != 0.5


@pytest.mark.parametrize(
    ("teacher", "options"),
    [(augmenting_teacher, {}), (make_teacher, {"batch_gpu": 2, "aux_dropout": 0.2})],
    ids=["labelled", "unlabelled"],
)
def test_a_run_with_them_differs_and_resumes(tmp_path, teacher, options):
    plain = run(make_run(tmp_path / "plain", teacher=teacher()))
    whole = run(make_run(tmp_path / "whole", teacher=teacher(), aux_augment=0.5, **options))
    assert not equal_states(plain.aux, whole.aux)
    stop_after(make_run(tmp_path / "part", teacher=teacher(), aux_augment=0.5, **options), 16)
    second = make_run(tmp_path / "part", teacher=teacher(), aux_augment=0.5, **options)
    second.load_state_dict(load_training_state(tmp_path / "part" / "training-state-000000.016.pt"))
    assert equal_states(run(second).aux, whole.aux)


@pytest.mark.parametrize("teacher", [augmenting_teacher, make_teacher])
def test_micro_batches_meet_the_same_augmentation(tmp_path, teacher):
    grads = []
    for size in (None, 2):
        trainer = make_run(tmp_path / str(size), teacher=teacher(), batch=6, batch_gpu=size, aux_augment=0.6).trainer
        trainer.aux_step(0.0)
        grads.append([p.grad for p in trainer.aux.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * a.abs().max().item())


def test_dropout_is_what_was_asked_for():
    trainer = Trainer(
        RefineConfig("g", "t", batch=4, adversarial=0.0, aux_dropout=0.7), make_student(), make_teacher(dropout=0.3)
    )
    rates = {getattr(m, "dropout", None) for m in trainer.aux.modules()} - {None}
    assert rates == {0.7} and trainer.aux.training
    assert {getattr(m, "dropout", None) for m in trainer.teacher.modules()} - {None} == {0.3}
    layers = torch.nn.Sequential(torch.nn.Dropout(0.1))
    set_dropout(layers, 0.5)
    assert layers[0].p == 0.5
    with pytest.raises(ValueError, match=r"--aux-dropout is 0\.5, but the network of --teacher has no"):
        set_dropout(torch.nn.Linear(1, 1), 0.5)


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"aux_dropout": 1.0}, "--aux-dropout"),
        ({"aux_dropout": 0.1, "dropout": True}, "--aux-dropout"),
        ({"aux_augment": 1.5}, "--aux-augment"),
        ({"objective": "ikl+"}, "--objective"),
        ({"objective": "ikl:+sid"}, "--objective"),
    ],
)
def test_impossible_options_are_refused(options, flag):
    with pytest.raises(ValueError, match=f"^{flag}"):
        RefineConfig("g", "t", **options)
