"""Gives networks back in the formats that other tools read.

write_like        the file that a network came from, with refined weights in it and every other byte as it was
write_rosinality  a `.pt` with state dicts under the names of rosinality/stylegan2-pytorch
write_plain       safetensors with the network's own tensor names
write_native      this toolkit's own format
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any

import torch

from refine import dnnlib
from refine.checkpoints import native, registry
from refine.checkpoints.foreign import rosinality, state_dicts
from refine.checkpoints.foreign.container import write_back
from refine.checkpoints.foreign.opening import open_container
from refine.checkpoints.sniff import sniff
from refine.checkpoints.writers import patient


def can_write_like(source_path: str | os.PathLike) -> str | None:
    """Why networks cannot be put back into a file of the form of `source_path`; None = they can.

    Only looks at what kind of file it is.
    """
    found = sniff(source_path)
    if found.kind != "pickle":
        return f"{source_path} is {found.description}; only other programs' pickles are written back"
    with open_container(source_path) as container:
        return None if container.writable else f"{source_path} is {container.family}, which is not written back"


def members(source_path: str | os.PathLike) -> list[str]:
    """Names of the networks in a pickle that can be written back, such as G, D and G_ema."""
    with open_container(source_path) as container:
        return list(container.members)


def write_like(
    source_path: str | os.PathLike,
    out_path: str | os.PathLike,
    networks: Mapping[str, torch.nn.Module],
    notes: list[str] | None = None,
) -> list[str]:
    """Writes the pickle `source_path` again, with `networks` in place of those of the same names.

    Tensors keep place, dtype and memory layout of the original; globals, protocol, embedded source text (unread), other
    networks and everything else are the original's bytes. So whatever loads the original loads the result.

    Args:
        source_path: A StyleGAN2, R3GAN, EDM or legacy TensorFlow pickle.
        out_path: The file to write or replace, whole or not at all.
        networks: `G_ema`, `G`, `D` or `ema` → network that computes the same as the original's with equal weights.
        notes: Gets a line for what a person should know about the result.

    Returns:
        Names of the networks of the file that were left as they were.

    Raises:
        ValueError: there is no such container, or a network does not fit into it.
        OSError: the file cannot be written.
    """
    reason = can_write_like(source_path)
    if reason:
        raise ValueError(reason)
    with open_container(source_path) as container:
        said = write_back(container, out_path, networks)
        if notes is not None:
            notes += said
        return [name for name in container.members if name not in networks]


def write_native(
    out_path: str | os.PathLike, networks: Mapping[str, torch.nn.Module], source: str | os.PathLike
) -> None:
    """Writes this toolkit's own format; its provenance names the file that the networks came from, with its sha256."""
    provenance = {"converted_from": {"file": os.path.basename(source), "sha256": dnnlib.sha256_of_file(source)}}
    native.save_networks(out_path, networks, provenance=provenance)


def write_plain(out_path: str | os.PathLike, networks: Mapping[str, torch.nn.Module]) -> None:
    """Writes one network, `G_ema` or `ema` where there are several, as plain safetensors.

    Raises:
        ValueError: there is not one network to choose.
    """
    name = next((name for name in ("G_ema", "ema", *networks) if name in networks), None)
    if name is None:
        raise ValueError("there is no network to write")
    state_dicts.save_plain(out_path, networks[name])


def write_rosinality(out_path: str | os.PathLike, networks: Mapping[str, torch.nn.Module]) -> list[str]:
    """Writes generators (and the discriminator, if theirs can express it) under rosinality's names.

    Returns:
        What was lost or left out, in sentences.

    Raises:
        ValueError: a generator is something that their class cannot express, or there is none.
        OSError: the file cannot be written.
    """
    table: dict[str, Any] = {}
    notes = []
    for ours, theirs in (("G_ema", "g_ema"), ("G", "g")):
        if ours in networks:
            table[theirs], w_avg = rosinality.generator_state(networks[ours])
            table.setdefault("latent_avg", w_avg)  # of G_ema where there is one
            generator: Any = networks[ours]
            notes += [f"{ours}: {text}" for text in rosinality.peculiarities(generator)]
            clamp = generator.init_kwargs["synthesis_kwargs"].get("conv_clamp")
            if clamp is not None:
                notes.append(f"{ours} clamps activations at {clamp}, theirs does not: the same unless that is reached")
    if not table:
        raise ValueError(f"there is no generator to write as {rosinality.FAMILY}")
    if "D" in networks:
        reason = rosinality.inexpressible_discriminator(networks["D"])
        if reason is None:
            table["d"] = rosinality.discriminator_state(networks["D"])
        else:
            notes.append(f"D was left out: {reason}")
    with dnnlib.replaced_atomically(out_path) as temporary, patient(temporary) as file:
        torch.save(table, file)
    return notes


def load_all(path: str | os.PathLike, kwargs: Mapping[str, Any] | None = None) -> Mapping[str, torch.nn.Module]:
    """Every generator, discriminator and teacher of a file that can be read, by name; not the aux network of a run.

    Args:
        path: The file.
        kwargs: How its networks are built, where the file does not tell it all.

    Raises:
        ValueError: there is none.
    """
    if sniff(path).kind == "native":
        table = native.read_metadata(path).get("networks", {})
        kinds = ("generator", "discriminator", "teacher")
        names = [name for name in table if registry.kind_of(table[name]["class"]) in kinds and name != "aux"]
        if not names:
            raise ValueError(f"{path} is a native file without a generator or teacher; expected one with")
        return native.load_networks(path, names)
    networks: dict[str, torch.nn.Module] = {}
    with open_container(path, kwargs=kwargs) as container:
        for name, kind in container.members.items():
            if kind != "discriminator":
                networks[name] = container.load(name).float()
        if "D" in container.members:  # it may be of a kind that is not known here, and that is not a reason to fail
            with contextlib.suppress(ValueError):
                networks["D"] = container.load("D")
    return networks
