"""The alias-free nonlinearity against what the original computed, and its derivatives against float64."""

import pytest
import torch

from refine.torch_utils.ops.filtered_lrelu import filtered_lrelu
from refine.torch_utils.ops.upfirdn2d import setup_filter
from tests.golden import max_error, read_arrays, read_json
from tests.torch_utils.ops import require_native

NAME = "stylegan3/ops/ops_filtered_lrelu"
CASES = read_json(NAME)["cases"]
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def arrays():
    return read_arrays(NAME)


@pytest.fixture(params=["ref", "torch", "native"])
def impl(request):
    if request.param == "native":
        require_native()
    return request.param


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["id"]))
def test_golden(arrays, case, impl, memory_format):
    data = {key.split("/")[1]: value for key, value in arrays.items() if key.startswith(f"{case['id']}/")}
    fu, fd = (arrays.get(f"filter/{case[key]}") for key in ("fu", "fd"))
    x = data["x"].contiguous(memory_format=memory_format).requires_grad_()
    b = data["b"].requires_grad_() if "b" in data else None
    y = filtered_lrelu(x, fu, fd, b, **case["kwargs"], impl=impl)
    assert max_error(y, data["y"]) < TOLERANCE
    inputs = [x] if b is None else [x, b]
    for actual, key in zip(torch.autograd.grad(y, inputs, data["dy"]), ("dx", "db"), strict=False):
        assert max_error(actual, data[key]) < TOLERANCE * 5, key


GEOMETRIES = [
    {"up": 2, "down": 2, "padding": (9, 8, 9, 8)},
    {"up": 4, "down": 2, "padding": (-1, 2, 3, -2)},
    {"up": 1, "down": 2, "padding": 6, "clamp": 0.6},
    {"up": 2, "down": 1, "padding": (5, 3, 4, 6), "flip_filter": True},
]


TAPS = [taps for taps in ("separable", "2-D") for _ in range(2)]


@pytest.mark.parametrize("options, taps", list(zip(GEOMETRIES, TAPS, strict=True)), ids=str)
def test_derivatives(options, taps, impl):
    """First and second order, by finite differences in float64."""
    fu, fd = (setup_filter(torch.rand(n), separable=taps == "separable") for n in (6, 5))
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def f(x, b):
        return filtered_lrelu(x, fu, fd, b, **options, impl=impl)

    assert torch.autograd.gradcheck(f, (x, b))
    assert torch.autograd.gradgradcheck(f, (x, b), fast_mode=True)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_half_precision(arrays, dtype, tolerance, impl):
    fu, fd = (arrays[f"filter/{key}"] for key in ("sep12", "full12"))
    x, b = torch.randn(2, 3, 9, 9), torch.randn(3)
    options = {"up": 2, "down": 2, "padding": 9, "clamp": 2.0}
    y = filtered_lrelu(x.to(dtype), fu, fd, b.to(dtype), **options, impl=impl)
    assert y.dtype == dtype and max_error(y.float(), filtered_lrelu(x, fu, fd, b, **options)) < tolerance


REFUSALS = {"slope is -0.1": {"slope": -0.1}, "factor": {"up": 0}, "clamp": {"clamp": -1.0}, "smaller": {"padding": -3}}


@pytest.mark.parametrize("problem", REFUSALS)
def test_refusals(problem):
    with pytest.raises(ValueError, match=problem):
        filtered_lrelu(torch.zeros(1, 1, 4, 4), **REFUSALS[problem])


def test_a_bias_that_does_not_fit():
    with pytest.raises(ValueError, match="bias has shape"):
        filtered_lrelu(torch.zeros(1, 2, 4, 4), b=torch.zeros(3), up=2)
