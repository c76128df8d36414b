"""The ops against what the original reference ops computed: values, first and second gradients."""

import pytest
import torch

from refine.torch_utils.ops import bias_act as bias_act_module
from refine.torch_utils.ops import upfirdn2d as upfirdn2d_module
from refine.torch_utils.ops.bias_act import bias_act
from refine.torch_utils.ops.conv2d_resample import conv2d_resample
from tests.golden import max_error, read_arrays, read_json
from tests.torch_utils.ops import require_native

TOLERANCE = 1e-5
UPFIRDN2D = read_json("stylegan2/ops/ops_upfirdn2d")
CONV2D = read_json("stylegan2/ops/ops_conv2d_resample")
BIAS_ACT = read_json("stylegan2/ops/ops_bias_act")


@pytest.fixture(scope="module")
def arrays():
    names = ("upfirdn2d", "conv2d_resample", "bias_act")
    return {name: read_arrays(f"stylegan2/ops/ops_{name}") for name in names}


@pytest.fixture(params=["ref", "torch", "native"])
def impl(request):
    """Each implementation; the compiled one where there is a compiler."""
    if request.param == "native":
        require_native()
    return request.param


def filter2d(x, f, padding=0, **options):
    """The original's filter at the same resolution, of which its numbers are."""
    fw, fh = upfirdn2d_module.filter_size(f)
    centred = upfirdn2d_module.add_padding(padding, (fw // 2, (fw - 1) // 2, fh // 2, (fh - 1) // 2))
    return upfirdn2d_module.upfirdn2d(x, f, padding=centred, **options)


def case_id(case):
    return "-".join(str(case[key]) for key in ("id", "op", "act") if key in case)


@pytest.mark.parametrize("index", range(len(UPFIRDN2D["setup_filter"])))
def test_setup_filter(arrays, index):
    f = upfirdn2d_module.setup_filter(**UPFIRDN2D["setup_filter"][index])
    assert f.dtype == torch.float32
    assert max_error(f, arrays["upfirdn2d"][f"setup/{index}"]) < 1e-7


@pytest.mark.parametrize("case", UPFIRDN2D["cases"], ids=case_id)
def test_upfirdn2d(arrays, case, impl):
    data = arrays["upfirdn2d"]
    f = data.get(f"filter/{case['filter']}")
    x = data[f"{case['id']}/x"].requires_grad_()
    y = getattr(upfirdn2d_module, case["op"], filter2d)(x, f, **case["kwargs"], impl=impl)
    assert max_error(y, data[f"{case['id']}/y"]) < TOLERANCE
    dy = data[f"{case['id']}/dy"].requires_grad_()
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    assert max_error(dx, data[f"{case['id']}/dx"]) < TOLERANCE
    # dx is linear in dy, and its adjoint is the operation itself.
    (ddy,) = torch.autograd.grad(dx, dy, x.detach())
    assert max_error(ddy, data[f"{case['id']}/y"]) < TOLERANCE


@pytest.mark.parametrize("case", CONV2D["cases"], ids=case_id)
def test_conv2d_resample(arrays, case):
    data = {
        key.split("/")[1]: value for key, value in arrays["conv2d_resample"].items() if key.startswith(f"{case['id']}/")
    }
    f = arrays["upfirdn2d"].get(f"filter/{case['filter']}")
    x, w = data["x"].requires_grad_(), data["w"].requires_grad_()
    options = {key: case[key] for key in ("up", "down", "padding", "groups", "flip_weight")}
    y = conv2d_resample(x, w, f, **options)
    dx, dw = torch.autograd.grad(y, [x, w], data["dy"])
    for actual, key in ((y, "y"), (dx, "dx"), (dw, "dw")):
        assert max_error(actual, data[key]) < TOLERANCE, key


def test_activation_table():
    for name, row in BIAS_ACT["table"].items():
        spec = bias_act_module.ACTIVATIONS[name]
        assert (spec.gain, spec.alpha) == (row["def_gain"], row["def_alpha"])
    assert set(bias_act_module.ACTIVATIONS) == set(BIAS_ACT["table"])


@pytest.mark.parametrize("case", BIAS_ACT["cases"], ids=case_id)
def test_bias_act(arrays, case, impl):
    data = {key.split("/")[1]: value for key, value in arrays["bias_act"].items() if key.startswith(f"{case['id']}/")}
    x = data["x"].requires_grad_()
    b = data["b"].requires_grad_() if "b" in data else None
    y = bias_act(x, b, **{key: case[key] for key in ("dim", "act", "alpha", "gain", "clamp") if key in case}, impl=impl)
    assert max_error(y, data["y"]) < TOLERANCE
    if "dx_ones" in data:
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert max_error(dx, data["dx_ones"]) < TOLERANCE
        return
    inputs = [x] if b is None else [x, b]
    dy = data["dy"].requires_grad_()
    first = torch.autograd.grad(y, inputs, dy, create_graph=True)
    for actual, key in zip(first, ("dx", "db"), strict=False):
        assert max_error(actual, data[key]) < TOLERANCE, key
    weights = [data[key] for key in ("vx", "vb") if key in data]
    s = sum((g * v).sum() for g, v in zip(first, weights, strict=True))
    second = torch.autograd.grad(s, [x, dy, *inputs[1:]], allow_unused=True, materialize_grads=True)
    for actual, key in zip(second, ("ddx", "ddy", "ddb"), strict=False):
        if key in data:
            assert max_error(actual, data[key]) < TOLERANCE, key
