"""StyleGAN2 networks against what the original computed: outputs, gradients, w_avg, second-order gradients, names."""

import pytest
import torch
import torch.nn.functional as F

from refine.networks.stylegan2 import Discriminator, Generator
from tests.golden import max_error, read_arrays, read_json

INDEX = read_json("stylegan2/nets/index")
GENERATORS = [name for name, case in INDEX.items() if case["kind"] == "generator"]
DISCRIMINATORS = [name for name, case in INDEX.items() if case["kind"] == "discriminator"]
IMAGE_TOLERANCE = 5e-6
GRADIENT_TOLERANCE = 5e-5
HALF_TOLERANCE = 1e-2


def build(name, cls):
    data = read_arrays(f"stylegan2/nets/{name}")
    net = cls(**INDEX[name]["init_kwargs"]).eval()
    state = {key.split("/", 1)[1]: value for key, value in data.items() if key.startswith(("param/", "buffer/"))}
    net.load_state_dict(state, strict=True)
    return net, data


@pytest.mark.parametrize("name", GENERATORS)
def test_generator_outputs(name):
    G, data = build(name, Generator)
    z, c = data["in/z"], data["in/c"]
    assert G.num_ws == INDEX[name]["num_ws"]
    assert max_error(G.mapping(z, c), data["out/ws_psi1"]) < IMAGE_TOLERANCE
    assert max_error(G.mapping(z, c, 0.7), data["out/ws_psi0.7"]) < IMAGE_TOLERANCE
    assert max_error(G.mapping(z, c, 0.5, 2), data["out/ws_psi0.5_cutoff2"]) < IMAGE_TOLERANCE
    images = [key for key in data if key.startswith("out/img_psi") and "random" not in key]
    assert images
    for key in images:
        _, psi, noise_mode, fused = key.removeprefix("out/").split("_")
        options = {"noise_mode": noise_mode, "fused_modconv": fused == "fused1", "force_fp32": True}
        image = G(z, c, truncation_psi=float(psi.removeprefix("psi")), **options)
        assert image.dtype == torch.float32
        assert max_error(image, data[key]) < IMAGE_TOLERANCE, key


@pytest.mark.parametrize("name", GENERATORS)
def test_generator_draws_noise_in_the_same_order(name):
    G, data = build(name, Generator)
    torch.manual_seed(123)
    image = G(data["in/z"], data["in/c"], noise_mode="random", fused_modconv=True)
    assert max_error(image, data["out/img_psi1_random_seed123_fused1"]) < IMAGE_TOLERANCE


@pytest.mark.parametrize("name", [n for n in GENERATORS if n[:3] in ("g01", "g04", "g05")])
def test_generator_activations(name):
    G, data = build(name, Generator)
    seen = {}
    for res in G.synthesis.block_resolutions:
        getattr(G.synthesis, f"b{res}").register_forward_hook(lambda m, i, out, res=res: seen.update({res: out}))
    G(data["in/z"], data["in/c"], noise_mode="const", fused_modconv=True)
    for res, (x, img) in seen.items():
        assert max_error(x, data[f"act/b{res}_x"]) < IMAGE_TOLERANCE
        if f"act/b{res}_img" in data:
            assert max_error(img, data[f"act/b{res}_img"]) < IMAGE_TOLERANCE


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", GENERATORS)
def test_generator_gradients(name, fused, memory_format):
    G, data = build(name, Generator)
    G.to(memory_format=memory_format)
    z = data["in/z"].requires_grad_()
    image = G(z, data["in/c"], noise_mode="const", fused_modconv=fused, force_fp32=True)
    parameters = dict(G.named_parameters())
    names = INDEX[name]["grad_params"]
    grads = torch.autograd.grad((image * data["in/R"]).sum(), [z, *(parameters[n] for n in names)])
    for key, grad in zip(["z", *names], grads, strict=True):
        assert max_error(grad, data[f"grad/fused{int(fused)}/{key}"]) < GRADIENT_TOLERANCE, key


