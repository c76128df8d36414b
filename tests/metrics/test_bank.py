"""Banks of a teacher's images: drawn once, kept, gone on with; and what is measured against them."""

import json
import os
import socket

import numpy as np
import pytest
import torch

from refine.checkpoints.native import save_networks
from refine.checkpoints.teachers import TeacherSource
from refine.dnnlib import sha256_of_file
from refine.metrics import bank, named
from refine.metrics.bank import BANK_SEED, teacher_bank
from refine.metrics.detectors import INCEPTION_SPACE, load_detector, space_of_results
from refine.metrics.named import NamedMetric
from refine.metrics.pipeline import sharing
from refine.metrics.references import REFERENCE_SEED, Looking, NotDrawn, load_reference
from refine.metrics.sampling import sample_teacher
from refine.networks.edm import EDMPrecond
from refine.networks.sampler_settings import SamplerChoice, SamplerSettings
from refine.torch_utils import distributed
from tests.launch import CONTEXT, wait
from tests.metrics.networks import PixelDetector, PlainGenerator
from tests.training.test_trainer import make_teacher


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REFINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bank, "PART", 8)
    return tmp_path / "cache" / "banks"


@pytest.fixture
def teacher(tmp_path):
    save_networks(tmp_path / "teacher.safetensors", {"ema": make_teacher()}, provenance={})
    return tmp_path / "teacher.safetensors"


@pytest.fixture
def evaluations(monkeypatch):
    """How many images a network was asked about, call by call."""
    calls, forward = [], EDMPrecond.forward
    monkeypatch.setattr(
        EDMPrecond,
        "forward",
        lambda self, x, *args, **kwargs: calls.append(len(x)) or forward(self, x, *args, **kwargs),
    )
    return calls


def steps(count, **more):
    return SamplerChoice({"steps": count, **more})


def draw(path, num=20, **options):
    return teacher_bank(path, num, **{"choice": steps(2), "batch": 4, **options})


def equal(a, b):
    return torch.equal(a.images, b.images) and torch.equal(a.classes, b.classes)


def test_a_bank_is_what_the_sampler_draws_and_is_drawn_once(cache, teacher, evaluations):
    first = draw(teacher)
    assert first.images.dtype == torch.uint8 and first.images.shape == (20, 1, 8, 8) and first.classes.shape == (20,)
    expected = list(
        sample_teacher(make_teacher(), range(BANK_SEED, BANK_SEED + 20), batch=4, settings=SamplerSettings(2))
    )
    assert torch.equal(first.images, torch.cat([part.images for part in expected]))
    assert torch.equal(first.classes, torch.cat([part.classes for part in expected]))
    asked = len(evaluations)
    assert equal(draw(teacher), first) and len(evaluations) == asked
    batches = list(first.batches(4, range(8, 18)))
    assert [len(part.images) for part in batches] == [4, 4, 2] and torch.equal(batches[2].images, first.images[16:18])
    assert BANK_SEED + 2**20 < 2**32 and BANK_SEED > REFERENCE_SEED + 2**20


def test_another_teacher_and_another_sampler_have_other_banks(cache, teacher, tmp_path):
    first = draw(teacher)
    save_networks(tmp_path / "other.safetensors", {"ema": make_teacher(seed=5)}, provenance={})
    assert not equal(draw(tmp_path / "other.safetensors"), first) and not equal(draw(teacher, choice=steps(3)), first)
    assert len(list(cache.iterdir())) == 9


def test_a_larger_bank_begins_with_the_smaller_one(cache, teacher, evaluations):
    small = draw(teacher, 16)
    evaluations.clear()
    large = draw(teacher, 24)
    assert torch.equal(large.images[:16], small.images) and sum(evaluations) == 8 * 3


@pytest.mark.parametrize("fault", ["half", "other", "shape", "classes", "writable"])
def test_a_broken_part_is_told_and_drawn_again(cache, teacher, capsys, evaluations, fault):
    whole = draw(teacher)
    place = bank._place(sha256_of_file(teacher), range(BANK_SEED, BANK_SEED + 8), SamplerSettings(2))
    arrays = {"images": whole.images[:8].numpy(), "classes": whole.classes[:8].numpy()}
    if fault == "half":
        place.write_bytes(place.read_bytes()[:200])
    elif fault == "other":
        place.write_text("something else")
    elif fault == "writable":
        place.chmod(0o666)
    else:
        change = {"shape": {"images": arrays["images"][:7]}, "classes": {"classes": arrays["classes"] + 3}}[fault]
        np.savez(place, **{**arrays, **change})
        place.chmod(0o644)
    evaluations.clear()
    assert equal(draw(teacher), whole) and sum(evaluations) == 8 * 3
    assert "drawn again" in capsys.readouterr().err
    evaluations.clear()
    assert equal(draw(teacher), whole) and not evaluations and capsys.readouterr().err == ""


