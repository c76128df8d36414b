"""From floats to uint8 to PNG and back."""

import numpy as np
import pytest
import torch
from PIL import Image

from refine.images import clamp_images, image_grid, png_bytes, save_image_grid, save_png, to_uint8


def test_to_uint8_truncates_and_clamps():
    x = torch.tensor(
        [-1.0, 1.0, 0.0, -5.0, 5.0, -128 / 127.5, -127 / 127.5, (1.99 - 128) / 127.5, (127.6 - 128) / 127.5]
    )
    assert to_uint8(x).tolist() == [0, 255, 128, 0, 255, 0, 1, 1, 127]


def test_clamped_images_look_the_same_and_let_gradients_back_into_the_range():
    x = torch.tensor([-1.5, -1.5, -0.5, -0.5, 1.5, 1.5, -1.0, 1.0], requires_grad=True)
    gradient = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    shown = clamp_images(x)
    assert torch.equal(to_uint8(shown), to_uint8(x)) and shown.abs().max() == 1
    shown.backward(gradient)
    # Descent would take the first pixel further below -1, and the sixth further above 1.
    assert x.grad.tolist() == [0.0, -1.0, 1.0, -1.0, 1.0, 0.0, 1.0, -1.0]


def test_to_uint8_hits_every_level():
    levels = torch.arange(256)
    centres = (levels.float() + 0.5 - 128) / 127.5
    assert torch.equal(to_uint8(centres), levels.to(torch.uint8))
    assert torch.equal(to_uint8(centres.double()), levels.to(torch.uint8))


def test_to_uint8_passes_bytes_through_and_refuses_other_integers():
    levels = torch.arange(256).to(torch.uint8)
    assert to_uint8(levels) is levels
    with pytest.raises(ValueError, match=r"int64.*expected floats"):
        to_uint8(torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip_is_exact(tmp_path, channels):
    image = torch.from_numpy(np.random.RandomState(0).randint(0, 256, [channels, 13, 7]).astype(np.uint8))
    save_png(tmp_path / "x.png", image)
    with Image.open(tmp_path / "x.png") as file:
        pixels = np.asarray(file)
    assert np.array_equal(pixels.reshape(13, 7, channels).transpose(2, 0, 1), image.numpy())
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_file_and_memory_agree_for_floats(tmp_path):
    x = torch.randn(1, 16, 16)
    save_png(tmp_path / "x.png", x)
    with Image.open(tmp_path / "x.png") as file:
        assert np.array_equal(np.asarray(file), to_uint8(x)[0].numpy())


def test_grid_places_images_row_by_row():
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 1, 2, 3) + 10
    grid = image_grid(images, columns=3)
    assert grid.shape == (1, 4, 9)
    assert grid[0, ::2, ::3].tolist() == [[10, 11, 12], [13, 14, 0]]
    assert image_grid(images).shape == (1, 4, 9)  # 3 × 2 is the smallest near-square that holds 5


def test_grid_file(tmp_path):
    images = torch.rand(4, 3, 8, 8) * 2 - 1
    save_image_grid(tmp_path / "grid.png", images)
    with Image.open(tmp_path / "grid.png") as file:
        assert file.mode == "RGB" and file.size == (16, 16)
        assert np.array_equal(np.asarray(file)[8:, 8:], to_uint8(images[3]).permute(1, 2, 0).numpy())


@pytest.mark.parametrize("shape", [[2, 8, 8], [8, 8], [0, 1, 8, 8], [4, 1, 8]])
def test_wrong_shapes_are_told(shape):
    with pytest.raises(ValueError, match="expected"):
        image_grid(torch.zeros(shape)) if len(shape) == 4 or shape[0] == 4 else png_bytes(torch.zeros(shape))


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    save_png(tmp_path / "x.png", torch.zeros(1, 4, 4))
    old = (tmp_path / "x.png").read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_png(tmp_path / "x.png", torch.ones(1, 4, 4))
    assert (tmp_path / "x.png").read_bytes() == old and len(list(tmp_path.iterdir())) == 1
