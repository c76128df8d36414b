"""ADM's networks beside the golden numbers: sizes of the published files, schedules, labels, what a trained copy is."""

import copy

import pytest
import torch

from refine.checkpoints.registry import build_empty
from refine.networks import adm
from refine.networks.ddpm import vp_betas
from refine.networks.one_step import OneStepGenerator
from refine.networks.sampler import heun_sampler
from refine.training.precision import set_precision
from refine.training.regularise import set_dropout
from tests.golden import array_error, read_arrays, read_json, unlikeness
from tests.networks.test_adm_golden import network

SMALL = {"model_channels": 32, "widths": [32, 32], "num_blocks": 1, "attention_levels": [1], "num_head_channels": 16}
ADM_HALF = {**SMALL, "img_resolution": 8, "img_channels": 3, "label_dim": 4}


def lit(net):
    """The network with every weight drawn, those that begin at zero as well."""
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net.eval()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [1000, 4000])
def test_schedules_are_the_golden_ones(schedule, steps):
    golden, sigmas = read_json("adm/schedules"), adm.adm_sigmas(schedule, steps)
    arrays = read_arrays("adm/schedules")
    name = f"{schedule}_{steps}"
    for part, ours in (("first20", sigmas[:20]), ("last20", sigmas[-20:])):
        assert array_error(torch.tensor(ours), arrays[f"{name}:sigma:{part}"]) < 1e-12
    assert sigmas[0] == pytest.approx(golden[name]["sigma_min"], rel=1e-12)
    if steps == 1000:
        every = arrays[f"{name}:sigma:all_float32"]
        assert ((torch.tensor(sigmas).float() - every).abs() / every).max() < 2e-7
    betas = vp_betas(adm.SCHEDULES[schedule], 0.1 / steps, 20 / steps, steps)
    assert array_error(torch.tensor(betas[:20]), arrays[f"{name}:betas:first20"]) < 1e-12


@pytest.mark.parametrize("t", [0, 1, 17, 500, 998, 999])
def test_times_of_the_table_are_whole(t):
    for schedule in ("linear", "cosine"):
        net = build_empty("adm.ADMPrecond", {**ADM_HALF, "noise_schedule": schedule})
        sigma = torch.tensor(adm.adm_sigmas(schedule, 1000)[t], dtype=torch.float32)
        assert net.time(sigma) == t


def test_a_longer_schedule_counts_its_own_steps_unless_it_is_rescaled():
    sigma = torch.tensor(adm.adm_sigmas("cosine", 4000)[[400, 3999]], dtype=torch.float32)
    plain, rescaled = (
        build_empty(
            "adm.ADMPrecond", {**ADM_HALF, "noise_schedule": "cosine", "num_steps": 4000, "rescale_timesteps": asked}
        )
        for asked in (False, True)
    )
    assert plain.scalings(sigma)[3].tolist() == [400, 3999]
    assert rescaled.scalings(sigma)[3].tolist() == [100, 999.75]


def test_every_image_of_a_network_with_classes_needs_one():
    net, x = lit(adm.ADMPrecond(**ADM_HALF)), torch.randn(2, 3, 8, 8)
    for labels in (None, torch.zeros(2, 4), torch.eye(4)[[0]] * 0):
        with pytest.raises(ValueError, match="every image needs one in class_labels"):
            net(x, 1.0, labels)
    one = net(x, 1.0, torch.eye(4)[[2]])
    assert unlikeness(net(x, 1.0, torch.eye(4)[[2, 2]]), one) < 1e-4 and not net.has_null_label
    assert unlikeness(net(x, 1.0, torch.eye(4)[[1]]), one) > 1e-2


@pytest.mark.parametrize("name", ["adm.ADMPrecond", "adm.CMPrecond"])
def test_a_single_noise_level_serves_all_images(name):
    cls = getattr(adm, name.partition(".")[2])
    net, x, c = lit(cls(**ADM_HALF)), torch.randn(3, 3, 8, 8), torch.eye(4)[:3]
    torch.testing.assert_close(net(x, 0.7, c), net(x, torch.full([3], 0.7), c))
    assert net(x.double(), torch.tensor(0.7, dtype=torch.float64), c).dtype == torch.float32


