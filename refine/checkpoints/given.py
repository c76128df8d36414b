"""Networks that a caller in Python gives as they are, where a command line names a file."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import secrets
from typing import Any

import torch

from refine.checkpoints import registry
from refine.checkpoints.sources import custom
from refine.networks.bases import Denoiser, Generator
from refine.networks.own import OwnGenerator
from refine.networks.own_teacher import OwnTeacher


def given_generator(network: torch.nn.Module) -> Generator:
    """A copy of a generator, as `load_generator` would give it; a foreign module in the toolkit's words.

    Raises:
        ValueError: It is no generator, cannot be copied, or could not be saved.
    """
    if isinstance(network, Denoiser):
        raise ValueError(f"found a teacher ({type(network).__name__}); expected a generator")
    G: Any = _copied(network)
    if not isinstance(network, Generator):
        G = custom.wrap_generator(G, name_of(network), f"{type(network).__name__} is")
    elif not isinstance(network, OwnGenerator):
        registry.registry_name(network)
    return G.cpu().float().eval().requires_grad_(False)


def given_teacher(network: torch.nn.Module) -> Denoiser:
    """A copy of a diffusion model, as `load_teacher` would give it; a foreign module in the toolkit's words.

    Raises:
        ValueError: It is no diffusion model, or cannot be copied.
    """
    if isinstance(network, Generator):
        raise ValueError(f"found a generator ({type(network).__name__}); expected a teacher")
    T: Any = _copied(network)
    if not isinstance(network, Denoiser):
        T = custom.wrap_teacher(T, name_of(network), f"{type(network).__name__} is")
    return T.cpu().float().eval().requires_grad_(False)


def makes_latents(network: torch.nn.Module) -> bool:
    """Whether a network is to be taken as a generator, not as a diffusion model."""
    return isinstance(network, Generator) or (not isinstance(network, Denoiser) and hasattr(network, "z_dim"))


def name_of(network: torch.nn.Module) -> str:
    """What stands for a network where a file's name would; no path, and no `module:function`."""
    own = isinstance(network, OwnGenerator | OwnTeacher)
    return f"{type(network.network if own else network).__name__} in memory"


def weights_sha256(network: torch.nn.Module) -> str:
    """Of names, dtypes, shapes and values of the tensors in its state dict."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def recipe_of(network: Denoiser) -> str:
    """What tells, beside its weights, what a network computes; a text that never comes again where nobody can know."""
    if not isinstance(network, OwnTeacher):
        return f"{type(network).__qualname__} {json.dumps(network.init_kwargs, sort_keys=True)}"
    try:
        return inspect.getsource(type(network.network))
    except (OSError, TypeError):  # typed into a session
        return secrets.token_hex(16)


def _copied(network: Any) -> Any:
    if not isinstance(network, torch.nn.Module):
        raise ValueError(f"found {type(network).__name__}; expected a file, a name, or a torch.nn.Module")
    if any(t.is_meta for t in (*network.parameters(), *network.buffers())):
        raise ValueError(f"{type(network).__name__} is on the device meta, without weights; expected one that has them")
    try:
        return copy.deepcopy(network)
    except Exception as error:  # of whatever the user's module holds
        raise ValueError(f"{type(network).__name__} cannot be copied: {' '.join(str(error).split())[:200]}") from error
