"""group_norm_silu: the compiled kernel against float64 torch, its derivatives, and how it fits into torch."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from refine.torch_utils.build import custom_ops
from refine.torch_utils.ops import native
from refine.torch_utils.ops.group_norm_silu import group_norm_silu
from tests.torch_utils.ops import require_native

FORMATS = {"planes": torch.contiguous_format, "pixels": torch.channels_last}
FORMS = {"norm": (), "before": ("before",), "scale": ("scale", "shift"), "all": ("before", "scale", "shift")}
# N, C, H, W, groups: the digits teacher's and CIFAR-10's kind, odd sizes, groups of one channel, one group, 1×1
SHAPES = [
    (3, 16, 16, 16, 4),
    (2, 64, 4, 4, 16),
    (1, 256, 8, 8, 32),
    (2, 12, 7, 9, 3),
    (2, 5, 3, 5, 5),
    (1, 20, 13, 1, 1),
    (3, 8, 1, 1, 2),
    (1, 4, 70, 61, 1),
    (2, 28, 33, 3, 7),
    (1, 1, 1, 9, 1),
]


@pytest.fixture(autouse=True)
def _native():
    require_native()
    torch.manual_seed(0)


def example(shape, form="all", layout=torch.contiguous_format, mean=0.0, std=1.0):
    """(groups, dict of inputs)"""
    n, c, h, w, groups = shape
    tensors = {"x": mean + std * torch.randn(n, c, h, w), "weight": torch.randn(c), "bias": torch.randn(c)}
    tensors |= {name: torch.randn(n, c) for name in FORMS[form]}
    tensors["x"] = tensors["x"].contiguous(memory_format=layout)
    return groups, {name: t.requires_grad_() for name, t in tensors.items()}


def exact(groups, eps, x, weight, bias, before=None, scale=None, shift=None):
    """The definition, in float64."""
    column = lambda t: t.double()[:, :, None, None]  # noqa: E731
    z = x.double() if before is None else x.double() + column(before)
    z = F.group_norm(z, groups, weight.double(), bias.double(), eps)
    z = z if scale is None else z * (column(scale) + 1) + column(shift)
    return z * torch.sigmoid(z)


def run(groups, tensors, impl="native", eps=1e-5, **options):
    return group_norm_silu(**tensors, num_groups=groups, eps=eps, impl=impl, **options)


def assert_near(found, expected, tolerance=3e-6):
    error = (found.double() - expected.double()).detach().abs().max() if found.numel() else 0
    assert error <= tolerance * max(1, float(expected.detach().abs().max())), error


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients(form, shape, layout):
    groups, tensors = example(shape, form, FORMATS[layout])
    y, expected = run(groups, tensors), exact(groups, 1e-5, **tensors)
    assert y.dtype == torch.float32 and y.stride() == tensors["x"].stride()
    assert_near(y, expected)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, tensors.values(), dy)
    for found, wanted in zip(grads, torch.autograd.grad(expected, tensors.values(), dy.double()), strict=True):
        assert_near(found, wanted, 1e-5)


@pytest.mark.parametrize("layout", FORMATS.values())
def test_plain_torch_is_the_same_function(layout):
    groups, tensors = example((2, 12, 7, 9, 3), layout=layout)
    for impl in ("torch", "ref"):
        assert_near(run(groups, tensors, impl), exact(groups, 1e-5, **tensors))
    plain = {name: t.detach() for name, t in tensors.items()}
    x = plain["x"].clone(memory_format=torch.preserve_format)
    y = run(groups, plain | {"x": x}, "torch", inplace=True)
    assert_near(y, exact(groups, 1e-5, **tensors))
    assert torch.equal(x, plain["x"] + plain["before"][:, :, None, None])
    run(groups, plain, "torch")
    assert torch.equal(plain["x"], tensors["x"])


@pytest.mark.parametrize("layout", FORMATS.values())
def test_exponential_over_its_range(layout):
    """silu(z) within 4 units in the last place, far out zero, z, and NaN where a NaN is."""
    z = torch.cat(
        [torch.linspace(-86, 86, 40_000), torch.randn(24_000), torch.tensor([-0.0, 0.0, 1e-30, -1e-30] * 384)]
    )
    z = z.reshape(1, 1, 256, 256)
    still = torch.zeros(1, 1, 256, 256)  # normalised it is 0, so shift alone makes z
    for value in (-1e30, -500.0, -100.0, -88.0, 88.0, 100.0, 1e30, math.nan):
        shift = torch.full([1, 1], value)
        y = group_norm_silu(still, 1, torch.ones(1), torch.zeros(1), 1e-5, None, shift * 0, shift, impl="native")
        expected = value * torch.sigmoid(shift.double())
        assert y.isnan().all() if math.isnan(value) else (y - expected).abs().max() <= 3e-7 * max(abs(value), 1e-29)
    weight, bias = z.double().std(unbiased=False).float(), z.double().mean().float()
    x = z.contiguous(memory_format=layout)
    y = group_norm_silu(x, 1, weight[None], bias[None], 0.0, impl="native").double()
    normed = F.group_norm(x.double(), 1, weight[None].double(), bias[None].double(), 0.0)  # z, but for its rounding
    # z itself is rounded, which e^−z turns into |z| of these units
    allowed = (4 + normed.abs()) * 2**-23 * (normed * torch.sigmoid(normed)).abs() + (1 + bias.abs()) * 2**-22
    assert bool(((y - normed * torch.sigmoid(normed)).abs() <= allowed).all())


@pytest.mark.parametrize("layout", FORMATS.values())
def test_statistics_do_not_cancel(layout):
    """A mean 10^4 deviations away, in x or in what is added; a group without any variance."""
    for shape in ((2, 16, 16, 16, 4), (2, 12, 7, 9, 3)):
        groups, tensors = example(shape, "before", layout, mean=1000.0, std=0.1)
        assert_near(run(groups, tensors), exact(groups, 1e-5, **tensors), 1e-4)  # x − mean itself is rounded
        groups, tensors = example(shape, "before", layout)
        with torch.no_grad():
            tensors["before"] += 1000
        assert_near(run(groups, tensors), exact(groups, 1e-5, **tensors), 1e-4)
        groups, tensors = example(shape, "norm", layout, mean=123.456, std=0.0)
        y = run(groups, tensors)
        assert_near(y, F.silu(tensors["bias"])[:, None, None].expand_as(y))
        (dx,) = torch.autograd.grad(y.sum(), tensors["x"])
        assert_near(dx, torch.autograd.grad(exact(groups, 1e-5, **tensors).sum(), tensors["x"])[0])


def test_gradients_that_nobody_asks_for():
    groups, tensors = example((2, 12, 3, 5, 3))
    dy = torch.randn(2, 12, 3, 5)
    full = dict(zip(tensors, torch.autograd.grad(run(groups, tensors), tensors.values(), dy), strict=True))
    for wanted in itertools.product((False, True), repeat=len(tensors)):
        leaves = {
            name: t.detach().requires_grad_(need) for (name, t), need in zip(tensors.items(), wanted, strict=True)
        }
        y = run(groups, leaves)
        assert y.requires_grad == any(wanted)
        if any(wanted):
            y.backward(dy)
        for name, leaf in leaves.items():
            assert torch.equal(leaf.grad, full[name]) if leaf.requires_grad else leaf.grad is None


def test_second_derivative():
    """Through graphs of plain torch; also where one input is a function of another."""
    groups, tensors = example((2, 4, 2, 3, 2))
    tensors["before"] = tensors["x"].mean([2, 3])
    leaves = [t for t in tensors.values() if t.is_leaf]
    dy, found = torch.randn(2, 4, 2, 3, requires_grad=True), []
    for y in (run(groups, tensors), exact(groups, 1e-5, **tensors)):
        grads = torch.autograd.grad(y, leaves, dy, create_graph=True)
        penalty = sum(g.double().square().sum() for g in grads)
        found.append([*grads, *torch.autograd.grad(penalty, [dy, *leaves])])
    for a, b in zip(*found, strict=True):
        assert_near(a, b, 2e-5)


@pytest.mark.parametrize("layout", FORMATS.values())
@pytest.mark.parametrize("shape", [(5, 64, 16, 16, 16), (1, 192, 17, 16, 32)])
def test_same_bits_with_any_number_of_threads(layout, shape):
    groups, tensors = example(shape, layout=layout)
    dy, threads, found = torch.randn(shape[:4]), torch.get_num_threads(), []
    try:
        for count in (1, 1, 2, 3, 8):
            torch.set_num_threads(count)
            y = run(groups, tensors)
            found.append([y, *torch.autograd.grad(y, tensors.values(), dy)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for others in found[1:] for a, b in zip(found[0], others, strict=True))


def test_strides_and_shapes():
    """Slices, steps, transposed x; rows for all images; parameters out of a larger tensor; other numbers of axes."""
    groups, tensors = example((4, 16, 6, 5, 4))
    wide = torch.randn(8, 16, 12, 5)
    both = torch.randn(1, 32)
    tensors |= {"x": wide[::2, :, ::2], "scale": both[:, :16], "shift": both[:, 16:], "before": torch.randn(16, 4).T}
    tensors["weight"] = torch.randn(32, requires_grad=True)[::2]
    both.requires_grad_()
    rows = {"scale": both[:, :16].expand(4, -1), "shift": both[:, 16:].expand(4, -1)}
    y, expected = run(groups, tensors), exact(groups, 1e-5, **(tensors | rows))
    assert_near(y, expected)
    y = run(groups, tensors | {"scale": both[:, :16], "shift": both[:, 16:]})
    dy = torch.randn(4, 5, 6, 16).permute(0, 3, 2, 1)
    assert_near(torch.autograd.grad(y, both, dy)[0], torch.autograd.grad(expected, both, dy.double())[0], 1e-5)
    for x in (torch.randn(3, 16), torch.randn(3, 16, 7), torch.randn(3, 16, 2, 3, 2)):
        y = group_norm_silu(x, 2, torch.ones(16), torch.zeros(16), impl="native")
        assert_near(y, F.silu(F.group_norm(x, 2)))
    assert run(4, {"x": torch.randn(0, 16, 2, 2), "weight": torch.ones(16), "bias": torch.ones(16)}).shape[0] == 0


@pytest.mark.parametrize("layout", FORMATS.values())
@pytest.mark.parametrize("form", ["norm", "all"])
def test_opcheck(form, layout):
    groups, tensors = example((2, 8, 3, 5, 2), form, layout)
    arguments = [tensors.get(name) for name in ("x", "weight", "bias", "before", "scale", "shift")]
    op, grad = torch.ops.refine.group_norm_silu.default, torch.ops.refine.group_norm_silu_grad.default
    torch.library.opcheck(op, (*arguments, groups, 1e-5, True))
    with torch.no_grad():
        y, stats = op(*arguments, groups, 1e-5, True)
    arguments = [None if t is None else t.detach() for t in arguments]
    schema = ("test_schema", "test_faketensor")
    torch.library.opcheck(grad, (torch.randn_like(y), stats, *arguments, groups, 1e-5, True), test_utils=schema)


def test_in_a_compiled_graph():
    groups, tensors = example((2, 16, 8, 8, 4))
    seen = []

    def backend(graph, _):
        seen.append(graph.code)
        return graph

    compiled = torch.compile(lambda **given: run(groups, given), backend=backend, fullgraph=True)
    assert_near(compiled(**tensors), exact(groups, 1e-5, **tensors))
    assert "refine.group_norm_silu" in seen[0]


def test_what_runs_it(monkeypatch):
    calls = []
    monkeypatch.setattr(native, "run", lambda op, x, record: calls.append(op))
    large, small = example((4, 16, 32, 32, 4)), example((1, 4, 2, 2, 1))
    run(*large, impl=None)
    assert calls == ["group_norm_silu"]
    run(*small, impl=None)
    run(*large, impl="torch")
    run(large[0], {name: t.bfloat16() for name, t in large[1].items()}, impl=None)
    monkeypatch.setattr(native, "_available", lambda op, device_type: False)  # no compiler
    assert_near(run(*large, impl=None), exact(large[0], 1e-5, **large[1]))
    assert calls == ["group_norm_silu"]
    with pytest.raises(RuntimeError, match=r"no compiled kernel for torch\.float32 on cpu"):
        run(*large)
    with pytest.raises(RuntimeError, match=r"no compiled kernel for torch\.float64 on cpu"):
        run(large[0], {name: t.double() for name, t in large[1].items()})


def test_mode_ref_never_uses_it(monkeypatch):
    monkeypatch.setattr(custom_ops, "_mode", None)
    monkeypatch.setattr(custom_ops, "_ready", {})
    monkeypatch.setattr(native, "run", None)
    custom_ops.set_mode("ref")
    groups, tensors = example((4, 16, 32, 32, 4))
    assert_near(run(groups, tensors, impl=None), exact(groups, 1e-5, **tensors))


def test_graph_of_a_machine_with_a_compiler(monkeypatch):
    """The registered op, where there is no library: plain torch in it."""
    groups, tensors = example((2, 8, 3, 5, 2), layout=torch.channels_last)
    monkeypatch.setattr(native, "function", lambda op, x: None)
    y, expected = run(groups, tensors), exact(groups, 1e-5, **tensors)
    assert_near(y, expected)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, tensors.values(), dy)
    for found, wanted in zip(grads, torch.autograd.grad(expected, tensors.values(), dy.double()), strict=True):
        assert_near(found, wanted, 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_groups": 3}, "multiple of 3 groups"),
        ({"weight": torch.ones(7)}, r"shape \(7,\); expected \(8,\)"),
        ({"before": torch.ones(3, 8)}, r"shape \(3, 8\); expected \(2, 8\)"),
        ({"scale": torch.ones(2, 8)}, "scale and shift come together"),
        ({"impl": "fast"}, "impl is 'fast'"),
    ],
)
def test_what_does_not_fit_is_told(change, message):
    given = {"x": torch.ones(2, 8, 3, 3), "num_groups": 4, "weight": torch.ones(8), "bias": torch.ones(8)}
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**(given | change))
