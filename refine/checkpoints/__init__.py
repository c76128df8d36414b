"""File → network: `load_generator` and `load_teacher` take the files people have, give back modules ready for use.

    sniff.py      what a file is, told by its bytes
    index.py      short names of shipped and of published files, and their checksums
    fetch.py      URL → file in the cache
    native.py     the toolkit's own files, read and written
    registry.py   which classes a native file may name, and how they are built safely

    containers.py files of other programs, opened: which networks are in them, the way in and out
    pickles.py    tells raw pickles apart, for the readers of pickles:
      nvidia_pickle.py  StyleGAN2-ADA and EDM     tf_pickle.py  legacy TensorFlow
    pt_files.py         what torch.save writes;  rosinality.py  the names in such files
    state_dicts.py      one network in plain safetensors or .npz
    restricted_unpickler.py  reads a pickle without running it;  inert.py, tensors.py  its values, not read yet
    export.py     gives networks back in the formats they came in

    describe.py   what is in a file, for `python -m refine inspect`

Importing this package does not import torch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from refine.checkpoints.index import resolve
from refine.checkpoints.sniff import sniff

if TYPE_CHECKING:
    import torch

__all__ = ["load_generator", "load_teacher", "resolve", "sniff"]


def load_generator(path_or_name: str | os.PathLike) -> torch.nn.Module:
    """The generator of a file: `G_ema` where there is one, otherwise the only generator in it.

    Args:
        path_or_name: A file, a URL, or a name of `pretrained/index.toml`.

    Returns:
        Module in eval mode, float32, on the CPU, without gradients: `G(z, c, truncation_psi=1.0, noise_mode='const')` →
        images, float32 [N, img_channels, img_resolution, img_resolution], about [-1, 1]. Attributes z_dim, c_dim,
        w_dim, num_ws, img_resolution, img_channels, mapping, synthesis.

    Raises:
        ValueError: the file cannot be used; one sentence says what it is and what was expected.
    """
    return _load(path_or_name, kind="generator", preferred="G_ema")


def load_teacher(path_or_name: str | os.PathLike) -> torch.nn.Module:
    """The diffusion model of a file: `ema` where there is one, otherwise the only denoiser in it.

    Args:
        path_or_name: A file, a URL, or a name of `pretrained/index.toml`.

    Returns:
        Module in eval mode, float32, on the CPU, without gradients: `T(x, sigma, class_labels=None)` → denoised images
        D_x, float32, shaped like x. Attributes sigma_min, sigma_max, label_dim, img_resolution, img_channels.

    Raises:
        ValueError: the file cannot be used; one sentence says what it is and what was expected.
    """
    return _load(path_or_name, kind="teacher", preferred="ema")


def _load(path_or_name: str | os.PathLike, kind: str, preferred: str) -> torch.nn.Module:
    path = resolve(path_or_name, kind)
    found = sniff(path)
    if found.kind not in _READERS:
        raise ValueError(f"{path} is {found.description}; expected {_EXPECTED[kind]}")
    network = _READERS[found.kind](path, kind, preferred)
    return network.cpu().float().eval().requires_grad_(False)


def _read_native(path: Path, kind: str, preferred: str) -> torch.nn.Module:
    from refine.checkpoints import describe, native, registry

    metadata = native.read_metadata(path)
    if metadata["kind"] != "networks":
        raise ValueError(f"{path} is a native file of {metadata['kind']}; expected a {kind}")
    networks = metadata["networks"]
    # aux: the auxiliary network of a run follows that run's student, so it is no teacher
    of_kind = [name for name, entry in networks.items() if registry.kind_of(entry["class"]) == kind and name != "aux"]
    if not of_kind:
        raise ValueError(f"{path} holds {describe.contents(networks)}; expected a {kind}")
    if preferred not in of_kind and len(of_kind) > 1:
        raise ValueError(
            f"{path} holds the {kind}s {', '.join(of_kind)}; expected one of them to be called {preferred}"
        )
    name = preferred if preferred in of_kind else of_kind[0]
    return native.load_networks(path, [name])[name]


def _read_container(path: Path, kind: str, preferred: str) -> torch.nn.Module:
    from refine.checkpoints.containers import open_container

    with open_container(path, expected=_EXPECTED[kind]) as container:
        of_kind = [name for name, found in container.members.items() if found == kind]
        if not of_kind:
            raise ValueError(f"{path} is {container.family}; expected {_EXPECTED[kind]}")
        return container.load(preferred if preferred in of_kind else of_kind[0])


_EXPECTED = {
    "generator": "a generator: a StyleGAN2 pickle (PyTorch or TensorFlow), a rosinality .pt, or a file of this toolkit",
    "teacher": "a teacher: an EDM pickle, or a file of this toolkit",
}

# Kind of file, as `sniff` tells it -> reader(path, kind of network, its preferred name) -> network.
_READERS = {"native": _read_native}
_READERS |= dict.fromkeys(("pickle", "torch", "npz", "safetensors"), _read_container)
