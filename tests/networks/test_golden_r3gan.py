"""R3GAN's generator against numbers of the original: images, activations, gradients, names and sizes."""

import pytest
import torch

from refine.checkpoints import registry
from refine.networks.r3gan import Generator
from tests.golden import ROOT, array_error, max_error, noted, read_arrays, read_json, unlikeness

CASES = read_json("r3gan/nets/index")
SIZES = sorted(path.stem for path in (ROOT / "r3gan/names").glob("*.json"))


def kwargs_of(theirs, dtypes):
    """Our constructor arguments for theirs."""
    return {
        "z_dim": theirs["NoiseDimension"],
        "c_dim": theirs["c_dim"],
        "img_resolution": theirs["img_resolution"],
        "img_channels": 3,
        "widths": theirs["WidthPerStage"],
        "cardinalities": theirs["CardinalityPerStage"],
        "blocks": theirs["BlocksPerStage"],
        "expansion": theirs["ExpansionFactor"],
        "embed_features": theirs.get("ConditionEmbeddingDimension", 0) if theirs["c_dim"] else 0,
        "kernel_size": theirs.get("KernelSize", 3),
        "resample_filter": theirs.get("ResamplingFilter", [1, 2, 1]),
        "bf16_stages": [index for index, dtype in enumerate(dtypes) if "bfloat16" in dtype],
    }


def golden(name):
    case, data = CASES[name], read_arrays(f"r3gan/nets/{name}")
    G = Generator(**kwargs_of(case["init_kwargs"], case["stage_dtypes"])).eval()
    state = {key.split("/", 1)[1]: value for key, value in data.items() if key.startswith(("param/", "buffer/"))}
    kernels = {key: value.clone() for key, value in G.state_dict().items() if key.endswith("Kernel")}
    G.load_state_dict({key.removeprefix("Model."): value for key, value in state.items()})
    for key, value in kernels.items():  # what the constructor makes is what the file holds
        torch.testing.assert_close(value, G.state_dict()[key], rtol=0, atol=1e-7)
    return G, data


@pytest.mark.parametrize("name", CASES)
def test_numbers(name):
    G, data = golden(name)
    z, c = data["in/z"].clone().requires_grad_(True), data["in/c"] if G.c_dim else None
    x, seen = z, {}
    for index, stage in enumerate(G.MainLayers):
        stage.register_forward_hook(lambda _, __, out, index=index: seen.update({f"act/stage{index}": out}))
        for number, layer in enumerate(stage.Layers):
            key = f"act/stage{index}_layer{number}"
            layer.register_forward_hook(lambda _, __, out, key=key: seen.update({key: out}))
    image = G(x, c)
    assert max_error(image, data["out/img"]) < 1e-5
    compared = [key for key in seen if key in data]
    assert {f"act/stage{index}" for index in range(len(G.MainLayers))} <= set(compared)
    for key in compared:
        assert max_error(seen[key], data[key]) < 1e-5, key
    (image * data["in/R"]).sum().backward()
    named = {"grad/z": z, **{f"grad/Model.{key}": value for key, value in G.named_parameters()}}
    gradients = {key: value for key, value in data.items() if key.startswith("grad/")}
    assert len(gradients) >= 3
    for key, value in gradients.items():
        assert array_error(named[key].grad, value) < 1e-4, key


def test_bfloat16_stages_where_they_are_asked_for():
    G, data = golden("r04_cond16_bf16")
    assert [stage.use_bf16 for stage in G.MainLayers] == [False, True, True]
    image = G(data["in/z"], data["in/c"], force_fp32=False)
    assert image.dtype == torch.float32
    assert unlikeness(image, data["out/img"]) > 1e-4
    assert noted((image - data["out/img_bf16stages"]).abs().max().item()) < 0.05
    assert torch.equal(G(data["in/z"], data["in/c"]), G(data["in/z"], data["in/c"], force_fp32=True))


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    """Names, shapes and numbers of parameters of the published networks; no weight is made."""
    table = read_json(f"r3gan/names/{name}")["G"]
    kwargs = kwargs_of(table["init_kwargs"], table["stage_dtypes"])
    G = registry.build_empty("r3gan.Generator", kwargs)
    listed = [*table["parameters"], *table["buffers"]]
    expected = {key.removeprefix("Model."): tuple(shape) for key, shape in listed}
    assert {key: tuple(value.shape) for key, value in G.state_dict().items()} == expected
    assert sum(p.numel() for p in G.parameters()) == table["num_params"]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"widths": [8, 8]}, "expected one for each stage"),
        ({"img_resolution": 32}, "img_resolution is 32"),
        ({"cardinalities": [3, 1, 1]}, "groups"),
        ({"bf16_stages": [0]}, "bfloat16"),
        ({"blocks": [-1, 1, 1]}, "less than 0"),
    ],
)
def test_impossible_arguments(change, reason):
    usual = {"z_dim": 4, "c_dim": 0, "img_resolution": 16, "img_channels": 3}
    usual |= {"widths": [8, 8, 4], "cardinalities": [4, 4, 2], "blocks": [1, 1, 1]}
    Generator(**usual)
    with pytest.raises(ValueError, match=reason):
        Generator(**{**usual, **change})


def test_shapes_are_checked():
    G = Generator(4, 3, 4, 3, widths=[4], cardinalities=[2], blocks=[1], embed_features=2)
    with pytest.raises(ValueError, match=r"z is of shape \(1, 5\)"):
        G(torch.zeros(1, 5), torch.zeros(1, 3))
    for c in (None, torch.zeros(1, 2)):
        with pytest.raises(ValueError, match="c is "):
            G(torch.zeros(1, 4), c)
