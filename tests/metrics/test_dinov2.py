"""DINOv2: the network, its positions and its weights in both namings, against numbers of the originals."""

import math

import pytest
import torch
import torch.nn.functional as F

from refine.metrics.dinov2 import Architecture, VisionTransformer, resample_positions
from refine.metrics.dinov2_detector import MODES, prepared
from refine.metrics.dinov2_weights import is_dinov2, load_dinov2, title
from refine.metrics.measures.frechet import frechet_distance
from refine.metrics.statistics import FeatureStatistics
from refine.metrics.stored import opened
from tests.golden import ROOT, read_arrays, read_json
from tests.metrics.networks import dinov2_state

GOLDEN = ROOT / "dinov2"
NETWORKS = ("tiny_mlp", "tiny_registers", "tiny_swiglu")
SIZES = ("70x70", "56x56", "98x98", "56x84")  # the first is that of the table
RESOLUTIONS = (32, 64, 256)


def error(actual, expected) -> float:
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def weights(arrays) -> dict[str, torch.Tensor]:
    return {key[2:]: value.float() for key, value in arrays.items() if key.startswith("w:")}


def golden_network(name: str, arrays) -> VisionTransformer:
    kwargs = read_json(f"dinov2/{name}")["kwargs"]
    grid, gated = kwargs["img_size"] // 14, kwargs["ffn_layer"] != "mlp"
    sizes = (kwargs["embed_dim"], kwargs["depth"], kwargs["num_heads"], grid, kwargs["num_register_tokens"], gated)
    architecture = Architecture(*sizes)
    assert {key: tuple(value.shape) for key, value in weights(arrays).items()} == architecture.shapes()
    return VisionTransformer(architecture, weights(arrays))


@pytest.mark.parametrize("name", NETWORKS)
def test_tokens_equal_the_originals(name):
    arrays = read_arrays(f"dinov2/{name}")
    network = golden_network(name, arrays)
    registers = network.architecture.registers
    for size in SIZES:
        x = arrays[f"{size}:x"].float()
        assert error(network.embed(x), arrays[f"{size}:embedded"]) < 1e-6
        tokens = network.tokens(x)
        assert error(tokens[:, 0], arrays[f"{size}:cls"]) < 2e-6
        assert error(tokens[:, 1 + registers :], arrays[f"{size}:patch_tokens"]) < 2e-6
        assert not registers or error(tokens[:, 1 : 1 + registers], arrays[f"{size}:register_tokens"]) < 2e-6
        assert torch.equal(network(x), tokens[:, 0])


