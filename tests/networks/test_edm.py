"""EDM's denoisers, sampler and losses beyond the golden numbers: contracts, errors, modes, analytic cases."""

import copy
import itertools
import json
import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from refine.networks.edm import EDMPrecond, VEPrecond, VPPrecond, iDDPMPrecond, vp_sigma
from refine.networks.edm_layers import GroupNorm, PositionalEmbedding, _frequencies
from refine.networks.edm_loss import EDMLoss
from refine.networks.edm_unets import DhariwalUNet, SongUNet
from refine.networks.sampler import heun_sampler, karras_sigmas

SONG = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
ADM = {**SONG, "model_type": "DhariwalUNet", "model_channels": 32}
NCSNPP = {**SONG, "embedding_type": "fourier", "encoder_type": "residual", "resample_filter": [1, 3, 3, 1]}
PRECONDITIONINGS = (EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond)


def make(cls=EDMPrecond, label_dim=3, seed=0, **options) -> nn.Module:
    """A small 8×8 network in eval mode in which nothing is left at a zero initialisation."""
    torch.manual_seed(seed)
    net = cls(8, 2, label_dim, **{**SONG, **options})
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return net.eval()


def inputs(n=3, label_dim=3):
    return torch.randn(n, 2, 8, 8), torch.linspace(0.1, 2, n), torch.eye(label_dim)[torch.arange(n) % label_dim]


@pytest.mark.parametrize("model", [SONG, ADM, NCSNPP])
@pytest.mark.parametrize("cls", PRECONDITIONINGS)
def test_denoises_to_float32_and_repeats_itself(cls, model):
    net = make(cls, **model)
    x, sigma, c = inputs()
    D_x = net(x, sigma, c)
    assert D_x.shape == x.shape and D_x.dtype == torch.float32
    assert torch.equal(net(x, sigma, c), D_x)
    assert torch.equal(net(x.double(), sigma.double(), c.double()), D_x)
    assert not torch.equal(net(x, sigma), D_x)  # labels matter
    assert 0 <= net.sigma_min < net.sigma_max


@pytest.mark.parametrize("cls", PRECONDITIONINGS)
def test_rebuilt_from_its_init_kwargs(cls):
    net = make(cls, dropout=0.2)
    assert net.init_kwargs == {"img_resolution": 8, "img_channels": 2, "label_dim": 3, **SONG, "dropout": 0.2}
    again = cls(**json.loads(json.dumps(net.init_kwargs))).eval()
    again.load_state_dict(net.state_dict())
    x, sigma, c = inputs()
    assert torch.equal(again(x, sigma, c), net(x, sigma, c))


@pytest.mark.parametrize("model", [SONG, ADM])
def test_dropout_only_in_train_mode(model):
    net, plain = make(**model, dropout=0.5), make(**model, dropout=0.0)
    x, sigma, c = inputs()
    assert torch.equal(net(x, sigma, c), plain(x, sigma, c))
    net.train()
    assert not torch.equal(net(x, sigma, c), net(x, sigma, c))


@pytest.mark.parametrize("model", [SONG, ADM])
def test_label_dropout_blanks_whole_rows_in_train_mode(model):
    net = make(**model, label_dropout=0.5, dropout=0.0)
    x, sigma, c = (t[:1].expand(32, *t.shape[1:]) for t in inputs())
    labelled, blank = net(x, sigma, c)[:1], net(x, sigma)[:1]
    D_x = net.train()(x, sigma, c)
    kept = (D_x - labelled).abs().amax([1, 2, 3]) < 1e-5
    dropped = (D_x - blank).abs().amax([1, 2, 3]) < 1e-5
    assert (kept ^ dropped).all() and 4 < kept.sum() < 28


@pytest.mark.parametrize("model", [SONG, ADM])
def test_use_fp16_does_nothing_on_a_cpu(model):
    half, full = make(**model, use_fp16=True), make(**model)
    x, sigma, c = inputs()
    assert torch.equal(half(x, sigma, c), full(x, sigma, c))


@pytest.mark.parametrize("model", [SONG, ADM, NCSNPP])
def test_channels_last_gives_the_same_numbers(model):
    net = make(**model)
    x, sigma, c = inputs()
    last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.contiguous(memory_format=torch.channels_last), sigma, c), net(x, sigma, c))


