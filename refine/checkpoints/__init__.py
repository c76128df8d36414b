"""File → network: `load_generator` and `load_teacher` take the files people have, give back modules ready for use.

    sniff.py      what a file is, told by its bytes
    native.py     the toolkit's own files, read and written
    reading.py    bytes of a file into memory, by a few threads
    registry.py   which classes a native file may name, and how they are built safely
    describe.py   what is in a file, for `python -m refine inspect`
    export.py     gives networks back in the formats they came in

    deploy.py     generators as graphs for other runtimes, ONNX and torch.export

    sources/      where files come from: index.py, short names of shipped and of published files and their checksums;
                  one_step.py, denoisers of files that are used once;
                  fetch.py, a URL to a file in the cache; custom.py, generators that a function of the user's own makes
    foreign/      files of other programs: opening.py finds the reader, container.py is what all of them give;
                  contents.py asks each family for its networks: nvidia.py (StyleGAN2-ADA, EDM, EDM2), stylegan3.py,
                  tensorflow.py, adm.py (guided-diffusion, consistency_models), r3gan.py, and by the names of tensors
                  (flat.py) stylegan2_names.py, rosinality.py and edm_names.py;
                  torch_save.py, raw_pickle.py, state_dicts.py and diffusers_folder.py are the forms of files
    pickles/      machine.py reads a pickle without running it; inert.py and tensors.py are what it reads

Importing this package does not import torch.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refine.checkpoints.sniff import Sniffed, sniff
from refine.checkpoints.sources import one_step
from refine.checkpoints.sources.index import resolve

if TYPE_CHECKING:
    from refine.checkpoints.sources.custom import Reference
    from refine.networks.bases import Denoiser, Generator

__all__ = ["NetworkInfo", "load_generator", "load_teacher", "peek", "resolve", "sniff", "source_file"]


@dataclass(frozen=True)
class NetworkInfo:
    """What a file says of one network, before it is built.

    Attributes:
        kind: 'generator' or 'teacher'.
        img_resolution, img_channels: Size of its images.
        classes: Number of classes, 0 = unconditional; also as `c_dim` and `label_dim`, the names that generators and
            teachers have for it, so that this can stand in for either.
        class_name: Key of `refine.checkpoints.registry.NETWORK_CLASSES`; empty for code of the user's own.
    """

    kind: str
    img_resolution: int
    img_channels: int
    classes: int
    class_name: str = ""

    @property
    def c_dim(self) -> int:
        return self.classes

    @property
    def label_dim(self) -> int:
        return self.classes


def load_generator(
    path_or_name: str | os.PathLike, kwargs: Mapping[str, Any] | None = None, sigma_init: float | None = None
) -> Generator:
    """The generator of a file: `G_ema` where there is one, otherwise the only generator in it.

    Args:
        path_or_name: A file, a URL, a name of `pretrained/index.toml`, or `package.module:function` of the user's own
            (docs/generators.md), which is then imported and called. `one-step:` before it means the denoiser of the
            file, used once (docs/generators.md).
        kwargs: Constructor arguments of a state dict that are not in it (docs/files.md).
        sigma_init: Noise level of a `one-step:`; None = 2.5.

    Returns:
        Module in eval mode, float32, on the CPU, without gradients: `G(z, c)` → images, see
        `refine.networks.bases.Generator`. A StyleGAN2 is called as `G(z, c, truncation_psi=1.0, noise_mode='const')`,
        too, a StyleGAN3 or StyleGAN-XL without a `noise_mode`; they have the attributes w_dim, num_ws, mapping and
        synthesis.

    Raises:
        ValueError: the file cannot be used; one sentence says what it is and what was expected.
    """
    if reference := _reference(path_or_name):
        from refine.checkpoints.sources import custom

        if kwargs is not None:
            raise ValueError(f"{reference} is code of your own, which builds its network; expected no --gan-kwargs")
        return custom.load_custom(reference)
    if (file := one_step.file_of(path_or_name)) is not None:
        return _one_step(file, kwargs, one_step.SIGMA_INIT if sigma_init is None else sigma_init)
    return _load(path_or_name, "generator", kwargs)


def _one_step(file: str, kwargs: Mapping[str, Any] | None, sigma_init: float) -> Generator:
    from refine.networks.one_step import OneStepGenerator

    with _as_generator():
        teacher = load_teacher(file, kwargs)
    G = OneStepGenerator.around(teacher, sigma_init).float()
    G.notes = teacher.notes
    return G


@contextmanager
def _as_generator() -> Iterator[None]:
    """Refusals of a denoiser that was asked for as a generator name the options that are given for one."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("--teacher-kwargs", "--gan-kwargs")) from None


