"""The alias-free nonlinearity against what the original computed and against its composed form, with derivatives."""

import itertools
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from refine.networks.stylegan3 import schedule
from refine.networks.stylegan3_layers import SynthesisLayer
from refine.torch_utils.build import custom_ops
from refine.torch_utils.ops import native
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


# The compiled kernel.


def both(x, b, *filters, **options):
    """Result and gradients of the composed form and of the kernel."""
    found = []
    for impl in ("torch", "native"):
        y = filtered_lrelu(x, *filters, b, **options, impl=impl)
        dy = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).reshape(y.shape)
        found.append([y, *torch.autograd.grad(y, [x, b], dy)])
    return found


FILTERS = [None, torch.rand(5), torch.rand(12), torch.rand(3, 6)]
FILTERS.append(torch.rand(6, 12))
FILTERS[-1] = torch.cat([FILTERS[-1], FILTERS[-1].flip(0)])  # as a circular filter's, rows that are equal in pairs


@pytest.mark.parametrize("clamp", [None, 0.4])
@pytest.mark.parametrize("padding", [14, (15, 12, 18, 13), (16, -3, 11, 17)], ids=str)
def test_every_factor_and_filter_agrees_with_the_composed_form(padding, clamp):
    require_native()
    x = torch.randn(1, 2, 9, 13, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, dtype=torch.float64, requires_grad=True)
    cases = itertools.product((1, 2, 3, 4), (1, 2, 4), FILTERS, FILTERS)
    for number, (up, down, fu, fd) in enumerate(cases):
        options = {"up": up, "down": down, "padding": padding, "clamp": clamp, "flip_filter": number % 3 == 0}
        for expected, actual in zip(*both(x, b, fu, fd, **options), strict=True):
            assert max_error(actual, expected) < 1e-12, (up, down, fu, fd)


def layers():
    """One of every shape in the official networks of 256² and 512²: a layer of one channel, and its input's size."""
    found = {}
    configurations = {"t": {}, "r": {"conv_kernel": 1, "use_radial_filters": True}}
    for (name, options), resolution in itertools.product(configurations.items(), (256, 512)):
        source = None
        for layer, target, kwargs in schedule(resolution, 3, **options):
            target = target._replace(channels=1)
            source = source or target
            made = SynthesisLayer(1, source, target, **kwargs)
            size = source.size + made.weight.shape[-1] - 1
            key = (name, size, target.size, made.up, made.down)
            found.setdefault(key, (f"{name}{resolution} {layer}", made, size))
            source = target
    return list(found.values())


