"""What a field of RefineConfig carries: everything that is known about one option."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from refine.config.kinds import Kind

# The headings of --help, in their order there.
GROUPS = (
    *("Input and output", "Length", "Rates", "Noise", "Objective", "Coverage", "Speed and memory", "Monitoring"),
    "Stopping and resuming",
)


@dataclass(frozen=True)
class Option:
    """What is known about one field of RefineConfig beside its name.

    Attributes:
        kind: How its values are read, shown and checked.
        default: Without a preset that says otherwise; `...` = it has to be given.
        group: Its heading in --help.
        help: Its text there.
        changeable: Whether --resume may change it: the length and the course of the run, where and how it runs, and the
            two rates, which one changes after a run went astray. All others decide what is being trained.
        in_snapshots: Whether two runs that differ in it write different files.
        formerly: What runs meant that were saved before there was the option; `...` = its default.
        aliases: Names that people know it by from elsewhere; they are suggested, not accepted.
    """

    kind: Kind
    default: Any
    group: str
    help: str
    changeable: bool = False
    in_snapshots: bool = True
    formerly: Any = ...
    aliases: tuple[str, ...] = ()


def option(*args: Any, **kwargs: Any) -> Any:
    """A field of RefineConfig; the arguments are those of `Option`."""
    return dataclasses.field(default=..., metadata={"option": Option(*args, **kwargs)})


def flag(name: str, part: str = "") -> str:
    """The name of a field, or of a part of its value, on the command line: 'sigma', 'range' → '--sigma-range'."""
    return "--" + "_".join(filter(None, (name, part))).replace("_", "-")
