"""The ops as torch sees them: schema, fake kernels, torch.compile, autocast, DistributedDataParallel; their sources."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from refine.torch_utils.build import custom_ops
from refine.torch_utils.ops.bias_act import bias_act
from refine.torch_utils.ops.conv2d_resample import conv2d_resample
from refine.torch_utils.ops.upfirdn2d import setup_filter, upfirdn2d, upsample2d
from tests.torch_utils.ops import require_native

SOURCES = custom_ops.SOURCES
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def _native():
    require_native()


def images(device="cpu", layout=torch.contiguous_format, dtype=torch.float32, size=(2, 3, 6, 5)):
    return torch.randn(size, device=device, dtype=dtype).contiguous(memory_format=layout).requires_grad_()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_opcheck(device, layout):
    x, b, f = images(device, layout), torch.randn(3, device=device, requires_grad=True), setup_filter([1, 3, 3, 1])
    ops = torch.ops.refine
    torch.library.opcheck(ops.upfirdn2d.default, (x, f.to(device), [2, 1], [1, 2], [2, 1, 3, -1], True, 4.0))
    torch.library.opcheck(ops.upfirdn2d.default, (x, None, [1, 1], [1, 1], [1, 0, 0, 0], False, 1.0))
    for act in ("linear", "lrelu", "swish"):
        options = (1, act, 0.2, 1.5, 0.8 if act == "swish" else -1.0)
        torch.library.opcheck(ops.bias_act.default, (x, b, *options))
        torch.library.opcheck(ops.bias_act_grad.default, (images(device, layout), x, b, *options, True))
    tests = ("test_schema", "test_faketensor")  # the third derivative is refused
    arguments = (images(device, layout), images(device, layout), x, b, 1, "tanh", 0.0, 1.0, -1.0)
    torch.library.opcheck(ops.bias_act_grad2.default, arguments, test_utils=tests)


class Seen(TorchDispatchMode):
    """Collects the names of the ops that a mode is shown."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_calls_past_the_dispatcher_agree_with_those_through_it(device, layout):
    x, b = images(device, layout), torch.randn(3, device=device, requires_grad=True)
    f = setup_filter([1, 3, 3, 1], device=device)

    def call():
        y = bias_act(upfirdn2d(x, f, up=2, padding=2, impl="native"), b, act="swish", impl="native")
        first = torch.autograd.grad(y.square().sum(), [x, b], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, b])
        with torch.no_grad():
            plain = bias_act(upfirdn2d(x, f, down=2, padding=2, impl="native"), b, impl="native")
        return [y, *first, *second, plain]

    with Seen() as seen:
        through = call()
    assert {"refine.upfirdn2d.default", "refine.bias_act.default", "refine.bias_act_grad.default"} <= seen.names
    for direct, expected in zip(call(), through, strict=True):
        torch.testing.assert_close(direct, expected, rtol=0, atol=0)
        assert direct.stride() == expected.stride()


def test_third_derivatives_are_refused_in_one_line():
    x = torch.randn(3, requires_grad=True)
    (dx,) = torch.autograd.grad(bias_act(x, act="tanh", impl="native").sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="impl='ref'"):
        torch.autograd.grad(ddx.sum(), x)


def layer(x, w, b, f):
    x = conv2d_resample(x, w, f, up=2, padding=1, flip_weight=False)
    return bias_act(x, b, act="lrelu", clamp=256.0, impl="native")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("amp", [False, True])
def test_compile_without_a_graph_break(device, amp):
    x, w = images(device), torch.randn(4, 3, 3, 3, device=device, requires_grad=True)
    b, f = torch.randn(4, device=device, requires_grad=True), setup_filter([1, 3, 3, 1], device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast(device, torch.bfloat16, enabled=amp):
        y, expected = compiled(x, w, b, f), layer(x, w, b, f)
    assert y.dtype == expected.dtype == (torch.bfloat16 if amp else torch.float32)
    torch.testing.assert_close(y, expected)
    grads = (torch.autograd.grad(out.float().square().sum(), [x, w, b]) for out in (y, expected))
    for a, e in zip(*grads, strict=True):
        torch.testing.assert_close(a, e, rtol=2e-2 if amp else 1e-5, atol=2e-2 if amp else 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device, dtype):
    x, w = images(device), torch.randn(4, 3, 3, 3, device=device)
    b, f = torch.randn(4, device=device, requires_grad=True), setup_filter([1, 3, 3, 1], device=device)
    with torch.autocast(device, dtype):
        y = layer(x, w, b, f)
    assert y.dtype == dtype
    expected = layer(x, w, b, f)
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
    y.float().sum().backward()
    assert x.grad.dtype == b.grad.dtype == torch.float32


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.randn(4))
        self.register_buffer("f", setup_filter([1, 3, 3, 1]))

    def forward(self, x):
        return layer(x, self.weight, self.bias, self.f)


def test_distributed_data_parallel(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        net, x = Layer(), images()
        (expected,) = torch.autograd.grad(net(x).square().sum(), net.bias)
        nn.parallel.DistributedDataParallel(net)(x).square().sum().backward()
        torch.testing.assert_close(net.bias.grad, expected)
    finally:
        torch.distributed.destroy_process_group()


def test_mode_ref_needs_no_compiled_op(monkeypatch):
    monkeypatch.setattr(custom_ops, "_outcome", lambda *args: pytest.fail("a build was tried"))
    before = custom_ops.get_mode()
    custom_ops.set_mode("ref")
    try:
        x, f = images(), setup_filter([1, 3, 3, 1])
        torch.testing.assert_close(upsample2d(x, f), upsample2d(x, f, impl="ref"))
        with pytest.raises(RuntimeError, match="no compiled kernel"):
            upfirdn2d(x, f, padding=2, impl="native")
    finally:
        custom_ops.set_mode(before)


@pytest.mark.parametrize("function", [upfirdn2d, bias_act])
def test_unknown_impl(function):
    with pytest.raises(ValueError, match="impl is 'cuda'; expected one of"):
        function(torch.zeros(1, 1, 8, 8), torch.ones(1), impl="cuda")


def test_indices_are_64_bits_wide():
    """A sparse file as memory: 2^31 + 64 numbers that nothing ever writes, of which a crop reads the last ones."""
    rows = (1 << 31) // 4096 + 2
    storage = torch.empty(rows * 4096, dtype=torch.bfloat16)  # pages come into being when touched
    x = storage.view(1, 1, rows, 4096)
    x[0, 0, -1] = torch.arange(4096) % 7
    y = upfirdn2d(x, None, padding=(0, 0, 1 - rows, 0), gain=2, impl="native")
    assert torch.equal(y[0, 0, 0], x[0, 0, -1] * 2)


# Sources.


@pytest.fixture(scope="session")
def replay(tmp_path_factory):
    """The CPU library and a host replay of the CUDA kernels' phases, under the sanitizers."""
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    binary = tmp_path_factory.mktemp("replay") / "replay"
    command = [compiler, "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fopenmp"]
    done = subprocess.run(
        [*command, "-I", str(SOURCES), "-o", str(binary), str(Path(__file__).with_name("replay.cpp"))],
        capture_output=True,
        text=True,
        timeout=300,
    )
    if "cannot find -lasan" in done.stderr or "cannot find -lubsan" in done.stderr:
        pytest.skip("no sanitizer libraries")
    assert done.returncode == 0, done.stderr
    return binary


def test_sanitizers_find_nothing(replay):
    done = subprocess.run([replay, "12"], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "96 calls agree\n"), done.stdout + done.stderr
