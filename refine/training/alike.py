"""Whether all processes of a run were started alike: one that trains something else would spoil the sums of all."""

import socket
import sys
from collections.abc import Mapping

import torch

import refine
from refine.config import OPTIONS, RefineConfig
from refine.config.option import flag
from refine.torch_utils import distributed

PLACES = {"gan", "teacher", "guide", "ref", "outdir"}  # machines may have their files in different places


def check_options_alike(config: RefineConfig, resumed_at: int | None, dry_run: bool) -> None:
    """Compares options, what is resumed, and versions.

    Args:
        config: All options; --outdir is that of the first process.
        resumed_at: Images of the training state that this process found; None = none.
        dry_run: Whether this is one.

    Raises:
        ValueError, LostProcess: They differ; in every process.
    """
    facts = {flag(name): str(getattr(config, name)) for name in OPTIONS if name not in PLACES}
    facts["--resume"] = "none" if resumed_at is None else f"at {resumed_at} images"
    facts["--dry-run"] = str(dry_run)
    facts |= {"gan-refine": refine.__version__, "torch": torch.__version__, "Python": sys.version.split()[0]}
    _check(facts)


def check_origins_alike(origins: Mapping[str, Mapping[str, str]]) -> None:
    """Compares the contents of the files of --gan, --teacher and --guide. Raises as `check_options_alike`.

    Args:
        origins: 'student', 'teacher' and, where there is one, 'guide', each with its 'sha256'.
    """
    names = {"--gan": "student", "--teacher": "teacher", **({"--guide": "guide"} if "guide" in origins else {})}
    _check({f"the sha256 of {name}": origins[network]["sha256"] for name, network in names.items()})


def _check(facts: Mapping[str, str]) -> None:
    if not distributed.is_joined():
        return
    everyone = distributed.gathered((socket.gethostname(), dict(facts)))
    first = everyone[0][1]
    for rank, (host, theirs) in enumerate(everyone):
        if differing := [name for name in facts if theirs.get(name) != first.get(name)]:
            name = differing[0]
            more = f", and so do {', '.join(differing[1:])}" if len(differing) > 1 else ""
            text = f"{name} differs between processes: {first[name][:80]} on rank 0, {theirs[name][:80]} on rank {rank}"
            text += f" ({host}){more}"
            if distributed.is_main():
                raise ValueError(text)
            raise distributed.LostProcess(text, told=True)  # by the first process
