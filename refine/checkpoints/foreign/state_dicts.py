"""One network as a flat table of its own tensor names: safetensors or `.npz`, with the constructor arguments beside it.

The arguments are a JSON object, either {"class": "stylegan2.Generator", "init_kwargs": {…}} or the init kwargs alone
(then of a StyleGAN2 generator, or of an EDMPrecond where `model_type` is among them), found, in this order,

    in the call              `open_container(path, kwargs={…}, class_name='edm.VPPrecond')`; arguments without a
                             class are laid over what names and shapes tell, see `contents`
    in the file              safetensors: the metadata 'class' and 'init_kwargs'; npz: an array of text 'init_kwargs'
    beside the file          `NAME.json` beside `NAME.safetensors`
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch

from refine.checkpoints import archives, registry
from refine.checkpoints.foreign import contents, diffusers_folder
from refine.checkpoints.foreign.container import Container, FileNetwork, plain, saying
from refine.checkpoints.native import _DTYPES
from refine.checkpoints.pickles.inert import Blob, Refused, shown
from refine.checkpoints.pickles.tensors import Storage, TensorRef
from refine.checkpoints.sniff import TensorInfo
from refine.dnnlib import read_text

_MAX_JSON_BYTES = 1 << 20
_NPY_DTYPES = {"f2": torch.float16, "f4": torch.float32, "f8": torch.float64}


def open_safetensors(
    path: Path,
    stream: BinaryIO,
    expected: str,
    kwargs: Mapping[str, Any] | None = None,
    class_name: str | None = None,
    *,
    header: tuple[dict[str, TensorInfo], dict[str, str]],
) -> Container:
    """The network of a plain safetensors file; for `header` see `sniff.read_safetensors_header`.

    Raises:
        ValueError: nothing tells its class and arguments.
    """
    given = _given(kwargs, class_name)
    infos, metadata = header
    with saying(str(path)):
        from_diffusers = None if given else diffusers_folder.describe(path)
    if from_diffusers is not None:
        return _open_diffusers(path, stream, infos, from_diffusers)
    with saying(str(path)):
        if (by_names := _by_names(path, stream, infos, metadata, given)) is not None:
            return by_names
    _check_arguments(path, metadata, given, "a safetensors file of another program", expected)
    with saying(str(path)):
        return _container(path, stream, tensor_refs(stream, infos), dict(metadata), "a plain safetensors file", given)


def tensor_refs(stream: BinaryIO, infos: Mapping[str, TensorInfo]) -> dict[str, TensorRef]:
    """Where the tensors of a safetensors file are, by its header.

    Raises:
        Refused: one has an unusual dtype.
    """
    refs = {}
    for name, info in infos.items():
        if info.dtype not in _DTYPES:
            raise Refused(f"{shown(name)} has dtype {info.dtype}")
        refs[name] = _ref(stream, _DTYPES[info.dtype], info.shape, info.start, info.end - info.start)
    return refs


def _by_names(
    path: Path, stream: BinaryIO, infos: Mapping[str, TensorInfo], metadata: Mapping[str, str], given: dict
) -> Container | None:
    """The networks of a safetensors file that says nothing of them but the names of their tensors."""
    if _told(path, metadata, given):
        return None
    known = {name: info for name, info in infos.items() if info.dtype in _DTYPES}
    found = contents.find(tensor_refs(stream, known), path, given.get("init_kwargs"))
    return None if found is None else Container(path, stream, *found[:2], takes_kwargs=found[2])


def _told(path: Path, metadata: Mapping[str, str], given: Mapping[str, Any]) -> bool:
    """Whether class and arguments are said in full."""
    in_call = "class_name" in given or "init_kwargs" in given.get("init_kwargs", {})
    return in_call or "init_kwargs" in metadata or path.with_suffix(".json").is_file()


def _given(kwargs: Mapping[str, Any] | None, class_name: str | None) -> dict[str, Any]:
    """What the call says of the network."""
    said = {"init_kwargs": kwargs, "class_name": class_name}
    return {name: value for name, value in said.items() if value is not None}


def _open_diffusers(path: Path, stream: BinaryIO, infos: Mapping[str, TensorInfo], init_kwargs: dict) -> Container:
    """The denoiser of a folder of diffusers, opened by its weights file."""
    with saying(str(path)):
        refs = {diffusers_folder.our_name(name): ref for name, ref in tensor_refs(stream, infos).items()}
        network = FileNetwork("ddpm.DDPMPrecond", plain(init_kwargs), refs)
        return Container(path, stream, "a UNet2DModel of diffusers", {"ema": ("teacher", lambda: network)})


def open_npz(
    path: Path,
    stream: BinaryIO,
    expected: str,
    kwargs: Mapping[str, Any] | None = None,
    class_name: str | None = None,
) -> Container:
    """The network of a NumPy archive.

    Raises:
        ValueError: it is broken, holds other arrays than numbers, or nothing tells its class and arguments.
    """
    given, size = _given(kwargs, class_name), os.fstat(stream.fileno()).st_size
    refs, metadata = {}, {}
    with saying(str(path)), archives.opened(stream) as archive:
        inflated = archives.check_inflation(archive.infolist(), size)
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            dtype, shape, fortran, start = _npy_header(archive, info)
            if dtype.startswith(("U", "S")):
                metadata[name] = _npy_text(archive, info)
                continue
            if dtype.lstrip(">") not in _NPY_DTYPES:
                raise Refused(f"{shown(name)} has dtype {shown(dtype)}; expected floating point numbers")
            refs[name] = _npy_ref(archive, stream, info, dtype, shape, fortran, start, size)
    with saying(str(path)):
        found = None if _told(path, metadata, given) else contents.find(refs, path, given.get("init_kwargs"))
        if found is not None:
            return Container(path, stream, *found[:2], nbytes=inflated, takes_kwargs=found[2])
    _check_arguments(path, metadata, given, "a NumPy archive (.npz)", expected)
    with saying(str(path)):
        return _container(path, stream, refs, metadata, "a NumPy archive of one network", given, inflated)


def _npy_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[str, tuple[int, ...], bool, int]:
    """dtype ('f4', or 'U…' for text), shape, whether in Fortran order, and where the data begin."""
    with archive.open(info) as entry:
        shape, fortran, dtype = archives.npy_header(entry)
        return dtype.str.lstrip("<|="), shape, fortran, entry.tell()


def _npy_text(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> str:
    if info.file_size > _MAX_JSON_BYTES:
        raise Refused(f"{shown(info.filename)} is an overlong text")
    array = archives.read_npy(archive, info)
    return str(array.reshape(-1)[0]) if array.size == 1 else ""


def _npy_ref(archive, stream, info, code, shape, fortran, start, size) -> TensorRef:
    length, dtype, swapped = info.file_size - start, _NPY_DTYPES[code.lstrip(">")], code.startswith(">")
    if info.compress_type == zipfile.ZIP_STORED:
        stream.seek(info.header_offset + 26)
        lengths = stream.read(4)
        start += info.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        if start + length > size:
            raise Refused("the archive is cut off")
        return _ref(stream, dtype, shape, start, length, fortran, swapped)
    return _ref(
        BytesIO(archive.read(info)), dtype, shape, start, length, fortran, swapped
    )  # no longer than the entry says


def _ref(stream, dtype, shape, start, length, fortran=False, swapped=False) -> TensorRef:
    if len(shape) > 8 or any(size >= 1 << 40 for size in shape):
        raise Refused("an array has an impossible shape")
    steps, step = [], 1
    for size in shape if fortran else reversed(shape):
        steps.append(step)
        step *= size
    nbytes = step * dtype.itemsize
    if length != nbytes:
        raise Refused("an array has other data than its shape says")
    stride = tuple(steps if fortran else reversed(steps))
    storage = Storage(dtype, step, Blob(stream, start, nbytes), 0, swapped)
    return TensorRef.checked(storage, 0, tuple(shape), stride)


def _container(
    path: Path,
    stream: BinaryIO,
    refs: dict[str, TensorRef],
    metadata: Mapping[str, str],
    family: str,
    given: dict,
    nbytes: int = 0,
) -> Container:
    class_name, init_kwargs = _arguments(path, metadata, **given)
    kind = registry.kind_of(class_name)
    name = {"generator": "G_ema", "discriminator": "D", "teacher": "ema"}.get(kind)
    if name is None:
        raise Refused(f"it names the class {shown(class_name)}; expected a generator, discriminator or teacher")
    network = FileNetwork(class_name, init_kwargs, refs)
    return Container(path, stream, family, {name: (kind, lambda: network)}, nbytes=nbytes, takes_kwargs=True)


def _check_arguments(path: Path, metadata: Mapping[str, str], given: dict, what: str, expected: str) -> None:
    """Whether anything tells how the network is built; otherwise the file could be of any program."""
    if given.get("init_kwargs") is None and "init_kwargs" not in metadata and not path.with_suffix(".json").is_file():
        raise ValueError(
            f"{path} is {what}, and nothing tells how its network is built (init kwargs in its metadata, or in "
            f"{path.stem}.json beside it); expected {expected}"
        )


def _arguments(
    path: Path, metadata: Mapping[str, str], init_kwargs: dict | None = None, class_name: str | None = None
) -> tuple[str, dict[str, Any]]:
    table: Any = {}
    if init_kwargs is not None:
        table = init_kwargs
    elif "init_kwargs" in metadata:
        table = {"init_kwargs": _json(metadata["init_kwargs"]), "class": metadata.get("class")}
    else:
        beside = path.with_suffix(".json")
        try:
            table = _json(read_text(beside, _MAX_JSON_BYTES))
        except ValueError as error:
            raise Refused(str(error)) from None
    if isinstance(table, dict) and "init_kwargs" in table:
        class_name, table = class_name or table.get("class"), table["init_kwargs"]
    if not isinstance(table, dict):
        raise Refused("its init kwargs are not a table")
    class_name = class_name or ("edm.EDMPrecond" if "model_type" in table else "stylegan2.Generator")
    if not isinstance(class_name, str):
        raise Refused("its class is not a name")
    return class_name, plain(table)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise Refused("its init kwargs are not valid JSON") from None


def save_plain(path: str | os.PathLike, network: torch.nn.Module) -> None:
    """Writes one network as plain safetensors: its own tensor names, class and init kwargs as metadata.

    Raises:
        ValueError: the class is not one of the registry.
        OSError: the file cannot be written.
    """
    from refine.checkpoints.writers import save_safetensors

    metadata = {"class": registry.registry_name(network), "init_kwargs": json.dumps(network.init_kwargs)}
    state = {name: value.detach().cpu().contiguous().clone() for name, value in network.state_dict().items()}
    save_safetensors(path, state, metadata)