@pytest.mark.parametrize("layer, size", [pytest.param(*case, id=name) for name, *case in layers()])
def test_layers_of_the_official_networks(layer, size):
    """In float32 as far from float64 as the composed form is, or nearer."""
    require_native()
    x, b = torch.randn(1, 1, size, size), torch.randn(1)
    filters, options = (layer.up_filter, layer.down_filter), {"up": layer.up, "down": layer.down}
    options |= {"padding": layer.padding, "clamp": 2.0, "slope": 1 if layer.is_torgb else 0.2}
    expected, _ = both(x.double().requires_grad_(), b.double().requires_grad_(), *filters, **options)
    composed, fused = both(x.requires_grad_(), b.requires_grad_(), *filters, **options)
    assert expected[0].shape[2:] == (layer.target.size, layer.target.size)
    assert max_error(fused[0], expected[0]) < 5e-6
    # A number beside zero or the clamp may have another slope in float32: few, so that the mean says more.
    for what, a, c, e in zip(("y", "dx"), fused, composed, expected, strict=False):
        assert (a - e).abs().mean() <= 1.5 * (c - e).abs().mean() + 1e-9, what


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(dtype):
    require_native()
    x, fu, fd = torch.randn(2, 5, 38, 38, dtype=dtype), torch.rand(12), torch.rand(12, 12)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            found.append(filtered_lrelu(x, fu, fd, up=2, down=2, padding=9, impl="native"))
        finally:
            torch.set_num_threads(1)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_what_is_kept_for_backward_is_two_bits_a_number():
    require_native()
    x = torch.randn(1, 4, 148, 148, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = filtered_lrelu(x, torch.rand(12), torch.rand(12), up=2, down=2, padding=11, impl="native")
    assert y.requires_grad and sum(t.nbytes for t in kept) < 1.2 * x.numel()


def test_a_nan_stays_one():
    require_native()
    x = torch.zeros(1, 1, 16, 16)
    x[0, 0, 8, 8] = math.nan
    for clamp in (None, 1.0):
        found = [
            filtered_lrelu(x, torch.rand(6), torch.rand(6), up=2, down=2, padding=5, clamp=clamp, impl=impl)
            for impl in ("torch", "native")
        ]
        assert found[0].isnan().any() and not found[0].isnan().all()
        assert torch.equal(*(y.isnan() for y in found))


def test_default_is_the_kernel_for_planes(monkeypatch):
    require_native()
    calls = []
    run = native.run
    monkeypatch.setattr(native, "run", lambda op, *rest: calls.append(op) or run(op, *rest))
    options = {"up": 2, "down": 2, "padding": 5}
    filters = (torch.rand(6), torch.rand(6))
    for x, fused in (
        (torch.randn(1, 8, 64, 64), True),
        (torch.randn(1, 8, 64, 64).to(memory_format=torch.channels_last), False),
    ):
        calls.clear()
        y = filtered_lrelu(x, *filters, **options)
        assert ("filtered_lrelu" in calls) == fused
        assert max_error(y, filtered_lrelu(x, *filters, **options, impl="ref")) < 1e-5


def test_as_torch_sees_it():
    """Schema, fake kernel and derivative; a compiled graph without a break; a graph where there is no compiler."""
    require_native()
    x, b, f = torch.randn(2, 3, 9, 8, requires_grad=True), torch.randn(3, requires_grad=True), torch.rand(6)
    op = torch.ops.refine.filtered_lrelu.default
    geometry = (2, 2, [23, 21], [9, 8], [5, 5], [0, 0], False, 4.0, 1.4, 0.2, 0.8)
    torch.library.opcheck(op, (x, b, f, f, None, 1, *geometry))
    mask = op(x, b, f, f, None, 1, *geometry)[1]
    torch.library.opcheck(op, (x, None, f, f, mask, 2, *geometry))

    def function(x):
        return filtered_lrelu(x, f, f, b, up=2, down=2, padding=5, clamp=0.8, impl="native")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x), function(x)
    torch.testing.assert_close(y, expected)
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (y, expected)]
    torch.testing.assert_close(*grads)


def test_a_graph_without_a_compiler(monkeypatch):
    require_native()
    x, b, f = torch.randn(2, 3, 9, 8), torch.randn(3), torch.rand(6)
    geometry = (2, 2, [23, 21], [9, 8], [5, 5], [0, 0], False, 4.0, 1.4, 0.2, -1.0)
    op = torch.ops.refine.filtered_lrelu
    expected, _ = op(x, b, f, f, None, 0, *geometry)
    monkeypatch.setattr(native, "function", lambda op, x: None)
    torch.testing.assert_close(op(x, b, f, f, None, 0, *geometry)[0], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="no compiled kernel for cpu, which the derivative needs"):
        op(x, b, f, f, None, 1, *geometry)


def test_sanitizers_find_nothing(tmp_path):
    require_native()
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++"))))
    binary, source = tmp_path / "bounds", Path(__file__).with_name("filtered_lrelu_bounds.cpp")
    flags = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fopenmp", "-I"]
    command = [compiler, *flags, str(custom_ops.SOURCES), "-o", str(binary), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "cannot find -lasan" in done.stderr or "cannot find -lubsan" in done.stderr:
        pytest.skip("no sanitizer libraries")
    assert done.returncode == 0, done.stderr
    done = subprocess.run([binary, "10"], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "40 calls agree\n"), done.stdout + done.stderr
