"""The images that a critic compares with: the teacher's, or real ones of either size."""

import json
import zipfile

import pytest
import torch

from refine.bridge import plan_bridge
from refine.checkpoints.native import read_metadata, save_networks
from refine.config import RefineConfig
from refine.evaluation.compare import Side
from refine.images import png_bytes
from refine.metrics.image_sets import ImageSet
from refine.training import assemble, others
from refine.training.others import images_of_data, images_of_teacher
from tests.training.test_trainer import make_student, make_teacher

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


def test_a_run_with_real_images_says_so_everywhere(tmp_path, capsys):
    pair = (tmp_path / "gan.safetensors", tmp_path / "teacher.safetensors")
    save_networks(pair[0], {"G_ema": make_student()}, provenance={})
    save_networks(pair[1], {"ema": make_teacher()}, provenance={})
    zip_of(tmp_path / "digits.zip", 8, 1, labels=[0, 1, 2, 0, 1, 2])
    config = RefineConfig(
        *map(str, pair), outdir=str(tmp_path / "runs"), desc="data", data=str(tmp_path / "digits.zip"), metrics=(),
        kimg=0.008, batch=4, tick=0.008, snap=1,
    )  # fmt: skip
    folder = assemble.run(config).folder
    assert "a critic compares the student with 6 real images of " in (folder / "log.txt").read_text()
    snapshot = folder / "network-snapshot-000000.008.safetensors"
    origins = read_metadata(snapshot)["provenance"]
    assert origins["data"]["file"] == "digits.zip" and len(origins["data"]["sha256"]) == 64
    assert Side(snapshot, "cpu", 4, "const", 1.0).describe()["refined_with"].endswith("the real images of digits.zip")
    assert "refined_with" not in Side(pair[0], "cpu", 4, "const", 1.0).describe()
    # They may have moved, but they must be the same.
    (tmp_path / "digits.zip").rename(tmp_path / "moved.zip")
    states = [folder / "training-state-000000.008.pt"]
    with pytest.raises(ValueError, match=r"--data was .* give --data where it is now"):
        assemble.resume(states, {"kimg": 0.016})
    assemble.resume(states, {"kimg": 0.016, "data": str(tmp_path / "moved.zip")})
    zip_of(tmp_path / "moved.zip", 8, 1, count=9)
    with pytest.raises(ValueError, match="--data has the sha256"):
        assemble.resume(states, {"kimg": 0.024, "data": str(tmp_path / "moved.zip")})