@pytest.mark.parametrize("name", GENERATORS)
def test_w_avg_follows_training_forwards(name):
    G, data = build(name, Generator)
    before = G.mapping.w_avg.clone()
    G.mapping(data["in/z"], data["in/c"])
    G.train().mapping(data["in/z"], data["in/c"], skip_w_avg_update=True)
    assert torch.equal(G.mapping.w_avg, before)
    G.mapping(data["in/z"], data["in/c"])
    assert max_error(G.mapping.w_avg, data["train/w_avg_after_one_forward"]) < IMAGE_TOLERANCE


@pytest.mark.parametrize("fused", [0, 1])
def test_fp16_blocks(fused):
    G, data = build("g09_skip_fp16", Generator)
    assert [G.synthesis.b4.use_fp16, G.synthesis.b8.use_fp16, G.synthesis.b16.use_fp16] == [False, True, True]
    options = {"noise_mode": "const", "fused_modconv": bool(fused)}
    half = G(data["in/z"], data["in/c"], force_fp32=False, **options)
    assert half.dtype == torch.float32
    assert max_error(half, data[f"out/fp16_img_psi1_const_fused{fused}"]) < HALF_TOLERANCE
    automatic = G(data["in/z"], data["in/c"], **options)  # a CPU computes in float32
    assert max_error(automatic, data[f"out/img_psi1_const_fused{fused}"]) < IMAGE_TOLERANCE


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_discriminator(name):
    D, data = build(name, Discriminator)
    img, c = data["in/img"].requires_grad_(), data["in/c"]
    logits = D(img, c)
    assert max_error(logits, data["out/logits"]) < IMAGE_TOLERANCE
    (grad,) = torch.autograd.grad(logits.sum(), img, create_graph=True)
    assert max_error(grad, data["grad/img"]) < GRADIENT_TOLERANCE
    penalty = grad.square().sum([1, 2, 3])
    assert max_error(penalty, data["out/r1_penalty"]) < GRADIENT_TOLERANCE
    parameters = dict(D.named_parameters())
    for scalar, prefix in ((penalty.mean(), "grad_r1"), (F.softplus(D(img, c)).mean(), "grad_softplus")):
        names = INDEX[name]["grad_params"]
        wanted = [parameters[n] for n in names]
        grads = torch.autograd.grad(scalar, wanted, allow_unused=True, materialize_grads=True)
        for key, actual in zip(names, grads, strict=True):
            assert max_error(actual, data[f"{prefix}/{key}"]) < GRADIENT_TOLERANCE, (prefix, key)


CIFAR = {"synthesis": {"num_fp16_res": 4, "conv_clamp": 256}, "layers": 2, "architecture": "orig", "mbstd": 32}
PAPER256 = {"synthesis": {"channel_base": 16384, "num_fp16_res": 4, "conv_clamp": 256}, "layers": 8, "mbstd": 8}
# Label size, resolution and the training configuration of each (facts of formats/stylegan2.md, 1.11).
OFFICIAL = {
    "cifar10_cond": (10, 32, CIFAR),
    "cifar10_uncond": (0, 32, CIFAR),
    "paper256_uncond": (0, 256, PAPER256),
    "auto64_cond5": (5, 64, {**PAPER256, "layers": 2, "mbstd": 4}),
}


def official(name):
    c_dim, resolution, cfg = OFFICIAL[name]
    G = Generator(512, c_dim, 512, resolution, 3, {"num_layers": cfg["layers"]}, cfg["synthesis"])
    options = {"architecture": cfg.get("architecture", "resnet"), "epilogue_kwargs": {"mbstd_group_size": cfg["mbstd"]}}
    return G, Discriminator(c_dim, resolution, 3, **options, **cfg["synthesis"])


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_sizes(name):
    golden = read_json(f"stylegan2/names/{name}")
    for key, net in zip("GD", official(name), strict=True):
        for kind, tensors in (("parameters", net.named_parameters()), ("buffers", net.named_buffers())):
            assert sorted([n, list(t.shape)] for n, t in tensors) == sorted(golden[key][kind])
        assert sum(p.numel() for p in net.parameters()) == golden[key]["n_params"]
        assert {n for n, m in net.named_modules() if getattr(m, "use_fp16", False)} == set(golden[key]["fp16_blocks"])
