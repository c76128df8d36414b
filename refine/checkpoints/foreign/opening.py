"""Opens a file of another program, whatever its format: told by its bytes, read by one of the modules beside this."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from refine.checkpoints.foreign import raw_pickle, state_dicts, torch_save
from refine.checkpoints.foreign.container import Container
from refine.checkpoints.sniff import sniff


@contextmanager
def open_container(path: str | os.PathLike, expected: str | None = None, **options: Any) -> Iterator[Container]:
    """Opens a pickle, a `.pt`, `.npz` or safetensors file of another program, for as long as the block lasts.

    Args:
        path: The file.
        expected: What a refusal says was expected instead. None = every kind of file that can be read.
        **options: `init_kwargs` of a state dict that tells nothing or not all; `class_name` of one in safetensors or
            `.npz`, see `state_dicts`.

    Raises:
        ValueError: the file is broken or none of those; one sentence says what it is and what was expected.
    """
    found, expected = sniff(path), expected or EXPECTED
    openers = {
        "pickle": raw_pickle.open_pickle,
        "torch": torch_save.open_zip,
        "npz": state_dicts.open_npz,
        "safetensors": state_dicts.open_safetensors,
    }
    if found.kind not in openers:
        raise ValueError(f"{path} is {found.description}; expected {expected}")
    with open(path, "rb") as stream:
        yield openers[found.kind](Path(path), stream, expected, **options)


EXPECTED = (
    "a StyleGAN2, R3GAN, EDM or EDM2 pickle or state dict, a legacy TensorFlow pickle of StyleGAN2, a rosinality .pt, "
    "or a file of this toolkit"
)
