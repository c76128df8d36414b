"""EDM2's network against numbers that the original implementation gave, and its own promises."""

import copy
import math
from functools import cache

import pytest
import torch

from refine.checkpoints import registry
from refine.networks import edm2
from tests.golden import read_arrays, read_json, unlikeness
from tests.golden import sample_error as error
from tests.networks.test_edm_golden import TOLERANCE

arrays = cache(lambda: read_arrays("edm/edm2_cond"))
facts = cache(lambda: read_json("edm/edm2_cond"))


@cache
def network(half: bool) -> edm2.Precond:
    net = edm2.Precond(**facts()["init_kwargs"])
    net.load_state_dict({key[2:]: value.float() for key, value in arrays().items() if key.startswith("w:")})
    return (net.half() if half else net).eval().requires_grad_(False)


@pytest.mark.parametrize("case", ["fp32params", "halfparams"])
def test_golden(case):
    """Also with parameters in float16, as in the published files: a quotient that is rounded makes a difference."""
    net, data = network(case == "halfparams"), arrays()
    x = data["x"].clone().requires_grad_()
    D_x = net(x, data["sigma"], data["class_labels"])
    (grad_x,) = torch.autograd.grad((D_x * data["cotangent"]).sum(), x)
    assert error(D_x, data[f"{case}:D"]) < TOLERANCE
    assert error(grad_x, data[f"{case}:grad_x"]) < TOLERANCE
    assert error(net.logvar(data["sigma"]), data[f"{case}:logvar"]) < TOLERANCE
    other = "halfparams" if case == "fp32params" else "fp32params"
    assert unlikeness(D_x, data[f"{other}:D"]) > TOLERANCE  # so the two can be told apart


def test_compute_dtype():
    """bfloat16 activations around float32 parameters; float32 again where it is asked for."""
    net, data = copy.deepcopy(network(False)), arrays()
    net.compute_dtype = torch.bfloat16
    D_x = net(data["x"], data["sigma"], data["class_labels"])
    assert D_x.dtype == torch.float32 and 1e-4 < unlikeness(D_x, data["fp32params:D"]) < 3e-2
    exact = net(data["x"], data["sigma"], data["class_labels"], force_fp32=True)
    assert error(exact, data["fp32params:D"]) < TOLERANCE


def test_golden_without_labels():
    data = arrays()
    for labels in (None, torch.zeros(3, 10)):
        assert error(network(False)(data["x"], data["sigma"], labels), data["fp32params:nolabel:D"]) < TOLERANCE


def test_golden_loss():
    net, data, loss = network(False), arrays(), facts()["loss"]
    sigma = (loss["P_mean"] + loss["P_std"] * data["loss:rnd"]).exp()
    weight = (sigma**2 + loss["sigma_data"] ** 2) / (sigma * loss["sigma_data"]) ** 2
    D_x = net(data["loss:images"] + data["loss:eps"] * sigma, sigma, data["class_labels"])
    u = net.logvar(sigma)
    assert error(weight / u.exp() * (D_x - data["loss:images"]) ** 2 + u, data["loss:value"]) < TOLERANCE


def test_names_and_shapes_of_the_golden_network_and_of_the_official_one():
    state = network(False).state_dict()
    for kind, entries in (
        ("parameters", network(False).named_parameters()),
        ("buffers", network(False).named_buffers()),
    ):
        assert {name: list(t.shape) for name, t in entries} == facts()[kind]
    assert len(state) == len(facts()["parameters"]) + len(facts()["buffers"])
    official = read_json("edm/official_shapes")["edm2-img64-s"]
    net = registry.build_empty("edm2.Precond", official["init_kwargs"])
    assert sum(p.numel() for p in net.parameters()) == official["num_params"] == 280_209_381
    assert {n: list(t.shape) for n, t in net.state_dict().items()} == {
        n: shape for n, shape, _ in official["state_dict"]
    }


@pytest.mark.parametrize(
    ("channels", "parameters"), [(128, 124.7e6), (256, 497_803_173), (320, 777_492_325), (384, 1_119_276_837)]
)
def test_sizes_of_the_other_official_ones(channels, parameters):
    kwargs = {"img_resolution": 64, "img_channels": 3, "label_dim": 1000, "model_channels": channels}
    count = sum(p.numel() for p in registry.build_empty("edm2.Precond", kwargs).parameters())
    assert count == parameters if isinstance(parameters, int) else abs(count - parameters) < 0.05e6


def test_train_mode_forces_the_norm_of_the_weights_and_eval_mode_changes_nothing():
    net, data = copy.deepcopy(network(False)), arrays()
    before = copy.deepcopy(net.state_dict())
    net(data["x"], data["sigma"], data["class_labels"])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net.train()(data["x"], data["sigma"], data["class_labels"])
    for name, weight in net.named_parameters():
        if weight.ndim > 1 and not name.startswith("logvar"):
            rms = weight.square().mean(dim=tuple(range(1, weight.ndim))).sqrt()
            assert (rms - 1).abs().max() < 1e-2, name


def test_operations_preserve_magnitude():
    a, b = torch.randn(4, 64, 32, 32), torch.randn(4, 16, 32, 32)
    layers = [
        edm2.mp_silu(a),
        edm2.mp_sum(a, a.flip(0), 0.3),
        edm2.mp_cat(a, b),
        edm2.MPConv(64, 64, (3, 3))(a)[..., 1:-1, 1:-1],
    ]
    for y in layers:
        assert y.square().mean().sqrt().item() == pytest.approx(1, abs=0.03)
    both = edm2.mp_cat(a, b, 0.5)
    norms = [part.square().sum().sqrt() for part in both.split([64, 16], dim=1)]
    assert norms[0].item() == pytest.approx(norms[1].item(), rel=0.03)


def test_inputs_that_do_not_fit():
    net = network(False)
    with pytest.raises(ValueError, match="this network denoises"):
        net(torch.zeros(1, 1, 16, 16), 1.0)
    with pytest.raises(ValueError, match="class labels have shape"):
        net(torch.zeros(1, 3, 16, 16), 1.0, torch.zeros(1, 3))
    with pytest.raises(ValueError, match="multiple of 2"):
        edm2.Precond(15, 3, channel_mult=[1, 1])
    assert math.isinf(net.sigma_max) and net.round_sigma(3.0) == 3.0
