"""`peek`: what a network is for, told from its file without building it."""

import json

import numpy as np
import pytest
import torch

from refine.checkpoints import load_generator, load_teacher, native, peek, registry
from refine.checkpoints.foreign import state_dicts
from refine.networks.edm import VPPrecond
from refine.networks.stylegan2 import Generator
from tests.checkpoints.builders import Format, edm_file, stylegan2_file
from tests.checkpoints.rosinality_reference import random_generator

UNET = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
SMALL = {"mapping_kwargs": {"num_layers": 1}, "synthesis_kwargs": {"channel_base": 16, "channel_max": 4}}
TF = "tests/golden/pickles/tf01_ada_skip_uncond.pkl"
LOADERS = {"generator": load_generator, "teacher": load_teacher}


@pytest.fixture(scope="module")
def folder(root, tmp_path_factory):
    """One generator, 8×8×1 with 3 classes, and one teacher, 8×8×2 with 5, in every format."""
    folder = tmp_path_factory.mktemp("files")
    G, T = Generator(4, 3, 4, 8, 1, **SMALL).requires_grad_(False), VPPrecond(8, 2, 5, **UNET).requires_grad_(False)
    for kind, net in (("generator", G), ("teacher", T)):
        names = {"G_ema": G} if kind == "generator" else {"ema": T, "aux": VPPrecond(16, 2, **UNET)}
        native.save_networks(folder / f"{kind}.safetensors", names, provenance={})
        state_dicts.save_plain(folder / f"{kind}-plain.safetensors", net)
        kwargs = {"class": registry.registry_name(net), "init_kwargs": net.init_kwargs}
        (folder / f"{kind}.json").write_text(json.dumps(kwargs))
        np.savez(folder / f"{kind}.npz", **{name: value.numpy() for name, value in net.state_dict().items()})
    (folder / "generator.pkl").write_bytes(stylegan2_file(Format(), G, style=3))
    (folder / "teacher.pkl").write_bytes(edm_file(Format(protocol=2, numpy=1), T))
    torch.save({"g_ema": random_generator(8, dim=16, layers=1)}, folder / "generator.pt")
    (folder / "generator-tf.pkl").write_bytes((root / TF).read_bytes())
    return folder


FILES = [f"{kind}{end}" for kind in LOADERS for end in (".safetensors", "-plain.safetensors", ".npz", ".pkl")]


@pytest.mark.parametrize("name", [*FILES, "generator.pt", "generator-tf.pkl"])
def test_says_what_the_network_is(folder, name, monkeypatch):
    path, kind = folder / name, "teacher" if name.startswith("teacher") else "generator"
    net = LOADERS[kind](path)
    with monkeypatch.context() as patch:
        patch.setattr(registry, "build_empty", None)  # what every network is built with
        info = peek(path, kind)
    classes = net.c_dim if kind == "generator" else net.label_dim
    assert info.kind == kind
    assert (info.img_resolution, info.img_channels, info.classes) == (net.img_resolution, net.img_channels, classes)
    assert info.c_dim == info.label_dim == classes
    other = "teacher" if kind == "generator" else "generator"
    with pytest.raises(ValueError, match=f"expected a {other}"):
        peek(path, other)


def test_a_size_that_is_none(folder, tmp_path):
    path = tmp_path / "x.safetensors"
    state_dicts.save_plain(path, load_teacher(folder / "teacher.safetensors"))
    path.write_bytes(path.read_bytes().replace(b'resolution\\": 8', b'resolution\\":[]'))
    with pytest.raises(ValueError, match="its img_resolution is '\\[\\]'; expected a whole number"):
        peek(path, "teacher")
