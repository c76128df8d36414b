"""sum_group_norm_silu: a sum, what is beside it, and the norm of both. Its kernels run in tests/cuda, or on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from refine.torch_utils.ops.sum_group_norm_silu import sum_group_norm_silu

GROUPS = 4


def example(terms: str, device="cpu", dtype=torch.float64, layout=torch.contiguous_format):
    torch.manual_seed(0)
    channels = {"x": 16, "y": 16, "beside": 8}
    images = {
        name: torch.randn(3, c, 8, 8, device=device).to(dtype).contiguous(memory_format=layout).requires_grad_()
        if name in ("x", *terms.split())
        else None
        for name, c in channels.items()
    }
    total = 24 if images["beside"] is not None else 16
    weights = {name: torch.randn(total, device=device, requires_grad=True) for name in ("weight", "bias")}
    return images, weights


def definition(images, weights, scale):
    x, y, beside = (None if t is None else t.double() for t in images.values())
    total = (x if y is None else x + y) * scale
    total = total if beside is None else torch.cat([total, beside], dim=1)
    return total, F.silu(F.group_norm(total, GROUPS, *(t.double() for t in weights.values()), 1e-5))


@pytest.mark.parametrize("terms", ["", "y", "beside", "y beside"])
def test_plain_torch_is_the_definition(terms):
    images, weights = example(terms)
    scale = 0.5 if "y" in terms.split() else 1.0
    expected = definition(images, weights, scale)
    given = {name: None if t is None else t * 1 for name, t in images.items()}  # x may be written to
    found = sum_group_norm_silu(**given, num_groups=GROUPS, **weights, scale=scale)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("terms", ["y", "beside", "y beside"])
def test_an_op_as_torch_wants_it(terms):
    """As a graph that was exported for a GPU calls it on a CPU: schema, shapes, derivatives of both orders."""
    images, weights = example(terms)
    weights = {name: t.detach().double().requires_grad_() for name, t in weights.items()}
    scale = 0.5 if "y" in terms.split() else 1.0
    arguments = (*images.values(), *weights.values(), GROUPS, 1e-5, True, scale)
    op = torch.ops.refine.sum_group_norm_silu
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    inputs = [t for t in (*images.values(), *weights.values()) if t is not None]
    for choose in (lambda both: both[:1], lambda both: both[1:], lambda both: both):
        results = []
        for both in (op(*arguments)[:2], definition(images, weights, scale)):
            y = sum(((k + 1) * t).sin().sum() for k, t in enumerate(choose(both)))
            first = torch.autograd.grad(y, inputs, create_graph=True, materialize_grads=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs, materialize_grads=True)
            results.append([*first, *second])
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("terms", ["y", "beside", "y beside"])
def test_on_a_gpu(terms, dtype, layout):
    images, weights = example(terms, "cuda", dtype, layout)
    scale = 0.5 if "y" in terms.split() else 1.0
    found, expected = (
        sum_group_norm_silu(**images, num_groups=GROUPS, **weights, scale=scale),
        definition(images, weights, scale),
    )
    assert found[0].grad_fn is found[1].grad_fn  # one op made both
    inputs = [t for t in (*images.values(), *weights.values()) if t is not None]
    d = [torch.randn_like(t) for t in found]
    mine = [*found, *torch.autograd.grad(found, inputs, d)]
    theirs = [*expected, *torch.autograd.grad(expected, inputs, [t.double() for t in d])]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip(mine, theirs, strict=True):
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max().clamp(min=1)
