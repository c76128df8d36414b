"""ADM's networks against numbers that guided-diffusion and consistency_models gave."""

from collections.abc import Callable, Iterator
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F

from refine.checkpoints import load_teacher
from refine.networks import adm
from refine.networks.denoiser import Preconditioner
from tests.golden import ROOT, array_error, noted, read_arrays, read_json, unlikeness
from tests.golden import sample_error as error

TOLERANCE, GRAD_TOLERANCE = 2e-5, 1e-4  # of the largest magnitude: of each sample, of each array
ADM = ("uncond_linear_legacy", "cond_cosine_new", "cond_linear_numheads", "uncond_plain_convs")
CM = ("cm_edm_cond", "cm_edm_uncond_noscale")
FILES = ("tiny_zip_shared_storage", "tiny_legacy_consistency")

facts = cache(lambda name: read_json(f"adm/{name}"))
arrays = cache(lambda name: read_arrays(f"adm/{name}{'.expected' if name in FILES else ''}"))


def init_kwargs(name: str) -> dict:
    """Our constructor's arguments from those of the original."""
    golden, unet = facts(name), facts(name)["unet_kwargs"]
    is_cm, factors = golden["family"] == "consistency_models", unet["attention_resolutions"]
    kwargs = {
        "img_resolution": unet["image_size"],
        "img_channels": unet["in_channels"],
        "label_dim": unet.get("num_classes", 0),
        "model_channels": unet["model_channels"],
        "widths": [unet["model_channels"] * mult for mult in unet["channel_mult"]],
        "num_blocks": unet["num_res_blocks"],
        "attention_levels": [level for level in range(len(unet["channel_mult"])) if 2**level in factors],
        "learn_sigma": unet["out_channels"] == 6,
        "num_heads": unet.get("num_heads", 1),
        "num_head_channels": unet.get("num_head_channels"),
        "qkv_order": "thirds" if is_cm or unet["use_new_attention_order"] else "heads",
        "qkv_axes": 2 if is_cm else 1,
        "scale_shift": unet["use_scale_shift_norm"],
        "residual_resampling": unet["resblock_updown"],
        "dropout": unet.get("dropout", 0.0),
    }
    return kwargs if is_cm else {**kwargs, "noise_schedule": golden["schedule"], "num_steps": golden["num_steps"]}


def kwargs_for_people(name: str) -> dict:
    """What has to be said of a file beside its shapes, in guided-diffusion's words."""
    unet = facts(name)["unet_kwargs"]
    known = {"image_size", "num_heads", "num_head_channels"}
    said = {key: value for key, value in unet.items() if key in known}
    if facts(name)["family"] == "consistency_models":
        return said
    said["use_new_attention_order"] = unet.get("use_new_attention_order", False)
    return {**said, "noise_schedule": facts(name)["schedule"], "diffusion_steps": facts(name)["num_steps"]}


@cache
def network(name: str) -> Preconditioner:
    if name in FILES:
        return load_teacher(ROOT / "adm" / f"{name}.pt", kwargs_for_people(name))
    net = (adm.CMPrecond if name in CM else adm.ADMPrecond)(**init_kwargs(name))
    weights = {f"model.{key[2:]}": value.float() for key, value in arrays(name).items() if key.startswith("w:")}
    net.load_state_dict(weights, strict=True)
    return net.eval()


def labels_of(name: str, indices: torch.Tensor | None) -> torch.Tensor | None:
    return None if indices is None else F.one_hot(indices.long(), network(name).label_dim).float()


def inner_case(name: str) -> dict[str, float]:
    """The raw U-Net with all its output channels, at whole and at fractional times."""
    net, data = network(name), arrays(name)
    classes = None if "inner:y" not in data else data["inner:y"].long()
    errors = {}
    for t in ("", "_fractional"):
        if f"inner:t{t}" in data:
            F_x = net.model(data["inner:x"], data[f"inner:t{t}"].float(), classes)
            errors[f"F{t}"] = error(F_x, data[f"inner:out{t}"])
    return errors


def denoiser_case(name: str) -> dict[str, float]:
    """D at noise levels of the table, its gradient to the images, and those of the parameters."""
    net, data, golden = network(name), arrays(name), facts(name)
    x, labels = data["x"].clone().requires_grad_(), labels_of(name, data.get("y"))
    net.requires_grad_(True)
    D_x = net(x, data["sigma"], labels)
    parameters = dict(net.model.named_parameters())
    grad_x, *grads = torch.autograd.grad((D_x * data["cotangent"]).sum(), [x, *parameters.values()])
    found = dict(zip(parameters, grads, strict=True))
    errors = {"D": error(D_x, data["D"]), "grad_x": array_error(grad_x, data["grad:x"])}
    grads = [array_error(grad, data[f"grad:{key}"]) for key, grad in found.items() if f"grad:{key}" in data]
    errors["grad"] = max(grads, default=0.0)
    norms = golden.get("param_grad_l2", {})
    assert not norms or list(norms) == list(found)
    if norms:
        difference = max(abs(found[key].norm().item() - norms[key]) for key in norms)
        errors["param_grad_l2"] = noted(difference / max(norms.values()))
    if "eps_pred" in data:
        _, _, c_in, t = net.scalings(data["sigma"].float()[:, None, None, None])
        assert torch.equal(t.flatten(), data["t"].float())
        eps = net.model(c_in * data["x"], t.flatten(), data["y"].long() if "y" in data else None)[:, :3]
        errors["eps"] = error(eps, data["eps_pred"])
    if "F" in data:
        _, _, c_in, c_noise = net.scalings(data["sigma"][:, None, None, None])
        errors["c_noise"] = array_error(c_noise.flatten(), data["c_noise"])
        F_x = net.model(c_in * data["x"], c_noise.flatten(), data["y"].long() if "y" in data else None)
        errors["F"] = error(F_x, data["F"])
    return errors


def between_case(name: str) -> dict[str, float]:
    """Between the levels of the table and outside of them, where the time is interpolated."""
    net, data = network(name), arrays(name)
    sigma, x = data["between:sigma"], data["between:x"]
    labels = labels_of(name, data.get("y"))
    errors = {"t": (net.time(sigma) - data["between:t_loglinear"]).abs().max().item() / 1000}
    errors["D"] = error(net(x, sigma, labels), data["between:D_loglinear"])
    assert unlikeness(net(x, sigma, labels), data["between:D_nearest"]) > 1e-3  # the other convention is told apart
    return errors


def cases() -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    for name in (*ADM, *CM, *FILES):
        yield f"{name}/inner", partial(inner_case, name)
        yield f"{name}/D", partial(denoiser_case, name)
        if "between:x" in arrays(name):
            yield f"{name}/between", partial(between_case, name)


CASES = dict(cases())


@pytest.mark.parametrize("case", CASES)
def test_golden(case):
    for name, value in CASES[case]().items():
        assert value <= (GRAD_TOLERANCE if name in ("grad", "grad_x") else TOLERANCE), name
