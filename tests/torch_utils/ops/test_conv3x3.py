"""The compiled 3×3 convolution against float64, and where it is used."""

import contextlib
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from refine.torch_utils.build import custom_ops
from refine.torch_utils.ops import native
from refine.torch_utils.ops.conv2d_resample import conv2d_resample
from refine.torch_utils.ops.conv3x3 import conv2d, conv3x3
from tests.torch_utils.ops import require_native

# Largest error relative to the largest number; a direct sum in float32 errs by up to half as much.
TOLERANCE = 4e-6
CHANNELS_LAST = torch.channels_last

# (images, channels, outputs, height, width): odd sizes, less than a tile, one more than a tile, channels that are
# multiples of nothing, of a vector, of a panel; the last two need several turns of outputs and several blocks.
SHAPES = [
    *((1, 1, 1, size, size) for size in range(1, 6)),
    (2, 3, 5, 5, 3),
    (3, 17, 9, 4, 7),
    (1, 8, 24, 13, 2),
    (2, 40, 33, 9, 11),
    (1, 16, 16, 8, 8),
    (2, 300, 40, 6, 5),
    (5, 24, 16, 33, 31),
]


@pytest.fixture(autouse=True)
def _native(monkeypatch):
    require_native()
    monkeypatch.setattr("refine.torch_utils.ops.conv3x3._IS_MEASURED", True)  # whatever this processor is


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def arrange(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers, otherwise in memory, as a leaf."""
    if layout == "channels_last":
        x = x.contiguous(memory_format=CHANNELS_LAST)
    elif layout == "strided":
        x = torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0]
    elif layout == "transposed":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    return x.detach().requires_grad_()


def random_call(shape, layout="contiguous", w_layout="contiguous", seed=0):
    n, c, k, height, width = shape
    torch.manual_seed(seed)
    x, w, b = torch.randn(n, c, height, width), torch.randn(k, c, 3, 3), torch.randn(k).requires_grad_()
    return arrange(x, layout), arrange(w, w_layout), b, arrange(torch.randn(n, k, height, width), layout)


def compiled(x, w, b=None):
    return conv3x3(x, w, b, impl="native")


def reference(x, w, b=None):
    return F.conv2d(x, w, b, padding=1)


def assert_close(found, expected, tolerance=TOLERANCE):
    for a, e in zip(found, expected, strict=True):
        assert a.shape == e.shape and a.dtype == torch.float32
        assert (a.double() - e).abs().max() <= tolerance * e.abs().max()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "transposed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(shape, layout):
    for w_layout in ("contiguous", "channels_last", "transposed"):
        x, w, b, dy = random_call(shape, layout, w_layout)
        wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
        y, expected = compiled(x, w, b), reference(*wide)
        assert_close([y, *torch.autograd.grad(y, [x, w, b], dy)],
                     [expected, *torch.autograd.grad(expected, wide, dy.double())])  # fmt: skip
        with torch.no_grad():
            assert torch.equal(compiled(x, w, b), y)


@pytest.mark.parametrize("x_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("w_layout", ["contiguous", "channels_last"])
def test_layouts_are_those_of_torch(x_layout, w_layout):
    """But for the gradient to the weights, which is laid out as they are."""
    x, w, _, _ = random_call((2, 16, 24, 8, 8), x_layout, w_layout)
    y, expected = compiled(x, w), reference(x, w)
    assert y.stride() == expected.stride()
    dy = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, [x, w], dy)
    assert dx.stride() == torch.autograd.grad(expected, x, dy)[0].stride() and dw.stride() == w.stride()


@pytest.mark.parametrize("needed", ["x", "w", "b", "xw", "xb", "wb"])
def test_only_what_needs_a_gradient(needed):
    leaves = dict(zip("xwb", random_call((2, 17, 9, 6, 7))[:3], strict=True))
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in needed)
    y = compiled(*leaves.values())
    y.backward(torch.ones_like(y))  # a gradient that is expanded from one number
    wide = [leaf.detach().double().requires_grad_(name in needed) for name, leaf in leaves.items()]
    reference(*wide).sum().backward()
    for leaf, expected in zip(leaves.values(), wide, strict=True):
        assert (leaf.grad is None) == (expected.grad is None)
        if leaf.grad is not None:
            assert_close([leaf.grad], [expected.grad])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_higher_derivatives(layout):
    """Gradients of a gradient penalty, and of the gradient of that."""

    def derivatives(function, x, w, b):
        y = function(x, w, b)
        first = torch.autograd.grad(y.pow(3).mean(), [x, w, b], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, w, b], create_graph=True)
        return [y, *first, *second, *torch.autograd.grad(sum(g.square().mean() for g in second), [x, w, b])]

    x, w, b, _ = random_call((2, 7, 10, 6, 5), layout, layout)
    wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
    assert_close(derivatives(compiled, x, w, b), derivatives(reference, *wide), tolerance=3e-5)


def value_and_gradients(shape, layout):
    x, w, b, dy = random_call(shape, layout, layout)
    y = compiled(x, w, b)
    return [y, *torch.autograd.grad(y, [x, w], dy)]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 48, 40, 8, 8), (2, 160, 80, 8, 9), (6, 33, 20, 32, 32)], ids=str)
def test_threads_change_no_bit(shape, layout, threads):
    threads(1)
    expected = value_and_gradients(shape, layout)
    for count in (1, 2, 3, 2):
        threads(count)
        assert all(map(torch.equal, value_and_gradients(shape, layout), expected))


def test_a_nan_stays_in_its_image():
    x, w, b, _ = random_call((3, 16, 16, 8, 8))
    clean = compiled(x, w, b).detach()
    with torch.no_grad():
        x[1, 3, 2, 2] = torch.nan
    y = compiled(x, w, b)
    assert torch.equal(y[::2], clean[::2]) and y[1, :, 1:4, 1:4].isnan().all()


def test_no_images():
    x, w, b, _ = random_call((1, 16, 24, 8, 8))
    y = compiled(x[:0], w, b)
    assert y.shape == (0, 24, 8, 8)
    assert torch.equal(torch.autograd.grad(y.sum(), w)[0], torch.zeros_like(w))


def test_mistakes_are_told():
    x, w, b, _ = random_call((1, 4, 6, 8, 8))
    with pytest.raises(ValueError, match=r"x has shape \(1, 4, 8, 8\) and w \(6, 4, 5, 5\)"):
        conv3x3(x, torch.zeros(6, 4, 5, 5))
    with pytest.raises(ValueError, match=r"bias has shape \(5,\); expected \(6,\)"):
        conv3x3(x, w, b[:5])
    with pytest.raises(ValueError, match="impl is 'fast'"):
        conv3x3(x, w, impl="fast")
    with pytest.raises(RuntimeError, match=r"conv3x3 has no compiled kernel for torch\.float64"):
        conv3x3(x.double(), w.double(), impl="native")
    assert conv3x3(x.double(), w.double()).dtype == torch.float64


# As torch sees it.


def test_flops_are_those_of_torch():
    x, w, b, dy = random_call((2, 17, 9, 6, 7))
    counts = []
    for function in (compiled, reference):
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(function(x, w, b), [x, w], dy)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_opcheck():
    x, w, b, dy = random_call((2, 17, 9, 6, 7), "channels_last")
    torch.library.opcheck(torch.ops.refine.conv3x3.default, (x, w, b, False))
    torch.library.opcheck(torch.ops.refine.conv3x3.default, (dy, w, None, True))
    torch.library.opcheck(torch.ops.refine.conv3x3_weight_grad.default, (dy, x, True))


def test_compile_without_a_graph_break():
    x, w, b, dy = random_call((2, 16, 24, 8, 8))
    function = torch.compile(conv2d, fullgraph=True, backend="aot_eager")
    y, expected = function(x, w, b, padding=1), compiled(x, w, b)
    assert torch.equal(y, expected)
    grads = (torch.autograd.grad(out, [x, w, b], dy) for out in (y, expected))
    assert all(map(torch.equal, *grads))


class Seen(TorchDispatchMode):
    """Collects the names of the ops that a mode is shown."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def is_compiled(function) -> bool:
    with Seen() as seen:
        function()
    return any("refine.conv3x3" in name for name in seen.names)


def test_used_where_it_pays():
    x, w, b, _ = random_call((2, 16, 24, 8, 8))
    assert is_compiled(lambda: conv2d(x, w, b, padding=1))
    assert is_compiled(lambda: conv2d(x, w, padding=(1, 1)))
    assert is_compiled(lambda: conv2d_resample(x, w, padding=1))
    few, small, one = (random_call(shape) for shape in ((2, 8, 24, 8, 8), (50, 16, 16, 2, 2), (1, 16, 16, 8, 8)))
    others = {
        "no padding": lambda: conv2d(x, w, b),
        "stride": lambda: conv2d(x, w, b, padding=1, stride=2),
        "groups": lambda: conv2d(x, w[:, :8], b, padding=1, groups=2),
        "a larger kernel": lambda: conv2d(x, torch.zeros(24, 16, 5, 5), padding=1),
        "float64": lambda: conv2d(x.double(), w.double(), b.double(), padding=1),
        "few channels": lambda: conv2d(few[0], few[1], padding=1),
        "small images": lambda: conv2d(small[0], small[1], padding=1),
        "one image": lambda: conv2d(one[0], one[1], padding=1),
    }
    assert [name for name, call in others.items() if is_compiled(call)] == []
    with torch.autocast("cpu", torch.bfloat16):
        assert conv2d(x, w, b, padding=1).dtype == torch.bfloat16


def test_only_on_processors_like_the_measured_one(monkeypatch):
    x, w, b, _ = random_call((2, 16, 24, 8, 8))
    monkeypatch.setattr("refine.torch_utils.ops.conv3x3._IS_MEASURED", False)
    assert not is_compiled(lambda: conv2d(x, w, b, padding=1))


def test_transforms_and_forward_mode_take_torch():
    x, w, _, _ = random_call((2, 16, 24, 8, 8))
    each = torch.func.vmap(lambda image: conv2d(image, w, padding=1))(x[None])
    torch.testing.assert_close(each[0], reference(x, w))
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(conv2d(forward_ad.make_dual(x, x), w, padding=1))
    torch.testing.assert_close(y.tangent, reference(x, w))


@contextlib.contextmanager
def mode(name):
    before = custom_ops.get_mode()
    custom_ops.set_mode(name)
    try:
        yield
    finally:
        custom_ops.set_mode(before)


def test_mode_ref_is_torch():
    x, w, b, _ = random_call((2, 16, 24, 8, 8))
    with mode("ref"):
        assert torch.equal(conv2d(x, w, b, padding=1), reference(x, w, b))
        assert torch.equal(conv3x3(x, w, b), reference(x, w, b))
        with pytest.raises(RuntimeError, match="no compiled kernel"):
            compiled(x, w, b)


def test_a_graph_without_a_compiler(monkeypatch):
    """A graph that holds the op runs where the op cannot be had."""
    x, w, b, dy = random_call((2, 16, 24, 8, 8), "channels_last")
    calls = [(x, w, b, False), (dy, w, None, True)]
    expected = [torch.ops.refine.conv3x3(*call) for call in calls]
    expected.append(torch.ops.refine.conv3x3_weight_grad(dy, x, True))
    monkeypatch.setattr(native, "function", lambda op, x: None)
    found = [torch.ops.refine.conv3x3(*call) for call in calls]
    found.append(torch.ops.refine.conv3x3_weight_grad(dy, x, True))
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-4)
        assert a.stride() == e.stride()


def test_sanitizers_find_nothing(tmp_path):
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++"))))
    binary, source = tmp_path / "bounds", Path(__file__).with_name("conv3x3_bounds.cpp")
    flags = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fopenmp", "-I"]
    command = [compiler, *flags, str(custom_ops.SOURCES), "-o", str(binary), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "cannot find -lasan" in done.stderr or "cannot find -lubsan" in done.stderr:
        pytest.skip("no sanitizer libraries")
    assert done.returncode == 0, done.stderr
    done = subprocess.run([binary, "20"], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "20 calls agree\n"), done.stdout + done.stderr
