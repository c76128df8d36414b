"""`.pt` files of the rosinality/stylegan2-pytorch family: state dicts of the same networks under other names.

Between the two there is only renaming, leading axes of size 1, a factor 4 on the upsampling filters and the learning
rate multiplier folded into the mapping's weights. Here are the names; where in a file they are is for `flat.py`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from refine.checkpoints.foreign.container import FileNetwork, Members, merged
from refine.checkpoints.foreign.flat import (
    Flat,
    channel_kwargs,
    filter_taps,
    generators,
    shape_of,
    without_strangers,
)
from refine.checkpoints.pickles.inert import Refused, shown
from refine.checkpoints.pickles.tensors import TensorRef

LR_MULTIPLIER = 0.01  # of the mapping network in all of their scripts; the file does not tell
FAMILY = "a rosinality-style .pt"
MEAN_OF = 10_000  # z from which a missing mean of w is estimated, which takes a second
ANCHOR = "conv1.conv.modulation.weight"
_MAX_LAYERS = 64  # that a mean of w can be stored for, one by one
_D_ANCHOR = "final_linear.1.weight"
_MEANS = ("latent_avg", "truncation_latent")  # names that the mean of w goes by, beside the network or in it
_MEAN_LABELS = 1 << 24  # numbers in the labels of one batch of them
_MEAN_WEIGHTS = 8 * 513 * 512  # of a mapping up to which there are so many; fewer where more weights would take longer


def members(flat: Flat, given: Mapping[str, Any] | None) -> Members | None:
    """The networks of a file's tensors; None = there is no generator of these names."""
    found: Members = {}
    for name, at in generators(flat, ANCHOR).items():
        describe = functools.partial(describe_generator, flat.under(at), _mean_of_w(flat, at), given)
        found[name] = ("generator", describe)
    discriminators = [name for name in flat.tensors if name == _D_ANCHOR or name.endswith(f".{_D_ANCHOR}")]
    if found and len(discriminators) == 1:
        theirs = flat.under(discriminators[0].removesuffix(_D_ANCHOR))
        found["D"] = ("discriminator", functools.partial(describe_discriminator, theirs))
    return found or None


def _mean_of_w(flat: Flat, prefix: str) -> TensorRef | None:
    """The mean of w that belongs to a generator: in it, beside it, or beside the table that it is in."""
    places, parts = [prefix], prefix.removesuffix(".").split(".")
    places += [".".join(parts[:count]) + "." if count else "" for count in reversed(range(len(parts)))]
    names = (place + name for place in places for name in _MEANS)
    return next((flat.tensors[name] for name in names if name in flat.tensors), None)


# Names. Theirs, with {j} for the index of a block: b8 is block 0.


def _mapped_name(name: str) -> tuple[str, Callable[[TensorRef], TensorRef]] | None:
    """Our name for a tensor of their generator, and our view of it."""
    if match := re.fullmatch(r"style\.(\d{1,3})\.(weight|bias)", name):
        return f"mapping.fc{int(match[1]) - 1}.{match[2]}", _same
    if name == "input.input":
        return "synthesis.b4.const", _drop(1)
    if match := re.fullmatch(r"noises\.noise_(\d{1,2})", name):
        k = int(match[1])
        return f"synthesis.b{2 ** ((k + 5) // 2)}.conv{(k + 1) % 2}.noise_const", _drop(2)
    if match := re.fullmatch(r"(conv1|to_rgb1|convs\.\d{1,2}|to_rgbs\.\d{1,2})\.(.+)", name):
        block, layer = _block(match[1])
        if layer == "torgb":
            leaf = {**_SHARED, "bias": ("bias", _second_axis)}.get(match[2])
            if match[2] == "upsample.kernel":
                return f"synthesis.{block}.resample_filter", _quarter
        else:
            leaf = {**_SHARED, **_CONV}.get(match[2])
            if match[2] == "conv.blur.kernel":
                leaf = ("resample_filter", _quarter)
        return leaf and (f"synthesis.{block}.{layer}.{leaf[0]}", leaf[1])
    return None


def _block(theirs: str) -> tuple[str, str]:
    """'convs.3' -> ('b16', 'conv1')."""
    if theirs in ("conv1", "to_rgb1"):
        return "b4", "conv1" if theirs == "conv1" else "torgb"
    kind, _, index = theirs.partition(".")
    k = int(index)
    return (f"b{2 ** (3 + k // 2)}", f"conv{k % 2}") if kind == "convs" else (f"b{2 ** (3 + k)}", "torgb")


