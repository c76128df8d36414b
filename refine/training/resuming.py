"""What a run goes on with: the options that its training state holds, and those of the command line beside --resume.

A state may come from anywhere. It names options, and files of this machine that are read as data; it never makes this
program import, download or run anything: what would has to be given again on the command line. The files are compared
with the checksums in the state.
"""

import dataclasses
import json
import os
import shlex
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refine.checkpoints.pickles.inert import shown
from refine.checkpoints.sources import custom, one_step
from refine.checkpoints.sources.fetch import is_url
from refine.checkpoints.sources.index import resolve
from refine.checkpoints.sources.reach import reach_of
from refine.config import CHANGEABLE, OPTIONS, TEACHER, RefineConfig
from refine.config.needs import ONE_STEP
from refine.config.option import flag
from refine.metrics.named import detector_of
from refine.training.state import FoundState, load_newest

_MAX_CONFIG = 1 << 20  # characters
MOVABLE = ("gan", "teacher", "guide", "data")  # may be given beside --resume: the same files in another place


@dataclass(frozen=True)
class Resumed:
    """The state that a run goes on from, and the options it was saved with."""

    found: FoundState
    config: RefineConfig

    def check_files(self, files: Mapping[str, str]) -> None:
        """Compares SHA-256 by option, where the state holds them.

        Raises:
            ValueError: The run was made with other files.
        """
        known = self.found.state.get("files", {})
        for name, digest in files.items():
            if known.get(name, digest) != digest:
                raise ValueError(
                    f"{flag(name)} has the sha256 {digest[:12]}…, but the run was made with "
                    f"{shown(known[name][:12])}…; expected the same file"
                )


def resumed_config(
    state_paths: list[Path], given: Mapping[str, Any], own_metrics: Collection[str] = ()
) -> tuple[Resumed, RefineConfig]:
    """The state to go on from, and all options.

    Args:
        state_paths: The first one that can be read is taken.
        given: Fields of RefineConfig that the command line holds.
        own_metrics: Names of metrics that a caller in Python brings.

    Raises:
        ValueError: No state can be read, an option cannot be changed, or has to be given again.
    """
    found = load_newest(state_paths)
    options = _options_of(found)
    try:
        saved = RefineConfig.from_dict({**options, "time_limit": None, "trust_detector": False})
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{found.path} holds options that cannot be read: {error}") from None
    _check_unchanged(given, saved)
    check_reach(given, saved, "the training state", own_metrics)
    _check_places(given, saved)
    changes = {name: value for name, value in given.items() if name in CHANGEABLE or name in MOVABLE}
    if changes.get("metrics") == ():
        changes.setdefault("patience", 0)  # there is nothing to go by any more
    elif "metrics" in changes and saved.ref is None:  # as in a run that begins
        changes.setdefault("ref", TEACHER)
    config = dataclasses.replace(saved, **changes)
    if (config.lr, config.aux_lr) != (saved.lr, saved.aux_lr):
        found.state["rollbacks"] = 0  # the new rates are meant as they are
    if config.metrics[:1] != saved.metrics[:1]:
        found.state["since_best"] = 0  # patience is with the metric that is now the first
    return Resumed(found, saved), config


def _options_of(found: FoundState) -> dict[str, Any]:
    text = found.state["config"]
    try:
        if len(text) > _MAX_CONFIG:
            raise ValueError(f"more than {_MAX_CONFIG} characters")
        return dict(json.loads(text))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{found.path} holds options that cannot be read: {error}") from None


def _check_unchanged(given: Mapping[str, Any], saved: RefineConfig) -> None:
    """Whatever decides what is trained may be said again, but not otherwise."""
    for name in given.keys() - CHANGEABLE - set(MOVABLE):
        before = getattr(saved, name)
        if OPTIONS[name].kind.cast(given[name], before) != before:
            names = ", ".join(sorted(map(flag, (*CHANGEABLE, *MOVABLE))))
            raise ValueError(
                f"--resume goes on with the options of the run; {flag(name)} cannot be changed, only {names}"
            )
    if "data" in given and (given["data"] is None) != (saved.data is None):
        found, was = given["data"] or "none", saved.data or "none: the teacher's images"
        raise ValueError(f"--data is {found}, but the run was made with {was}; expected the same images")
    for name in ("gan", "teacher", "guide"):
        if name in given and _kind_of(given[name]) != _kind_of(getattr(saved, name)):
            found, was = given[name] or "none", getattr(saved, name) or "none"
            raise ValueError(f"{flag(name)} is {found}, but the run was made with {was}; expected the same")


def _kind_of(network: str | None) -> str | None:
    """What has to stay of --gan, --teacher and --guide, beside the contents of their files."""
    if network and (reference := custom.parse(network)):
        return f"{reference}{'@' if reference.file else ''}"
    return network if network in (ONE_STEP, None) else "a file"


def check_reach(given: Mapping[str, Any], saved: RefineConfig, source: str, own_metrics: Collection[str] = ()) -> None:
    """What options from a file would import, download or run has to be given on the command line.

    Args:
        given: Fields of RefineConfig that the command line holds.
        saved: All options, as the file has them.
        source: The file, for messages.
        own_metrics: Names of metrics that a caller in Python brings.

    Raises:
        ValueError: It is not.
    """
    for name, text, reach in _reaching(saved, own_metrics):
        if name not in given:
            raise ValueError(f"{source} names {text}, {reach}; give {_as_typed(saved, name)} again if that is meant")


def _reaching(config: RefineConfig, own_metrics: Collection[str] = ()) -> Iterator[tuple[str, str, str]]:
    """(option, what it names, what that would do) for whatever has to be given again beside --resume."""
    names = [(name, getattr(config, name) or "", False) for name in ("gan", "teacher", "guide", "ref")]
    names += [("metrics", detector_of(metric), True) for metric in config.metrics if metric not in own_metrics]
    for name, text, is_detector in names:
        if text not in (ONE_STEP, TEACHER) and (reach := reach_of(text, is_detector)):
            yield name, text, reach


def _as_typed(config: RefineConfig, name: str) -> str:
    return f"{flag(name)}={OPTIONS[name].kind.format(getattr(config, name))}"


def how_to_go_on(config: RefineConfig, folder: Path) -> str:
    """The command that resumes a run, with what has to be given again."""
    names = dict.fromkeys(name for name, _, _ in _reaching(config))
    again = [_as_typed(config, name) for name in names]
    trust = ["--trust-detector"] if config.trust_detector and "metrics" in names else []
    return shlex.join(["python", "refine.py", f"--resume={folder}", *again, *trust])


def _check_places(given: Mapping[str, Any], saved: RefineConfig) -> None:
    """Names where files that were moved can be given."""
    for name in ("gan", "teacher", "guide", "ref", "data"):
        text = getattr(saved, name)
        if reference := custom.parse(text or ""):
            text = reference.file
        if text and name not in given and os.path.isabs(text) and not os.path.lexists(text):
            raise ValueError(f"{flag(name)} was {text}, which is not there any more; give {flag(name)} where it is now")


def absolute_place(text: str) -> str:
    """The path that an option means; names stay names. A URL, which may hold a password, becomes its file."""
    if (reference := custom.parse(text)) and reference.file:
        return f"{reference}@{os.path.abspath(reference.file)}"
    if (file := one_step.file_of(text)) is not None:
        return one_step.PREFIX + absolute_place(file)
    if is_url(text):
        return os.path.abspath(resolve(text))
    return os.path.abspath(text) if os.path.exists(text) else text  # folders of images, too
