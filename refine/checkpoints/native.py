"""The toolkit's own files: safetensors whose header says how to build the networks again.

One JSON text under the metadata key 'gan-refine' makes a file one of ours:

    {"format": "gan-refine", "version": 1, "kind": "networks",
     "networks": {"G_ema": {"class": "stylegan2.Generator", "init_kwargs": {…}}, …},
     "provenance": {…}}                                  # where it comes from: parents' sha256, options, …

Tensors are called `<network>.<name in its state_dict>`.

Reading is strict (names, shapes and dtypes must be those of the rebuilt network), runs no code from the file, and finds
out everything that can be wrong from header and file size before memory for a single weight is taken. Values are not
judged: NaN and infinity are loaded as they are.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from refine.checkpoints import registry
from refine.checkpoints.pickles.tensors import as_bytes
from refine.checkpoints.reading import in_threads, read_at
from refine.checkpoints.sniff import HEADER_KEY, Sniffed, TensorInfo, sniff
from refine.checkpoints.writers import save_safetensors
from refine.networks.bases import Network
from refine.networks.own import OwnGenerator

FORMAT, VERSION = "gan-refine", 1
CUSTOM = "custom"  # class of networks that the user's own code makes: see `refine.checkpoints.sources.custom`
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def save_networks(
    path: str | os.PathLike, networks: Mapping[str, torch.nn.Module], *, provenance: dict[str, Any]
) -> None:
    """Writes networks to one native file, all of it or nothing.

    Args:
        path: The file to write or replace; its folder must exist.
        networks: Name in the file (`G_ema`, `G`, `ema`, …; no dots) → network of a class of the registry, which keeps
            its constructor arguments in `init_kwargs`. Device, memory format and sharing of tensors do not matter.
        provenance: JSON-able table: how the networks came about.

    Raises:
        ValueError: a network could not be rebuilt from what would be written, or something is not JSON-able.
        OSError: the file cannot be written.
    """
    tensors, table = {}, {}
    for name, network in networks.items():
        if not name or "." in name:
            raise ValueError(f"a network in a native file needs a name without dots, got {name!r}")
        if isinstance(network, OwnGenerator):  # only its maker can build it again
            table[name] = {"class": CUSTOM, "init_kwargs": network.init_kwargs}
            tensors.update({f"{name}.{key}": value for key, value in network.state_dict().items()})
            continue
        class_name = registry.registry_name(network)
        init_kwargs = json.loads(_to_json(network.init_kwargs, f"init_kwargs of {name}"))
        state = {key: t.float() if network.keeps_halves else t for key, t in network.state_dict().items()}
        expected = registry.build_empty(class_name, init_kwargs).state_dict()
        _check_state({key: (t.dtype, tuple(t.shape)) for key, t in state.items()}, expected, f"network {name}")
        table[name] = {"class": class_name, "init_kwargs": init_kwargs}
        tensors.update({f"{name}.{key}": value for key, value in state.items()})
    if not table:
        raise ValueError("there is no network to save")
    _write(path, tensors, {"kind": "networks", "networks": table, "provenance": provenance})


def load_networks(
    path: str | os.PathLike, names: Iterable[str] | None = None, found: Sniffed | None = None
) -> dict[str, Network]:
    """Reads networks from a native file.

    Args:
        path: The file.
        names: Which networks to read; None = all. The tensors of others are not read.
        found: What `sniff(path)` has said.

    Returns:
        Name → network on the CPU, in the dtypes of its class, in train mode with gradients enabled, as if just
        constructed. The random number generators are not touched.

    Raises:
        ValueError: the file is not a whole native file of networks, a wanted one is not in it, or the names, shapes or
            dtypes of its tensors are not those that its class and init kwargs ask for.
    """
    metadata, infos = _read_header(path, found)
    table = metadata["networks"]
    names = list(table if names is None else names)
    for name in names:
        if name not in table:
            raise ValueError(f"{path} holds {', '.join(table)}, but no network {name!r}")
    strays = [key for key in infos if key.partition(".")[0] not in table]
    if strays:
        raise ValueError(f"{path}: the tensor {strays[0]!r} belongs to none of the networks {', '.join(table)}")
    networks, states = {}, {}
    for name in names:
        if table[name]["class"] == CUSTOM:
            raise ValueError(
                f"{path} holds a generator of somebody's own code, which a file cannot bring along; "
                f"name the function that made it: {str(table[name]['init_kwargs'].get('reference'))[:100]}@{path}"
            )
        try:
            mine = {key[len(name) + 1 :]: info for key, info in infos.items() if key.startswith(f"{name}.")}
            held = len(mine), sum(info.numel for info in mine.values())
            network = registry.build_empty(table[name]["class"], table[name]["init_kwargs"], held)
            tensors = {key: (_DTYPES.get(info.dtype), info.shape) for key, info in mine.items()}
            states[name] = network.state_dict(keep_vars=True)
            _check_state(tensors, states[name], f"network {name}")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        networks[name] = network
    for name, network in networks.items():
        values = _read_tensors(path, [infos[f"{name}.{key}"] for key in states[name]])
        # The tensors read become the parameters, so no weight exists twice and none is initialised in vain.
        registry.fill(network, dict(zip(states[name], values, strict=True)))
        kept = [item for m in network.modules() for item in (*m._parameters.items(), *m._buffers.items())]
        homeless = [key for key, tensor in kept if tensor is not None and tensor.is_meta]
        assert not homeless, (
            f"{type(network).__name__} keeps {homeless[0]} out of its state_dict, so it cannot be loaded"
        )
    return networks


def load_loose(path: str | os.PathLike, name: str) -> dict[str, torch.Tensor]:
    """The tensors of one network of a native file, by their names in its state_dict; the network is not built.

    Raises:
        ValueError: the file is not a whole native file of networks.
    """
    _, infos = _read_header(path)
    keys = [key for key in infos if key.startswith(f"{name}.")]
    values = _read_tensors(path, [infos[key] for key in keys])
    return dict(zip([key.removeprefix(f"{name}.") for key in keys], values, strict=True))


def load_into(path: str | os.PathLike, name: str, network: torch.nn.Module) -> None:
    """Reads one network's tensors into `network`, which must have exactly these names, shapes and dtypes.

    Raises:
        ValueError: the file is not a whole native file of networks, or the tensors do not fit.
    """
    tensors = load_loose(path, name)
    try:
        found = {key: (value.dtype, tuple(value.shape)) for key, value in tensors.items()}
        _check_state(found, network.state_dict(), f"network {name}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    network.load_state_dict(tensors)


def read_metadata(path: str | os.PathLike, found: Sniffed | None = None) -> dict[str, Any]:
    """The JSON of a native file, without reading a tensor; for `found` see `load_networks`.

    Returns:
        'format', 'version', 'kind' (always 'networks'), 'networks' (name → 'class', 'init_kwargs'), 'provenance'.

    Raises:
        ValueError: the file is not a whole native file of a version that is known here.
    """
    return _read_header(path, found)[0]


def _write(path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    for key, value in tensors.items():
        if value.layout != torch.strided or value.dtype not in _DTYPES.values():
            raise ValueError(f"the tensor {key!r} ({value.dtype}, {value.layout}) has no place in a native file")
    # One metadata key only: safetensors keeps metadata in no order, and equal networks shall give equal bytes.
    header = {HEADER_KEY: _to_json({"format": FORMAT, "version": VERSION, **metadata}, "the metadata")}
    save_safetensors(path, _unshared(tensors), header)


def _unshared(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous CPU tensors, none of which shares memory with another: what the format can hold."""
    result, seen = {}, set()
    for key, value in tensors.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != value.nbytes:
            value = value.clone()
        seen.add(storage.data_ptr())
        result[key] = value
    return result