def test_it_goes_on_after_an_interruption(cache, teacher, monkeypatch, evaluations):
    def interrupted(*args, **kwargs):
        for index, part in enumerate(sample_teacher(*args, **kwargs)):
            if len(list(cache.glob("*.npz"))) == 1 and index == 1:
                raise KeyboardInterrupt
            yield part

    with monkeypatch.context() as patch:
        patch.setattr(bank, "sample_teacher", interrupted)
        with pytest.raises(KeyboardInterrupt):
            draw(teacher)
    evaluations.clear()
    whole = draw(teacher)
    assert sum(evaluations) == 12 * 3  # of 20 images
    assert equal(whole, draw(teacher, cache=False))


def test_a_cache_that_cannot_be_written_is_told_once(cache, teacher, capsys):
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be")
    assert len(draw(teacher).images) == 20
    assert capsys.readouterr().err.count("cannot be kept") == 1


def test_every_setting_of_the_sampler_tells_banks_apart(cache, teacher):
    source = TeacherSource.of(teacher)
    usual = bank.describe_bank(source, 20, SamplerSettings())
    changed = {"steps": 17, "rho": 6.0, "sigma_min": 0.003, "sigma_max": 70.0}
    changed |= {"S_churn": 1.0, "S_min": 0.1, "S_max": 9.0, "S_noise": 1.1}
    keys = {bank.describe_bank(source, 20, SamplerSettings(**{name: value})) for name, value in changed.items()}
    assert len(keys | {usual}) == len(changed) + 1
    # what was drawn before there were settings to choose is found again
    assert usual == json.dumps([1, sha256_of_file(teacher), BANK_SEED, 20, 18])
    noisy = draw(teacher, num=8, choice=steps(2, S_churn=1.4))
    assert not torch.equal(noisy.images, draw(teacher, num=8).images)


def test_a_smaller_bank_is_the_beginning_of_a_larger_one(cache, teacher, evaluations):
    larger = draw(teacher, num=16)
    asked = len(evaluations)
    smaller = draw(teacher, num=11)
    assert len(evaluations) == asked and torch.equal(smaller.images, larger.images[:11])
    assert torch.equal(smaller.classes, larger.classes[:11])


def test_the_bar_is_shown_where_it_is_wanted(cache, teacher, capsys):
    draw(teacher, progress=True)
    assert "images of teacher" in capsys.readouterr().err
    draw(teacher, progress=True)
    assert capsys.readouterr().err == ""


def process(rank, port, cache, path, out):
    torch.set_num_threads(1)
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["REFINE_CACHE"] = f"{cache}{rank}"  # machines may have caches of their own
    bank.PART = 8
    asked, forward = [], EDMPrecond.forward
    EDMPrecond.forward = lambda self, x, *args, **kwargs: asked.append(len(x)) or forward(self, x, *args, **kwargs)
    with distributed.session(cuda=False), sharing():
        found = draw(path)
        count = sum(asked)
        reference = load_reference(path, PixelDetector(), Looking(batch=4, bank=20))
        torch.save((found.images, found.classes, count, reference.mu), f"{out}{rank}")
        if rank == 1:
            bank.sample_teacher = lambda *_, **__: 1 / 0
        with pytest.raises(ZeroDivisionError if rank else ValueError, match="division by zero"):
            draw(path, choice=steps(3))