def test_one_sigma_and_one_label_for_all():
    net = make()
    x, _, c = inputs()
    expected = net(x, torch.full((3,), 0.7), c[:1].expand(3, -1))
    for sigma in (0.7, torch.tensor(0.7), torch.tensor([0.7])):
        torch.testing.assert_close(net(x, sigma, c[:1]), expected)
    torch.testing.assert_close(net(x, 0.7), net(x, 0.7, torch.zeros(3, 3)))


def test_unconditional_networks_ignore_labels():
    net = make(label_dim=0)
    x, sigma, c = inputs()
    assert torch.equal(net(x, sigma, c), net(x, sigma))


@pytest.mark.parametrize("model", [SONG, ADM])
def test_augmentation_labels(model):
    net = make(**model, augment_dim=9)
    x, sigma, c = inputs()
    assert torch.equal(net(x, sigma, c, augment_labels=torch.zeros(3, 9)), net(x, sigma, c))
    assert not torch.equal(net(x, sigma, c, augment_labels=torch.ones(3, 9)), net(x, sigma, c))


@pytest.mark.parametrize("cls", PRECONDITIONINGS)
def test_a_fresh_network_adds_nothing(cls):
    """The last layer starts at (nearly) zero, so D starts at c_skip · x."""
    net = cls(8, 2, **SONG)
    x, sigma, _ = inputs()
    c_skip = 0.25 / (sigma**2 + 0.25) if cls is EDMPrecond else torch.ones(3)
    torch.testing.assert_close(net(x, sigma), c_skip[:, None, None, None] * x, atol=1e-3, rtol=0)


@pytest.mark.parametrize("model", [SONG, ADM])
def test_initial_weights(model):
    net = EDMPrecond(8, 2, 3, **{**model, "model_channels": 64})
    weights = {name.removeprefix("model."): parameter.detach() for name, parameter in net.named_parameters()}
    conv = weights["enc.8x8_block0.conv0.weight"]  # 64 → 64 channels, uniform
    expected = math.sqrt(1 / (9 * 64)) if model is SONG else math.sqrt(1 / 3 / (9 * 64))
    assert conv.std().item() == pytest.approx(expected, rel=0.02)
    assert conv.abs().max().item() <= expected * math.sqrt(3)
    scale = 1e-5 if model is SONG else 0
    assert weights["enc.8x8_block0.conv1.weight"].std().item() == pytest.approx(expected * scale, rel=0.02)
    qkv_gain = math.sqrt(0.2) * math.sqrt(2 / (128 + 384) * 128) if model is SONG else math.sqrt(1 / 3)
    assert weights["dec.4x4_in0.qkv.weight"].std().item() == pytest.approx(qkv_gain / math.sqrt(128), rel=0.02)
    bias = weights["enc.8x8_block0.conv0.bias"]
    assert (bias == 0).all() if model is SONG else bias.abs().max() > 0


def test_gradients_reach_images_and_parameters():
    for model in (SONG, ADM, NCSNPP):
        net = make(**model)
        x, sigma, c = inputs()
        x.requires_grad_()
        net(x, sigma, c).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in [x, *net.parameters()])


def test_misfits_are_one_clear_sentence():
    net = make()
    x, sigma, c = inputs()
    with pytest.raises(ValueError, match=r"^images have shape \(3, 2, 16, 16\), .* \('N', 2, 8, 8\)\.$"):
        net(torch.zeros(3, 2, 16, 16), sigma, c)
    with pytest.raises(ValueError, match="images have shape"):
        net(torch.zeros(3, 1, 8, 8), sigma, c)
    for labels in (torch.eye(3, 4), torch.tensor([0, 1, 2]), torch.eye(2, 3)):
        with pytest.raises(ValueError, match=r"^class labels have shape .* one-hot rows \(3, 3\)\.$"):
            net(x, sigma, labels)
    with pytest.raises(ValueError, match=r"^model_type is 'UNet', expected one of SongUNet, DhariwalUNet\.$"):
        EDMPrecond(8, 2, model_type="UNet")
    for option in ("embedding_type", "encoder_type", "decoder_type"):
        with pytest.raises(ValueError, match=f"^{option} is 'other'"):
            SongUNet(8, 2, 2, **{option: "other"})
    with pytest.raises(ValueError, match="144 channels"):
        GroupNorm(144)


