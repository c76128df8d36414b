"""Discrete diffusion models as denoisers: noise levels and D against numbers of diffusers' own schedulers."""

import numpy as np
import pytest
import torch
from torch import nn

from refine.networks import ddpm
from tests.golden import noted, read_json, unlikeness
from tests.golden import sample_error as error

GOLDEN = read_json("ddpm/schedules")  # made with DDPMScheduler of diffusers 0.42
TOLERANCE = 5e-5  # relative, of sigma: theirs comes from a float32 product of up to 1000 factors


class Recorded(nn.Module):
    """In place of the U-Net: gives what was recorded, keeps what it was asked."""

    def __init__(self):
        super().__init__()
        self.answer, self.asked = None, None

    def forward(self, x, time, class_labels=None):
        self.asked = (x, time, class_labels)
        return type("", (), {"sample": self.answer})


@pytest.fixture
def precond(monkeypatch):
    def make(**kwargs):
        monkeypatch.setattr(ddpm, "_make_unet", lambda *args: Recorded())
        return ddpm.DDPMPrecond(2, 1, **kwargs)

    return make


@pytest.mark.parametrize("schedule", GOLDEN)
def test_noise_levels(schedule):
    case = GOLDEN[schedule]
    sigmas = ddpm.vp_discrete_sigmas(ddpm.vp_betas(**case["scheduler"]))
    signal = np.array(case["alphas_cumprod"])
    assert len(sigmas) == 1000 and (np.diff(sigmas) > 0).all()
    expected = np.sqrt((1 - signal) / signal)
    assert noted(np.abs(sigmas[case["times"]] / expected - 1).max()) < TOLERANCE


@pytest.mark.parametrize("prediction", ddpm.PREDICTIONS)
@pytest.mark.parametrize("schedule", GOLDEN)
def test_denoised_images_and_times(schedule, prediction, precond):
    """At 20 times: the U-Net is asked what the library asks it, and D is what it makes of the answer."""
    case = GOLDEN[schedule]
    net = precond(prediction_type=prediction, **case["scheduler"])
    for t, signal, (x_t, F_x, x_0) in zip(
        case["times"], case["alphas_cumprod"], case["predictions"][prediction], strict=True
    ):
        x_t, net.unet.answer, x_0 = (torch.tensor(value * 2).reshape(1, 1, 2, 2) for value in (x_t, F_x, x_0))
        sigma = net.log_sigmas[t].exp()
        D_x = net((x_t.double() / signal**0.5).float(), sigma)
        asked, time, _ = net.unet.asked
        assert time.tolist() == [t]
        torch.testing.assert_close(asked, x_t, rtol=TOLERANCE, atol=1e-6)
        assert noted((D_x - x_0).abs().max().item() / max(1.0, sigma.item())) < 3 * TOLERANCE


def test_between_the_levels_time_is_interpolated_and_outside_it_ends(precond):
    net = precond()
    levels = net.log_sigmas
    halfway = ((levels[300] + levels[301]) / 2).exp()
    assert net.time(halfway).item() == pytest.approx(300.5, abs=1e-2)
    assert net.time(torch.tensor([1e-6, 1e6])).tolist() == [0, 999]
    times = net.time(torch.logspace(-3, 3, 5000))
    assert (times.diff() >= 0).all() and len(times.unique()) > 2000
    assert (net.time(levels.exp()) == torch.arange(1000)).all()
    assert net.time(torch.ones(3, 1, 1, 1)).shape == (3, 1, 1, 1)
    assert net.sigma_min == pytest.approx(0.010001, rel=1e-3) and net.sigma_max == pytest.approx(157.4, rel=1e-3)
    assert net.round_sigma(1.234) == pytest.approx(1.234)


def test_each_image_has_its_own_level(precond):
    net = precond()
    net.unet.answer = torch.ones(2, 1, 2, 2)
    sigma = net.log_sigmas[[3, 700]].exp()
    D_x = net(torch.zeros(2, 1, 2, 2), sigma)
    assert net.unet.asked[1].tolist() == [3, 700]
    assert torch.equal(D_x[:, 0, 0, 0], -sigma)
    net.unet.answer = torch.ones(2, 2, 2, 2)  # a learned variance in the second half
    assert net(torch.zeros(2, 1, 2, 2), 1.0).shape == (2, 1, 2, 2) and net.unet.asked[1].shape == (2,)