def test_ranks_share_the_work_and_hold_the_same_bank(cache, teacher, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    args = (port, str(tmp_path / "cache"), teacher, str(tmp_path / "out"))
    processes = [CONTEXT.Process(target=process, args=(rank, *args)) for rank in range(2)]
    for child in processes:
        child.start()
    assert wait(processes) == [0, 0]
    alone = draw(teacher, cache=False)
    mu = load_reference(teacher, PixelDetector(), Looking(batch=4, bank=20, cache=False)).mu
    counts = []
    for rank in range(2):
        images, classes, count, their_mu = torch.load(tmp_path / f"out{rank}", weights_only=True)
        assert torch.equal(images, alone.images) and torch.equal(classes, alone.classes)
        torch.testing.assert_close(their_mu, mu)
        counts.append(count)
    assert sum(counts) == 20 * 3 and min(counts) > 0


# As a reference.


def test_a_teacher_as_a_reference(cache, teacher, evaluations):
    looking = Looking(batch=4, bank=20)
    reference = load_reference(teacher, PixelDetector(), looking)
    assert reference.is_teacher and reference.num == 20 and reference.form == "teacher, 20 images, 18 Heun steps"
    assert reference.sha256 == sha256_of_file(teacher) and len(reference.classes) == 20
    asked = len(evaluations)
    again = load_reference(teacher, PixelDetector(), looking)
    assert torch.equal(again.mu, reference.mu) and torch.equal(again.classes, reference.classes)
    other = load_reference(teacher, PixelDetector(), Looking(batch=4, bank=16))
    assert other.num == 16 and len(evaluations) == asked  # the bank's first images, which are there
    with pytest.raises(ValueError, match="is a teacher, whose images need a detector"):
        load_reference(teacher)
    with pytest.raises(NotDrawn):
        load_reference(teacher, PixelDetector(), Looking(draw=False))


def test_numbers_against_a_teacher_say_so(cache, teacher, monkeypatch):
    detector = PixelDetector(num_classes=4)
    monkeypatch.setattr(named, "load_detector", lambda *_: detector)
    metric = NamedMetric("fd20-pixels", "teacher", teacher=teacher, batch=4)
    results = metric.measure(PlainGenerator(), "cpu")
    assert metric.key == "fd_pixels-vs-teacher" and {metric.key, "kid_pixels-vs-teacher", "precision"} <= set(results)
    assert "fd_pixels" not in results and results["reference"]["teacher"] and "teacher" in results["reference"]["form"]
    assert space_of_results(results).against_teacher
    monkeypatch.setattr(detector, "fid_basis", "in a test", raising=False)
    monkeypatch.setattr(detector, "space", INCEPTION_SPACE, raising=False)
    metric = NamedMetric("fid20_full", str(teacher), batch=4)
    results = metric.measure(PlainGenerator(), "cpu")
    assert metric.key == "fd_inception_2015_12_05-vs-teacher" in results
    assert not [key for key in results if key.startswith("fid") or key == "kid"]
    assert metric.name == "fid20_full-vs-teacher"


def test_a_score_without_reference_draws_nothing(cache, teacher, monkeypatch, evaluations):
    monkeypatch.setattr(named, "load_detector", lambda *_: PixelDetector(num_classes=4))
    metric = NamedMetric("is40-pixels", "teacher", teacher=teacher)
    assert metric.key == "is_pixels" in metric.measure(PlainGenerator(), "cpu") and not evaluations
    with pytest.raises(ValueError, match="the teacher of a run"):
        NamedMetric("fd40-pixels", "teacher")


# As the detector.


def test_the_teacher_as_the_detector(cache, teacher):
    detector = load_detector(teacher)
    digest = sha256_of_file(teacher)
    assert detector.space == f"teacher-{digest[:8]}" and detector.sha256 == digest and detector.fid_basis is None
    images = torch.randint(256, [3, 1, 8, 8], dtype=torch.uint8)
    features = detector(images)
    assert features.shape == (3, detector.feature_dim) and features.dtype == torch.float32
    means = make_teacher().encode(images / 127.5 - 1, 0.1)
    torch.testing.assert_close(features, torch.cat(means, dim=1))
    large = images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3).expand(-1, 3, -1, -1)
    assert detector(large).shape == features.shape
    for bad in (images[..., :4, :4], images[..., :4], images.float(), images.expand(-1, 2, -1, -1)):
        with pytest.raises(ValueError, match=r"expected uint8 \[N, 1, 8, 8\], or larger"):
            detector(bad)
    metric = NamedMetric("fd20-teacher", "teacher", teacher=teacher, batch=4)
    assert metric.name == "fd20-teacher" and metric.key == f"fd_teacher_{digest[:8]}-vs-teacher"
    assert metric.measure(PlainGenerator(), "cpu")[metric.key] > 0


def test_too_many_features_are_those_of_the_coarsest_resolutions(monkeypatch):
    from refine.metrics import teacher_features

    kwargs = {"model_channels": 8, "channel_mult": [1, 2, 3], "num_blocks": 1}
    network = EDMPrecond(16, 1, 0, model_type="SongUNet", **kwargs).eval()
    assert teacher_features.TeacherDetector(network, "0" * 64).feature_dim == 8 + 16 + 24
    for limit, expected in ((40, 40), (39, 24), (3, 24)):
        monkeypatch.setattr(teacher_features, "MAX_FEATURES", limit)
        assert teacher_features.TeacherDetector(network, "0" * 64).feature_dim == expected
