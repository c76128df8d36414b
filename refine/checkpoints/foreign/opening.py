"""Opens a file of another program, whatever its format: told by its bytes, read by one of the modules beside this."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from refine.checkpoints.foreign import raw_pickle, state_dicts, torch_save
from refine.checkpoints.foreign.container import Container
from refine.checkpoints.sniff import Sniffed, sniff


@contextmanager
def open_container(
    path: str | os.PathLike,
    expected: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    class_name: str | None = None,
    found: Sniffed | None = None,
) -> Iterator[Container]:
    """Opens a pickle, a `.pt`, `.npz` or safetensors file of another program, for as long as the block lasts.

    Args:
        path: The file.
        expected: What a refusal says was expected instead. None = every kind of file that can be read.
        kwargs: How its networks are built, for files that do not tell it all: arguments of a state dict, laid over what
            names and shapes tell, or the options of the program that a `.pt` comes from (see `adm`).
        class_name: Of a network in safetensors or `.npz`, see `state_dicts`.
        found: What `sniff(path)` has said.

    Raises:
        ValueError: the file is broken or none of those; one sentence says what it is and what was expected.
    """
    found, expected = found or sniff(path), expected or EXPECTED
    openers: dict[str, Any] = {
        "pickle": raw_pickle.open_pickle,
        "torch": torch_save.open_zip,
        "npz": state_dicts.open_npz,
        "safetensors": state_dicts.open_safetensors,
    }
    if found.kind not in openers:
        raise ValueError(f"{path} is {found.description}; expected {expected}")
    options: dict[str, Any] = {"class_name": class_name} if found.kind in ("npz", "safetensors") else {}
    options |= {} if found.header is None else {"header": found.header}
    with open(path, "rb") as stream:
        container = openers[found.kind](Path(path), stream, expected, kwargs, **options)
        if kwargs is not None and not container.takes_kwargs:
            name = kwargs_option("teacher" if "teacher" in container.members.values() else "generator")
            raise ValueError(
                f"{path} is {container.family}, which tells how its networks are built; expected no {name}"
            )
        yield container


def kwargs_option(kind: str) -> str:
    """The option that says how networks of a kind are built."""
    return "--teacher-kwargs" if kind == "teacher" else "--gan-kwargs"


EXPECTED = (
    "a StyleGAN2, StyleGAN3, StyleGAN-XL, R3GAN, EDM or EDM2 pickle, a state dict of StyleGAN2, StyleGAN3, "
    "StyleGAN-XL, R3GAN or EDM, a legacy TensorFlow pickle of StyleGAN2, a rosinality .pt, a guided-diffusion or "
    "consistency_models .pt, or a file of this toolkit"
)
