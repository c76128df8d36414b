"""Parts of the project on the device that is not there: the CUDA kernels, thread by thread, against the reference;
samplers; what is sent to other processes. And how strict the device is. Prints JSON."""

import contextlib
import functools
import itertools
import json
import os
import pickle

from tests.cuda import fake_device

DEVICE = fake_device.install()

import torch

from refine.metrics.measures.spread import ClassSpread
from refine.metrics.metric import Observed
from refine.metrics.sampling import sample_teacher
from refine.metrics.statistics import FeatureStatistics
from refine.networks.edm import EDMPrecond, iDDPMPrecond
from refine.networks.sampler import heun_sampler
from refine.networks.sampler_settings import SamplerSettings
from refine.torch_utils.distributed import packed
from refine.torch_utils.ops.bias_act import bias_act
from refine.torch_utils.ops.filtered_lrelu import filtered_lrelu
from refine.torch_utils.ops.group_norm_silu import group_norm_silu
from refine.torch_utils.ops.modulated_act import modulated_act
from refine.torch_utils.ops.sum_group_norm_silu import sum_group_norm_silu
from refine.torch_utils.ops.upfirdn2d import setup_filter, upfirdn2d

SHAPES = [(1, 1, 1, 1), (2, 3, 5, 7), (1, 33, 9, 8), (2, 5, 33, 35), (0, 3, 4, 4)]
KINDS = ("native", "ref")
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def error(mine, reference):
    pairs = [(a, b) for a, b in zip(mine, reference, strict=True) if a.numel()]
    return max((((a - b).abs().max() / b.abs().max().clamp_min(1)).item() for a, b in pairs), default=0.0)


def both_orders(function, inputs):
    """Result, gradients, and the gradients of a gradient."""
    y = function(*inputs)
    first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs, allow_unused=True)
    return [y, *first, *(torch.zeros([]) if g is None else g for g in second)]


def bias_act_error(dtype):
    worst = 0.0
    for shape in SHAPES:
        for layout in LAYOUTS:
            x = torch.randn(shape, device=DEVICE, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
            b = torch.randn(shape[1], device=DEVICE, dtype=dtype, requires_grad=True)
            kinds = [("lrelu", None), ("swish", None)]  # rounded to 11 bits, a number may be on either side of a clamp
            for act, clamp in kinds if dtype == torch.float16 else [*kinds, ("lrelu", 0.5)]:
                options = {"act": act, "clamp": clamp}
                found = [both_orders(functools.partial(bias_act, impl=impl, **options), [x, b]) for impl in KINDS]
                worst = max(worst, error(*found))
    return worst


def modulated_act_error(dtype):
    """In float16 the reference computes in float32: it would round after every step."""
    worst = 0.0
    for shape, layout, case in itertools.product(SHAPES, LAYOUTS, range(6)):
        n, c, *size = shape
        both, wide = case == 4, case == 5  # with both results; with a float32 image beside
        given = {"x": torch.randn(shape, device=DEVICE).contiguous(memory_format=layout)}
        given |= {"b": torch.randn(c, device=DEVICE)}
        given |= {"d": torch.randn(n, c, device=DEVICE)} if case != 1 else {}
        given |= {"strength": torch.randn([], device=DEVICE)} if case != 2 else {}
        noise = torch.randn(size if case == 3 else [n, 1, *size], device=DEVICE) if case != 2 else None
        given |= {"then": torch.randn(n, c, device=DEVICE)} if case in (0, 2, 4) else {}
        given |= {"beside": torch.randn_like(given["x"])} if case in (0, 3, 5) else {}
        clamp = 0.5 if dtype == torch.float32 and case in (0, 4) else None
        dys, found = [torch.randn(shape, device=DEVICE).to(dtype) for _ in range(1 + both)], []
        kept = ("strength", "beside") if wide else ("strength",)
        for impl in KINDS:
            narrow = {name: t if name in kept else t.to(dtype) for name, t in given.items()}
            inputs = {name: (t if impl == "native" else t.float()).requires_grad_() for name, t in narrow.items()}
            rest = {"noise": noise, "d": None, "strength": None, **inputs}
            ys = modulated_act(**rest, act="swish" if case == 1 else "lrelu", clamp=clamp, impl=impl, both=both)
            ys, wanted = ys if both else (ys,), list(inputs.values())
            slopes = [dy.to(y.dtype) for dy, y in zip(dys, ys, strict=True)]
            grads = torch.autograd.grad(ys, wanted, slopes, retain_graph=True)
            expected = (torch.float32 if wide else dtype, inputs["x"].stride())
            assert impl == "ref" or all((y.dtype, y.stride()) == expected for y in ys)
            again = torch.autograd.grad(ys, wanted, slopes, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in again), wanted, allow_unused=True)
            second = [torch.zeros([]) if g is None or dtype == torch.float16 else g for g in second]
            found.append([t.double() for t in (*ys, *grads, *second)])
        worst = max(worst, error(*found))
    return worst


