"""Networks of the user's own: `package.module:function`, or `package.module:function@FILE` for one that was saved.

The function takes no arguments and gives a module: a generator (docs/generators.md), or a diffusion model
(docs/teachers.md), which is not saved and has no FILE. It is code that the user names and that Python imports like any
other; or the caller in Python gives the module itself (`refine.checkpoints.given`). A file can never do that: what is
written of such a network are its tensors and, for people, its reference; reading it takes the reference from the user
again.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from refine.checkpoints import native
from refine.networks.own import OwnGenerator
from refine.networks.own_teacher import DENOISED, OwnTeacher

_REFERENCE = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)(?:@(.+))?")
_SIZES = ("z_dim", "c_dim", "img_resolution", "img_channels")
_OPTIONS = {"noise_mode": "const", "truncation_psi": 1.0}  # of a call, with values that every generator knows


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


def load_custom(reference: Reference) -> OwnGenerator:
    """The generator that the user's function makes, with the weights of the file where one is named.

    Returns:
        As `load_generator`; what the function made is in its attribute `network`.

    Raises:
        ValueError: The function cannot be found or fails, its result is not a generator, or the file does not fit it.
    """
    G = wrap_generator(_call(reference), str(reference), f"{reference}() gave")
    if reference.file is not None:
        _load_weights(G, reference, reference.file)
    return G.cpu().float().eval().requires_grad_(False)


def load_custom_teacher(reference: Reference) -> OwnTeacher:
    """The diffusion model that the user's function makes.

    Returns:
        As `load_teacher`; what the function made is in its attribute `network`.

    Raises:
        ValueError: The function cannot be found or fails, or its result is not a diffusion model.
    """
    if reference.file is not None:
        raise ValueError(f"{reference}@{reference.file}: a teacher of your own code has no file; expected {reference}")
    return wrap_teacher(_call(reference), str(reference), f"{reference}() gave")


def wrap_generator(network: Any, reference: str, gave: str) -> OwnGenerator:
    """The user's network as one of ours, if it fulfils the protocol: four sizes, and what one call gives.

    Args:
        network: It is put on the CPU, in eval mode and float32.
        reference: What files call it.
        gave: Subject and verb of messages.

    Raises:
        ValueError: It is not a generator.
    """
    if not isinstance(network, torch.nn.Module):
        raise ValueError(f"{gave} {type(network).__name__}; expected a torch.nn.Module")
    with _their_code(f"{gave} a generator that cannot be used"):
        sizes: dict[str, Any] = {name: getattr(network, name, None) for name in _SIZES}
        copy.deepcopy(network.cpu().float().eval().requires_grad_(True))  # as training will
        network.state_dict()
    for name, value in sizes.items():
        if type(value) is not int or value < (name != "c_dim"):
            raise ValueError(f"{gave} a generator whose {name} is {value!r}; expected a whole number")
    failed = f"{gave} a generator that fails at G(z, c)"
    with _their_code(failed), torch.random.fork_rng(devices=[]), torch.enable_grad():
        z = torch.randn(2, sizes["z_dim"])
        c = torch.eye(sizes["c_dim"])[:1].repeat(2, 1) if sizes["c_dim"] else None
        options = _accepted_options(network, z, c)
        images = network(z, c, **options)
    _check_images(images, (2, sizes["img_channels"], *[sizes["img_resolution"]] * 2), f"{gave} a generator", "latents")
    return OwnGenerator(network, reference, options)


def wrap_teacher(network: Any, reference: str, gave: str) -> OwnTeacher:
    """The user's diffusion model as one of ours; arguments and faults as for `wrap_generator`."""
    if not isinstance(network, torch.nn.Module):
        raise ValueError(f"{gave} {type(network).__name__}; expected a torch.nn.Module")
    with _their_code(f"{gave} a teacher that cannot be used"):
        names = {"img_resolution": 1, "img_channels": 1, "label_dim": 0}
        sizes = {name: getattr(network, name, 0 if name == "label_dim" else None) for name in names}
        lacks = getattr(network, "predicts", DENOISED) != DENOISED and not hasattr(network, "alphas_cumprod")
    for name, least in names.items():
        value = sizes[name]
        if type(value) is not int or value < least:
            raise ValueError(f"{gave} a teacher whose {name} is {value!r}; expected a whole number")
    if lacks:
        raise ValueError(f"{gave} a teacher that predicts {network.predicts!r} without alphas_cumprod")
    with _their_code(f"{gave} a teacher that cannot be used"):  # of impossible attributes, or that cannot be copied
        network.cpu().float().eval().requires_grad_(True)
        teacher = copy.deepcopy(OwnTeacher(network, reference)).eval()  # as the auxiliary network will be
    shape = (2, teacher.img_channels, teacher.img_resolution, teacher.img_resolution)
    sigma = min(max(1.0, teacher.sigma_min), teacher.sigma_max)
    asked = "D(x, sigma, class_labels)" if teacher.predicts == DENOISED else "network(x, t, class_labels)"
    failed = f"{gave} a teacher that fails at {asked}"
    with _their_code(failed), torch.random.fork_rng(devices=[]), torch.enable_grad():
        c = torch.eye(teacher.label_dim)[:1].repeat(2, 1) if teacher.label_dim else None
        images = teacher(torch.randn(shape), torch.full([2], sigma), c)
    _check_images(images, shape, f"{gave} a teacher", "images")
    return teacher.requires_grad_(False)