def _same(ref: TensorRef) -> TensorRef:
    return ref


def _drop(count: int) -> Callable[[TensorRef], TensorRef]:
    return lambda ref: ref.without_leading(count)


def _second_axis(ref: TensorRef) -> TensorRef:
    if len(ref.shape) != 4 or ref.numel != ref.shape[1]:
        raise Refused(f"a bias has shape {list(ref.shape)}; expected one number for each channel")
    return replace(ref, shape=ref.shape[1:2], stride=ref.stride[1:2])


def _quarter(ref: TensorRef) -> TensorRef:
    return ref.affine(scale=0.25)


_SHARED = {
    "conv.weight": ("weight", _drop(1)),
    "conv.modulation.weight": ("affine.weight", _same),
    "conv.modulation.bias": ("affine.bias", _same),
}
_CONV = {"noise.weight": ("noise_strength", _drop(1)), "activate.bias": ("bias", _same)}


def channels(resolution: int, multiplier: int) -> int:
    """Channels of their networks."""
    return 512 if resolution <= 32 else 16384 * multiplier // resolution


# Reading.


def describe_generator(
    state: Mapping[str, TensorRef], w_avg: TensorRef | None = None, given: Mapping[str, Any] | None = None
) -> FileNetwork:
    """Arguments, inferred from names and shapes, and tensors of a generator.

    Args:
        state: By their names in the generator.
        w_avg: The mean of w, of any shape that holds one or one for each layer; None = the file has none.
        given: Arguments that are laid over the inferred ones.
    """
    if any(".iwt." in name or ".dwt." in name for name in state) or _shape(state, "to_rgb1.bias")[1:2] == (12,):
        raise Refused("it is a SWAGAN generator (wavelets); expected one of StyleGAN2")
    size = 4 << sum(re.fullmatch(r"to_rgbs\.\d{1,2}\.bias", name) is not None for name in state)
    if not 4 <= size <= 1024:
        raise Refused(f"it has toRGB layers for images of {size}×{size}; expected 4 to 1024")
    notes = [f"the learning rate multiplier of the mapping is taken as {LR_MULTIPLIER}: the file does not tell"]
    tensors: dict[str, TensorRef] = {}
    state = {name: ref for name, ref in state.items() if name not in _MEANS}
    for name, ref in without_strangers(state, notes).items():
        ours = _mapped_name(name)
        if ours is None or ours[0] in tensors:
            raise Refused(f"it has the tensor {shown(name)}, which is not one of StyleGAN2's")
        tensors[ours[0]] = ours[1](ref)
    kwargs = merged(_init_kwargs(state, size, tensors), given or {})
    computed = {f"synthesis.b{4 << i}.conv1.resample_filter" for i in range(9)}
    computed.add("synthesis.b4.resample_filter")
    if not any(name.endswith("resample_filter") for name in tensors):
        computed |= {f"synthesis.b{4 << i}{layer}.resample_filter" for i in range(9) for layer in ("", ".conv0")}
        notes.append("no filter is stored: it is taken as [1, 3, 3, 1]")
    finish = _set_mean_of_w(w_avg, kwargs["w_dim"], tensors, notes)
    if finish is not None:
        computed.add("mapping.w_avg")
    if not any(name.startswith("noises.") for name in state):
        computed |= {f"synthesis.b{4 << i}.conv{k}.noise_const" for i in range(9) for k in (0, 1)}
        notes.append("no constant noise is stored (files before 2020): it is drawn with a fixed seed")
    return FileNetwork("stylegan2.Generator", kwargs, tensors, computed.__contains__, finish, notes=notes)


