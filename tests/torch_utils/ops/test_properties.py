"""The compiled kernels and the fast plain-torch form against the reference, on random and on extreme inputs."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refine.torch_utils.ops.bias_act import ACTIVATIONS, bias_act
from refine.torch_utils.ops.upfirdn2d import setup_filter, upfirdn2d
from tests.torch_utils.ops import require_native

# Largest error relative to the largest number. The reference rounds to half precision after every step, we once.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.float16: 1e-2, torch.bfloat16: 8e-2}
CASES = settings(
    max_examples=250, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)


@pytest.fixture(autouse=True, scope="module")
def _native():
    require_native()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    actual, expected = actual.double(), expected.double()
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    error = (actual - expected).abs().max().item() if expected.numel() else 0.0
    assert error <= TOLERANCE[dtype or torch.float32] * scale, f"error {error}, scale {scale}"


def arrange(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers, otherwise in memory."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
    if layout == "strided":
        wide = x.new_full([*x.shape[:-1], 2 * x.shape[-1] + 1], math.nan)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    return x


LAYOUTS = st.sampled_from(["contiguous", "channels_last", "strided", "transposed", "expanded"])
DTYPES = st.sampled_from(list(TOLERANCE))
PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))


def reference_in_float(function, x, *others):
    """The reference on the same numbers; half precision is computed in float32, not to blur the comparison."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x = x.detach().to(wide).contiguous().requires_grad_()
    return x, function(x, *(None if o is None else o.detach().to(wide) for o in others))


@CASES
@given(
    seed=st.integers(0, 10**6),
    size=st.tuples(st.integers(0, 3), st.sampled_from([1, 2, 3, 5, 33]), st.integers(1, 14), st.integers(1, 40)),
    taps=st.one_of(
        st.none(),
        st.integers(1, 9),
        st.tuples(st.integers(1, 6), st.integers(1, 6)),
        st.just("1331"),
        st.just("rank 1"),
    ),
    up=PAIR,
    down=PAIR,
    padding=st.tuples(*[st.integers(-3, 12)] * 4),
    flip=st.booleans(),
    gain=st.sampled_from([1.0, 4.0, 0.3]),
    layout=LAYOUTS,
    dtype=DTYPES,
)
def test_upfirdn2d(seed, size, taps, up, down, padding, flip, gain, layout, dtype):
    torch.manual_seed(seed)
    f = (
        None
        if taps is None
        else torch.randn([taps] if isinstance(taps, int) else (taps if isinstance(taps, tuple) else 4))
    )
    if taps == "1331":
        f = setup_filter([1, 3, 3, 1])
        up, down = (min(up[0], 2),) * 2, (min(down[0], 2),) * 2
    elif taps == "rank 1":
        f = torch.outer(torch.randn(5), torch.randn(4))
    x = arrange(torch.randn(size).to(dtype), layout).detach().requires_grad_()

    def call(x, impl):
        return upfirdn2d(x, f, up, down, padding, flip, gain, impl=impl)

    try:
        wide, expected = reference_in_float(lambda x: call(x, "ref"), x)
    except ValueError as error:
        with pytest.raises(ValueError, match="smaller than the filter"):
            call(x, "native")
        assert "smaller than the filter" in str(error)
        return
    dy = torch.randn(expected.shape).to(dtype)
    (dx,) = torch.autograd.grad(expected, wide, dy.to(expected.dtype))
    for impl in ("native", "torch") if dtype in (torch.float32, torch.float64) else ("native",):
        y = call(x, impl)
        assert_close(y, expected.to(dtype), dtype)
        assert_close(torch.autograd.grad(y, x, dy)[0], dx.to(dtype), dtype)


@CASES
@given(
    seed=st.integers(0, 10**6),
    size=st.one_of(
        st.tuples(st.integers(0, 3), st.sampled_from([1, 3, 33]), st.integers(1, 9), st.integers(1, 40)),
        st.lists(st.integers(0, 40), min_size=1, max_size=3),
    ),
    axis=st.integers(0, 3),
    act=st.sampled_from(list(ACTIVATIONS)),
    bias=st.booleans(),
    alpha=st.sampled_from([None, 0.0, 0.7, -0.3]),
    gain=st.sampled_from([None, 0.5, -1.5, 0.0]),
    clamp=st.sampled_from([None, 0.4, 0.0]),
    layout=LAYOUTS,
    dtype=DTYPES,
)
def test_bias_act(seed, size, axis, act, bias, alpha, gain, clamp, layout, dtype):
    torch.manual_seed(seed)
    dim = axis % len(size)
    x = torch.randn(size).to(dtype)
    x = (arrange(x, layout) if x.numel() else x).detach().requires_grad_()
    b = torch.randn(size[dim]).to(dtype).requires_grad_() if bias else None

    def call(x, b, impl):
        return bias_act(x, b, dim, act, alpha, gain, clamp, impl=impl)

    wide_b = b.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_() if bias else None
    wide, expected = reference_in_float(lambda x: call(x, wide_b, "ref"), x)
    y = call(x, b, "native")
    assert_close(y, expected.to(dtype), dtype)
    dy = torch.randn(expected.shape).to(dtype)
    inputs, wides = ([x, b], [wide, wide_b]) if bias else ([x], [wide])
    actual = torch.autograd.grad(y, inputs, dy)
    for a, e in zip(actual, torch.autograd.grad(expected, wides, dy.to(expected.dtype)), strict=True):
        assert_close(a, e.to(dtype), dtype)


