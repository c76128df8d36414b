"""The teacher and real images beside two networks: what they are measured on and against, and where they are shown."""

import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from refine.checkpoints import load_teacher
from refine.checkpoints.native import save_networks
from refine.evaluation.compare import compare
from refine.evaluation.sides import Side
from refine.evaluation.tables import text_table
from refine.guidance import Autoguided
from refine.metrics.bank import BANK_SEED
from refine.metrics.detectors import load_detector
from refine.metrics.evaluate import evaluate
from refine.metrics.image_sets import ImageSet, SampleArray
from refine.metrics.references import load_reference, save_reference
from refine.metrics.sampling import sample_teacher, sensible_batch
from refine.metrics.statistics import FeatureStatistics
from refine.networks.sampler_settings import SamplerChoice, SamplerSettings
from tests.evaluation.test_compare import arguments, files, run, small_generator  # noqa: F401 - a fixture

NUM = 20


@pytest.fixture
def real(tmp_path, monkeypatch):
    """A folder of 50 images, and a cache of its own."""
    monkeypatch.setenv("REFINE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "real").mkdir()
    for index in range(50):
        noise = np.random.RandomState(index).randint(0, 256, [32, 32], dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "real" / f"{index}.png")
    return tmp_path / "real"


def zipped(folder):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    return path


def test_both_stand_beside_the_networks_everywhere(files, real, tmp_path, capsys):  # noqa: F811
    options = {**arguments(files), "teacher": files / "teacher.safetensors", "data": real}
    choice = SamplerChoice({"steps": 2})
    results = compare(**options, num=NUM, sampler=choice, outdir=tmp_path / "out")
    teacher, found = results["teacher"], results["real"]
    assert teacher["sampling"] == "2 Heun steps" and teacher["images"] == "0 to 59 of its bank"
    assert len(teacher["fd_digits"]["values"]) == len(found["fd_digits"]["values"]) == 3
    assert "label_accuracy" in teacher and "label_accuracy" not in found  # these images have no classes
    assert found["how"] == "20 images against 30 others of the data, drawn anew for each seed range"
    err = capsys.readouterr().err
    assert "note: --teacher is sampled with 2 Heun steps, --steps as asked for, the rest as published" in err
    header, first, *_ = text_table(results).splitlines()
    assert header.split() == ["before", "after", "difference", "teacher", "real"]
    assert f"{teacher['fd_digits']['mean']:.1f}" in first and f"{found['fd_digits']['mean']:.1f}" in first
    page = (tmp_path / "out" / "report.html").read_text()
    for name in ("teacher", "real"):
        assert f'data-label="{name}"' in page and f"<figcaption>{name}: " in page and f'class="{name}"' in page
    assert page.count("data:image/png;base64,") == 6 and str(real) not in page
    assert "The teacher: fd_digits" in results["summary"] and "Real images (20 images against 30" in results["summary"]
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["real"] == found


def test_the_bank_is_drawn_once_and_the_reference_is_left_out(files, real, monkeypatch):  # noqa: F811
    teacher = files / "teacher.safetensors"
    options = {**arguments(files, "good", "good"), "teacher": teacher, "ref": teacher, "progress": False}
    choice = SamplerChoice({"steps": 2})
    first = compare(**options, num=4, sampler=choice)
    assert first["metric"] == "fd_digits-vs-teacher" and first["teacher"]["images"] == "4 to 15 of its bank"
    monkeypatch.setattr("refine.metrics.bank.sample_teacher", lambda *_, **__: pytest.fail("it is drawn again"))
    again = compare(**options, num=4, sampler=choice)
    assert again["teacher"]["fd_digits-vs-teacher"] == first["teacher"]["fd_digits-vs-teacher"]
    assert BANK_SEED > 2**31


def test_a_guided_teacher_is_measured_as_it_is_asked(files, real, tmp_path, capsys):  # noqa: F811
    """--teacher with --guide and --guidance: the column holds the numbers of the guided images, drawn here by hand."""
    networks = []
    for seed, name in enumerate(("main", "worse")):
        networks.append(load_teacher(files / "teacher.safetensors"))
        torch.manual_seed(seed)
        for parameter in networks[-1].parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        save_networks(tmp_path / f"{name}.safetensors", {"ema": networks[-1]}, provenance={})
    given = arguments(files, "good", "good") | {"teacher": tmp_path / "main.safetensors", "num": 4, "steps": 2}
    guided = given | {"guide": tmp_path / "worse.safetensors", "guidance": 2}
    code, _, err = run(capsys, **guided, outdir=tmp_path / "guided")
    assert code == 0, err
    column = json.loads((tmp_path / "guided" / "comparison.json").read_text())["teacher"]
    assert column["guide"]["name"] == "worse.safetensors" and column["guide"]["guidance"] == 2
    assert column["sampling"] == "2 Heun steps, guided by worse.safetensors with w 2"
    detector, settings = load_detector(given["detector"]), SamplerSettings(steps=2)
    asked = sample_teacher(Autoguided(*networks, 2.0), range(BANK_SEED, BANK_SEED + 4), settings=settings)
    expected = evaluate(asked, detector, load_reference(given["ref"]), ("fd",))["fd_digits"]
    assert column["fd_digits"]["values"][0] == pytest.approx(expected, rel=1e-6)
    assert run(capsys, **given, outdir=tmp_path / "alone")[0] == 0
    alone = json.loads((tmp_path / "alone" / "comparison.json").read_text())["teacher"]
    assert "guide" not in alone and alone["fd_digits"]["values"][0] != pytest.approx(expected, rel=1e-3)
    code, _, err = run(capsys, **guided | {"guide": files / "good.safetensors"})
    assert code == 2 and "--guide" in err and len(err.strip().splitlines()) == 1


def test_images_at_once_follow_from_their_size(files, real, tmp_path):  # noqa: F811
    """As many pixels at once as 100 images of 256x256 have, whether networks make them or a folder holds them."""
    G = small_generator(0, img_resolution=512, synthesis_kwargs={"channel_base": 512, "channel_max": 2})
    save_networks(tmp_path / "huge.safetensors", {"G_ema": G}, provenance={})
    sides = [Side(files / "good.safetensors", "cpu", None, "const", 1.0)]
    sides += [Side(tmp_path / "huge.safetensors", "cpu", batch, "const", 1.0) for batch in (None, 3)]
    assert [side.batch for side in sides] == [100, 25, 3]
    assert [len(batch.images) for batch in sides[2].sample(range(4))] == [3, 1]
    assert [sensible_batch(size) for size in (8, 256, 1024, 4096)] == [100, 100, 6, 1]
    Image.new("L", (2048, 2048)).save(real / "0.png")
    assert ImageSet(real).resolution == 2048 and SampleArray(samples(tmp_path, 16, 24)).resolution == 24


def samples(folder, height, width):
    np.savez(folder / "samples.npz", arr_0=np.zeros([4, height, width, 3], np.uint8))
    return folder / "samples.npz"


def how(files, ref, data):  # noqa: F811
    options = {**arguments(files, "good", "good"), "ref": ref, "data": data, "progress": False}
    return compare(**options, num=4, ref_num=20)["real"]["how"]


def test_real_images_are_never_compared_with_themselves(files, real, tmp_path):  # noqa: F811
    assert "4 images against 46 others" in how(files, real, real)
    assert "4 images against 46 others" in how(files, real, zipped(real))  # the same images by another name
    assert "4 images against 46 others" in how(files, files / "reference.npz", real)  # nobody knows what it was made of
    (tmp_path / "other").mkdir()
    for index in range(50):
        image = np.random.RandomState(100 + index).randint(0, 128, [32, 32], dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / "other" / f"{index}.png")
    assert how(files, tmp_path / "other", real) == "4 images drawn anew for each seed range, against the reference"
    assert "against the reference" in how(files, files / "good.safetensors", real)


def test_halves_share_no_image(files, real, monkeypatch):  # noqa: F811
    """With each image of a constant grey, features tell them apart."""
    seen = []
    from refine.evaluation import scale

    measure = scale.measure

    def spied(batches, detector, reference, kinds):
        batches = list(batches)
        images = {image.numpy().tobytes() for batch in batches for image in batch.images}
        others = {row.numpy().tobytes() for row in reference.features}
        own = {row.numpy().tobytes() for batch in batches for row in detector(batch.images)}
        seen.append((len(images), len(own & others), len(others)))
        return measure(iter(batches), detector, reference, kinds)

    monkeypatch.setattr(scale, "measure", spied)
    how(files, real, real)
    assert seen == [(4, 0, 46)] * 3


def test_a_floor_of_equal_halves_is_low(files, real):  # noqa: F811
    """Statistics of the very same images, which give halves, and of a shifted cloud, which is far from every image."""
    detector_options = arguments(files, "good", "good")
    reference = load_reference(files / "reference.npz")
    shifted = FeatureStatistics(keep_features=True).update(reference.features + 20)

    class Named:
        name, sha256, resize = reference.detector, reference.detector_sha256, reference.detector_resize

    save_reference(real.parent / "far.npz", shifted, Named())
    results = compare(**{**detector_options, "ref": real.parent / "far.npz", "data": real}, num=NUM, progress=False)
    assert results["real"]["fd_digits"]["mean"] < 0.05 * results["before"]["fd_digits"]["mean"]


def test_too_few_real_images(files, real):  # noqa: F811
    for path in sorted(real.iterdir())[3:]:
        path.unlink()
    with pytest.raises(ValueError, match=r"--data: .*holds 3 images; expected at least 4"):
        how(files, files / "reference.npz", real)
