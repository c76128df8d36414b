"""The pictures of fixed latents."""

from unittest.mock import Mock

import pytest
import torch

from refine.training import fakes
from refine.training.fakes import COLUMNS, LARGEST, ROWS, FakesGrid, grid_classes, grid_shape
from tests.training.test_trainer import make_student

pytestmark = pytest.mark.usefixtures("full_pictures")


@pytest.mark.parametrize(
    ("resolution", "shape"),
    [(32, (32, 32)), (64, (16, 32)), (128, (8, 16)), (256, (4, 8)), (512, (4, 7)), (1024, (4, 7))],
)
def test_as_many_images_as_fit_within_the_limits(resolution, shape):
    assert grid_shape(resolution) == shape


@pytest.mark.parametrize("num_classes", [1, 2, 3, 10, 31, 32, 33, 100, 1000, 5000])
@pytest.mark.parametrize("resolution", [32, 64, 256, 1024])
def test_every_class_is_there_or_they_are_evenly_spread(resolution, num_classes):
    rows, columns = grid_shape(resolution, num_classes)
    assert ROWS[0] <= rows <= ROWS[1] and columns <= COLUMNS[1]
    classes = grid_classes(rows * columns, columns, num_classes)
    assert len(classes.unique()) == min(num_classes, rows * columns)
    if num_classes <= columns:
        assert torch.equal(classes[:columns], classes[-columns:])  # a column is one class
    elif num_classes > len(classes):
        assert classes[-1] > num_classes * 0.9


@pytest.mark.parametrize(("resolution", "num_classes"), [(16, 0), (32, 10), (100, 3), (257, 0), (512, 10), (1024, 0)])
def test_a_picture_is_bounded_whatever_the_size_of_an_image(resolution, num_classes):
    rows, columns = grid_shape(resolution, num_classes)

    def draw(z, c):
        assert c is None or c.shape == (len(z), num_classes)
        return torch.rand(len(z), 1, 1, 1).expand(-1, 1, resolution, resolution)

    G = Mock(side_effect=draw, img_resolution=resolution, z_dim=4, c_dim=num_classes, accepted=lambda **_: {})
    picture = FakesGrid(G, torch.device("cpu")).draw(G)
    side = picture.shape[1] // rows
    assert picture.shape == (1, rows * side, columns * side) and min(resolution, LARGEST // 2) <= side <= LARGEST
    assert picture.numel() <= fakes.WIDTH * fakes.HEIGHT


def test_a_picture_shows_the_latents_in_order_and_large_images_reduced(monkeypatch):
    G = make_student(c_dim=3)
    monkeypatch.setattr("refine.training.fakes.WIDTH", 64)  # eight images in a row, and the fewest rows
    monkeypatch.setattr("refine.training.fakes.HEIGHT", 16)
    whole = FakesGrid(G, torch.device("cpu")).draw(G)
    assert whole.shape == (1, 4 * 8, 6 * 8) and whole.float().std() > 0
    assert torch.equal(whole, FakesGrid(G, torch.device("cpu")).draw(G))
    monkeypatch.setattr("refine.training.fakes.LARGEST", 4)
    small = FakesGrid(G, torch.device("cpu")).draw(G)
    assert small.shape == (1, 4 * 4, 6 * 4)
    means = torch.nn.functional.avg_pool2d(whole[None].float(), 2)[0]
    assert (small - means).abs().max() <= 0.5