def _init_kwargs(state: Mapping[str, TensorRef], size: int, tensors: Mapping[str, TensorRef]) -> dict[str, Any]:
    """Arguments of our generator.

    Args:
        state, tensors: The file's, under their names and under ours.
        size: Of the images.
    """
    filters = {ref.shape for name, ref in tensors.items() if name.endswith("resample_filter")}
    if len(filters) > 1:
        raise Refused("its filters have different sizes, which our network cannot express")
    dim = _shape(state, ANCHOR)[1:2]
    if not dim:
        raise Refused("its modulation has no weights")
    layers = sum(re.fullmatch(r"style\.\d{1,3}\.weight", name) is not None for name in state)
    convs = ["conv1", *(f"convs.{2 * i + 1}" for i in range(size.bit_length() - 3))]
    widths = [shape_of(state, f"{conv}.conv.weight", 5)[1] for conv in convs]
    return {
        "z_dim": dim[0],
        "c_dim": 0,
        "w_dim": dim[0],
        "img_resolution": size,
        "img_channels": shape_of(state, "to_rgb1.bias", 4)[1],
        "mapping_kwargs": {"num_layers": layers, "lr_multiplier": LR_MULTIPLIER},
        "synthesis_kwargs": {
            **channel_kwargs(widths),
            "architecture": "skip",
            "resample_filter": filter_taps(filters.pop() if filters else ()),
        },
    }


def _set_mean_of_w(
    w_avg: TensorRef | None, w_dim: int, tensors: dict[str, TensorRef], notes: list[str]
) -> Callable[[Any], None] | None:
    """Puts the mean of w among the tensors; otherwise what sets it once the network is built."""
    if w_avg is None:
        notes.append(f"no mean of w is stored, which truncation needs: it is estimated from {MEAN_OF:,} draws")
        return estimate_w_avg
    if w_avg.numel == w_dim:
        tensors["mapping.w_avg"] = w_avg.squeezed() if w_dim > 1 else replace(w_avg, shape=(1,), stride=(1,))
        return None
    layers = w_avg.numel // max(w_dim, 1)
    if not w_dim or w_avg.shape[-1:] != (w_dim,) or layers > _MAX_LAYERS:
        raise Refused(f"its mean of w has shape {list(w_avg.shape)}; expected {w_dim} numbers, or so many per layer")
    means = w_avg.read().reshape(layers, w_dim)
    if not torch.equal(means, means[:1].expand_as(means)):
        notes.append("its mean of w differs between layers, which ours does not: truncation goes to their mean")
        mean = means.mean(dim=0)
    else:
        mean = means[0]
    return lambda network: network.mapping.w_avg.copy_(mean)


