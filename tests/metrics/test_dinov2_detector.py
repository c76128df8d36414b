"""DINOv2 as a detector: names and modes, what may be called FD-DINOv2, references of EDM2, files that are none."""

import json
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch

from refine.checkpoints.sources.index import read_index
from refine.dnnlib import sha256_of_file
from refine.evaluation.report import feature_space_note
from refine.metrics import detectors, dinov2_detector
from refine.metrics.detectors import load_detector, source_of
from refine.metrics.dinov2_detector import PUBLISHED, split_mode
from refine.metrics.evaluate import describe_detector, evaluate
from refine.metrics.named import NamedMetric, detector_of
from refine.metrics.references import Looking, load_reference, save_reference
from refine.metrics.sampling import Batch
from refine.metrics.statistics import FeatureStatistics
from tests.golden import read_json
from tests.limits import outcome
from tests.metrics.networks import PixelDetector, PlainGenerator, dinov2_state, metric_names

TINY = "64 wide, 1 deep, 0 registers"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("dinov2") / "My weights.pth"
    torch.save(dinov2_state(), path)
    return path


@pytest.fixture
def published(weights, monkeypatch):
    """As if these were the published weights."""
    monkeypatch.setattr(dinov2_detector, "PUBLISHED", sha256_of_file(weights))
    monkeypatch.setattr(dinov2_detector, "ARCHITECTURE", TINY)
    return weights


def images(num=3, channels=3, size=32):
    return torch.randint(0, 256, [num, channels, size, size], dtype=torch.uint8)


def hugging_face(state):
    """The weights under Hugging Face's names."""
    words = [(f"ls{i}.gamma", f"layer_scale{i}.lambda1") for i in (1, 2)] + [("blocks.", "encoder.layer.")]
    words += [("attn.proj", "attention.output.dense"), ("mlp.w12", "mlp.weights_in"), ("mlp.w3", "mlp.weights_out")]
    words += [("patch_embed.proj", "embeddings.patch_embeddings.projection")]
    starts = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"}
    starts |= {name: f"embeddings.{name}" for name in ("mask_token", "register_tokens")}
    starts |= {"norm.weight": "layernorm.weight", "norm.bias": "layernorm.bias"}
    renamed = {}
    for name, tensor in state.items():
        name = starts.get(name, name)
        for ours, theirs in words:
            name = name.replace(ours, theirs)
        thirds = [("attn.qkv", f"attention.attention.{part}") for part in ("query", "key", "value")]
        if "attn.qkv" in name:
            renamed |= {name.replace(*pair): t.clone() for pair, t in zip(thirds, tensor.chunk(3), strict=True)}
        else:
            renamed[name] = tensor
    return dict(sorted(renamed.items()))


def test_features_of_grey_and_of_colour_in_batches_of_any_size(weights, monkeypatch):
    detector = load_detector(weights)
    grey = images(5, channels=1)
    features = detector(grey)
    assert features.shape == (5, 64) == (5, detector.feature_dim) and features.dtype == torch.float32
    assert torch.equal(detector(grey.repeat(1, 3, 1, 1)), features)
    monkeypatch.setattr(dinov2_detector, "_AT_ONCE", 2)
    torch.testing.assert_close(detector(grey), features, rtol=1e-5, atol=1e-5)
    for wrong in (torch.zeros(1, 2, 8, 8, dtype=torch.uint8), torch.zeros(1, 3, 8, 8)):
        with pytest.raises(ValueError, match=r"expected uint8 \[N, 3, H, W\]"):
            detector(wrong)


@pytest.mark.parametrize("new", [True, False])
def test_both_containers_of_torch(weights, tmp_path, new):
    torch.save(dinov2_state(), tmp_path / "w.pth", _use_new_zipfile_serialization=new)
    batch = images()
    assert torch.equal(load_detector(tmp_path / "w.pth")(batch), load_detector(weights)(batch))


