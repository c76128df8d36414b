"""Generators of the user's own: `package.module:function`, or `package.module:function@FILE` for one that was saved.

The function takes no arguments and gives a module that fulfils the Generator protocol (docs/generators.md). It is code
that the user names and that Python imports like any other. A file can never do that: what is written of such a network
are its tensors and, for people, its reference; reading it takes the reference from the user again.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from refine.checkpoints import native

_REFERENCE = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)(?:@(.+))?")
_SIZES = ("z_dim", "c_dim", "img_resolution", "img_channels")


@dataclass(frozen=True)
class Reference:
    """`module:function` with an optional file; see `parse`."""

    module: str
    function: str
    file: str | None

    def __str__(self) -> str:
        return f"{self.module}:{self.function}"


def parse(text: str | os.PathLike) -> Reference | None:
    """The reference that `text` is, or None if it is a file, a URL or a name."""
    match = _REFERENCE.fullmatch(text) if isinstance(text, str) and not os.path.exists(text) else None
    return Reference(*match.groups()) if match else None


def load_custom(reference: Reference) -> torch.nn.Module:
    """The generator that the user's function makes, with the weights of the file where one is named.

    Returns:
        As `load_generator`. The attribute `custom_reference` is `module:function`, under which it can be saved.

    Raises:
        ValueError: The function cannot be found or fails, its result is no generator, or the file does not fit it.
    """
    G = _checked(_call(reference), reference)
    G.custom_reference = str(reference)
    if reference.file is not None:
        _load_weights(G, reference)
    return G.cpu().float().eval().requires_grad_(False)


def source_of(reference: Reference) -> Path:
    """The file that the weights come from, or else the source file of the function's module."""
    if reference.file is not None:
        return Path(reference.file)
    return Path(_module(reference).__file__ or reference.module)


def _module(reference: Reference) -> Any:
    here = os.getcwd()
    sys.path.append(here)  # behind everything else: a module beside the user, who may have called us from anywhere
    try:
        return importlib.import_module(reference.module)
    except Exception as error:  # whatever the user's module does
        raise ValueError(f"{reference.module} cannot be imported: {_line(error)}") from error
    finally:
        sys.path.remove(here)


def _call(reference: Reference) -> Any:
    function = getattr(_module(reference), reference.function, None)
    if not callable(function):
        raise ValueError(f"{reference.module} has no function {reference.function}")
    try:
        return function()
    except Exception as error:  # whatever the user's function does
        raise ValueError(f"{reference}() failed: {_line(error)}") from error


def _checked(G: Any, reference: Reference) -> torch.nn.Module:
    """G, if it fulfils the protocol: sizes, the shape of its images, and a gradient for its parameters."""
    if not isinstance(G, torch.nn.Module):
        raise ValueError(f"{reference}() gave {type(G).__name__}; expected a torch.nn.Module")
    for name in _SIZES:
        value = getattr(G, name, None)
        if type(value) is not int or value < (name != "c_dim"):
            raise ValueError(f"{reference}() gave a generator whose {name} is {value!r}; expected a whole number")
    expected = (2, G.img_channels, G.img_resolution, G.img_resolution)
    c = torch.eye(G.c_dim)[:1].repeat(2, 1) if G.c_dim else None
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            images = G.cpu().float().eval().requires_grad_(True)(torch.randn(2, G.z_dim), c)
    except Exception as error:  # whatever the user's network does
        raise ValueError(f"{reference}() gave a generator that fails at G(z, c): {_line(error)}") from error
    if not isinstance(images, torch.Tensor) or tuple(images.shape) != expected or not images.is_floating_point():
        found = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(f"{reference}() gave a generator of {found} for two latents; expected floats {expected}")
    if not images.requires_grad:
        raise ValueError(f"{reference}() gave a generator whose images do not depend differentiably on its parameters")
    return G


def _load_weights(G: torch.nn.Module, reference: Reference) -> None:
    path = reference.file
    metadata = native.read_metadata(path)
    networks = metadata.get("networks", {})
    mine = [name for name, entry in networks.items() if entry["class"] == native.CUSTOM]
    if not mine:
        raise ValueError(f"{path} holds no generator of your own code; expected one of {reference}")
    name = "G_ema" if "G_ema" in mine else mine[0]
    written = str(networks[name]["init_kwargs"].get("reference"))[:100]
    if written != str(reference):
        raise ValueError(f"{path} was made with {written}; expected {reference}")
    native.load_into(path, name, G)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