@torch.no_grad()
def estimate_w_avg(network: Any) -> None:
    """Sets w_avg of a generator with StyleGAN2's mapping to the mean of w over a fixed set of random z, and over its
    classes in turn."""
    rng, total = torch.Generator().manual_seed(0), torch.zeros(network.w_dim, dtype=torch.float64)
    weights = sum(p.numel() for p in network.mapping.parameters())
    draws = max(min(MEAN_OF, MEAN_OF * _MEAN_WEIGHTS // max(weights, 1)) // 10, 1)
    draws = max(min(draws, _MEAN_LABELS // max(network.c_dim, 1)), 1)
    for part in range(10):
        z = torch.randn(draws, network.z_dim, generator=rng)
        c = None
        if network.c_dim:
            c = F.one_hot((torch.arange(draws) + part * draws) % network.c_dim, network.c_dim).float()
        total += network.mapping(z, c, skip_w_avg_update=True)[:, 0].double().sum(dim=0)
    network.mapping.w_avg.copy_(total / (10 * draws))


def describe_discriminator(refs: Mapping[str, TensorRef]) -> FileNetwork:
    """Arguments, inferred from names and shapes, and tensors of a discriminator."""
    blocks = sum(re.fullmatch(r"convs\.\d{1,2}\.skip\.1\.weight", name) is not None for name in refs)
    if not 1 <= blocks <= 8:
        raise Refused("it is not a discriminator of StyleGAN2")
    size = 4 << blocks
    width = _shape(refs, "convs.0.0.weight")[0:1]
    multiplier = 2 if size <= 32 or not width else max(width[0] * size // 16384, 1)
    tensors: dict[str, TensorRef] = {}
    for name, ref in refs.items():
        ours = _mapped_discriminator(name, size)
        if ours is None or ours in tensors:
            raise Refused(f"it has the tensor {shown(name)}, which is not one of StyleGAN2's discriminator")
        tensors[ours] = ref
    init_kwargs = {"c_dim": 0, "img_resolution": size, "img_channels": 3, "architecture": "resnet"}
    init_kwargs |= {"channel_base": 16384 * multiplier, "channel_max": 512}
    init_kwargs["epilogue_kwargs"] = {"mbstd_group_size": 4, "mbstd_num_channels": 1}
    return FileNetwork(
        "stylegan2.Discriminator", init_kwargs, tensors, computed=lambda name: name.endswith("resample_filter")
    )


_D_LEAVES = {
    "conv1.0.weight": "conv0.weight",
    "conv1.1.bias": "conv0.bias",
    "conv2.0.kernel": "conv1.resample_filter",
    "conv2.1.weight": "conv1.weight",
    "conv2.2.bias": "conv1.bias",
    "skip.0.kernel": "skip.resample_filter",
    "skip.1.weight": "skip.weight",
}
_D_END = {
    "final_conv.0.weight": "b4.conv.weight",
    "final_conv.1.bias": "b4.conv.bias",
    "final_linear.0.weight": "b4.fc.weight",
    "final_linear.0.bias": "b4.fc.bias",
    "final_linear.1.weight": "b4.out.weight",
    "final_linear.1.bias": "b4.out.bias",
}


def _mapped_discriminator(name: str, size: int) -> str | None:
    if name in ("convs.0.0.weight", "convs.0.1.bias"):
        return f"b{size}.fromrgb.{name.rpartition('.')[2]}"
    if match := re.fullmatch(r"convs\.([1-9]\d?)\.(.+)", name):
        leaf = _D_LEAVES.get(match[2])
        return leaf and f"b{size >> (int(match[1]) - 1)}.{leaf}"
    return _D_END.get(name)


def _shape(refs: Mapping[str, TensorRef], name: str) -> tuple[int, ...]:
    return refs[name].shape if name in refs else ()


# Writing.


def generator_state(network: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A `stylegan2.Generator` under their names, and the mean of w.

    Raises:
        ValueError: it is something that their class cannot express; says what.
    """
    reason = _inexpressible(network)
    if reason:
        raise ValueError(f"this generator cannot be written as {FAMILY}: {reason}")
    ours = network.state_dict()
    size = network.img_resolution
    lr = network.init_kwargs["mapping_kwargs"].get("lr_multiplier", 0.01) / LR_MULTIPLIER
    state: dict[str, torch.Tensor] = {}
    for i in range(network.mapping.num_layers):
        for leaf in ("weight", "bias"):
            state[f"style.{i + 1}.{leaf}"] = ours[f"mapping.fc{i}.{leaf}"] * lr
    state["input.input"] = ours["synthesis.b4.const"][None]
    layers = [("conv1", "b4", "conv1"), ("to_rgb1", "b4", "torgb")]
    levels = range(size.bit_length() - 3)
    layers += [(f"convs.{2 * j + k}", f"b{8 << j}", f"conv{k}") for j in levels for k in (0, 1)]
    layers += [(f"to_rgbs.{j}", f"b{8 << j}", "torgb") for j in levels]
    for theirs, block, layer in layers:
        state.update(_layer_state(theirs, ours, f"synthesis.{block}", layer))
    for k in range(2 * size.bit_length() - 5):
        noise = ours.get(f"synthesis.b{2 ** ((k + 5) // 2)}.conv{(k + 1) % 2}.noise_const")
        side = 2 ** ((k + 5) // 2)
        state[f"noises.noise_{k}"] = (torch.zeros(side, side) if noise is None else noise)[None, None]
    state = {name: value.detach().to("cpu", torch.float32).contiguous().clone() for name, value in state.items()}
    return state, ours["mapping.w_avg"].detach().to("cpu", torch.float32).clone()


def _layer_state(theirs: str, ours: Mapping[str, torch.Tensor], block: str, layer: str) -> dict[str, torch.Tensor]:
    prefix = f"{block}.{layer}"
    state = {
        f"{theirs}.conv.weight": ours[f"{prefix}.weight"][None],
        f"{theirs}.conv.modulation.weight": ours[f"{prefix}.affine.weight"],
        f"{theirs}.conv.modulation.bias": ours[f"{prefix}.affine.bias"],
    }
    if layer == "torgb":
        state[f"{theirs}.bias"] = ours[f"{prefix}.bias"][None, :, None, None]
        if block != "synthesis.b4":
            state[f"{theirs}.upsample.kernel"] = ours[f"{block}.resample_filter"] * 4
        return state
    strength = ours.get(f"{prefix}.noise_strength")
    state[f"{theirs}.noise.weight"] = (torch.zeros([]) if strength is None else strength).reshape(1)
    state[f"{theirs}.activate.bias"] = ours[f"{prefix}.bias"]
    if layer == "conv0":
        state[f"{theirs}.conv.blur.kernel"] = ours[f"{prefix}.resample_filter"] * 4
    return state


def _inexpressible(network: Any) -> str | None:
    kwargs = getattr(network, "init_kwargs", {})
    mapping, synthesis = kwargs.get("mapping_kwargs", {}), kwargs.get("synthesis_kwargs", {})
    size, dim = network.img_resolution, network.w_dim
    checks = [
        (network.c_dim == 0, f"it has {network.c_dim} classes, and theirs have none"),
        (network.z_dim == dim, f"z has {network.z_dim} and w {dim} numbers, and theirs have equally many"),
        (mapping.get("layer_features") in (None, dim), "the mapping's inner layers have another width than w"),
        (mapping.get("activation", "lrelu") == "lrelu", "its mapping has another activation than leaky ReLU"),
        (mapping.get("w_avg_beta", 0.995) is not None, "it tracks no mean of w"),
        (synthesis.get("architecture", "skip") == "skip", f"its architecture is {synthesis.get('architecture')}"),
        (synthesis.get("activation", "lrelu") == "lrelu", "it has another activation than leaky ReLU"),
        (synthesis.get("kernel_size", 3) == 3, "its kernels are not 3×3"),
        (size <= 1024, "it is larger than 1024×1024"),
        (tuple(network.synthesis.b4.resample_filter.shape) == (4, 4), "its filters are not 4×4"),
    ]
    return next((reason for fine, reason in checks if not fine), None)


def peculiarities(network: Any) -> list[str]:
    """What their class must be changed for, as forks do, to take the state of this generator."""
    size = network.img_resolution
    widths = {r: getattr(network.synthesis, f"b{r}").conv1.weight.shape[0] for r in network.synthesis.block_resolutions}
    found = []
    if network.img_channels != 3:
        found.append(f"it has {network.img_channels} image channels: theirs has 3 unless it is changed")
    if not any(all(width == channels(r, m) for r, width in widths.items()) for m in (1, 2)):
        found.append(
            f"its numbers of channels are not those of their networks of {size}×{size}, of no channel_multiplier"
        )
    return found


def discriminator_state(network: Any) -> dict[str, torch.Tensor]:
    """A `stylegan2.Discriminator` under their names; it must be one that theirs can express."""
    ours, size = network.state_dict(), network.img_resolution
    state = {}
    names = ["convs.0.0.weight", "convs.0.1.bias"]
    names += [f"convs.{i}.{leaf}" for i in range(1, size.bit_length() - 2) for leaf in _D_LEAVES]
    for name in [*names, *_D_END]:
        mapped = _mapped_discriminator(name, size)
        assert mapped is not None, f"{name} is one of their names"
        state[name] = ours[mapped].detach().to("cpu", torch.float32).contiguous().clone()
    return state


def inexpressible_discriminator(network: Any) -> str | None:
    """Why their class cannot be this `stylegan2.Discriminator`, or None."""
    kwargs, size = network.init_kwargs, network.img_resolution
    epilogue, block = kwargs["epilogue_kwargs"], kwargs["block_kwargs"]
    sizes = [4 << i for i in range(size.bit_length() - 2)]
    base, most = kwargs["channel_base"], kwargs["channel_max"]
    checks = [
        (kwargs["architecture"] == "resnet", f"its architecture is {kwargs['architecture']}, and theirs resnet"),
        (kwargs["c_dim"] == 0, f"it has {kwargs['c_dim']} classes, and theirs have none"),
        (kwargs["img_channels"] == 3, f"it has {kwargs['img_channels']} image channels, and theirs have 3"),
        (kwargs["conv_clamp"] is None, f"it clamps activations at {kwargs['conv_clamp']}, and theirs do not"),
        (epilogue.get("mbstd_group_size", 4) == 4, "its minibatch standard deviation is not over groups of 4"),
        (epilogue.get("mbstd_num_channels", 1) == 1, "its minibatch standard deviation has not one channel"),
        (block.get("activation", "lrelu") == "lrelu", "it has another activation than leaky ReLU"),
        (size >= 8, "it has no blocks"),
        (
            any(all(min(base // r, most) == channels(r, m) for r in sizes) for m in (1, 2)),
            "its numbers of channels are not those of theirs",
        ),
        (tuple(network.b4.conv.resample_filter.shape) == (4, 4), "its filters are not 4×4"),
    ]
    return next((reason for fine, reason in checks if not fine), None)