def test_consistency_models_have_another_c_noise_than_edm():
    net = build_empty("adm.CMPrecond", ADM_HALF)
    sigma = torch.tensor([0.002, 0.5, 80.0])
    c_skip, c_out, c_in, c_noise = net.scalings(sigma)
    torch.testing.assert_close(c_noise, 250 * sigma.log())
    torch.testing.assert_close(c_skip, 0.25 / (sigma**2 + 0.25))
    torch.testing.assert_close(c_out, 0.5 * sigma / (sigma**2 + 0.25).sqrt())
    torch.testing.assert_close(c_in, 1 / (sigma**2 + 0.25).sqrt())
    assert (net.sigma_min, net.sigma_max) == (0.002, 80)


def test_a_trained_copy_has_dropout_where_it_is_asked_for_and_computes_in_the_runs_precision():
    teacher = lit(adm.ADMPrecond(**ADM_HALF))
    aux, x, c = copy.deepcopy(teacher).requires_grad_(True), torch.randn(2, 3, 8, 8), torch.eye(4)[:2]
    assert torch.equal(aux.train()(x, 1.0, c), teacher(x, 1.0, c))  # the file's rate is 0
    set_dropout(aux, 0.5)
    dropped = aux(x, 1.0, c)
    assert not torch.equal(dropped, teacher(x, 1.0, c)) and torch.equal(aux.eval()(x, 1.0, c), teacher(x, 1.0, c))
    dropped.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in aux.parameters())
    dtypes = []
    aux.model.middle_block[0].register_forward_pre_hook(lambda _, inputs: dtypes.append(inputs[0].dtype))
    aux(x, 1.0, c)
    set_precision("bf16", [aux], torch.device("cpu"))
    half = aux(x, 1.0, c)
    assert dtypes == [torch.float32, torch.bfloat16] and half.dtype == torch.float32
    assert {p.dtype for p in aux.parameters()} == {torch.float32}
    assert 0 < unlikeness(half, teacher(x, 1.0, c)) < 0.05


def test_features_are_the_ends_of_the_encoders_levels():
    net = network("cond_cosine_new")
    means = net.encode(torch.randn(2, 3, 8, 8), 0.1)
    assert [m.shape for m in means] == [(2, 32), (2, 32)]
    assert not torch.equal(means[0], means[1])
    assert [m.shape[1] for m in network("uncond_linear_legacy").encode(torch.randn(1, 3, 8, 8), 0.1)] == [32, 64]


def test_it_is_sampled_within_its_range_and_distilled_into_one_step():
    net = network("cond_cosine_new")
    seen = []
    hook = net.register_forward_pre_hook(lambda _, inputs: seen.append(float(inputs[1])))
    images = heun_sampler(net, torch.randn(2, 3, 8, 8), torch.eye(10)[:2], num_steps=3)
    hook.remove()
    assert images.isfinite().all() and min(seen) == pytest.approx(net.sigma_min) and max(seen) == pytest.approx(80)
    G = OneStepGenerator.from_teacher(net, 2.5)
    z, c = torch.randn(2, 3 * 64), torch.eye(10)[:2]
    assert torch.equal(G(z, c), net(2.5 * z.reshape(2, 3, 8, 8), 2.5, c))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"img_resolution": 9}, "expected a multiple of 2"),
        ({"widths": [32, 48]}, "48 channels cannot be normalised in 32 groups"),
        ({"num_head_channels": 24}, "cannot have heads of 24 channels"),
        ({"num_head_channels": None, "num_heads": 5}, "cannot have 5 heads"),
        ({"qkv_order": "legacy"}, "expected one of heads, thirds"),
        ({"noise_schedule": "sigmoid"}, "expected one of linear, cosine"),
        ({"num_steps": 10}, "are not a schedule"),
        ({"model_channels": 33}, "expected even"),
    ],
)
def test_impossible_sizes_are_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        build_empty("adm.ADMPrecond", {**ADM_HALF, **changes})