def source_of(reference: Reference) -> Path:
    """The file that the weights come from, or else the source file of the function's module."""
    if reference.file is not None:
        return Path(reference.file)
    return Path(getattr(_module(reference), "__file__", None) or reference.module)


def _module(reference: Reference) -> Any:
    here = os.getcwd()
    sys.path.append(here)  # behind everything else: a module beside the user, who may have called us from anywhere
    try:
        with _their_code(f"{reference.module} cannot be imported"):
            return importlib.import_module(reference.module)
    finally:
        sys.path.remove(here)


def _call(reference: Reference) -> Any:
    function = getattr(_module(reference), reference.function, None)
    if not callable(function):
        raise ValueError(f"{reference.module} has no function {reference.function}")
    with _their_code(f"{reference}() failed"):
        return function()


def _accepted_options(network: torch.nn.Module, z: torch.Tensor, c: torch.Tensor | None) -> dict[str, Any]:
    """Those of `_OPTIONS` that a call takes: what its forward names, and what goes through its `**kwargs`."""
    try:
        parameters = inspect.signature(network.forward).parameters
    except (TypeError, ValueError):  # not written in Python
        return {}
    named = {name: value for name, value in _OPTIONS.items() if name in parameters}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        try:
            network(z, c, **_OPTIONS)
        except (TypeError, ValueError, RuntimeError):  # passed on to something that does not know them
            return named
        return _OPTIONS
    return named


def _check_images(images: Any, expected: tuple[int, ...], what: str, given: str) -> None:
    """Raises ValueError unless what a network gave for two inputs is finite floats of that shape with a gradient."""
    if not isinstance(images, torch.Tensor) or tuple(images.shape) != expected or not images.is_floating_point():
        found = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(f"{what} of {found} for two {given}; expected floats {expected}")
    if images.layout != torch.strided or images.device.type != "cpu":
        raise ValueError(f"{what} of {images.layout} on {images.device}; expected plain tensors where the weights are")
    if not images.isfinite().all():
        raise ValueError(f"{what} whose images hold NaN or infinity")
    if not images.requires_grad:
        raise ValueError(f"{what} whose images do not depend differentiably on its parameters")


def _load_weights(G: OwnGenerator, reference: Reference, path: str) -> None:
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


@contextlib.contextmanager
def _their_code(failed: str) -> Iterator[None]:
    """Around what may do anything: whatever it raises, also to end the program, becomes the ValueError `failed: …`."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ValueError(f"{failed}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
