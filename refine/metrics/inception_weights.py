"""Weights of the Inception-2015-12-05 network in the forms people have, brought to the names of our own network.

A file's tensors are recognised, in this order, by the names of the published state dict; by the names of TensorFlow's
graph (`mixed_1/tower/conv`); or, where a file has names of its own, by their order and shapes: 94 convolutions, each
beside its batch normalisation, then the classifier. Shapes are always checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from refine.metrics.inception import CLASSES, FEATURES, Conv, InceptionNetwork

_LEAVES = {  # last word of a tensor's name → its role in batch normalisation
    "beta": "bias",
    "bias": "bias",
    "gamma": "weight",
    "weight": "weight",
    "mean": "running_mean",
    "moving_mean": "running_mean",
    "running_mean": "running_mean",
    "var": "running_var",
    "variance": "running_var",
    "moving_variance": "running_var",
    "running_var": "running_var",
}
_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
_BLOCKS = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")  # TensorFlow: mixed, mixed_1 … mixed_10


def load_inception(tensors: Iterable[tuple[str, torch.Tensor]]) -> InceptionNetwork:
    """The network with a file's weights, in eval mode, without gradients.

    Args:
        tensors: (name, tensor) in the file's order; others may be among them.

    Raises:
        ValueError: They are not those of this network.
    """
    network = InceptionNetwork().eval().requires_grad_(False)
    found = dict(tensors)
    state = _published(network, found) or _by_unit(network, found)
    for name, value in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        if name not in state:
            raise ValueError(f"it has no {name} of the Inception-2015-12-05 network")
        if state[name].shape != value.shape:
            shapes = f"{list(state[name].shape)} instead of {list(value.shape)}"
            raise ValueError(f"its {name} has shape {shapes} as in the Inception-2015-12-05 network")
        if not state[name].isfinite().all():
            raise ValueError(f"its {name} holds NaN or infinity")
    network.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False)
    return network


def units(network: InceptionNetwork) -> dict[str, Conv]:
    """The 94 convolutions with their batch normalisation, in the order of the graph."""
    return {name: module for name, module in network.named_modules() if isinstance(module, Conv)}


def tensorflow_name(unit: str) -> str:
    """The name of a convolution in TensorFlow's graph: Mixed_5c.branch3x3dbl_2 → mixed_1/tower_1/conv_1."""

    def numbered(word: str, index: int) -> str:
        return word if index == 0 else f"{word}_{index}"

    if unit in _STEM:
        return numbered("conv", _STEM.index(unit))
    block, branch = unit.removeprefix("Mixed_").split(".")
    mixed = numbered("mixed", _BLOCKS.index(block))
    branch, _, step = branch.removeprefix("branch").lstrip("_").partition("_")
    if branch == "1x1" or (block == "6a" and branch == "3x3"):
        return f"{mixed}/conv"
    first = block in ("6a", "7a")  # blocks that shrink have no tower before this one
    tower = {"pool": 2, "3x3dbl": 0 if first else 1, "7x7dbl": 1, "7x7x3": 1}.get(branch, 0)
    last = step[-1:] if step[-1:] in ("a", "b") else ""
    conv = f"mixed/{numbered('conv', 'ab'.index(last))}" if last else numbered("conv", int(step or 1) - 1)
    return f"{mixed}/{numbered('tower', tower)}/{conv}"


def _published(network: InceptionNetwork, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """The tensors if they have the published names, below a common prefix or not."""
    key = "Mixed_5b.branch1x1.conv.weight"
    prefix = next((name.removesuffix(key) for name in found if name.endswith(key)), None)
    if prefix is None:
        return None
    return {name: found[prefix + name] for name in network.state_dict() if prefix + name in found}


def _by_unit(network: InceptionNetwork, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = units(network)
    groups = _groups(found)
    keyed = {_normal(name): group for name, group in groups.items()}
    common = next((key.removesuffix("mixed_1_tower_conv") for key in keyed if key.endswith("mixed_1_tower_conv")), None)
    if common is not None:
        pairs = [(name, keyed.get(common + _normal(tensorflow_name(name)))) for name in names]
    else:
        whole = [group for group in groups.values() if {"conv", "running_mean", "running_var"} <= group.keys()]
        if len(whole) != len(names):
            raise ValueError(
                f"it has {len(whole)} convolutions with batch normalisation, "
                f"expected the {len(names)} of the Inception-2015-12-05 network"
            )
        pairs = list(zip(names, whole, strict=True))
    state: dict[str, torch.Tensor] = {}
    for name, group in pairs:
        for role, tensor in (group or {}).items():
            state[f"{name}.conv.weight" if role == "conv" else f"{name}.bn.{role}"] = tensor
        state.setdefault(f"{name}.bn.weight", torch.ones(names[name].bn.num_features))  # the graph has no gamma
    return state | _classifier(found)


def _groups(found: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Convolution → its tensors by role: those that lie in one module, or in two that are neighbours below one."""
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in found.items():
        parent, _, leaf = name.replace("/", ".").rpartition(".")
        if parent.rpartition(".")[2] in ("bn", "batchnorm", "batch_norm", "batch_normalization", "conv2d") or (
            parent.rpartition(".")[2] == "conv" and f"{parent.rpartition('.')[0]}.bn.running_mean" in found
        ):
            parent = parent.rpartition(".")[0]
        if tensor.ndim == 4:
            groups.setdefault(parent, {})["conv"] = tensor
        elif tensor.ndim == 1 and leaf in _LEAVES and len(tensor) != CLASSES:
            groups.setdefault(parent, {})[_LEAVES[leaf]] = tensor
    return groups


def _classifier(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state = {}
    for tensor in found.values():
        if tensor.shape in ((CLASSES, FEATURES), (FEATURES, CLASSES)):
            state["fc.weight"] = tensor if len(tensor) == CLASSES else tensor.T.contiguous()
        elif tensor.shape == (CLASSES,):
            state["fc.bias"] = tensor
    return state


def _normal(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