@pytest.mark.parametrize("cls", [SongUNet, DhariwalUNet])
def test_resolution_must_halve_evenly(cls):
    with pytest.raises(ValueError, match=r"img_resolution is 12, .* multiple of 8"):
        cls(12, 2, 2, channel_mult=[1, 1, 1, 1])


def test_iddpm_rounds_to_its_own_levels():
    net = make(iDDPMPrecond)
    assert net.u.shape == (1001,) and net.u[1000] == 0 and (net.u.diff() < 0).all()
    sigma = torch.tensor([0.5, 3.0, 1e9], dtype=torch.float64)
    rounded = net.round_sigma(sigma)
    assert rounded.dtype == torch.float64
    for level, wanted in zip(rounded, sigma, strict=True):
        assert (net.u.double() - level).abs().min() == 0
        assert (level - wanted).abs() == (net.u.double() - wanted).abs().min()
    assert torch.equal(net.round_sigma(rounded), rounded)


class GaussianDenoiser(nn.Module):
    """The exact denoiser of data N(0, std²)."""

    def __init__(self, std: float, sigma_min: float = 0, sigma_max: float = math.inf):
        super().__init__()
        self.std, self.sigma_min, self.sigma_max = std, sigma_min, sigma_max

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

    def forward(self, x, sigma, class_labels=None):
        return x * self.std**2 / (self.std**2 + sigma**2)


@pytest.mark.parametrize(("solver", "order"), [("heun", 2), ("euler", 1)])
def test_sampler_converges_with_the_order_of_its_solver(solver, order):
    """For Gaussian data the ODE has the solution x(σ) = x(σ_max) · √((s² + σ²) / (s² + σ_max²))."""
    latents = torch.ones(1, 1, 1, 1)
    exact = 80 * 0.5 / math.sqrt(0.5**2 + 80**2)
    options = {"solver": solver, "sigma_min": 1e-4}
    errors = [
        abs(heun_sampler(GaussianDenoiser(0.5), latents, num_steps=n, **options).item() - exact) for n in (64, 128)
    ]
    assert errors[1] < 0.02
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)


def test_churned_samples_keep_the_distribution():
    latents = torch.randn(4000, 1, 1, 1)
    images = heun_sampler(GaussianDenoiser(0.5), latents, num_steps=40, S_churn=20)
    assert images.std().item() == pytest.approx(0.5, rel=0.05)
    correlation = torch.corrcoef(torch.stack([images.flatten(), latents.flatten().double()]))[0, 1]
    assert correlation.abs() < 0.5  # fresh noise has replaced much of the latents