@pytest.mark.parametrize("kind", [{}, {"registers": 4}, {"gated": True}])
def test_a_folder_of_hugging_face(tmp_path, kind):
    """File, folder and published names give the same features, registers and gates too."""
    torch.save(dinov2_state(**kind), tmp_path / "w.pth")
    folder = tmp_path / "dinov2-mine"
    folder.mkdir()
    safetensors.torch.save_file(hugging_face(dinov2_state(**kind)), folder / "model.safetensors")
    model = "dinov2_with_registers" if "registers" in kind else "dinov2"
    (folder / "config.json").write_text(json.dumps({"model_type": model, "num_attention_heads": 1}))
    batch = images()
    expected = load_detector(tmp_path / "w.pth")(batch)
    for place in (folder, folder / "model.safetensors"):
        detector = load_detector(place)
        assert torch.equal(detector(batch), expected)
        assert metric_names(detector)[0] == "fd_dinov2_mine" and detector.sha256 == sha256_of_file(
            folder / "model.safetensors"
        )
    assert load_detector(f"{folder}:pil").mode == "pil"
    (folder / "config.json").write_text(json.dumps({"model_type": model, "num_attention_heads": 2}))
    with pytest.raises(ValueError, match=r"config\.json has the num_attention_heads 2; expected 1"):
        load_detector(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has its weights in pytorch_model\.bin; expected model\.safetensors"):
        load_detector(folder)


def test_modes_give_other_features_under_other_names(weights):
    batch, found = images(size=32), {}
    for mode in ("torch", "pil", "clean"):
        detector = load_detector(f"{weights}:{mode}")
        assert mode in detector.resize and mode in detector.note
        found[metric_names(detector)[0]] = detector(batch)
    assert list(found) == ["fd_my_weights", "fd_my_weights_pil", "fd_my_weights_clean"]
    first, *others = found.values()
    assert torch.equal(load_detector(weights)(batch), first)
    assert all((other - first).norm() > 1e-3 * first.norm() for other in others)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dinov2-vitl14:pil", ("dinov2-vitl14", "pil")),
        ("https://host/x.pth:clean", ("https://host/x.pth", "clean")),
        ("https://host:8080/x.pth", ("https://host:8080/x.pth", None)),
        ("digits", ("digits", None)),
        (":pil", (":pil", None)),
    ],
)
def test_what_stands_behind_a_colon(text, expected):
    assert split_mode(text) == expected


def test_modes_that_do_not_exist_or_fit(weights, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"found 'dinov2-vitl14:bicubic'; expected .* torch, pil, clean"):
        load_detector("dinov2-vitl14:bicubic")
    with pytest.raises(ValueError, match="digits is not a DINOv2"):
        load_detector("digits:pil")
    monkeypatch.chdir(tmp_path)
    torch.save(dinov2_state(), "w:pil")  # a file that is there is that file
    assert load_detector("w:pil").mode == "torch"


def test_fd_dinov2_is_the_published_weights_alone(weights, published):
    detector = load_detector(weights)
    assert metric_names(detector) == ("fd_dinov2", "kid_dinov2") and detector.fid_basis is None
    assert "this is FD-DINOv2, resize torch" in detector.note and detector.edm2_part == "fd_dinov2"
    pil = load_detector(f"{weights}:pil")
    assert metric_names(pil)[0] == "fd_dinov2_pil" and "resize pil" in pil.note and pil.edm2_part is None
    results = evaluate([Batch(images(4), None)], detector, None)
    assert feature_space_note({**results, "detector": describe_detector(detector)}) == detector.note


@pytest.mark.parametrize("name", ["dinov2", "DINOv2_pil", "dinov2-clean"])
def test_no_other_file_takes_the_name(weights, tmp_path, name):
    path = tmp_path / f"{name}.pth"
    path.write_bytes(weights.read_bytes())
    detector = load_detector(path)
    slug = name.lower().replace("-", "_")
    assert metric_names(detector)[0] == f"fd_{slug}_{detector.sha256[:8]}"
    assert "not called FD-DINOv2" in detector.note and detector.sha256[:12] in detector.note
    other = detectors.ModuleDetector(torch.nn.Identity(), f"{name}.pt", "0" * 64)
    assert metric_names(other)[0] == f"fd_{slug}_00000000"


