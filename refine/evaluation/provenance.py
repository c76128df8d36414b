"""What a run says of itself: its options, and the command that would repeat it; file names only, no folders."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refine.config import OPTIONS, PRESETS, TEACHER
from refine.config.option import flag
from refine.evaluation.run_folder import RunFolder
from refine.evaluation.sides import provenance_of

_FILES = ("gan", "teacher", "ref", "data")
_SAID_FIRST = ("gan", "teacher", "preset")
_OF_THE_MACHINE = {"outdir", "desc", "device"}
_MAX_BYTES = 1 << 20  # of training_options.json


def describe_run(run: RunFolder | None, judged: Path | None) -> dict[str, Any] | None:
    """The run that a network comes from; None where nothing is known of one.

    Args:
        run: The run folder, where one was given.
        judged: The file of the network, if it has one.

    Returns:
        JSON-able: `folder` (name), `kimg`, `options`, and `command`, which is what differs from the preset.
    """
    origins = {} if judged is None else provenance_of(judged)
    options = _of_folder(run) or _of_snapshot(origins)
    if options is None:
        return None
    folder = run.path.resolve().name if run is not None else None
    facts = {"folder": folder, "kimg": origins.get("kimg"), "options": options, "command": command_of(options)}
    return {key: value for key, value in facts.items() if value is not None}


def command_of(options: Mapping[str, Any]) -> str:
    """The command line that gives these options, which are as JSON has them; files by their names alone."""
    preset = options.get("preset", OPTIONS["preset"].default)
    usual = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
    words = [f"--{name}={options[name]}" for name in ("gan", "teacher") if options.get(name)]
    words += [f"--preset={preset}"] if preset != OPTIONS["preset"].default else []
    for name, known in OPTIONS.items():
        default = usual.get(name, known.default)
        if name not in options or name in _SAID_FIRST:
            continue
        with contextlib.suppress(ValueError, TypeError, AttributeError):  # of another version: it is among the options
            value = known.kind.cast(options[name], default)
            if value != default and known.kind.allows(value):
                words.append(f"{flag(name)}={known.kind.format(value)}")
    return " ".join(["python refine.py", *words])


def _of_folder(run: RunFolder | None) -> dict[str, Any] | None:
    """The options of training_options.json that this version knows."""
    path = None if run is None else run.path / "training_options.json"
    if path is None or not path.is_file() or path.stat().st_size > _MAX_BYTES:
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return _without_folders(values) if isinstance(values, dict) and "teacher" in values else None


def _of_snapshot(origins: Mapping[str, Any]) -> dict[str, Any] | None:
    options, found = origins.get("options"), {}
    if not isinstance(options, dict):
        return None
    for name, key in (("gan", "student"), ("teacher", "teacher"), ("data", "data")):
        if isinstance(origin := origins.get(key), dict) and isinstance(origin.get("file"), str):
            found[name] = origin["file"]
    return _without_folders({**found, **options})


def _without_folders(options: Mapping[str, Any]) -> dict[str, Any]:
    known = {name: value for name, value in options.items() if name in OPTIONS and name not in _OF_THE_MACHINE}
    for name in _FILES:
        if isinstance(value := known.get(name), str) and value != TEACHER:
            known[name] = value.replace("\\", "/").rstrip("/").rpartition("/")[2]
    if isinstance(metrics := known.get("metrics"), list | tuple):  # a detector may be a file
        known["metrics"] = [_metric(name) for name in metrics if isinstance(name, str)]
    return known


def _metric(name: str) -> str:
    kind, dash, detector = name.partition("-")
    return f"{kind}{dash}{detector.rpartition('/')[2]}"