def load_teacher(path_or_name: str | os.PathLike, kwargs: Mapping[str, Any] | None = None) -> Denoiser:
    """The diffusion model of a file: `ema` where there is one, otherwise the only denoiser in it.

    Args:
        path_or_name: A file, a URL, a name of `pretrained/index.toml`, or `package.module:function` of the user's own
            (docs/teachers.md), which is then imported and called.
        kwargs: How its network is built, where the file does not tell it all, see `foreign.opening.open_container`.

    Returns:
        Module in eval mode, on the CPU, without gradients: `T(x, sigma, class_labels=None)` → denoised images D_x, see
        `refine.networks.bases.Denoiser`. Float32; weights of EDM2 are as its files have them, float16, which every
        call widens.

    Raises:
        ValueError: the file cannot be used; one sentence says what it is and what was expected.
    """
    if reference := _reference(path_or_name):
        from refine.checkpoints.sources import custom

        if kwargs is not None:
            raise ValueError(f"{reference} is code of your own, which builds its network; expected no --teacher-kwargs")
        return custom.load_custom_teacher(reference)
    return _load(path_or_name, "teacher", kwargs)


def peek(path_or_name: str | os.PathLike, kind: str, kwargs: Mapping[str, Any] | None = None) -> NetworkInfo:
    """What `load_generator` or `load_teacher` would give, told from the file's header or pickle: nothing is built.

    Args:
        path_or_name: A file, a URL, or a name of `pretrained/index.toml`.
        kind: 'generator' or 'teacher'.
        kwargs: See `load_teacher`.

    Raises:
        ValueError: as `load_generator` and `load_teacher`, except for faults that only show once weights are read.
    """
    if _reference(path_or_name):  # only calling it can tell
        G: Any = load_generator(path_or_name, kwargs) if kind == "generator" else load_teacher(path_or_name, kwargs)
        classes = G.c_dim if kind == "generator" else G.label_dim
        return NetworkInfo(kind, G.img_resolution, G.img_channels, classes)
    if kind == "generator" and (file := one_step.file_of(path_or_name)) is not None:
        with _as_generator():
            return replace(peek(file, "teacher", kwargs), kind="generator")
    path = resolve(path_or_name, kind)
    class_name, init_kwargs = _reader(path, kind)(path, kind, kwargs, build=False)
    size: dict[str, Any] = {name: init_kwargs.get(name) for name in ("img_resolution", "img_channels")}
    size["classes"] = init_kwargs.get("c_dim" if kind == "generator" else "label_dim", 0)
    for name, value in size.items():
        if type(value) is not int:
            raise ValueError(f"{path}: its {name} is {str(value)[:40]!r}; expected a whole number")
    return NetworkInfo(kind, **size, class_name=class_name)


def source_file(path_or_name: str | os.PathLike, kind: str | None = None) -> Path:
    """The file that a network comes from; for `package.module:function` without a file, the module's source."""
    if reference := _reference(path_or_name):
        from refine.checkpoints.sources import custom

        return custom.source_of(reference)
    if (file := one_step.file_of(path_or_name)) is not None:
        return resolve(file, "teacher" if kind == "generator" else kind)
    return resolve(path_or_name, kind)


