"""torch-fidelity and pytorch-fid, where they are installed: other implementations to hold ours against."""

import importlib
import re
import sys

import numpy as np
import pytest
import torch


def oracle(name: str):
    """The module of that name; skips the test, with the reason, where it cannot be imported."""
    try:
        import_torchvision()
        return importlib.import_module(name)
    except (ImportError, RuntimeError, AttributeError) as error:
        reason = str(error).splitlines()[0][:150]
        pytest.skip(f"{name} cannot be imported ({reason}); golden numbers made with it are compared with instead")


_declared = []  # a torch.library.Library takes its operators away when it is collected


def import_torchvision() -> None:
    """Imports torchvision also beside a build of torch that it was not compiled for, by declaring its operators."""
    missing = _missing_operator()
    while missing and len(_declared) < 50:
        _declared.append(torch.library.Library("torchvision", "FRAGMENT"))
        _declared[-1].define(f"{missing}(Tensor x) -> Tensor")
        for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[module]
        missing = _missing_operator()


def _missing_operator() -> str | None:
    try:
        importlib.import_module("torchvision")
        return None
    except RuntimeError as error:
        found = re.search(r"operator torchvision::(\w+) does not exist", str(error))
        if not found:
            raise
        return found[1]


def random_inception_state() -> dict[str, torch.Tensor]:
    """A state dict in the published layout, the same on every machine, whose features stay of order one."""
    from refine.metrics.inception import InceptionNetwork

    rng = np.random.RandomState(0)
    state = {}
    for name, tensor in InceptionNetwork().state_dict().items():
        if tensor.ndim > 1:
            values = rng.standard_normal(tensor.shape).astype(np.float32) * (2 / tensor[0].numel()) ** 0.5
        elif name.endswith("running_var"):
            values = rng.uniform(0.5, 1.5, tensor.shape).astype(np.float32)
        elif name.endswith("bn.weight"):
            values = np.ones(tensor.shape, np.float32)  # TensorFlow's graph has no such factor
        else:
            values = rng.uniform(-0.1, 0.1, tensor.shape).astype(np.float32)
        state[name] = torch.from_numpy(values) if tensor.ndim else tensor
    return state


def sample_pictures(size: int) -> torch.Tensor:
    """Two RGB images with structure at several scales, uint8 [2, 3, size, size]."""
    rng = np.random.RandomState(size)
    small = torch.from_numpy(rng.uniform(0, 255, [2, 3, 8, 8]))
    smooth = torch.nn.functional.interpolate(small, [size, size], mode="bicubic")
    return (smooth + torch.from_numpy(rng.uniform(-20, 20, smooth.shape))).clamp(0, 255).to(torch.uint8)
