"""Pairs whose images or classes differ."""

import numpy as np
import pytest
import torch
from PIL import Image

from refine.guidance import Guided
from refine.pair import draw_labels, lanczos_matrix, plan_bridge, reduce_images
from tests.training.test_trainer import make_run, make_student, make_teacher, run


@pytest.mark.parametrize(("size", "target"), [(64, 32), (64, 16), (96, 32), (8, 8)])
def test_reduction_gives_the_numbers_of_pillow(size, target):
    x = torch.rand(2, 3, size, size) * 2 - 1
    reduced = reduce_images(x, target)
    for image, expected in zip(x.flatten(0, 1), reduced.flatten(0, 1), strict=True):
        theirs = Image.fromarray(image.numpy(), mode="F").resize((target, target), Image.Resampling.LANCZOS)
        assert np.abs(np.asarray(theirs) - expected.numpy()).max() < 1e-5


def test_reduction_keeps_aliases_out_and_what_is_coarse():
    rows = torch.arange(64.0)
    fine = torch.cos(torch.pi * rows * 0.9).expand(1, 1, 64, 64)  # far above what 32 pixels can show
    coarse = torch.cos(torch.pi * rows * 0.1).expand(1, 1, 64, 64)
    assert reduce_images(fine, 32)[..., 4:-4].abs().max() < 0.05
    assert fine[..., ::2].abs().max() == pytest.approx(1)  # what simply leaving out pixels would show
    assert reduce_images(coarse, 32)[..., 4:-4].abs().max() > 0.95
    assert torch.allclose(reduce_images(torch.full([1, 1, 64, 64], 0.3), 32), torch.tensor(0.3))


@pytest.mark.parametrize("student", [(16, 1, 0), (16, 3, 0), (8, 3, 0), (8, 1, 0)])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_cross_linearly_and_gradients_come_back(student, channels):
    bridge = plan_bridge(student, (8, channels, 0))
    x = torch.randn(2, student[1], student[0], student[0], dtype=torch.float64, requires_grad=True)
    y = bridge.images(x)
    assert y.shape == (2, channels, 8, 8)
    direction, g = torch.randn_like(x), torch.randn_like(y)
    (back,) = torch.autograd.grad(y, x, g)
    assert (back * direction).sum().item() == pytest.approx((g * bridge.images(direction)).sum().item())


def test_equal_images_cross_untouched():
    x = torch.randn(1, 3, 8, 8)
    assert plan_bridge((8, 3, 5), (8, 3, 5)).images(x) is x
    assert plan_bridge((8, 3, 5), (8, 3, 5)).messages(null_label=False) == []


def test_grey_is_luma_and_white_stays_white():
    to_grey = plan_bridge((8, 3, 0), (8, 1, 0))
    assert torch.allclose(to_grey.images(torch.ones(1, 3, 8, 8)), torch.ones(1, 1, 8, 8))
    green = torch.zeros(1, 3, 8, 8)
    green[:, 1] = 1
    assert to_grey.images(green).unique().item() == pytest.approx(0.587)


@pytest.mark.parametrize(
    ("student", "teacher", "word"),
    [
        ((8, 3, 0), (16, 3, 0), "img_resolution 8"),
        ((48, 3, 0), (32, 3, 0), "whole multiple of 32"),
        ((32, 4, 0), (32, 3, 0), "img_channels 4"),
        ((32, 3, 10), (32, 3, 100), "classes 10"),
    ],
)
def test_pairs_without_a_way_are_refused(student, teacher, word):
    with pytest.raises(ValueError, match=word):
        plan_bridge(student, teacher)


def test_every_difference_has_its_message():
    lines = plan_bridge((64, 1, 0), (32, 3, 10)).messages(null_label=True)
    assert [
        word for word, line in zip(("reduced", "three times", "without a label"), lines, strict=True) if word in line
    ]
    assert "drawn per image" in plan_bridge((32, 3, 0), (32, 3, 10)).messages(null_label=False)[0]
    assert "whether they show their label" in plan_bridge((32, 3, 10), (32, 3, 0)).messages(null_label=False)[0]


def test_drawn_labels_follow_the_prior():
    c = draw_labels(4000, 3, torch.tensor([1.0, 0.0, 3.0]), "cpu")
    assert torch.equal(c.sum(dim=1), torch.ones(4000))
    assert torch.allclose(c.mean(dim=0), torch.tensor([0.25, 0.0, 0.75]), atol=0.03)


