"""EDM's networks, layers, sampler and losses against numbers that the original implementation gave."""

import math
from collections.abc import Callable, Iterator
from functools import cache, partial

import pytest
import torch

from refine.networks import edm, edm_layers
from refine.networks.denoiser import Preconditioner
from refine.networks.edm_loss import EDMLoss
from refine.networks.sampler import heun_sampler, karras_sigmas
from tests.golden import noted, read_arrays, read_json
from tests.golden import sample_error as error

NETWORKS = (
    "song_ddpmpp_edm_uncond",
    "song_ddpmpp_edm_cond_mult222",
    "song_ncsnpp_edm_cond",
    "song_ncsnpp_ve_uncond",
    "song_ddpmpp_vp_cond",
    "song_skip_skip_edm",
    "adm_edm_cond_attn",
    "adm_edm_uncond_augment",
    "adm_iddpm_cond",
)
TOLERANCE = 2e-5  # of the largest magnitude in each sample: D scales with sigma

arrays = cache(lambda name: read_arrays(f"edm/{name}"))
facts = cache(lambda name: read_json(f"edm/{name}"))


@cache
def network(name: str) -> Preconditioner:
    net = getattr(edm, facts(name)["precond"])(**facts(name)["init_kwargs"])
    weights = {key[2:]: value.float() for key, value in arrays(name).items() if key.startswith("w:")}
    net.load_state_dict(weights, strict=True)
    return net.eval()


def network_case(name: str, case: str) -> dict[str, float]:
    """Errors of D, of the gradient to the images, and of the norms of all parameters' gradients."""
    net, data = network(name), arrays(name)
    x = data["x"].clone().requires_grad_()
    labels = None if case == "nolabel" else data.get("class_labels")
    D_x = net(x, data["sigma"], labels, augment_labels=data["augment_labels"] if case == "augment" else None)
    parameters = dict(net.named_parameters())
    grad_x, *grads = torch.autograd.grad((D_x * data["cotangent"]).sum(), [x, *parameters.values()], allow_unused=True)
    errors = {"D": error(D_x, data[f"{case}:D"]), "grad_x": error(grad_x, data[f"{case}:grad_x"])}
    golden = facts(name)[f"{case}:param_grad_l2"]
    norms = {n: None if g is None else g.norm().item() for n, g in zip(parameters, grads, strict=True)}
    used = [n for n in golden if golden[n] is not None]
    assert used == [n for n in norms if norms[n] is not None]
    floor = 1e-3 * max(golden[n] for n in used)  # the label layer's gradient is 0 where there is no label
    errors["param_grad_l2"] = noted(max(abs(norms[n] - golden[n]) / max(golden[n], floor) for n in used))
    return errors


def scalar_sigma_case(name: str) -> dict[str, float]:
    net, data = network(name), arrays(name)
    sigma = torch.tensor(facts(name)["scalar_sigma"], dtype=torch.float64)
    D_x = net(data["x"].double(), sigma, data.get("class_labels"))
    assert D_x.dtype == torch.float32
    return {"D": error(D_x, data["scalar_sigma:D"])}


def inner_case(name: str) -> dict[str, float]:
    model, data = network(name).model, arrays(name)
    F_x = model(data["inner:x"], data["inner:noise_labels"], data.get("class_labels"))
    embedding = model.map_noise(data["inner:noise_labels"])
    return {"F": error(F_x, data["inner:F"]), "map_noise": error(embedding, data["inner:map_noise"])}


def conv_case(name: str) -> dict[str, float]:
    data = {key.split(":")[1]: value for key, value in arrays("primitives").items() if key.startswith(f"{name}:")}
    layer = edm_layers.Conv2d(**facts("primitives")[name])
    layer.load_state_dict({key: data[key] for key in ("weight", "bias") if key in data}, strict=False)
    return {"y": error(layer(data["x"]), data["y"])}


def groupnorm_case(name: str) -> dict[str, float]:
    data = {key.split(":")[1]: value for key, value in arrays("primitives").items() if key.startswith(f"{name}:")}
    options = dict(facts("primitives")[name])
    groups = options.pop("num_groups")
    layer = edm_layers.GroupNorm(**options)
    assert layer.num_groups == groups
    layer.load_state_dict({"weight": data["weight"], "bias": data["bias"]})
    return {"y": error(layer(data["x"]), data["y"])}


def block_case(name: str) -> dict[str, float]:
    data, options = arrays("primitives"), dict(facts("primitives")[name])
    heads = options.pop("num_heads_effective")
    block = edm_layers.UNetBlock(**options)
    assert block.num_heads == heads
    prefix = f"{name}:w:"
    block.load_state_dict({key.removeprefix(prefix): value for key, value in data.items() if key.startswith(prefix)})
    return {"y": error(block(data[f"{name}:x"], data[f"{name}:emb"]), data[f"{name}:y"])}


def embedding_case(name: str) -> dict[str, float]:
    data = arrays("primitives")
    labels = data["embed:noise_labels"]
    if name == "fourier":
        layer = edm_layers.FourierEmbedding(2 * len(data["fourier:freqs"]))
        layer.load_state_dict({"freqs": data["fourier:freqs"]})
        return {"y": error(layer(labels[:5]), data["fourier:y"])}
    _, channels, endpoint = name.split("_")
    layer = edm_layers.PositionalEmbedding(int(channels), endpoint=endpoint == "endpoint")
    return {"y": error(layer(labels), data[name])}


