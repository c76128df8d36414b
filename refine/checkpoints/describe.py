"""What is in a checkpoint, for people and for programs: the matter of `python -m refine inspect`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

import dnnlib
from refine.checkpoints import native, registry
from refine.checkpoints.sniff import sniff


def contents(networks: Mapping[str, Mapping[str, Any]]) -> str:
    """The networks of a file's metadata in a few words: 'a teacher (EDMPrecond 32×32×1, 10 classes)'."""
    words = []
    for entry in networks.values():
        name = str(entry["class"]).rpartition(".")[2][:60]
        text = f"a {registry.kind_of(entry['class'])} ({name}{_size(entry['init_kwargs'])})"
        words += [text] if text not in words else []
    return " and ".join(words)


def inspect_file(path: str | os.PathLike) -> dict[str, Any]:
    """Everything that can be told about a file; a native file of networks is read in full, so it is known to load.

    Returns:
        JSON-able: 'path', 'bytes', 'sha256', 'kind' and 'description' (what the file is), and for native files
        'format_version', 'contents', 'provenance' or 'metadata', 'networks' (name → see `inspect_network`) or 'tensors'
        (name → dtype and shape).

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
    if found.kind != "native":
        return report
    metadata = native.read_metadata(path)
    report |= {"format_version": metadata["version"], "contents": metadata["kind"]}
    if metadata["kind"] == "tensors":
        tensors = native.load_tensors(path)[0]
        table = {name: {"dtype": _dtype(t), "shape": list(t.shape)} for name, t in tensors.items()}
        return report | {"metadata": metadata["metadata"], "tensors": table}
    networks = native.load_networks(path)
    table = {name: inspect_network(network, metadata["networks"][name]) for name, network in networks.items()}
    return report | {"provenance": metadata["provenance"], "networks": table}


def inspect_network(network: torch.nn.Module, entry: Mapping[str, Any]) -> dict[str, Any]:
    """One network: 'class', 'kind', 'init_kwargs', 'img_resolution', 'img_channels', 'classes' (0 = unconditional),
    'parameters' and 'buffers' (numbers of elements), 'dtypes', 'non_finite' (number of elements), and 'w_avg_norm'
    where it tracks w_avg."""
    parameters, buffers = list(network.parameters()), list(network.buffers())
    w_avg = getattr(getattr(network, "mapping", None), "w_avg", None)
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
        "non_finite": sum(int((~torch.isfinite(t)).sum()) for t in parameters + buffers),
    }
    return report if w_avg is None else report | {"w_avg_norm": float(w_avg.double().norm())}


def as_text(report: Mapping[str, Any]) -> str:
    """The report of `inspect_file` as aligned lines."""
    lines = [
        f"file        {report['path']}",
        f"what        {report['description']}",
        f"size        {dnnlib.format_bytes(report['bytes'])}",
        f"sha256      {report['sha256']}",
    ]
    for name, network in report.get("networks", {}).items():
        size, dtypes = _size(network["init_kwargs"]), ", ".join(network["dtypes"])
        lines += [
            f"{name:<11} {network['kind']}, {network['class']}{size}",
            f"  weights   {network['parameters']:,} parameters, {network['buffers']:,} in buffers, {dtypes}",
            f"  kwargs    {_pairs(network['init_kwargs'])}",
        ]
        lines += [f"  |w_avg|   {network['w_avg_norm']:.4g}"] if "w_avg_norm" in network else []
        lines += [f"  WARNING   {network['non_finite']:,} values are NaN or infinite"] if network["non_finite"] else []
    lines += [f"tensors     {len(report['tensors'])}"] if "tensors" in report else []
    for title in ("provenance", "metadata"):
        lines += [f"{title:<11} {_pairs(report[title])}"] if report.get(title) else []
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
    return ", ".join(f"{key}={value}" for key, value in table.items())
