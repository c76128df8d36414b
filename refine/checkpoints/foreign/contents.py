"""Which networks are in a file of another program, once its pickle or table is read: every family is asked in turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refine.checkpoints.foreign import edm_names, nvidia, r3gan, rosinality, stylegan2_names, tensorflow
from refine.checkpoints.foreign.container import Members
from refine.checkpoints.foreign.flat import flattened
from refine.checkpoints.pickles.inert import Refused


def find(value: Any, given: Mapping[str, Any] | None = None) -> tuple[str, Members] | None:
    """(family, members) of a file's value; None where no family knows it.

    Args:
        value: What the pickle or table holds.
        given: Constructor arguments for a state dict; None = what shapes tell.

    Raises:
        Refused: it is a file of a family, but an impossible one, or one that takes no arguments.
    """
    known = nvidia.members(value) or tensorflow.members(value)
    if known is not None:
        if given:
            raise Refused(
                "it says itself how its networks are built; expected no --gan-kwargs, which are for state dicts"
            )
        return known
    flat = flattened(value)
    for family in (stylegan2_names, r3gan, rosinality, edm_names):
        if (found := family.members(flat, given)) is not None:
            return family.FAMILY, found
    return None