def _read_header(path: str | os.PathLike, found: Sniffed | None = None) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    found = found or sniff(path)
    if found.kind != "native" or found.header is None:
        raise ValueError(f"{path} is {found.description}; expected a file of networks written by this toolkit")
    try:
        metadata = json.loads(found.header[1][HEADER_KEY])
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: its {HEADER_KEY} metadata are not valid JSON") from None
    reason = _metadata_fault(metadata)
    if reason:
        raise ValueError(f"{path}: {reason}")
    return metadata, found.header[0]


def _metadata_fault(metadata: Any) -> str | None:
    """What is wrong with the metadata's structure, or None. Class names and kwargs are judged where networks are
    built."""
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        return f'its metadata do not say "format": "{FORMAT}"'
    if metadata.get("version") != VERSION or isinstance(metadata["version"], bool):
        return f"it has format version {str(metadata.get('version'))[:20]}; this release reads version {VERSION}"
    if metadata.get("kind") != "networks":
        return f"its metadata name the unknown kind {str(metadata.get('kind'))[:20]!r}"
    for key in ("networks", "provenance"):
        if not isinstance(metadata.get(key), dict):
            return f"its metadata lack the table {key!r}"
    if not metadata["networks"]:
        return "it holds no network"
    for name, entry in metadata["networks"].items():
        if (
            "." in name
            or not isinstance(entry, dict)
            or not isinstance(entry.get("class"), str)
            or not isinstance(entry.get("init_kwargs"), dict)
        ):
            return f"its metadata lack class or init_kwargs of the network {name[:60]!r}"
    return None


def _check_state(
    found: Mapping[str, tuple[torch.dtype | None, tuple[int, ...]]], expected: Mapping[str, torch.Tensor], what: str
) -> None:
    missing, extra = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing:
        raise ValueError(f"{what} lacks {len(missing)} of {len(expected)} tensors of its class, such as {min(missing)}")
    if extra:
        raise ValueError(f"{what} has {len(extra)} tensors that its class does not have, such as {min(extra)[:80]}")
    for key, tensor in expected.items():
        dtype, shape = found[key]
        if shape != tuple(tensor.shape):
            raise ValueError(f"{what}: {key} has shape {list(shape)}; expected {list(tensor.shape)}")
        if dtype != tensor.dtype:
            raise ValueError(f"{what}: {key} has dtype {dtype}; expected {tensor.dtype}")


def _read_tensors(path: str | os.PathLike, infos: Sequence[TensorInfo]) -> list[torch.Tensor]:
    """Tensors in memory of their own: a map of the file would change or die with it."""
    try:
        flats = [torch.empty(info.numel, dtype=_DTYPES[info.dtype]) for info in infos]
        with open(path, "rb") as file:

            def read(places: Iterable[tuple[TensorInfo, torch.Tensor]]) -> None:
                for info, flat in places:
                    if read_at(file, info.start, as_bytes(flat)) != info.end - info.start:
                        raise ValueError(f"{path} was cut off while it was read")

            in_threads(read, zip(infos, flats, strict=True))
    except (OSError, KeyError) as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error})") from None
    return [flat.reshape(info.shape) for info, flat in zip(infos, flats, strict=True)]


def _to_json(value: Any, what: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} cannot be written as JSON: {error}") from None