def _reference(path_or_name: str | os.PathLike) -> Reference | None:
    if ":" not in str(path_or_name) or one_step.file_of(path_or_name) is not None:  # without importing torch
        return None
    from refine.checkpoints.sources import custom

    return custom.parse(path_or_name)


def _load(path_or_name: str | os.PathLike, kind: str, kwargs: Mapping[str, Any] | None = None) -> Any:
    path = resolve(path_or_name, kind)
    network = _reader(path, kind)(path, kind, kwargs, build=True)
    return network.eval().requires_grad_(False)


def _reader(path: Path, kind: str) -> Any:
    """reader(path, kind, kwargs, build) of such files: gives the network, or where it is not to be built, its class's
    name and init kwargs."""
    found = sniff(path)
    if found.kind == "native":
        return functools.partial(_read_native, found)
    if found.kind in ("pickle", "torch", "npz", "safetensors"):
        return functools.partial(_read_container, found)
    raise ValueError(f"{path} is {found.description}; expected {_EXPECTED[kind]}")


def _read_native(found: Sniffed, path: Path, kind: str, kwargs: Mapping[str, Any] | None, build: bool) -> Any:
    from refine.checkpoints import native, registry
    from refine.checkpoints.foreign.opening import kwargs_option

    if kwargs is not None:
        option = kwargs_option(kind)
        raise ValueError(f"{path} is a native file, which tells how its networks are built; expected no {option}")
    metadata = native.read_metadata(path, found)
    if metadata["kind"] != "networks":
        raise ValueError(f"{path} is a native file of {metadata['kind']}; expected a {kind}")
    networks, preferred = metadata["networks"], _PREFERRED[kind]
    # aux: the auxiliary network of a run follows that run's student, so it is not a teacher
    of_kind = [name for name, entry in networks.items() if registry.kind_of(entry["class"]) == kind and name != "aux"]
    if not of_kind:
        from refine.checkpoints import describe

        raise ValueError(f"{path} holds {describe.contents(networks)}; expected a {kind}")
    if preferred not in of_kind and len(of_kind) > 1:
        raise ValueError(
            f"{path} holds the {kind}s {', '.join(of_kind)}; expected one of them to be called {preferred}"
        )
    name = preferred if preferred in of_kind else of_kind[0]
    entry = networks[name]
    return native.load_networks(path, [name], found)[name] if build else (entry["class"], entry["init_kwargs"])


def _read_container(found: Sniffed, path: Path, kind: str, kwargs: Mapping[str, Any] | None, build: bool) -> Any:
    from refine.checkpoints.foreign.opening import open_container

    with open_container(path, _EXPECTED[kind], kwargs, found=found) as container:
        of_kind = [name for name, its_kind in container.members.items() if its_kind == kind]
        if not of_kind:
            hint = "; a denoiser that is used once is one-step:FILE" if "teacher" in container.members.values() else ""
            raise ValueError(f"{path} is {container.family}; expected {_EXPECTED[kind]}{hint}")
        name = _PREFERRED[kind] if _PREFERRED[kind] in of_kind else of_kind[0]
        if build:
            return container.load(name)
        network = container.network(name)
        return network.class_name, network.init_kwargs


_PREFERRED = {"generator": "G_ema", "teacher": "ema"}
_EXPECTED = {
    "generator": "a generator: a StyleGAN2 pickle (PyTorch or TensorFlow) or state dict, a StyleGAN3 or "
    "StyleGAN-XL pickle or state dict, an R3GAN file, a rosinality .pt, or a file of this toolkit",
    "teacher": "a teacher: an EDM or EDM2 pickle, an EDM state dict, a .pt of guided-diffusion or consistency_models, "
    "a UNet2DModel of diffusers, or a file of this toolkit",
}