@pytest.mark.parametrize("rule", ["offset0.1_noantialias", "offset0_antialias"])
def test_positions_are_resampled_as_in_the_originals(rule):
    arrays = read_arrays("dinov2/pos_embed")
    table, registers = arrays["pos_embed"].float(), rule == "offset0_antialias"
    for height, width in ((224, 224), (252, 252), (224, 280), (98, 98)):
        found = resample_positions(table, height // 14, width // 14, registers)
        assert error(found, arrays[f"{rule}:{height}x{width}"]) < 1e-6
    assert resample_positions(table, 37, 37, registers) is table
    other = arrays["hf_size_only:224x224"]  # what Hugging Face's code makes of it is something else
    assert registers or error(resample_positions(table, 16, 16, registers), other) > 0.01


def test_the_published_networks_have_these_tensors():
    for published, expected in read_json("dinov2/official_shapes").items():
        name = published.removeprefix("dinov2_")
        architecture = Architecture.published(name)
        shapes = architecture.shapes()
        assert shapes == {key: tuple(shape) for key, shape in expected["state_dict"]}, published
        assert sum(math.prod(shape) for shape in shapes.values()) == expected["num_params"]
        assert architecture.name == name and architecture.heads == expected["num_heads"]
        assert architecture.depth == expected["depth"] and bool(architecture.registers) == name.endswith("_reg")


def test_hugging_faces_names_mean_the_same_tensors():
    networks = []
    for file in ("tiny_mlp_official.pth", "tiny_mlp_hf.safetensors"):
        with opened(GOLDEN / file, "a network") as tensors:
            assert is_dinov2(tensors)
            networks.append(load_dinov2(tensors, (GOLDEN / file).stat().st_size, heads=4))
            prefixed = {f"dinov2.{name}": tensor for name, tensor in tensors.items()}
            if file.endswith(".safetensors"):  # a classifier's, whose head is left out
                prefixed["classifier.weight"] = next(iter(tensors.values()))
                networks.append(load_dinov2(prefixed, 1 << 30, heads=4))
    arrays = read_arrays("dinov2/tiny_mlp")
    for network in networks:
        assert network.architecture == Architecture(32, 2, 4, 5)
        assert error(network(arrays["56x56:x"].float()), arrays["56x56:cls"]) < 2e-6


@pytest.mark.parametrize("name", ["vitl14", "vitg14", "vits14_reg"])
def test_names_of_the_published_models_of_hugging_face(name):
    """Tensors of the official size, of which only the shapes are there."""
    from refine.metrics.dinov2_weights import _published_names, _shape

    class Place:
        def __init__(self, shape):
            self.shape = tuple(shape)

    table = read_json("dinov2/official_shapes")[f"dinov2_{name}"]["hf_state_dict"]
    named = _published_names({key: Place(shape) for key, shape in table})
    assert {key: _shape(pieces) for key, pieces in named.items()} == Architecture.published(name).shapes()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_images_are_resized_as_in_the_originals(resolution, mode):
    arrays = read_arrays("dinov2/preprocess")
    expected = {key.rpartition(":")[2]: value for key, value in arrays.items() if f"{resolution}:{mode}:" in key}
    x = prepared(arrays[f"{resolution}:images"], mode)
    assert x.shape == (2, 3, 224, 224) and x.dtype == torch.float32
    assert error(x[:, :, ::7, ::7], expected["every7"]) < 1e-6
    assert error(x[:, :, :5, :5], expected["corner_tl"]) < 1e-6
    assert error(x[:, :, -5:, -5:], expected["corner_br"]) < 1e-6
    assert error(x.double().sum((2, 3)), expected["channel_sum"]) < 1e-6
    assert error(x.double().square().sum((2, 3)), expected["channel_sumsq"]) < 1e-6
    features = read_arrays("dinov2/end_to_end")
    network = VisionTransformer(Architecture(32, 2, 4, 37), weights(features))
    assert error(network(x), features[f"{resolution}:{mode}:features"]) < 2e-6


def test_images_of_224_pixels_are_left_as_they_are():
    images = torch.randint(0, 256, [2, 1, 224, 224], dtype=torch.uint8)
    results = [prepared(images, mode) for mode in MODES]
    assert all(torch.equal(result, results[0]) for result in results)
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    torch.testing.assert_close(results[0] * std + mean, images.expand(-1, 3, -1, -1) / 255, atol=1e-6, rtol=0)


def test_the_distance_is_edm2s():
    arrays = read_arrays("dinov2/frechet")
    fake, real = (FeatureStatistics().update(arrays[key]) for key in ("features", "reference_features"))
    assert error(fake.mean, arrays["mu"]) < 1e-13 and error(fake.covariance, arrays["sigma"]) < 1e-13
    distance = frechet_distance(fake.mean, fake.covariance, real.mean, real.covariance)
    assert distance == pytest.approx(arrays["fd"].item(), rel=1e-10)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_features_are_of_float32_whatever_is_around(monkeypatch, precision):
    network = VisionTransformer(Architecture(64, 1, 1, 37), dinov2_state())
    x = torch.randn(1, 3, 224, 224)
    expected, linear, seen = network(x), F.linear, set()

    def spied(*args):
        seen.add(torch.get_float32_matmul_precision())
        return linear(*args)

    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(F, "linear", spied)
    try:
        torch.set_float32_matmul_precision(precision)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(network(x), expected)
        assert seen == {"highest"} and torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
def test_tf32_changes_nothing():
    network = VisionTransformer(Architecture(64, 1, 1, 37), dinov2_state()).to("cuda")
    x, matmul = torch.randn(2, 3, 224, 224, device="cuda"), torch.backends.cuda.matmul
    expected, before = network(x), matmul.allow_tf32
    try:
        matmul.allow_tf32 = True
        assert torch.equal(network(x), expected) and matmul.allow_tf32
    finally:
        matmul.allow_tf32 = before


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("a/dinov2_vitl14_pretrain.pth", "dinov2_vitl14_pretrain"),
        ("a/dinov2-large/model.safetensors", "dinov2-large"),
        (f"hub/models--facebook--dinov2-large/snapshots/{'a1' * 20}/model.safetensors", "dinov2-large"),
        ("cache/host/facebook/dinov2-large/resolve/main/model.safetensors", "dinov2-large"),
    ],
)
def test_what_weights_are_called(tmp_path, place, expected):
    assert title(tmp_path / place) == expected
