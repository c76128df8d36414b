"""What follows a modulated convolution, as an op and on a GPU, against its definition in float64."""

import pytest
import torch
import torch.nn.functional as F

from refine.torch_utils.ops.modulated_act import modulated_act

FORMS = ["d noise then beside", "noise", "d", "beside", "d const then"]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def example(form, device, dtype, layout):
    n, c, h, w = size = (3, 40, 9, 7)
    tensors = {"x": torch.randn(size), "b": torch.randn(c)}
    tensors |= {name: torch.randn(n, c) for name in ("d", "then") if name in form.split()}
    tensors |= {"beside": torch.randn(size)} if "beside" in form else {}
    tensors = {name: t.to(device, dtype) for name, t in tensors.items()}
    for name in {"x", "beside"} & set(tensors):
        tensors[name] = tensors[name].contiguous(memory_format=layout)
    noise = torch.randn(h, w) if "const" in form else torch.randn(n, 1, h, w) if "noise" in form else None
    if noise is not None:
        tensors["strength"] = torch.randn([], device=device)
        noise = noise.to(device)
    return {name: t.requires_grad_() for name, t in tensors.items()}, noise


def definition(x, b, noise, d=None, then=None, beside=None, strength=None):
    column = lambda t: t[:, :, None, None]  # noqa: E731
    x = x if d is None else x * column(d)
    x = x if noise is None else x + noise * strength
    y = F.leaky_relu(x + b[:, None, None], 0.2) * 1.5
    y = y if then is None else y * column(then)
    return y if beside is None else y + beside


def gradients(function, tensors, noise):
    y = function(**tensors, noise=noise)
    dy = torch.linspace(-1, 1, y.numel(), device=y.device).reshape(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, list(tensors.values()), dy)]


def of_op(x, b, noise, d=None, then=None, beside=None, strength=None):
    return torch.ops.refine.modulated_act(x, d, noise, strength, b, then, beside, "lrelu", 1.5, -1.0)


def of_function(x, b, noise, d=None, then=None, beside=None, strength=None):
    return modulated_act(x, d, noise, strength, b, then, beside, "lrelu", gain=1.5)


def errors(function, device, dtype, layout, form):
    tensors, noise = example(form, device, dtype, layout)
    doubles = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    mine = gradients(function, tensors, noise)
    theirs = gradients(definition, doubles, None if noise is None else noise.double())
    assert mine[0].dtype == dtype and mine[0].stride() == tensors["x"].stride()
    return [((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in zip(mine, theirs, strict=True)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("function", [of_op, of_function])
@pytest.mark.parametrize("form", FORMS)
def test_on_a_cpu(form, function, layout):
    """Plain torch, in a graph that was exported for a GPU, too."""
    assert max(errors(function, "cpu", torch.float32, layout, form)) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form):
    tensors, noise = example(form, "cpu", torch.float64, torch.contiguous_format)
    order = [tensors.get(name) for name in ("x", "d")], [tensors.get(name) for name in ("b", "then", "beside")]
    arguments = (*order[0], noise, tensors.get("strength"), *order[1], "lrelu", 1.5, -1.0)
    torch.library.opcheck(torch.ops.refine.modulated_act.default, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_on_a_gpu(form, dtype, layout):
    assert max(errors(of_function, "cuda", dtype, layout, form)) < (1e-5 if dtype == torch.float32 else 2e-2)
