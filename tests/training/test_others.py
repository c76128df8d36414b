"""The images that a critic compares with: the teacher's, or real ones of either size."""

import json
import zipfile

import pytest
import torch

from refine.bridge import plan_bridge
from refine.checkpoints.native import save_networks
from refine.images import png_bytes
from refine.metrics.image_sets import ImageSet
from refine.training import others
from refine.training.others import images_of_data, images_of_teacher
from tests.training.test_trainer import make_teacher

CPU = torch.device("cpu")


def zip_of(path, size=16, channels=3, count=6, labels=None):
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(count):
            archive.writestr(
                f"{index}.png", png_bytes(torch.full((channels, size, size), 10 * index + 5).to(torch.uint8))
            )
        if labels is not None:
            archive.writestr("dataset.json", json.dumps({"labels": [[f"{i}.png", c] for i, c in enumerate(labels)]}))
    return ImageSet(path)


@pytest.mark.parametrize("size", [16, 8])
def test_real_images_of_either_size_are_taken_as_the_teacher_takes_them(tmp_path, size):
    found = images_of_data(zip_of(tmp_path / "data.zip", size), plan_bridge((16, 3, 0), (8, 3, 0)), CPU)
    x = found.draw(200, None)
    assert x.shape == (200, 3, 8, 8) and len(found) == 6
    assert sorted({round(float(v)) for v in (x.mean(dim=[1, 2, 3]) + 1) * 127.5}) == [5, 15, 25, 35, 45, 55]


def test_their_classes_are_those_of_the_student(tmp_path):
    images = zip_of(tmp_path / "data.zip", labels=[0, 1, 2, 0, 1, 2])
    conditional = images_of_data(images, plan_bridge((16, 3, 3), (16, 3, 3)), CPU)
    assert conditional.num_classes == 3
    assert images_of_data(images, plan_bridge((16, 3, 0), (16, 3, 3)), CPU).num_classes == 0
    with pytest.raises(ValueError, match="expected 2 classes"):
        images_of_data(images, plan_bridge((16, 3, 2), (16, 3, 2)), CPU)


def test_images_of_another_size_are_told(tmp_path):
    with pytest.raises(ValueError, match="12×12×3; expected 16×16×3 or 8×8×1"):
        images_of_data(zip_of(tmp_path / "data.zip", 12), plan_bridge((16, 3, 0), (8, 1, 0)), CPU)


def test_of_a_large_set_a_part_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(others, "MAX_BYTES", 3 * 16 * 16 * 3)
    labels = [0, 1, 0, 1, 0, 1]
    found = images_of_data(zip_of(tmp_path / "a.zip", labels=labels), plan_bridge((16, 3, 0), (16, 3, 0)), CPU)
    assert len(found) == 3


def test_a_bank_that_lacks_a_class_is_used_without_labels(tmp_path, monkeypatch):
    monkeypatch.setenv("REFINE_CACHE", str(tmp_path / "cache"))
    save_networks(tmp_path / "teacher.safetensors", {"ema": make_teacher()}, provenance={})
    bridge = plan_bridge((8, 1, 3), (8, 1, 3))
    assert images_of_teacher(tmp_path / "teacher.safetensors", 2, bridge, CPU).num_classes == 0
    assert images_of_teacher(tmp_path / "teacher.safetensors", 30, bridge, CPU).num_classes == 3