def upfirdn2d_error(dtype):
    worst = 0.0
    filters = [setup_filter(taps, device=DEVICE) for taps in ([1, 3, 3, 1], [1, 2, 3, 4, 3, 2, 1])]
    filters.append(setup_filter([1, 3, 3, 1], device=DEVICE, separable=True))
    for shape in SHAPES:
        for layout in LAYOUTS:
            x = torch.randn(shape, device=DEVICE, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
            for f in filters:
                for up, down in ((1, 1), (2, 1), (1, 2)):
                    found = []
                    for impl in KINDS:
                        y = upfirdn2d(x, f, up, down, 4, impl=impl)
                        found.append([y, *torch.autograd.grad(y.square().sum(), x)])
                    worst = max(worst, error(*found))
    return worst


# N, C, H, W, groups: packs of channels and none, one group, and more pixels than a thread keeps
NORMS = [(3, 16, 16, 16, 4), (1, 64, 8, 8, 16), (2, 12, 7, 9, 3), (2, 5, 3, 5, 5), (3, 8, 1, 1, 2), (1, 4, 70, 61, 1)]
FORMS = {"norm": (), "before": ("before",), "scale": ("scale", "shift"), "all": ("before", "scale", "shift")}


def group_norm_silu_error(dtype):
    """Weights in float32 or as the image."""
    worst = 0.0
    for (n, c, h, w, groups), (index, form), layout in itertools.product(NORMS, enumerate(FORMS), LAYOUTS):
        x = torch.randn(n, c, h, w, device=DEVICE).to(dtype).contiguous(memory_format=layout)
        tensors = {"x": x} | {name: torch.randn(n, c, device=DEVICE).to(dtype) for name in FORMS[form]}
        for name in ("weight", "bias"):
            tensors[name] = torch.randn(c, device=DEVICE).to(torch.float32 if index % 2 else dtype)
        dy, found = torch.randn_like(x), []
        for impl, precision in (("native", None), ("ref", torch.float64)):
            inputs = {name: t.detach().to(precision or t.dtype).requires_grad_() for name, t in tensors.items()}
            y = group_norm_silu(**inputs, num_groups=groups, silu=form != "norm", impl=impl)
            found.append([t.double() for t in (y, *torch.autograd.grad(y, inputs.values(), dy.to(y.dtype)))])
        worst = max(worst, error(*found))
    return worst


# The same with channels of x and of what is beside it; images without one or the other term
SUMS = [(3, 16, 0, 16, 16, 4), (1, 32, 32, 8, 8, 16), (2, 7, 5, 7, 9, 3), (2, 8, 16, 5, 3, 6), (1, 3, 1, 70, 61, 1)]


def sum_group_norm_silu_error(dtype):
    """With the gradient of the sum, without it, and with that alone."""
    worst = 0.0
    for (n, c, b, h, w, groups), layout in itertools.product(SUMS, LAYOUTS):
        image = functools.partial(torch.randn, device=DEVICE)
        tensors = {"x": image(n, c, h, w), "weight": image(c + b), "bias": image(c + b)}
        tensors |= {"y": image(n, c, h, w)} if c % 2 == 0 or not b else {}
        tensors |= {"beside": image(n, b, h, w)} if b else {}
        for name, t in tensors.items():
            if t.ndim == 4:
                tensors[name] = t.to(dtype).contiguous(memory_format=layout)
        scale = 0.7 if "y" in tensors else 1.0
        d = [image(n, c + b, h, w).to(dtype).contiguous(memory_format=layout) for _ in range(2)]
        for used in ((0, 1), (1,), (0,)):
            found = []
            for precision in (None, torch.float64):
                inputs = {name: t.detach().to(precision or t.dtype).requires_grad_() for name, t in tensors.items()}
                given = {name: inputs.get(name) for name in ("x", "y", "beside", "weight", "bias")}
                if precision is None:
                    both = sum_group_norm_silu(**given, num_groups=groups, scale=scale, silu=h > 5)
                    assert both[0].grad_fn is both[1].grad_fn  # one op made both
                else:
                    total = inputs["x"] + inputs["y"] if "y" in inputs else inputs["x"]
                    total = torch.cat([total * scale, *([inputs["beside"]] if b else [])], dim=1)
                    rest = (groups, inputs["weight"], inputs["bias"])
                    both = total, group_norm_silu(total, *rest, silu=h > 5, impl="ref")
                wanted = [t for name, t in inputs.items() if used != (0,) or name in ("x", "y", "beside")]
                outputs = [both[index] for index in used]
                grads = torch.autograd.grad(outputs, wanted, [d[index].to(outputs[0].dtype) for index in used])
                found.append([t.double() for t in (*both, *grads)])
            worst = max(worst, error(*found))
    return worst


LRELU = [(2, 2, 12, 12), (4, 2, 24, 12), (2, 4, 6, 9), (1, 3, 1, 5), (2, 2, (3, 7), 12), (2, 2, 12, (12, 12))]


def filtered_lrelu_error(dtype):
    """Result, gradients and the derivative of a gradient with respect to what it is multiplied with."""
    worst = 0.0
    for shape in SHAPES:
        for number, (up, down, *sizes) in enumerate(LRELU):
            fu, fd = (f / f.abs().sum() for f in (torch.randn(n, device=DEVICE) for n in sizes))
            x = torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()
            b = torch.randn(shape[1], device=DEVICE).to(dtype).requires_grad_()
            padding = (19, 23 + number, 31 - 3 * number, 21 + number)
            clamp, found = 0.5 if dtype == torch.float32 and number % 2 else None, []
            for impl in KINDS:
                # the reference rounds after every step, the kernel once
                wide = [t if impl == "native" else t.detach().float().requires_grad_() for t in (x, b)]
                y = filtered_lrelu(wide[0], fu, fd, wide[1], up, down, padding, clamp=clamp, impl=impl)
                dy = torch.linspace(-1, 1, y.numel(), device=DEVICE).reshape(y.shape).to(y.dtype).requires_grad_()
                grads = torch.autograd.grad(y, wide, dy, create_graph=True)
                second = torch.autograd.grad(grads[0].sum(), dy) if y.numel() else []
                found.append([y, *grads, *second])
            worst = max(worst, error(*found))
    return worst


def refused():
    """What a GPU would refuse as well."""
    mine, theirs, found = torch.ones(3, device=DEVICE), torch.ones(3), []
    for wrong in (lambda: mine + theirs, lambda: theirs @ mine):
        with contextlib.suppress(RuntimeError), noting(found):
            wrong()
    return found


@contextlib.contextmanager
def noting(found):
    try:
        yield
    except RuntimeError as caught:
        found.append(str(caught))
        raise


def noticed():
    """That waits and copies are noted at all; and that what is no wait is not."""
    x = torch.ones(3, device=DEVICE)
    actions = {
        "item": lambda: x.sum().item(),
        "if": lambda: bool((x > 0).all()),
        "mask": lambda: x[x > 0],
        "index": lambda: x[torch.tensor([0])],
        "cpu": lambda: x.cpu(),
        "to": lambda: torch.ones(3).to(DEVICE),
        "tensor": lambda: torch.tensor([1.0], device=DEVICE),
        "arithmetic": lambda: (x * 2 + torch.rand(3, device=DEVICE)).relu_().sum(),
    }
    found = {}
    for name, action in actions.items():
        with fake_device.watched() as events:
            action()
        found[name] = len(events)
    return found


# As they are launched; loops over the grid, and threads in any order.
WAYS = {"launched": ("", ""), "shuffled": ("3", "shuffled"), "backwards": ("1", "backwards")}


OPS = {
    "bias_act": bias_act_error,
    "modulated_act": modulated_act_error,
    "upfirdn2d": upfirdn2d_error,
    "group_norm_silu": group_norm_silu_error,
    "sum_group_norm_silu": sum_group_norm_silu_error,
    "filtered_lrelu": filtered_lrelu_error,
}


def errors():
    found = {}
    for way, (grid, order) in WAYS.items():
        os.environ |= {"FAKE_GRID": grid, "FAKE_ORDER": order}
        found[way] = {}
        for (op, function), dtype in itertools.product(OPS.items(), (torch.float32, torch.float16)):
            torch.manual_seed(0)  # the same numbers in all ways, whatever other ops draw
            found[way][f"{op} {str(dtype).removeprefix('torch.')}"] = function(dtype)
    return found


def sampled():
    """Waits and copies of the samplers, {name: events}; of `sample_teacher` for each batch of images."""
    kwargs = {
        "model_type": "SongUNet",
        "model_channels": 8,
        "channel_mult": [1],
        "num_blocks": 1,
        "attn_resolutions": [],
    }
    found = {}
    for family in (EDMPrecond, iDDPMPrecond):
        net = family(8, 1, 3, **kwargs).to(DEVICE).eval()
        noise, labels = torch.randn(2, 1, 8, 8, device=DEVICE), torch.eye(3, device=DEVICE)[:2]
        for churn in (0, 5):
            with fake_device.watched() as events:
                heun_sampler(net, noise, labels, num_steps=3, S_churn=churn, S_min=0.1, S_max=50)
            found[f"{family.__name__} S_churn {churn}"] = list(events)
    with fake_device.watched() as events:
        list(sample_teacher(net, range(4), batch=2, device=DEVICE, settings=SamplerSettings(3)))
    return {**found, "sample_teacher": list(events)}


def sent():
    """Devices of what processes send each other, after it has arrived."""
    images = torch.randint(256, [5, 1, 4, 4], dtype=torch.uint8, device=DEVICE)
    spread, statistics = ClassSpread(), FeatureStatistics()
    spread.update(Observed(images, torch.tensor([0, 1, 1, 2, 2]), None))
    statistics.update(images.flatten(1).float())
    for other in (spread, statistics):  # what has been received is merged into what is on the device, too
        other.merge(pickle.loads(packed(other)))
    arrived = pickle.loads(packed({"spread": spread, "statistics": [statistics], "images": images}))
    tensors = [x for _, *sums in arrived["spread"]._sums.values() for x in sums]
    tensors += [arrived["statistics"][0]._mean, arrived["statistics"][0]._scatter, arrived["images"]]
    same = torch.equal(arrived["images"], images.cpu()) and arrived["spread"].result() == spread.result()
    return {"devices": sorted({x.device.type for x in tensors}), "same": same, "num": arrived["statistics"][0].num}


if __name__ == "__main__":
    torch.manual_seed(0)
    found = {"errors": errors(), "refused": refused(), "noticed": noticed(), "sampled": sampled(), "sent": sent()}
    print(json.dumps(found))
