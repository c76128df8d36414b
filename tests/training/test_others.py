"""The images that a critic compares with: the teacher's, or real ones of either size."""

import dataclasses
import json
import zipfile

import pytest
import torch

from refine.checkpoints.native import read_metadata, save_networks
from refine.config import RefineConfig
from refine.evaluation.compare import Side
from refine.images import png_bytes
from refine.metrics.image_sets import ImageSet
from refine.pair import plan_bridge
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


def test_grey_images_do_for_colours_wherever_they_stand(tmp_path):
    for size, expected in ((16, 8), (8, 8)):
        found = images_of_data(zip_of(tmp_path / "grey.zip", size, 1), plan_bridge((16, 3, 0), (8, 3, 0)), CPU)
        x = found.draw(9, None)
        assert x.shape == (9, 3, expected, expected) and torch.equal(x[:, 0], x[:, 2])
    grey = images_of_data(zip_of(tmp_path / "grey.zip", 16, 1), plan_bridge((16, 3, 0), (8, 1, 0)), CPU).draw(60, None)
    assert grey.shape == (60, 1, 8, 8)
    assert {round(float(v)) for v in (grey.mean(dim=[1, 2, 3]) + 1) * 127.5} == {5, 15, 25, 35, 45, 55}
    with pytest.raises(ValueError, match="8×8×3; expected 8×8×1"):  # the other way round, colours would be lost
        images_of_data(zip_of(tmp_path / "data.zip", 8), plan_bridge((8, 1, 0), (8, 1, 0)), CPU)


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


@pytest.fixture
def pair(tmp_path):
    save_networks(tmp_path / "gan.safetensors", {"G_ema": make_student()}, provenance={})
    save_networks(tmp_path / "teacher.safetensors", {"ema": make_teacher()}, provenance={})
    return str(tmp_path / "gan.safetensors"), str(tmp_path / "teacher.safetensors")


SHORT = {"desc": "data", "metrics": (), "kimg": 0.008, "batch": 4, "tick": 0.008, "snap": 1}


def test_a_folder_serves_from_anywhere(tmp_path, monkeypatch, pair):
    folder = tmp_path / "teacher"  # which is a word of --ref, and no name of a file here
    folder.mkdir()
    for index in range(3):
        (folder / f"{index}.png").write_bytes(png_bytes(torch.full((1, 8, 8), 90 * index, dtype=torch.uint8)))
    monkeypatch.chdir(tmp_path)
    run = assemble.run(RefineConfig(*pair, outdir=str(tmp_path / "runs"), data="teacher", **SHORT))
    assert run.config.data == str(folder)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assemble.resume([run.folder / "training-state-000000.008.pt"], {"kimg": 0.016})


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("size", "labels", "message"),
    [
        (9, None, "9×9×1"),
        (8, [0, 1, 7], "expected 3 classes"),
        (8, [0, 1, 1], "no image of class 2"),
        (8, [0, 1, 2.5], "no class for 2.png"),
    ],
)
def test_images_that_are_of_no_use_are_told_before_anything_is_written(tmp_path, pair, size, labels, message, dry_run):
    data = zip_of(tmp_path / "data.zip", size, 1, count=3, labels=labels).path
    with pytest.raises(ValueError, match=f"--data.*{message}"):
        assemble.run(RefineConfig(*pair, outdir=str(tmp_path / "runs"), data=str(data), **SHORT), dry_run)
    assert not (tmp_path / "runs").exists()


def test_a_bank_that_cannot_be_drawn_leaves_no_run_folder(tmp_path, pair, monkeypatch):
    monkeypatch.setenv("REFINE_CACHE", str(tmp_path / "cache"))

    def broken(*args, **kwargs):
        raise ValueError("the network gave NaN")

    monkeypatch.setattr(others, "teacher_bank", broken)
    with pytest.raises(ValueError, match=r"--bank.*NaN"):
        assemble.run(RefineConfig(*pair, outdir=str(tmp_path / "runs"), **SHORT))
    assert not (tmp_path / "runs").exists()
    assemble.run(RefineConfig(*pair, outdir=str(tmp_path / "runs"), **SHORT), dry_run=True)  # draws nothing


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
    # They may have moved, but they must be the same, and a run stays with or without them.
    with pytest.raises(ValueError, match=r"--data is none, but the run was made with .*digits\.zip"):
        assemble.resume([folder / "training-state-000000.008.pt"], {"kimg": 0.016, "data": None})
    free = assemble.run(dataclasses.replace(config, data=None, bank=6)).folder / "training-state-000000.008.pt"
    with pytest.raises(ValueError, match=r"--data is .*digits\.zip, but the run was made with none"):
        assemble.resume([free], {"kimg": 0.016, "data": str(tmp_path / "digits.zip")})
    (tmp_path / "digits.zip").rename(tmp_path / "moved.zip")
    states = [folder / "training-state-000000.008.pt"]
    with pytest.raises(ValueError, match=r"--data was .* give --data where it is now"):
        assemble.resume(states, {"kimg": 0.016})
    assemble.resume(states, {"kimg": 0.016, "data": str(tmp_path / "moved.zip")})
    zip_of(tmp_path / "moved.zip", 8, 1, count=9)
    with pytest.raises(ValueError, match="--data has the sha256"):
        assemble.resume(states, {"kimg": 0.024, "data": str(tmp_path / "moved.zip")})