def dropout_teacher(label_dim=3, label_dropout=0.1):
    teacher = make_teacher(label_dim)
    teacher.model.label_dropout = label_dropout
    return teacher


def test_guidance_moves_away_from_no_label():
    teacher = dropout_teacher()
    with torch.no_grad():
        teacher.model.map_label.weight.mul_(30)  # a label that shows
    x, sigma, c = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 2.0]).reshape(2, 1, 1, 1), torch.eye(3)[:2]
    free, labelled = teacher(x, sigma), teacher(x, sigma, c)
    assert (free - labelled).abs().max() > 1e-3
    assert torch.allclose(Guided(teacher, 1.0)(x, sigma, c), labelled, atol=1e-5)
    assert torch.allclose(Guided(teacher, 3.0)(x, sigma, c), free + 3 * (labelled - free), atol=1e-5)
    assert torch.allclose(Guided(teacher, 3.0)(x, sigma), free, atol=1e-6)
    guided = Guided(teacher, 3.0)  # a denoiser itself: one noise level and one label for all
    assert torch.allclose(guided(x, 0.3, c[:1]), guided(x, torch.full([2], 0.3), c[[0, 0]]), atol=1e-6)
    facts = ("img_resolution", "img_channels", "label_dim", "sigma_min", "sigma_max", "has_null_label")
    assert [getattr(guided, name) for name in facts] == [getattr(teacher, name) for name in facts]
    for other in (make_teacher(3), make_teacher(0)):
        assert not other.has_null_label
        with pytest.raises(ValueError, match="missing label"):
            Guided(other, 2.0)


CROSSINGS = {
    "larger student": ((3, 16, 1), make_teacher()),
    "grey student": ((3, 8, 1), make_teacher(channels=3)),
    "RGB student": ((3, 8, 3), make_teacher()),
    "no classes, null label": ((0, 8, 1), dropout_teacher()),
    "no classes, drawn labels": ((0, 8, 1), make_teacher()),
    "teacher without classes": ((3, 8, 1), make_teacher(0)),
    "all at once": ((0, 16, 3), dropout_teacher()),
}


@pytest.mark.parametrize("crossing", CROSSINGS)
def test_runs_across_the_bridge_move_the_student(tmp_path, crossing):
    (c_dim, size, channels), teacher = CROSSINGS[crossing]
    asked = []
    teacher.register_forward_pre_hook(lambda module, args: asked.append((args[0].shape, args[2])))
    student = make_student(c_dim, resolution=size, channels=channels)
    trainer = run(make_run(tmp_path, student, teacher))
    assert any(not torch.equal(p, q) for p, q in zip(trainer.G_ema.parameters(), student.parameters(), strict=True))
    shape, labels = asked[0]
    assert shape[1:] == (teacher.img_channels, 8, 8)
    if teacher.label_dim == 0 or (c_dim == 0 and teacher.has_null_label):
        assert labels is None
    else:
        assert torch.equal(labels.sum(dim=1), torch.ones(4))


def test_a_prior_and_guidance_in_a_run(tmp_path):
    teacher, seen = dropout_teacher(), []
    teacher.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    trainer = run(make_run(tmp_path, teacher=teacher, label_dist=(0.0, 1.0, 0.0), guidance=2.0))
    guided = [labels for labels in seen if len(labels) == 8]  # the teacher's calls; the others are those of aux
    assert len(guided) == 6
    for labels in guided:
        assert torch.equal(labels, torch.cat([torch.zeros(4, 3), torch.eye(3)[[1, 1, 1, 1]]]))
    assert trainer.nimg == 24
    with pytest.raises(ValueError, match="--label-dist has 2 numbers"):
        make_run(tmp_path, label_dist=(1.0, 1.0))
    with pytest.raises(ValueError, match="--guidance"):
        make_run(tmp_path, guidance=2.0)


def test_lanczos_rows_sum_to_one_and_are_even():
    matrix = lanczos_matrix(64, 16)
    assert torch.allclose(matrix.sum(dim=1), torch.ones(16, dtype=torch.float64))
    assert torch.allclose(matrix, matrix.flip(0, 1))
