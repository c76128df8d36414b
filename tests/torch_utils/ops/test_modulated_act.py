"""What follows a modulated convolution, as an op and on a GPU, against its definition in float64."""

import pytest
import torch
import torch.nn.functional as F

from refine.torch_utils.ops.modulated_act import modulated_act

FORMS = ["d noise then beside", "noise", "d", "beside", "d const then", "d noise then both", "then both"]
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


def definition(x, b, noise, d=None, then=None, beside=None, strength=None, both=False):
    column = lambda t: t[:, :, None, None]  # noqa: E731
    x = x if d is None else x * column(d)
    x = x if noise is None else x + noise * strength
    y = F.leaky_relu(x + b[:, None, None], 0.2) * 1.5
    scaled = y if then is None else y * column(then)
    return (y, scaled) if both else scaled if beside is None else scaled + beside


def gradients(function, tensors, noise, both):
    ys = function(**tensors, noise=noise, both=both)
    ys = ys if both else (ys,)
    dys = [torch.linspace(-1, place, y.numel(), device=y.device).reshape(y.shape).to(y) for place, y in enumerate(ys)]
    return [*ys, *torch.autograd.grad(ys, list(tensors.values()), dys)]


def of_op(x, b, noise, d=None, then=None, beside=None, strength=None, both=False):
    if both:
        return torch.ops.refine.modulated_act_both(x, d, noise, strength, b, then, "lrelu", 1.5, -1.0)
    return torch.ops.refine.modulated_act(x, d, noise, strength, b, then, beside, "lrelu", 1.5, -1.0)


def of_function(x, b, noise, d=None, then=None, beside=None, strength=None, both=False):
    return modulated_act(x, d, noise, strength, b, then, beside, "lrelu", gain=1.5, both=both)


def errors(function, device, dtype, layout, form, wide=False):
    """If `wide`, the image beside is of float32, and so is the result."""
    tensors, noise = example(form, device, dtype, layout)
    if wide:
        tensors["beside"] = tensors["beside"].detach().float().requires_grad_()
    doubles = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    mine = gradients(function, tensors, noise, "both" in form)
    theirs = gradients(definition, doubles, None if noise is None else noise.double(), "both" in form)
    assert mine[0].dtype == (torch.float32 if wide else dtype) and mine[0].stride() == tensors["x"].stride()
    return [((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in zip(mine, theirs, strict=True)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("function", [of_op, of_function])
@pytest.mark.parametrize("form", FORMS)
def test_on_a_cpu(form, function, layout):
    """Plain torch, in a graph that was exported for a GPU, too."""
    assert max(errors(function, "cpu", torch.float32, layout, form)) < 1e-5


@pytest.mark.parametrize("function", [of_op, of_function])
def test_a_wide_image_beside_a_narrow_one(function):
    assert max(errors(function, "cpu", torch.bfloat16, torch.channels_last, "beside", wide=True)) < 3e-2


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form):
    tensors, noise = example(form, "cpu", torch.float64, torch.contiguous_format)
    order = [tensors.get(name) for name in ("x", "d")], [tensors.get(name) for name in ("b", "then", "beside")]
    arguments = (*order[0], noise, tensors.get("strength"), *order[1])
    if "both" in form:
        torch.library.opcheck(torch.ops.refine.modulated_act_both.default, (*arguments[:-1], "lrelu", 1.5, -1.0))
    else:
        torch.library.opcheck(torch.ops.refine.modulated_act.default, (*arguments, "lrelu", 1.5, -1.0))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_on_a_gpu(form, dtype, layout):
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert max(errors(of_function, "cuda", dtype, layout, form)) < limit
    if "beside" in form:
        assert max(errors(of_function, "cuda", dtype, layout, form, wide=True)) < limit