@pytest.mark.parametrize("act", list(ACTIVATIONS))
@pytest.mark.parametrize("clamp", [None, 0.6])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bias_act_gradcheck(act, clamp, layout):
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    b = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def call(x, b):
        return bias_act(x, b, act=act, gain=1.3, clamp=clamp, impl="native")

    assert torch.autograd.gradcheck(call, (x, b))
    assert torch.autograd.gradgradcheck(call, (x, b))


@pytest.mark.parametrize("f", [None, torch.tensor([1.0, 2, -3]), torch.randn(3, 4)], ids=["none", "1-D", "2-D"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_upfirdn2d_gradcheck(f, layout):
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()

    def call(x):
        return upfirdn2d(x, f, up=(2, 1), down=(3, 2), padding=(3, -1, 2, 4), gain=1.5, impl="native")

    assert torch.autograd.gradcheck(call, x)
    assert torch.autograd.gradgradcheck(call, x)


@pytest.mark.parametrize("act", list(ACTIVATIONS))
@pytest.mark.parametrize("clamp", [None, 1.0])
def test_nan_and_infinity_go_where_torch_lets_them_go(act, clamp):
    x = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30, 0.0, -0.0, 1.0])
    actual, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = bias_act(actual, act=act, gain=1.0, clamp=clamp, impl="native")
    e = bias_act(expected, act=act, gain=1.0, clamp=clamp, impl="ref")
    torch.testing.assert_close(y, e, equal_nan=True, rtol=1e-6, atol=1e-6)
    (dx,), (de,) = (torch.autograd.grad(v.sum(), i) for v, i in ((y, actual), (e, expected)))
    finite = torch.isfinite(x) | torch.isnan(x)  # at infinity torch's own formulas give 0 · inf for some activations
    torch.testing.assert_close(dx[finite], de[finite], equal_nan=True, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_bad_pixel_reaches_its_neighbours_only(value, layout):
    x = torch.zeros(1, 2, 9, 9).contiguous(memory_format=layout)
    x[0, 1, 4, 4] = value
    f = setup_filter([1, 3, 3, 1])
    y, expected = (upfirdn2d(x, f, padding=(2, 1, 2, 1), impl=impl) for impl in ("native", "ref"))
    assert torch.equal(torch.isfinite(y), torch.isfinite(expected))
    assert (~torch.isfinite(y)).sum() == 16


def test_clamped_values_have_no_gradient_and_the_limit_itself_has():
    x = torch.tensor([-2.0, -1.0, 0.5, 1.0, 2.0], requires_grad=True)
    (dx,) = torch.autograd.grad(bias_act(x, act="linear", clamp=1.0, impl="native").sum(), x)
    assert dx.tolist() == [0, 1, 1, 1, 0]


def test_only_the_bias_wants_a_gradient():
    x, b = torch.randn(4, 3, 5, 5), torch.randn(3, requires_grad=True)
    for layout in (torch.contiguous_format, torch.channels_last):
        (db,) = torch.autograd.grad(
            bias_act(x.contiguous(memory_format=layout), b, act="lrelu", impl="native").sum(), b
        )
        (expected,) = torch.autograd.grad(bias_act(x, b, act="lrelu", impl="ref").sum(), b)
        torch.testing.assert_close(db, expected)


@pytest.mark.parametrize("size", [(0, 3, 4, 4), (2, 0, 4, 4)])
def test_empty(size):
    x = torch.zeros(size, requires_grad=True)
    y = upfirdn2d(x, setup_filter([1, 3, 3, 1]), up=2, padding=1, impl="native")
    assert y.shape == (*size[:2], 7, 7)
    y = bias_act(y, torch.zeros(size[1]), act="swish", impl="native")
    assert torch.autograd.grad(y.sum(), x)[0].shape == size


def test_padding_much_larger_than_the_image():
    x = torch.randn(1, 2, 3, 3, requires_grad=True)
    options = {"up": 2, "down": 3, "padding": (1000, 2000, 700, 1)}
    f = torch.randn(3, 4)
    y, expected = (upfirdn2d(x, f, **options, impl=impl) for impl in ("native", "ref"))
    assert_close(y, expected)
    dy = torch.randn_like(y)
    assert_close(*(torch.autograd.grad(out, x, dy)[0] for out in (y, expected)))


def test_bias_of_another_dtype_is_taken_in_that_of_the_image():
    x, b = torch.randn(2, 3, dtype=torch.bfloat16), torch.randn(3)
    for impl in ("ref", "native"):
        assert bias_act(x, b, impl=impl).dtype == torch.bfloat16
