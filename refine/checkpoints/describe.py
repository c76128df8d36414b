"""What is in a checkpoint, for people and for programs: the matter of `python -m refine inspect`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from refine import dnnlib
from refine.checkpoints import native, registry
from refine.checkpoints.foreign.opening import open_container
from refine.checkpoints.sniff import sniff


def contents(networks: Mapping[str, Mapping[str, Any]]) -> str:
    """The networks of a file's metadata in a few words: 'a teacher (EDMPrecond 32×32×1, 10 classes)'."""
    words = []
    for entry in networks.values():
        name = str(entry["class"]).rpartition(".")[2][:60]
        text = f"a {registry.kind_of(entry['class'])} ({name}{_size(entry['init_kwargs'])})"
        words += [text] if text not in words else []
    return " and ".join(words)


def inspect_file(path: str | os.PathLike, kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything that can be told about a file; files of networks are read in full, so they are known to load.

    Args:
        path: The file.
        kwargs: How its networks are built, where the file does not tell it all.

    Returns:
        JSON-able: 'path', 'bytes', 'sha256', 'kind' and 'description' (what the file is), and for native files
        'format_version', 'contents', 'provenance' and 'networks' (name → see `inspect_network`). For files of other
        programs 'networks', or 'problem' where nothing in it can be used.

    Raises:
        ValueError: there is no such file, or it is a native file that cannot be used.
    """
    found = sniff(path)
    report: dict[str, Any] = {
        "path": os.fspath(path),
        "bytes": os.path.getsize(path),
        "sha256": dnnlib.sha256_of_file(path),
        "kind": found.kind,
        "description": found.description,
    }
    if found.kind in _CONTAINERS:
        return report | _inspect_container(path, kwargs)
    if found.kind != "native":
        return report
    metadata = native.read_metadata(path)
    report |= {"format_version": metadata["version"], "contents": metadata["kind"]}
    table = {name: _inspect_native(path, name, entry) for name, entry in metadata["networks"].items()}
    return report | {"provenance": metadata["provenance"], "networks": table}


def _inspect_native(path: str | os.PathLike, name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    if entry["class"] == native.CUSTOM:  # of somebody's own code: its tensors can be counted, not more
        loose = native.load_loose(path, name).values()
        return inspect_network(torch.nn.ParameterList(torch.nn.Parameter(t, requires_grad=False) for t in loose), entry)
    return inspect_network(native.load_networks(path, [name])[name], entry)


_CONTAINERS = ("pickle", "torch", "npz", "safetensors")


def _inspect_container(path: str | os.PathLike, kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    try:
        with open_container(path, kwargs=kwargs) as container:
            table = {name: _inspect_member(container, name) for name in container.members}
            return {"description": container.family, "written_back": container.writable, "networks": table}
    except ValueError as error:
        return {"problem": str(error)}


def _inspect_member(container: Any, name: str) -> dict[str, Any]:
    try:
        found = container.network(name)
        if found.finish is None:  # the numbers are looked at one tensor after the other
            network, values = container.outline(name), {key: ref.read for key, ref in found.tensors.items()}
        else:
            network, values = container.load(name), None
    except ValueError as error:  # such as a discriminator of another kind beside a generator that can be read
        return {"kind": container.members[name], "problem": str(error)}
    entry = {"class": found.class_name, "init_kwargs": network.init_kwargs}
    report = inspect_network(network, entry, values)
    report["dtypes"] = sorted({str(ref.storage.dtype).removeprefix("torch.") for ref in found.tensors.values()})
    return report | ({"notes": found.notes} if found.notes else {})


def role(report: Mapping[str, Any]) -> str | None:
    """What a network can serve as, and with which partner: one like it, or across a bridge (`refine.pair`)."""
    partner = {"generator": "teacher", "teacher": "student"}.get(report["kind"])
    if partner is None:
        return None
    size = f"{report['img_resolution']}×{report['img_resolution']}×{report['img_channels']}"
    classes = f"{report['classes']} classes (or none)" if report["classes"] else "no classes (or any)"
    own, also = ("student", "a whole fraction") if partner == "teacher" else ("teacher", "a whole multiple")
    return f"{own}, with a {partner} for {size} images (or {also} of that size) and {classes}"


def inspect_network(
    network: torch.nn.Module,
    entry: Mapping[str, Any],
    values: Mapping[str, Callable[[], torch.Tensor]] | None = None,
) -> dict[str, Any]:
    """One network: 'class', 'kind', 'init_kwargs', 'img_resolution', 'img_channels', 'classes' (0 = unconditional),
    'parameters' and 'buffers' (numbers of elements), 'dtypes', 'non_finite' (number of elements), 'serves_as' (see
    `role`), and 'w_avg_norm' where it tracks w_avg. `values` give the numbers where the network is only an outline."""
    parameters, buffers = list(network.parameters()), list(network.buffers())
    w_avg = getattr(getattr(network, "mapping", None), "w_avg", None)
    read = {} if values is None else dict(values)
    made = [(lambda t=t: t) for key, t in network.state_dict().items() if key not in read and not t.is_meta]
    if "mapping.w_avg" in read:
        w_avg = read["mapping.w_avg"]()
    report = {
        "class": entry["class"],
        "kind": registry.kind_of(entry["class"]),
        "init_kwargs": entry["init_kwargs"],
        "img_resolution": entry["init_kwargs"].get("img_resolution"),
        "img_channels": entry["init_kwargs"].get("img_channels"),
        "classes": _classes(entry["init_kwargs"]),
        "parameters": sum(p.numel() for p in parameters),
        "buffers": sum(b.numel() for b in buffers),
        "dtypes": sorted({_dtype(t) for t in parameters + buffers}),
        "non_finite": sum(int((~torch.isfinite(value())).sum()) for value in (*read.values(), *made)),
    }
    report["serves_as"] = role(report)
    return report if w_avg is None else report | {"w_avg_norm": float(w_avg.double().norm())}


def as_json(report: Mapping[str, Any]) -> str:
    """The report of `inspect_file` as JSON that every program reads: NaN and infinity, which JSON lacks, as text."""

    def convert(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        if isinstance(value, dict):
            return {key: convert(item) for key, item in value.items()}
        return [convert(item) for item in value] if isinstance(value, list | tuple) else value

    return json.dumps(convert(report), indent=2, allow_nan=False)


def as_text(report: Mapping[str, Any]) -> str:
    """The report of `inspect_file` as aligned lines."""
    lines = [
        f"file        {report['path']}",
        f"what        {report['description']}",
        f"size        {dnnlib.format_bytes(report['bytes'])}",
        f"sha256      {report['sha256']}",
    ]
    lines += [f"problem     {report['problem']}"] if "problem" in report else []
    lines += [f"use         {report['use']}"] if report.get("use") not in (None, "networks") else []
    for name, network in report.get("networks", {}).items():
        if "problem" in network:
            lines += [f"{name:<11} {network['kind']}", f"  problem   {network['problem']}"]
            continue
        size, dtypes = _size(network["init_kwargs"]), ", ".join(network["dtypes"])
        lines += [
            f"{name:<11} {network['kind']}, {network['class']}{size}",
            f"  weights   {network['parameters']:,} parameters, {network['buffers']:,} in buffers, {dtypes}",
            f"  kwargs    {_pairs(network['init_kwargs'])}",
        ]
        lines += [f"  serves    as {network['serves_as']}"] if network["serves_as"] else []
        lines += [f"  note      {note}" for note in network.get("notes", [])]
        lines += [f"  |w_avg|   {network['w_avg_norm']:.4g}"] if "w_avg_norm" in network else []
        lines += [f"  WARNING   {network['non_finite']:,} values are NaN or infinite"] if network["non_finite"] else []
    lines += [f"provenance  {_pairs(report['provenance'])}"] if report.get("provenance") else []
    return "\n".join(lines)


def _size(init_kwargs: Mapping[str, Any]) -> str:
    resolution, channels, classes = (
        init_kwargs.get("img_resolution"),
        init_kwargs.get("img_channels"),
        _classes(init_kwargs),
    )
    text = "" if resolution is None else f" {resolution}×{resolution}" + ("" if channels is None else f"×{channels}")
    return text + (f", {classes} classes" if classes else "")


def _classes(init_kwargs: Mapping[str, Any]) -> int:
    value = next((init_kwargs[key] for key in ("c_dim", "label_dim", "num_classes") if key in init_kwargs), 0)
    return value if isinstance(value, int) else 0


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _pairs(table: Mapping[str, Any]) -> str:
    def short(value: Any) -> Any:
        tables = isinstance(value, list) and any(isinstance(item, dict) for item in value)
        return f"({len(value)} entries)" if tables else value

    return ", ".join(f"{key}={short(value)}" for key, value in table.items())