def test_classes(precond):
    net = precond(label_dim=3)
    net.unet.answer = torch.zeros(2, 1, 2, 2)
    x = torch.zeros(2, 1, 2, 2)
    net(x, 1.0, torch.eye(3)[[2, 0]])
    assert net.unet.asked[2].tolist() == [2, 0]
    net(x, 1.0, torch.eye(3)[[1]])
    assert net.unet.asked[2].tolist() == [1, 1]
    for labels, what in (
        (None, "trained with classes only"),
        (torch.zeros(2, 3), "classes only"),
        (torch.eye(2), "shape"),
    ):
        with pytest.raises(ValueError, match=what):
            net(x, 1.0, labels)


@pytest.mark.parametrize(
    ("kwargs", "what"),
    [
        ({"prediction_type": "flow"}, "prediction_type is 'flow'"),
        ({"beta_schedule": "exotic"}, "beta_schedule is 'exotic'"),
        ({"beta_end": 2.0}, "not a schedule"),
        ({"num_steps": 1}, "not a schedule"),
        ({"trained_betas": [0.1, -0.1]}, "do not rise"),
        ({"trained_betas": [0.5, 1.0]}, "do not rise"),
    ],
)
def test_impossible_schedules(kwargs, what, precond):
    with pytest.raises(ValueError, match=what):
        precond(**kwargs)


def test_trained_betas(precond):
    assert torch.equal(precond(trained_betas=ddpm.vp_betas().tolist()).log_sigmas, precond().log_sigmas)


# With the library.


def test_denoiser_equals_the_librarys_own_arithmetic():
    """A real U-Net: D is the pred_original_sample of the scheduler's step, at 20 times of every schedule."""
    diffusers = pytest.importorskip("diffusers", reason="the optional package diffusers is not installed")
    unet = {"block_out_channels": [8, 16], "norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 8}
    unet |= {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
    for schedule, case in GOLDEN.items():
        for prediction in ddpm.PREDICTIONS:
            net = ddpm.DDPMPrecond(8, 2, prediction_type=prediction, **case["scheduler"], **unet).eval()
            scheduler = diffusers.DDPMScheduler(prediction_type=prediction, clip_sample=False, **case["scheduler"])
            x_t = torch.randn(1, 2, 8, 8)
            for t in case["times"]:
                with torch.no_grad():
                    expected = scheduler.step(net.unet(x_t, t).sample, t, x_t).pred_original_sample
                    signal = scheduler.alphas_cumprod[t].double()
                    D_x = net(x_t / signal.sqrt(), ((1 - signal) / signal).sqrt())
                assert error(D_x, expected) < 2e-4, (schedule, prediction, t)


@pytest.mark.parametrize("prediction", ddpm.PREDICTIONS)
def test_gradients_equal_those_of_the_librarys_own_arithmetic(prediction):
    """Of D to x, and to the weights, against the scheduler's step around the same U-Net."""
    diffusers = pytest.importorskip("diffusers", reason="the optional package diffusers is not installed")
    unet = {"block_out_channels": [8, 16], "norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 8}
    unet |= {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
    net = ddpm.DDPMPrecond(8, 2, prediction_type=prediction, **unet).eval()
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction, clip_sample=False)
    weight = net.unet.conv_in.weight
    for t in (3, 400, 990):
        signal = scheduler.alphas_cumprod[t].double()
        x = (torch.randn(2, 2, 8, 8) / signal.sqrt()).float().requires_grad_(True)
        cotangent = torch.randn(2, 2, 8, 8)
        x_t = x * signal.sqrt().float()
        theirs = scheduler.step(net.unet(x_t, t).sample, t, x_t).pred_original_sample
        ours = net(x, ((1 - signal) / signal).sqrt().float())
        expected, found = (torch.autograd.grad(D_x, [x, weight], cotangent) for D_x in (theirs, ours))
        for a, b in zip(found, expected, strict=True):
            assert b.abs().max() > 0 and error(a, b) < 5e-4, (prediction, t)


def test_compute_dtype():
    """bfloat16 by autocast around float32 parameters; float32 again where it is asked for."""
    pytest.importorskip("diffusers", reason="the optional package diffusers is not installed")
    unet = {"block_out_channels": [8], "norm_num_groups": 4, "layers_per_block": 1}
    unet |= {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "attention_head_dim": 8}
    net = ddpm.DDPMPrecond(8, 1, **unet).eval().requires_grad_(False)
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 5.0])
    expected = net(x, sigma)
    net.compute_dtype = torch.bfloat16
    D_x = net(x, sigma)
    assert D_x.dtype == torch.float32 and 1e-5 < unlikeness(D_x, expected) < 3e-2
    assert torch.equal(net(x, sigma, force_fp32=True), expected)