def test_names_of_the_published_files():
    index = read_index()
    for published in read_json("dinov2/official_shapes"):
        entry = index[published.replace("_", "-")]
        base, registers = published.removesuffix("_reg"), "_reg4" if published.endswith("_reg") else ""
        assert entry.url == f"https://dl.fbaipublicfiles.com/dinov2/{base}/{base}{registers}_pretrain.pth"
        assert entry.licence == "Apache-2.0" and entry.kind == "classifier"
        assert (entry.sha256 == PUBLISHED) == (published == "dinov2_vitl14")
    assert source_of("dinov2") == source_of("dinov2-vitl14:pil") == "dinov2-vitl14" in index
    assert detector_of("fd50k-dinov2") == "dinov2-vitl14" and detector_of("kid5k-dinov2-vitb14:pil") == "dinov2-vitb14"


def test_a_metric_by_name(published, tmp_path):
    detector = load_detector(f"{published}:pil")
    np.savez(tmp_path / "r.npz", mu=np.zeros(64), sigma=np.eye(64))
    metric = NamedMetric(f"fd6-{published}:pil", tmp_path / "r.npz", batch=4)
    assert (metric.name, metric.key) == ("fd6-My weights-pil", "fd_dinov2_pil")
    results = metric.measure(PlainGenerator(), "cpu")
    assert results["fd_dinov2_pil"] > 0 and results["detector"]["resize"] == detector.resize
    with pytest.raises(ValueError, match=r"fid6-.* is measured with Inception-2015-12-05 only"):
        NamedMetric(f"fid6-{published}", tmp_path / "r.npz")


def edm2_pickle(path, **parts):
    """A table as EDM2's tools write it: one mean and covariance for each feature space."""
    table = {name: {"mu": np.full(width, value), "sigma": np.eye(width)} for name, (width, value) in parts.items()}
    path.write_bytes(pickle.dumps({"num_images": 100, **table}))
    return path


def test_edm2s_references_have_a_part_for_each_detector(published, tmp_path):
    both = edm2_pickle(tmp_path / "img64.pkl", fid=(4, 1.0), fd_dinov2=(64, 2.0))
    reference = load_reference(both, load_detector(published))
    assert reference.mu.tolist() == [2.0] * 64 and reference.num == 100
    assert load_reference(both, PixelDetector()).mu.tolist() == [1.0] * 4  # 4 features, as the part for Inception here
    one = edm2_pickle(tmp_path / "one.pkl", fid=(4, 1.0))
    other = edm2_pickle(tmp_path / "other.pkl", fd_dinov2=(64, 2.0))
    for path, detector, found in [
        (one, load_detector(published), r"of Inception's features \(fid\); found the detector My weights"),
        (other, PixelDetector(), r"of those of DINOv2's vitl14.*found the detector pixels"),
        (both, load_detector(f"{published}:pil"), "resized in the mode torch.*found the detector My weights.pth:pil"),
    ]:
        with pytest.raises(ValueError, match=found) as caught:
            load_reference(path, detector)
        assert "\n" not in str(caught.value)


