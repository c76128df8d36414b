"""One network as safetensors or npz with the constructor arguments beside it."""

import io
import json
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from refine.checkpoints import load_generator, load_teacher
from refine.checkpoints.foreign.opening import open_container
from refine.checkpoints.foreign.state_dicts import save_plain
from refine.checkpoints.pickles.inert import Blob
from refine.checkpoints.pickles.tensors import Storage, TensorRef
from tests.checkpoints.foreign.test_nvidia import (
    assert_generator,
    assert_same,
    assert_teacher,
    golden_network,
    golden_teacher,
)


def write(path, net, kwargs=None):
    state = net.state_dict()
    if path.suffix == ".safetensors":
        metadata = {} if kwargs is None else {"init_kwargs": json.dumps(kwargs)}
        safetensors.torch.save_file(state, path, metadata=metadata)
    else:
        extra = {} if kwargs is None else {"init_kwargs": np.array(json.dumps(kwargs))}
        np.savez(path, **{name: value.numpy() for name, value in state.items()}, **extra)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("where", ["in the call", "in the file", "beside it"])
def test_generator(where, suffix, tmp_path):
    G, data = golden_network("g02_skip_cond_clamp")
    G.requires_grad_(False)
    path = write(tmp_path / f"x{suffix}", G, G.init_kwargs if where == "in the file" else None)
    if where == "in the call":
        with open_container(path, kwargs=G.init_kwargs, class_name="stylegan2.Generator") as container:
            loaded = container.load("G_ema").eval()
    else:
        if where == "beside it":
            (tmp_path / "x.json").write_text(json.dumps({"class": "stylegan2.Generator", "init_kwargs": G.init_kwargs}))
        loaded = load_generator(path)
    assert_same(loaded, G)
    assert_generator(loaded, data)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_teacher(suffix, tmp_path):
    net, data = golden_teacher("song_ncsnpp_ve_uncond")
    path = write(tmp_path / f"x{suffix}", net.requires_grad_(False))
    (tmp_path / "x.json").write_text(json.dumps({"class": "edm.VEPrecond", "init_kwargs": net.init_kwargs}))
    assert_teacher(load_teacher(path), data)
    with pytest.raises(ValueError, match="expected a generator"):
        load_generator(path)


def test_save_plain(tmp_path):
    G, _ = golden_network("g07_skip_sep8_misc")
    save_plain(tmp_path / "x.safetensors", G)
    assert_same(load_generator(tmp_path / "x.safetensors"), G)


def test_compressed_and_fortran_order(tmp_path):
    G, _ = golden_network("g01_skip_uncond")
    arrays = {name: value.numpy().copy(order="F") for name, value in G.state_dict().items()}
    np.savez_compressed(tmp_path / "x.npz", init_kwargs=np.array(json.dumps(G.init_kwargs)), **arrays)
    assert_same(load_generator(tmp_path / "x.npz"), G)


def test_big_endian_numbers(tmp_path):
    """Read as they are meant, and written back in the file's order."""
    G, _ = golden_network("g01_skip_uncond")
    arrays = {name: value.numpy().astype(">f8") for name, value in G.state_dict().items()}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", init_kwargs=np.array(json.dumps(G.init_kwargs)), **arrays)
        assert_same(load_generator(tmp_path / "x.npz"), G)
    data = np.arange(1, 7, dtype=">f8").tobytes()
    ref = TensorRef.checked(Storage(torch.float64, 6, Blob(io.BytesIO(data), 0, 48), 0, swapped=True), 1, (5,), (1,))
    assert ref.read().tolist() == [2, 3, 4, 5, 6] and ref.encoded(ref.read()) == data[8:]
    assert ref.encoded(torch.full([5], 0.5)) == np.full(5, 0.5, ">f8").tobytes()


def npz_with(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_refused(tmp_path):
    G, _ = golden_network("g01_skip_uncond")
    G.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing tells how its network is built"):
        load_generator(npz_with(tmp_path / "x.npz", weight=np.zeros(3, np.float32)))
    for suffix in (".npz", ".safetensors"):
        with pytest.raises(ValueError, match="not valid JSON"):
            path = write(tmp_path / f"y{suffix}", G)
            (tmp_path / "y.json").write_text("{")
            load_generator(path)
    objects = npz_with(tmp_path / "o.npz", a=np.array([print], dtype=object))
    with pytest.raises(ValueError, match="not a plain array"):
        load_generator(objects)
    whole = write(tmp_path / "z.npz", G, G.init_kwargs).read_bytes()
    for count in (200, len(whole) // 2, len(whole) - 10):
        (tmp_path / "z.npz").write_bytes(whole[:count])
        with pytest.raises(ValueError, match="broken or cut-off"):
            load_generator(tmp_path / "z.npz")
    bomb = tmp_path / "bomb.npz"
    np.savez_compressed(bomb, a=np.zeros(1 << 28, dtype=np.float32).reshape(1, -1)[:, : 1 << 26])
    with pytest.raises(ValueError, match="many times the memory"):
        load_generator(bomb)
    integers = npz_with(tmp_path / "i.npz", a=np.arange(3), init_kwargs=np.array("{}"))
    with pytest.raises(ValueError, match="floating point"):
        load_generator(integers)
    for shape in ("(1,,2)", "(1 2)", "(01,)", "(" + "9" * 5000 + ",)"):  # what Python cannot even parse
        with zipfile.ZipFile(tmp_path / "s.npz", "w") as archive:
            header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
            archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
        with pytest.raises(ValueError, match=r"not a plain array|other data"):
            load_generator(tmp_path / "s.npz")
    assert torch.equal(load_generator(write(tmp_path / "ok.npz", G, G.init_kwargs)).mapping.w_avg, G.mapping.w_avg)