def attention_case() -> dict[str, float]:
    """With the identity as values, attention returns its weights."""
    data = {key.removeprefix("attn:"): value for key, value in arrays("primitives").items() if key.startswith("attn:")}
    q, k = data["q"].clone().requires_grad_(), data["k"].clone().requires_grad_()
    v = torch.eye(k.shape[-1]).expand(len(k), 1, -1, -1)
    w = edm_layers.scaled_dot_product(q[:, None], k[:, None], v)[:, 0].mT  # [N queries keys]
    dq, dk = torch.autograd.grad((w * data["dw"]).sum(), [q, k])
    return {"w": error(w, data["w"]), "dq": error(dq, data["dq"]), "dk": error(dk, data["dk"])}


def sampler_case(name: str) -> dict[str, float]:
    case = facts("sampler")[name]
    data = {key.split(":")[1]: value for key, value in arrays("sampler").items() if key.startswith(f"{name}:")}
    net, calls, noises = network(case["config"]), [], iter(data.get("noises", ()))
    handle = net.register_forward_pre_hook(lambda _, args: calls.append(args))
    options = {"solver": "heun", "randn_like": lambda _: next(noises).double(), **case["kwargs"]}
    try:
        final = heun_sampler(net, data["latents"], data.get("class_labels"), num_steps=case["num_steps"], **options)
    finally:
        handle.remove()
    inputs, sigmas, _ = zip(*calls, strict=True)
    assert (len(calls), final.dtype, next(noises, None)) == (case["num_net_calls"], torch.float64, None)
    errors = {"final": error(final, data["final"]), "sigmas": error(torch.stack(sigmas), data["sigmas_of_calls"])}
    if len(data["x_of_calls"]):
        errors["x"] = error(torch.cat(inputs), data["x_of_calls"].flatten(0, 1))
    return errors


def schedule_case(num_steps: int) -> dict[str, float]:
    sigmas = karras_sigmas(num_steps)
    assert sigmas.dtype == torch.float64
    return {"t": error(sigmas, arrays("loss_and_schedules")[f"t_steps_{num_steps}"])}


def loss_case(name: str) -> dict[str, float]:
    case = facts("loss_and_schedules")[name]
    prefix = f"{name}:"
    data = {k.removeprefix(prefix): v for k, v in arrays("loss_and_schedules").items() if k.startswith(prefix)}
    loss_fn = EDMLoss(**case["kwargs"])
    sigma = loss_fn.sigma(data["rnd"])
    loss = loss_fn.at(network(case["config"]), data["images"], sigma, data["eps"], data.get("class_labels"))
    assert loss.shape == data["images"].shape
    return {
        "sigma": error(sigma, data["sigma"]),
        "loss": error(loss, data["loss"]),
        "sum": error(loss.sum([1, 2, 3]), data["loss_sum_per_sample"]),
        "mean": error(loss.mean([1, 2, 3]), data["loss_mean_per_sample"]),
    }


def cases() -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """(name, function that returns the errors of that case) for everything golden of EDM."""
    for name in NETWORKS:
        for case in ("base", "augment", "nolabel"):
            if case in facts(name)["cases"]:
                yield f"{name}-{case}", partial(network_case, name, case)
        yield f"{name}-scalar_sigma", partial(scalar_sigma_case, name)
        yield f"{name}-inner", partial(inner_case, name)
    for name in facts("primitives"):
        kind = {"conv": conv_case, "groupnorm": groupnorm_case, "block": block_case}[name.split("_")[0]]
        yield name, partial(kind, name)
    for name in ("positional_8_endpoint", "positional_8_noendpoint", "positional_32_endpoint",
                 "positional_32_noendpoint", "fourier"):  # fmt: skip
        yield name, partial(embedding_case, name)
    yield "attention", attention_case
    for name in facts("sampler"):
        yield f"sampler-{name}", partial(sampler_case, name)
    for num_steps in (18, 40, 256):
        yield f"schedule-{num_steps}", partial(schedule_case, num_steps)
    for name in facts("loss_and_schedules"):
        yield f"loss-{name}", partial(loss_case, name)


CASES = dict(cases())


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str):
    for quantity, value in CASES[name]().items():
        assert value <= TOLERANCE, quantity


@pytest.mark.parametrize("name", NETWORKS)
def test_names_shapes_and_order(name: str):
    net, golden = network(name), facts(name)
    for kind, tensors in (("parameters", net.named_parameters()), ("buffers", net.named_buffers())):
        assert [(n, list(t.shape)) for n, t in tensors] == list(golden[kind].items())
    assert list(net.state_dict()) == [key[2:] for key in arrays(name) if key.startswith("w:")]
    assert sum(p.numel() for p in net.parameters()) == golden["num_params"]
    assert math.isclose(net.sigma_min, golden["sigma_min"], rel_tol=1e-6)
    assert math.isclose(net.sigma_max, math.inf if golden["sigma_max"] is None else golden["sigma_max"], rel_tol=1e-6)


OFFICIAL = [name for name in read_json("edm/official_shapes") if not name.startswith("edm2")]


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_sizes(name: str):
    golden = facts("official_shapes")[name]
    with torch.device("meta"):
        net = edm.EDMPrecond(**golden["init_kwargs"])
    buffers = dict(net.named_buffers())
    state = [[n, list(t.shape), "buffer" if n in buffers else "param"] for n, t in net.state_dict().items()]
    assert state == golden["state_dict"]
    assert sum(p.numel() for p in net.parameters()) == golden["num_params"]
