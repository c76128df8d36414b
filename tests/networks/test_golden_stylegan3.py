"""StyleGAN3 and StyleGAN-XL against what the originals computed: outputs, gradients, running means, names."""

import pytest
import torch

from refine.networks import stylegan3, stylegan_xl
from refine.networks.stylegan3_layers import design_lowpass
from tests.golden import array_error, max_error, read_arrays, read_json, unlikeness
from tests.networks.stylegan3_tables import xl_kwargs

INDEX = read_json("stylegan3/nets/index")
ARRAYS = {name: read_arrays(f"stylegan3/nets/{name}") for name in INDEX}
TOLERANCE = 1e-5  # in units of the largest number
GRADIENT_TOLERANCE = 2e-5


def golden_generator(name):
    """A network of the golden collection, and its numbers."""
    case, data = INDEX[name], ARRAYS[name]
    state = {key.split("/", 1)[1]: value for key, value in data.items() if key.startswith(("param/", "buffer/"))}
    if name.startswith("x"):
        shapes = {key: list(value.shape) for key, value in state.items()}
        G = stylegan_xl.Generator(**xl_kwargs(case, shapes))
    else:
        G = stylegan3.Generator(**case["init_kwargs"])
    G.load_state_dict(state, strict=True)
    return G.eval(), data


@pytest.mark.parametrize("name", INDEX)
def test_outputs(name):
    G, data = golden_generator(name)
    z, c = data["in/z"], data["in/c"]
    assert G.num_ws == INDEX[name]["num_ws"] and G.synthesis.layer_names == INDEX[name]["layer_names"]
    for psi in ("1", "0.7"):
        ws = data[f"out/ws_psi{psi}"][:, None].expand(-1, G.num_ws, -1)
        assert max_error(G.mapping(z, c, float(psi)), ws) < TOLERANCE
        assert max_error(G(z, c, float(psi)), data[f"out/img_psi{psi}"]) < TOLERANCE
    assert max_error(G.mapping(z, c, 0.5, 3), data["out/ws_psi0.5_cutoff3"]) < TOLERANCE
    assert max_error(G.synthesis(data["in/ws_mixed"]), data["out/img_ws_mixed"]) < TOLERANCE
    if "in/transform" in data:
        G.synthesis.input.transform.copy_(data["in/transform"])
        assert max_error(G(z, c), data["out/img_psi1_transform"]) < TOLERANCE


WITH_ACTIVATIONS = [name for name, data in ARRAYS.items() if any(key.startswith("act/") for key in data)]


@pytest.mark.parametrize("name", WITH_ACTIVATIONS)
def test_activations(name):
    G, data = golden_generator(name)
    seen = {}
    for layer, module in G.synthesis.named_children():
        module.register_forward_hook(lambda m, i, out, layer=layer: seen.update({layer: out}))
    G(data["in/z"], data["in/c"])
    compared = [key for key in data if key.startswith(("act/", "actstat/"))]
    assert len(compared) >= 2
    for key in compared:
        kind, layer = key.split("/")
        x = seen[layer].detach().double()
        actual = x if kind == "act" else torch.stack([x.mean(), x.std(), x.abs().max()])
        assert max_error(actual, data[key]) < TOLERANCE, key


LAYOUTS = [(name, torch.contiguous_format) for name in INDEX]
LAYOUTS += [
    (name, torch.channels_last) for name in ("t02_t16_cond", "r01_r32_uncond", "m01_odd", "x03_super_t16x2_cond")
]


@pytest.mark.parametrize("name, memory_format", LAYOUTS)
def test_gradients(name, memory_format):
    G, data = golden_generator(name)
    G.to(memory_format=memory_format)
    z = data["in/z"].clone().requires_grad_()
    loss = (G(z, data["in/c"]) * data["in/R"]).sum()
    assert max_error(loss, data["out/loss"]) < GRADIENT_TOLERANCE
    names, parameters = INDEX[name]["grad_params"], dict(G.named_parameters())
    grads = torch.autograd.grad(loss, [z, *(parameters[n] for n in names)], retain_graph=True)
    for key, grad in zip(["z", *names], grads, strict=True):
        assert array_error(grad, data[f"grad/{key}"]) <= GRADIENT_TOLERANCE, key
    others = [parameters[n] for n in INDEX[name]["no_grad_params"]]
    if others:
        assert all(g is None for g in torch.autograd.grad(loss, others, allow_unused=True))


@pytest.mark.parametrize("name", INDEX)
def test_running_means(name):
    """w_avg follows in train() mode; the magnitudes follow where they are asked to, before they are used."""
    G, data = golden_generator(name)
    before = {key: value.clone() for key, value in G.state_dict().items()}
    z, c = data["in/z"], data["in/c"]
    G(z, c)
    G.train().mapping(z, c, skip_w_avg_update=True)
    G.synthesis(G.eval().mapping(z, c))
    assert all(torch.equal(before[key], value) for key, value in G.state_dict().items())
    image = G.train()(z, c, update_magnitudes=True)
    assert max_error(image, data["emas/img"]) < TOLERANCE
    assert max_error(G.mapping.w_avg, data["emas/w_avg"]) < TOLERANCE
    for layer in G.synthesis.layer_names:
        if f"emas/{layer}" in data:
            assert max_error(getattr(G.synthesis, layer).magnitude_ema, data[f"emas/{layer}"]) < TOLERANCE


