"""The compiled kernels on a real GPU: against the reference, on any stream, thread and device, and in CUDA graphs."""

import math
import threading

import pytest
import torch

from refine.torch_utils.build import custom_ops, device_code, nvrtc, toolchain
from refine.torch_utils.ops import native
from refine.torch_utils.ops.bias_act import ACTIVATIONS, bias_act
from refine.torch_utils.ops.filtered_lrelu import filtered_lrelu
from refine.torch_utils.ops.upfirdn2d import setup_filter, upfirdn2d

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LAYOUTS = [torch.contiguous_format, torch.channels_last]
SIZES = [(3, 40, 33, 70), (2, 1, 1, 1), (1, 5, 130, 3), (2, 64, 16, 16), (0, 3, 8, 8)]


@pytest.fixture(autouse=True, scope="module")
def _native():
    custom_ops.obtain("cuda")


def images(size, dtype, layout, seed=0):
    torch.manual_seed(seed)
    return torch.randn(size, device="cuda").to(dtype).contiguous(memory_format=layout).requires_grad_()


def wide(x):
    """The same numbers for the reference, which rounds after every step where the kernels round once."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32)).requires_grad_(x.requires_grad)


def assert_close(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        if a.numel():
            error, scale = (a.double() - e.double()).abs().max().item(), max(1.0, e.abs().max().item())
            assert error <= TOLERANCE[a.dtype] * scale, f"{a.dtype} {tuple(a.shape)}: error {error}, scale {scale}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_upfirdn2d(dtype, layout):
    """Forward, the gradient, and the gradient of the gradient, which are the same op with up and down exchanged."""
    taps = (setup_filter([1, 3, 3, 1]), torch.randn(3, 5), torch.randn(9), torch.randn(120, 130))
    for f in (None, *(f.cuda() for f in taps)):
        for size in SIZES if f is None or f.numel() < 100 else SIZES[1:3]:
            for up, down in ((1, 1), (2, 1), (1, 2), ((3, 2), (1, 3))):
                x = images(size, dtype, layout)

                def both(x, impl, f=f, up=up, down=down):
                    y = upfirdn2d(x, f, up, down, 70, gain=1.5, impl=impl)
                    dy = torch.linspace(-1, 1, y.numel(), device="cuda").reshape(y.shape).to(y.dtype)
                    dy.requires_grad_()
                    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
                    return [y, dx, *torch.autograd.grad(dx, dy, x.detach())]

                actual = both(x, "native")
                assert actual[0].is_contiguous(memory_format=native.layout_of(x))
                assert_close(actual, both(wide(x), "ref"))


LRELU = [(2, 2, 12, 12), (4, 2, 24, 12), (2, 4, 6, 9), (1, 3, 1, 5), (2, 2, (3, 7), 12), (2, 2, 12, (12, 12))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("up, down, n_u, n_d", LRELU, ids=str)
def test_filtered_lrelu(dtype, up, down, n_u, n_d):
    """Forward, the gradients, and the gradient of a gradient."""
    fu, fd = (f / f.abs().sum() for f in (torch.randn(n, device="cuda") for n in (n_u, n_d)))
    for size in SIZES:
        for clamp in (None, 0.5) if dtype in (torch.float32, torch.float64) else (None,):
            x, b = images(size, dtype, torch.contiguous_format), images([size[1]], dtype, torch.contiguous_format, 1)

            def both(x, b, impl, clamp=clamp):
                y = filtered_lrelu(x, fu, fd, b, up, down, (19, 24, 29, 21), clamp=clamp, impl=impl)
                dy = torch.linspace(-1, 1, y.numel(), device="cuda").reshape(y.shape).to(y.dtype).requires_grad_()
                grads = torch.autograd.grad(y, [x, b], dy, create_graph=True)
                return [y, *grads, *(torch.autograd.grad(grads[0].sum(), dy) if y.numel() else [])]

            assert_close(both(x, b, "native"), both(wide(x), wide(b), "ref"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_bias_act(dtype, layout, act):
    """Forward, both gradients, and the gradients of these. A clamp only where no rounding decides about it."""
    for size in SIZES:
        for clamp in (None, 0.9) if dtype in (torch.float32, torch.float64) else (None,):
            x, b = images(size, dtype, layout), images([size[1]], dtype, torch.contiguous_format, seed=1)
            dy = images(size, dtype, layout, seed=2)

            def both(x, b, dy, impl, clamp=clamp):
                y = bias_act(x, b, act=act, clamp=clamp, impl=impl)
                first = torch.autograd.grad(y, [x, b], dy, create_graph=True)
                seeds = [x.detach() * 0.3, b.detach() * 0.7]
                inputs = [dy, x, b]
                second = torch.autograd.grad(first, inputs, seeds, allow_unused=True)
                second = [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, second, strict=True)]
                return [y, *first, *second]

            expected = both(wide(x), wide(b), wide(dy), "ref")
            actual = both(x, b, dy, "native")
            for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
                # gradients of a bias are sums of up to 7000 numbers that were rounded on the way
                scale = math.sqrt(max(1, x.numel() / max(1, x.shape[1]))) if index in (2, 5) else 1
                assert_close([a / scale], [e / scale])


def test_images_that_are_not_aligned():
    """Views that begin in the middle of 16 bytes, with a number of numbers that no pack divides."""
    for dtype in DTYPES:
        x = images([1 + 2 * 3 * 5 * 7], dtype, torch.contiguous_format).detach()[1:].view(2, 3, 5, 7).requires_grad_()
        found = []
        for z, impl in ((x, "native"), (wide(x), "ref")):
            y = bias_act(z, act="lrelu", impl=impl)
            found.append([y, *torch.autograd.grad(y.sum(), z)])
        assert_close(*found)


def test_more_numbers_than_32_bits_count():
    x = torch.ones(2, 1, 1 << 15, (1 << 15) + 8, device="cuda", dtype=torch.bfloat16)
    if torch.cuda.mem_get_info()[0] < 4 * x.numel() * 2:
        pytest.skip("not enough memory of the GPU")
    x[1, 0, -1] = 3
    assert bias_act(x, act="relu", gain=2.0, impl="native")[1, 0, -2:].float().mean(1).tolist() == [2, 6]
    y = upfirdn2d(x, None, padding=(0, 0, 1, -1), gain=2, impl="native")
    assert (y[:, 0, 0] == 0).all() and (y[1, 0, -1] == 2).all() and y.shape == x.shape


def call(x, b, f):
    return bias_act(upfirdn2d(x, f, up=2, padding=(2, 1), impl="native"), b, act="lrelu", impl="native")


@pytest.fixture
def layer(device="cuda"):
    f = setup_filter([1, 3, 3, 1], device)
    x, b = torch.randn(4, 8, 32, 32, device=device), torch.randn(8, device=device)
    return x, b, f, call(x, b, f)


def test_kernels_run_on_the_current_stream(layer):
    """The side stream is kept busy before it makes the input: a kernel on another stream would read what was there."""
    x, b, f, expected = layer
    late, stream = torch.zeros_like(x), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        y = call(late, b, f)
    assert not stream.query()  # nothing waited
    stream.synchronize()
    assert torch.equal(y, expected)


def test_a_thread_that_has_not_used_the_gpu(layer):
    x, b, f, expected = layer
    found = []
    thread = threading.Thread(target=lambda: found.append(call(x, b, f)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], expected)


def test_a_second_gpu(layer):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    x, b, f, expected = layer
    y = call(x.to("cuda:1"), b.to("cuda:1"), f.to("cuda:1"))
    assert y.device.index == 1 and torch.cuda.current_device() == 0
    torch.testing.assert_close(y.cpu(), expected.cpu(), rtol=0, atol=1e-6)


def test_a_cuda_graph(layer):
    """Forward and backward are captured, and replayed with other numbers."""
    x, b, f, _ = layer
    x, b = x.requires_grad_(), b.requires_grad_()
    dy = torch.randn(4, 8, 64, 64, device="cuda")

    def step():
        y = call(x, b, f)
        return [y, *torch.autograd.grad(y, [x, b], dy)]

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    expected = step()
    for a, e in zip(captured, expected, strict=True):
        assert torch.equal(a, e)


def test_a_kernel_that_is_first_called_in_a_capture_is_refused_in_one_line(layer, monkeypatch):
    x, b, f, _ = layer
    monkeypatch.setattr(native, "_kernels", {})
    with (
        pytest.raises(RuntimeError, match=r"upfirdn2d on cuda:0: .*is not loaded yet: call the op before a CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        call(x, b, f)
    monkeypatch.undo()
    torch.cuda.synchronize()


def test_a_filled_cache_needs_no_compiler(layer, monkeypatch):
    x, b, f, expected = layer
    monkeypatch.setattr(native, "_kernels", {})
    monkeypatch.setattr(device_code, "open_compiler", lambda: pytest.fail("a compiler is looked for"))
    assert torch.equal(call(x, b, f), expected)


@pytest.mark.parametrize("way", ["ptx", "nvcc", "refused"])
def test_other_ways_to_an_image(layer, monkeypatch, tmp_path, way):
    """PTX, as for a GPU newer than the compiler; nvcc, where there is one; an image that the driver refuses."""
    x, b, f, expected = layer
    monkeypatch.setattr(native, "_kernels", {})
    monkeypatch.setenv("REFINE_OPS_CACHE", str(tmp_path))
    if way == "ptx":
        monkeypatch.setattr(toolchain, "choose_target", lambda known, capability: "ptx_80")
    if way == "nvcc":
        if toolchain.find_nvcc(torch.version.cuda) is None:
            pytest.skip("no nvcc")
        monkeypatch.setattr(nvrtc, "find", lambda torch_cuda: None)
        device_code.open_compiler.cache_clear()
    try:
        assert torch.equal(call(x, b, f), expected)
        if way == "refused":
            for path in tmp_path.glob("*/*.image"):
                path.unlink()
                keep_as(path, b".version 7.0\n.target sm_80\n.address_size 64\n.visible .entry nothing() { bogus; }")
            native._kernels.clear()
            assert torch.equal(call(x, b, f), expected)
    finally:
        device_code.open_compiler.cache_clear()


def keep_as(path, data):
    """The same kernel and target, with a checksum that fits."""
    from refine.torch_utils.build import op_cache

    path.write_bytes(data)
    stem = path.name.rsplit(".", 2)[0]
    path.rename(path.with_name(f"{stem}.{op_cache.checksum(path)}.image"))