def test_what_one_mode_saw_is_not_compared_with_another(weights, tmp_path, monkeypatch):
    """The cache of a folder's statistics tells modes apart."""
    from PIL import Image

    monkeypatch.setenv("REFINE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    for index, image in enumerate(images(3)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "set" / f"{index}.png")
    found = [load_reference(tmp_path / "set", load_detector(f"{weights}:{m}"), Looking()).mu for m in ("torch", "pil")]
    assert (found[0] - found[1]).norm() > 1e-3 * found[0].norm()
    plain, other = (load_detector(f"{weights}:{mode}") for mode in ("torch", "pil"))
    save_reference(tmp_path / "r.npz", FeatureStatistics().update(plain(images(3))), plain)
    assert load_reference(tmp_path / "r.npz", plain).detector_resize == plain.resize
    with pytest.raises(ValueError, match=r"r.npz was made of images that were resized otherwise \(torch: .*:pil does"):
        load_reference(tmp_path / "r.npz", other)
    assert len(list((tmp_path / "cache" / "metrics").iterdir())) == 2


def without(name):
    return {key: value for key, value in dinov2_state().items() if key != name}


def changed(name, value):
    return dinov2_state() | {name: value}


NO_DINOV2 = {
    "missing": (lambda: without("blocks.0.ls1.gamma"), "lacks 1 of 21 tensors of a DINOv2"),
    "no class": (lambda: without("cls_token"), "has no cls_token"),
    "no positions": (lambda: without("pos_embed"), "has no pos_embed"),
    "more": (lambda: changed("head.weight", torch.zeros(3)), "1 tensors that a DINOv2"),
    "shape": (lambda: changed("norm.weight", torch.zeros(65)), r"norm\.weight has shape \[65\]; expected \[64\]"),
    "rank": (lambda: changed("cls_token", torch.zeros(64)), r"cls_token has shape \[64\]"),
    "empty": (lambda: changed("cls_token", torch.zeros(1, 1, 0)), r"cls_token has shape \[1, 1, 0\]"),
    "no square": (lambda: changed("pos_embed", torch.zeros(1, 1369, 64)), "1368 patches, which is no square"),
    "no positions but one": (lambda: changed("pos_embed", torch.zeros(1, 1, 64)), "0 patches"),
    "half": (lambda: changed("norm.bias", torch.zeros(64).half()), "has dtype float16; expected float32"),
    "whole": (lambda: changed("norm.bias", torch.zeros(64).long()), "has dtype int64; expected float32"),
    "nan": (lambda: changed("blocks.0.norm1.bias", torch.full([64], torch.nan)), "holds NaN or infinity"),
    "heads": (lambda: dinov2_state(width=96), "96 channels wide, which is not a multiple of 64"),
    "gap": (lambda: changed("blocks.2.ls1.gamma", torch.zeros(64)), "has 2 blocks"),
    "deep": (lambda: dinov2_state() | {f"blocks.{i}.ls1.gamma": torch.zeros(64) for i in range(999)}, "999 blocks"),
    "chunks": (lambda: changed("blocks.0.0.ls1.gamma", torch.zeros(64)), "blocks are in chunks"),
    "training": (
        lambda: {"teacher": {f"backbone.{k}": v for k, v in dinov2_state().items()}},
        r"holds teacher\.backbone\.cls_token; expected cls_token, pos_embed",
    ),
    "head": (lambda: {"weight": torch.zeros(1000, 2048), "bias": torch.zeros(1000)}, "one linear layer, such as"),
    "other": (lambda: {"patch_embed.proj.weight": torch.zeros(3), "cls\n": torch.zeros(3)}, "has no cls_token"),
}


@pytest.mark.parametrize("case", NO_DINOV2)
def test_files_that_are_no_dinov2(case, tmp_path):
    make, message = NO_DINOV2[case]
    torch.save(make(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message) as caught:
        load_detector(tmp_path / "w.pth")
    assert "\n" not in str(caught.value) and "w.pth" in str(caught.value) and len(str(caught.value)) < 400


def test_weights_that_are_cut_off(weights, tmp_path):
    data = weights.read_bytes()
    for end in (100, len(data) // 2, len(data) - 1):
        (tmp_path / "w.pth").write_bytes(data[:end])
        assert outcome(load_detector, tmp_path / "w.pth")
    safetensors.torch.save_file(hugging_face(dinov2_state()), tmp_path / "w.safetensors")
    assert outcome(load_detector, tmp_path / "w.safetensors") == ""
    (tmp_path / "w.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:-100])
    assert "cut off" in outcome(load_detector, tmp_path / "w.safetensors")


def test_weights_that_claim_more_than_the_file_holds(tmp_path):
    """Hundreds of megabytes of tensors that are views of the same one; and numbers that no weights are."""
    state, longest = dinov2_state(), 4 * 512 * 512
    state = detectors.dinov2_weights.Architecture(512, 64, 8, 37).shapes()
    one = torch.zeros(longest)
    torch.save({name: one[: int(np.prod(shape))].view(shape) for name, shape in state.items()}, tmp_path / "w.pth")
    assert "take more memory than the file is long" in outcome(load_detector, tmp_path / "w.pth")
    named = hugging_face(dinov2_state()) | {"layernorm.bias": torch.zeros(64, dtype=torch.float8_e4m3fn)}
    safetensors.torch.save_file(named, tmp_path / "w.safetensors")
    assert "has dtype F8_E4M3" in outcome(load_detector, tmp_path / "w.safetensors")


def test_a_third_of_another_shape(tmp_path):
    named = hugging_face(dinov2_state())
    named["encoder.layer.0.attention.attention.key.weight"] = torch.zeros(32, 64)
    safetensors.torch.save_file(named, tmp_path / "w.safetensors")
    assert "attn.qkv.weight has shape" in outcome(load_detector, tmp_path / "w.safetensors")
