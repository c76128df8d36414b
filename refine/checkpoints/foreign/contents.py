"""Which networks are in a file of another program, once its pickle or table is read: every family is asked in turn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refine.checkpoints.foreign import (
    adm,
    edm_names,
    nvidia,
    r3gan,
    rosinality,
    stylegan2_names,
    stylegan3,
    stylegan3_names,
    stylegan_xl_names,
    tensorflow,
)
from refine.checkpoints.foreign.container import Members
from refine.checkpoints.foreign.flat import flattened

# Families that are state dicts; few programs write those as plain pickles, so none is written back into one.
STATE_DICTS = {adm.FAMILY, adm.CM_FAMILY, edm_names.FAMILY, rosinality.FAMILY}
STATE_DICTS |= {stylegan2_names.FAMILY, stylegan3_names.FAMILY, stylegan_xl_names.FAMILY}


def find(value: Any, path: Path, kwargs: Mapping[str, Any] | None = None) -> tuple[str, Members, bool] | None:
    """(family, members, whether they take arguments) of a file's value; None where no family knows it.

    Args:
        value: What the pickle or table holds.
        path: The file, whose name may tell, and beside which arguments may lie.
        kwargs: Arguments for networks that take them; None = what names and shapes tell.

    Raises:
        Refused: it is a file of a family, but an impossible one.
    """
    known = stylegan3.members(value) or nvidia.members(value) or tensorflow.members(value)
    if known is not None:
        return *known, False
    diffusion = adm.members(value, path, kwargs)
    if diffusion is not None:
        return *diffusion, True
    flat = flattened(value)
    for family in (stylegan2_names, stylegan_xl_names, stylegan3_names, r3gan, rosinality, edm_names):
        if (found := family.members(flat, kwargs)) is not None:
            return family.FAMILY, found, True
    return None