def test_magnitudes_are_constants_of_training():
    G, data = golden_generator("t02_t16_cond")
    before = [b.clone() for n, b in G.named_buffers() if n.endswith("magnitude_ema")]
    G.train()(data["in/z"], data["in/c"]).sum().backward()
    after = [b for n, b in G.named_buffers() if n.endswith("magnitude_ema")]
    assert all(map(torch.equal, before, after)) and not any(b.requires_grad for b in after)


@pytest.mark.parametrize("name", INDEX)
def test_layers_are_scheduled_as_in_the_original(name):
    G, _ = golden_generator(name)
    for row in INDEX[name]["schedule"]["layers"]:
        layer = getattr(G.synthesis, row["name"])
        found = (layer.up, layer.down, list(layer.padding), layer.use_fp16, layer.conv_clamp, layer.magnitude_ema_beta)
        keys = ("up_factor", "down_factor", "padding", "use_fp16", "conv_clamp", "magnitude_ema_beta")
        assert found == tuple(row[key] for key in keys)
        for signal, side in ((layer.source, "in"), (layer.target, "out")):
            assert [signal.size] * 2 == row[f"{side}_size"] and signal.channels == row[f"{side}_channels"]
            for value, key in zip(signal[2:], ("sampling_rate", "cutoff", "half_width"), strict=True):
                assert value == pytest.approx(row[f"{side}_{key}"], rel=1e-12)


@pytest.mark.parametrize("name", INDEX)
def test_filters_are_designed_as_in_the_original(name):
    case, data = INDEX[name], ARRAYS[name]
    shapes = {key.split("/", 1)[1]: list(value.shape) for key, value in data.items() if "/" in key}
    xl = name.startswith("x")
    fresh = stylegan_xl.Generator(**xl_kwargs(case, shapes)) if xl else stylegan3.Generator(**case["init_kwargs"])
    filters = {key: value for key, value in fresh.named_buffers() if key.endswith("_filter")}
    assert len(filters) > 8
    for key, value in filters.items():
        torch.testing.assert_close(value, data[f"buffer/{key}"], rtol=2e-7, atol=1e-9)


DESIGNS = read_json("stylegan3/ops/ops_filtered_lrelu")["lowpass"]


@pytest.mark.parametrize("case", DESIGNS, ids=lambda case: str(case["id"]))
def test_filter_design(case):
    f = design_lowpass(case["numtaps"], case["cutoff"], case["width"], case["fs"], case["radial"])
    if case["result"] is None:
        assert f is None
        return
    expected = read_arrays("stylegan3/ops/ops_filtered_lrelu")[f"lowpass/{case['id']}"]
    torch.testing.assert_close(f, expected, rtol=2e-7, atol=1e-9)


def test_a_circular_filter_of_an_odd_number_of_taps():
    f = design_lowpass(7, 3.0, 2.0, 16, radial=True)
    assert f.isfinite().all() and torch.equal(f, f.t()) and f[3, 3] == f.max() and f.sum() == pytest.approx(1)


@pytest.mark.parametrize("name", ["t01_t32_uncond", "x04_super_of_super_64_cond"])
def test_half_precision(name):
    """Formats of training: close to float32 where a CPU emulates them, and the image is float32."""
    G, data = golden_generator(name)
    expected = data["out/img_psi1"]
    for module in G.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype, module.use_fp16 = torch.bfloat16, False
    image = G(data["in/z"], data["in/c"])
    assert image.dtype == torch.float32 and 0 < unlikeness(image, expected) < 0.1
    for module in G.modules():
        if hasattr(module, "compute_dtype"):
            module.use_fp16 = True
    image = G(data["in/z"], data["in/c"], force_fp32=False)
    assert image.dtype == torch.float32 and 0 < unlikeness(image, expected) < 1e-2


NAMES = [*("t256", "t256_ffhqu_cbase16384", "t512", "t1024", "t128_cond10", "r256", "r256_ffhqu_cbase16384")]
NAMES += ["r512", "r1024", *(f"xl_imagenet{2**k}" for k in range(4, 11)), "sanxl_cifar16_stem", "sanxl_cifar10"]


@pytest.mark.parametrize("name", NAMES)
def test_official_sizes(name):
    golden = read_json(f"stylegan3/names/{name}")
    with torch.device("meta"):
        if "xl" in name:
            G = stylegan_xl.Generator(**xl_kwargs(golden, dict([*golden["parameters"], *golden["buffers"]])))
        else:
            G = stylegan3.Generator(**golden["init_kwargs"])
    for kind, tensors in (("parameters", G.named_parameters()), ("buffers", G.named_buffers())):
        assert sorted([n, list(t.shape)] for n, t in tensors) == sorted(golden[kind])
    assert sum(p.numel() for p in G.parameters()) == golden["parameter_count"]
    assert G.synthesis.layer_names == [row["name"] for row in golden["schedule"]["layers"]]
    none = [f"synthesis.{n}.{b}" for n, m in G.synthesis.named_children() for b, v in m._buffers.items() if v is None]
    assert sorted(none) == sorted(golden["none_buffers"])