def test_every_noise_of_the_stochastic_sampler_arrives_in_closed_form():
    """A Gaussian's denoiser is linear: latents and the noise of each step reach the image times known factors.

    With g(σ) = σ / (s² + σ²), the slope at x is g·x, and Heun's step from a to b multiplies x with
    1 + (b − a) / 2 · (g(a) + g(b) · (1 + (b − a) g(a))). Step i adds S_noise · √(a² − t²) · ε, a = (1 + γ) t, where t
    lies between S_min and S_max (Karras et al. 2022, algorithm 2).
    """
    s, steps, churn = 0.5, 7, {"S_churn": 2.1, "S_min": 0.05, "S_max": 50.0, "S_noise": 1.003}
    levels = [*karras_sigmas(steps).tolist(), 0.0]
    sources = torch.eye(steps + 1, dtype=torch.float64)  # the latent, and the noise of each step
    order = iter(sources[1:])
    images = heun_sampler(
        GaussianDenoiser(s),
        sources[0].reshape(-1, 1, 1, 1),
        num_steps=steps,
        randn_like=lambda _: next(order).reshape(-1, 1, 1, 1),
        **churn,
    )
    found = images.flatten()
    slope = lambda level: level / (s**2 + level**2)  # noqa: E731
    expected, added = torch.zeros(steps + 1, dtype=torch.float64), 0
    expected[0] = levels[0]
    for index, (t, b) in enumerate(itertools.pairwise(levels)):
        gamma = min(churn["S_churn"] / steps, math.sqrt(2) - 1) if churn["S_min"] <= t <= churn["S_max"] else 0.0
        a = (1 + gamma) * t
        expected[index + 1] = churn["S_noise"] * math.sqrt(a**2 - t**2)
        added += gamma > 0
        factor = 1 + (b - a) * slope(a)
        if b > 0:
            factor = 1 + (b - a) / 2 * (slope(a) + slope(b) * factor)
        expected *= factor
    assert 0 < added < steps and next(order, None) is None
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_sampler_without_churn_leaves_the_random_numbers_alone():
    net, latents = make(), torch.randn(2, 2, 8, 8)
    state = torch.get_rng_state()
    images = heun_sampler(net, latents, num_steps=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert images.dtype == torch.float64 and not images.requires_grad


def test_sampler_stays_in_the_networks_range():
    seen = []
    net = GaussianDenoiser(0.5, sigma_min=0.1, sigma_max=10)
    net.register_forward_pre_hook(lambda _, args: seen.append(float(args[1])))
    heun_sampler(net, torch.ones(1, 1, 1, 1), num_steps=4)
    assert (min(seen), max(seen)) == pytest.approx((0.1, 10))


def test_sampler_errors():
    with pytest.raises(ValueError, match="solver is 'rk4'"):
        heun_sampler(make(), torch.zeros(1, 2, 8, 8), solver="rk4")
    with pytest.raises(ValueError, match="num_steps is 0"):
        karras_sigmas(0)
    assert karras_sigmas(1).tolist() == pytest.approx([80])


def test_law_of_sigma():
    log_sigma = EDMLoss(P_mean=-0.5, P_std=1.1).sigma(torch.randn(20_000, 1, 1, 1)).log()
    assert log_sigma.mean().item() == pytest.approx(-0.5, abs=0.05)
    assert log_sigma.std().item() == pytest.approx(1.1, rel=0.02)


def test_vp_times_are_those_of_its_process():
    """t(σ) of the preconditioning is the inverse of σ(t)."""
    net, t = make(VPPrecond), torch.rand(100).clamp_min(0.1)
    torch.testing.assert_close(net.scalings(vp_sigma(t))[3] / (net.M - 1), t, rtol=1e-4, atol=0)


def test_loss():
    """Unreduced, seeded by torch, and the weighted squared error of the denoiser."""
    images, c = torch.randn(3, 2, 8, 8), torch.eye(3)
    net = make(augment_dim=9)
    torch.manual_seed(1)
    loss = EDMLoss()(net, images, c, torch.ones(3, 9))
    torch.manual_seed(1)
    sigma = (-1.2 + 1.2 * torch.randn(3, 1, 1, 1)).exp()
    noisy = images + sigma * torch.randn_like(images)
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    D_x = net(noisy, sigma, c, augment_labels=torch.ones(3, 9))
    assert loss.shape == images.shape
    torch.testing.assert_close(loss, weight * (D_x - images) ** 2)


def test_frequencies_are_made_once_and_serve_everywhere():
    """What an evaluation in inference mode has made, or a tracer, does not get into a training run."""
    embedding, sigma = PositionalEmbedding(24, max_positions=77, endpoint=True), torch.tensor([0.3, 2.0])
    with FakeTensorMode() as mode:
        assert isinstance(embedding(mode.from_tensor(sigma)), FakeTensor)
    with torch.inference_mode():
        before = embedding(sigma)
    made = _frequencies.cache_info().misses
    level = sigma.clone().requires_grad_()
    after = copy.deepcopy(embedding)(level)
    assert torch.equal(before, after) and _frequencies.cache_info().misses == made
    (slope,) = torch.autograd.grad(after.sum(), level)
    assert slope.isfinite().all() and not embedding.state_dict()
    exponents = torch.arange(12, dtype=torch.float32) / 11
    assert torch.equal(embedding.angles(sigma), sigma.outer((1 / 77) ** exponents))
