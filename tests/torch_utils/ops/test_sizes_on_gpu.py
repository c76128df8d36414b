"""The compiled ops on a real GPU against float64, at the sizes of EDM's and StyleGAN2's networks."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from refine.torch_utils.ops.bias_act import bias_act
from refine.torch_utils.ops.group_norm_silu import group_norm_silu
from refine.torch_utils.ops.upfirdn2d import setup_filter, upfirdn2d

pytestmark = pytest.mark.gpu

LAYOUTS = [torch.contiguous_format, torch.channels_last]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# N, C, H, W, groups: CIFAR-10's DDPM++, FFHQ-64's, ImageNet-64's ADM; odd sizes, and groups that a pack does not fit
NORMS = [
    *((8, 256, 32, 32, 32), (1, 128, 32, 32, 32), (5, 512, 16, 16, 32), (512, 256, 8, 8, 32), (3, 384, 8, 8, 32)),
    *((2, 128, 64, 64, 32), (2, 192, 64, 64, 32), (2, 1536, 8, 8, 32), (2, 960, 16, 16, 32)),
    *((3, 20, 7, 9, 5), (2, 5, 3, 5, 5), (2, 12, 5, 5, 1), (2, 100, 33, 31, 25), (3, 8, 1, 1, 2)),
]
FORMS = {"norm": (), "before": ("before",), "scale": ("scale", "shift"), "all": ("before", "scale", "shift")}
# N, C, size, up, down, padding: StyleGAN2 at CIFAR-10's sizes and a 128×128 one, RGB, odd sizes, a crop
RESAMPLED = [
    *((8, 512, 9, 1, 1, (1, 1)), (8, 512, 17, 1, 1, (1, 1)), (4, 512, 33, 1, 1, (1, 1)), (2, 64, 129, 1, 1, (1, 1))),
    *((8, 512, 4, 2, 1, (2, 1)), (4, 512, 16, 2, 1, (2, 1)), (2, 3, 64, 2, 1, (2, 1)), (2, 7, 13, 2, 1, (1, 2))),
    *((8, 512, 8, 1, 2, (1, 1)), (4, 512, 32, 1, 2, (1, 1)), (2, 3, 65, 1, 2, (2, 1)), (2, 40, 37, 1, 1, (-2, 5))),
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def images(*size, dtype, layout):
    return torch.randn(size, device="cuda").to(dtype).contiguous(memory_format=layout)


def assert_near(found, expected, tolerance):
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        error = (a.double() - b).abs().max() / b.abs().max().clamp(min=1)
        assert error < tolerance, (index, error)


def exact(groups, silu, x, weight, bias, before=None, scale=None, shift=None):
    column = lambda t: t[:, :, None, None]  # noqa: E731
    z = F.group_norm(x if before is None else x + column(before), groups, weight, bias, 1e-5)
    z = z if scale is None else z * (column(scale) + 1) + column(shift)
    return F.silu(z) if silu else z


@pytest.mark.parametrize("shape", NORMS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_group_norm_silu(dtype, layout, shape):
    *size, groups = shape
    n, c = size[:2]
    for form, weight_dtype in itertools.product(FORMS, {torch.float32, dtype}):
        tensors = {"x": images(*size, dtype=dtype, layout=layout)}
        tensors |= {name: torch.randn(c, device="cuda").to(weight_dtype) for name in ("weight", "bias")}
        tensors |= {name: torch.randn(n, c, device="cuda").to(dtype) for name in FORMS[form]}
        doubles = {name: t.double().requires_grad_() for name, t in tensors.items()}
        silu = form != "norm"
        for t in tensors.values():
            t.requires_grad_()
        y, expected = (
            group_norm_silu(**tensors, num_groups=groups, silu=silu, impl="native"),
            exact(groups, silu, **doubles),
        )
        assert y.dtype == dtype and y.stride() == tensors["x"].stride()
        dy = images(*size, dtype=dtype, layout=layout)
        grads = torch.autograd.grad(y, tensors.values(), dy)
        wanted = torch.autograd.grad(expected, doubles.values(), dy.double())
        assert [g.dtype for g in grads] == [t.dtype for t in tensors.values()]
        assert_near([y, *grads], [expected, *wanted], TOLERANCE[dtype])
        again = group_norm_silu(**tensors, num_groups=groups, silu=silu, impl="native")
        assert all(map(torch.equal, [y, *grads], [again, *torch.autograd.grad(again, tensors.values(), dy)]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_do_not_cancel(layout):
    """A mean 10^4 deviations away, in x or in what is added; a group without any variance."""
    for mean, std, added in ((1000.0, 0.1, 0.0), (0.0, 1.0, 1000.0), (123.456, 0.0, 0.0)):
        x = mean + std * images(2, 64, 16, 16, dtype=torch.float32, layout=layout)
        before = added + torch.randn(2, 64, device="cuda")
        ones = torch.ones(64, device="cuda")
        y = group_norm_silu(x, 16, ones, ones, before=before, impl="native")
        assert_near([y], [exact(16, True, *(t.double() for t in (x, ones, ones, before)))], 1e-4)


@pytest.mark.parametrize("shape", RESAMPLED, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_upfirdn2d(dtype, layout, shape):
    n, c, size, up, down, padding = shape
    x = images(n, c, size, size, dtype=dtype, layout=layout).requires_grad_()
    double = x.detach().double().requires_grad_()
    f = torch.randn(4, 4, device="cuda")
    for filters, flip in itertools.product((setup_filter([1, 3, 3, 1], "cuda"), f), (False, True)):
        options = {"up": up, "down": down, "padding": (*padding, *padding), "flip_filter": flip, "gain": up**2}
        y = upfirdn2d(x, filters, **options, impl="native")
        expected = upfirdn2d(double, filters, **options, impl="ref")
        dy = torch.randn_like(y)
        (dx,), (wanted,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, double, dy.double())
        assert y.is_contiguous(memory_format=layout)
        assert_near([y, dx], [expected, wanted], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_in_a_graph(dtype):
    """Forward and backward, captured once they have been called, with other numbers in the replay."""
    f = setup_filter([1, 3, 3, 1], "cuda")
    x = images(4, 64, 16, 16, dtype=dtype, layout=torch.channels_last).requires_grad_()
    parameters = [torch.randn(64, device="cuda", requires_grad=True) for _ in range(3)]

    def step():
        y = group_norm_silu(x, 16, *parameters[:2], impl="native")
        y = bias_act(upfirdn2d(y, f, up=2, padding=(2, 1), impl="native"), parameters[2], act="lrelu", impl="native")
        return [y, *torch.autograd.grad(y.float().square().sum(), [x, *parameters])]

    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        found = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, found, step()))
