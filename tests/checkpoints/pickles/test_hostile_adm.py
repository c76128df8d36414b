"""Hostile `.pt` files with the names of guided-diffusion: each is refused in one line, and nothing in it is run."""

import io
import json
import random
import zipfile
from collections import OrderedDict

import pytest
import torch

from refine.checkpoints import load_teacher
from refine.networks.adm import ADMPrecond
from tests.checkpoints.builders import Call, Global, PersistentId, dumps
from tests.checkpoints.pickles.test_hostile import FORBIDDEN, attempt, bomb

SAID = {"image_size": 4, "num_heads": 1, "use_new_attention_order": False, "noise_schedule": "linear"}
REBUILD, FLOATS = Global("torch._utils", "_rebuild_tensor_v2"), Global("torch", "FloatStorage")


def load(path):
    return load_teacher(path, SAID)


@pytest.fixture(scope="module")
def state():
    net = ADMPrecond(4, 1, model_channels=32, widths=[32], num_blocks=0, attention_levels=[], num_head_channels=None)
    return {name.removeprefix("model."): value for name, value in net.state_dict().items()}


class Forge:
    """A zip of torch.save, whose pickle and storages can be anything."""

    def __init__(self):
        self.storages = {}

    def storage(self, data, key=None, numel=None, kind=FLOATS, tag="storage", location="cpu"):
        key = str(len(self.storages)) if key is None else key
        if data is not None:
            self.storages[str(key)] = data
        return PersistentId((tag, kind, key, location, len(data or b"") // 4 if numel is None else numel))

    def tensor(self, value, shape=None, stride=None, offset=0, storage=None):
        storage = self.storage(value.contiguous().numpy().tobytes()) if storage is None else storage
        shape = tuple(value.shape) if shape is None else shape
        stride = tuple(value.contiguous().stride()) if stride is None else stride
        return Call(REBUILD, storage, offset, shape, stride, False, OrderedDict())

    def table(self, state):
        return {name: self.tensor(value) for name, value in state.items()}

    def zip(self, value):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("x/data.pkl", value if isinstance(value, bytes) else dumps(value, 2))
            for key, data in self.storages.items():
                archive.writestr(f"x/data/{key}", data)
            archive.writestr("x/version", b"3\n")
        return file.getvalue()


def test_the_forged_file_is_read(state, tmp_path):
    forge = Forge()
    (tmp_path / "x.pt").write_bytes(forge.zip(forge.table(state)))
    found = load(tmp_path / "x.pt").state_dict()
    assert all(torch.equal(found[f"model.{name}"], value) for name, value in state.items())


@pytest.mark.parametrize("module, name", FORBIDDEN)
def test_forbidden_globals(module, name, state, tmp_path):
    forge = Forge()
    refusal = attempt(tmp_path / "x.pt", forge.zip({**forge.table(state), "extra": bomb(module, name)}), load=load)
    assert f"names {module}.{name}" in refusal


PLACES = {
    "top": lambda forge, table, bad: bad,
    "before": lambda forge, table, bad: {"a": bad, **table},
    "instead of a tensor": lambda forge, table, bad: {**table, "out.2.bias": bad},
    "storage": lambda forge, table, bad: {**table, "out.2.bias": Call(REBUILD, bad, 0, (2,), (1,), False, {})},
    "type of storage": lambda forge, table, bad: {
        **table, "out.2.bias": forge.tensor(torch.zeros(2), storage=forge.storage(b"\0" * 8, kind=bad))
    },
    "shape": lambda forge, table, bad: {**table, "out.2.bias": forge.tensor(torch.zeros(2), shape=bad)},
    "offset": lambda forge, table, bad: {**table, "out.2.bias": forge.tensor(torch.zeros(2), offset=bad)},
    "attributes of the table": lambda forge, table, bad: Call(
        Global("collections", "OrderedDict"), state={"_metadata": bad}
    ),
    "list": lambda forge, table, bad: [table, bad],
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_forbidden_global_at_every_place(place, state, tmp_path):
    forge = Forge()
    value = PLACES[place](forge, forge.table(state), bomb("builtins", "eval"))
    assert "names builtins.eval" in attempt(tmp_path / "x.pt", forge.zip(value), load=load)


def zeros(*shape):
    return lambda forge: forge.tensor(torch.zeros(shape))


def claimed(shape, stride=None, offset=0, data=b"\0" * 64, numel=None, **storage):
    """A tensor that claims a shape of a storage with little in it."""
    return lambda forge: forge.tensor(
        None, tuple(shape), tuple(stride or [1] * len(shape)), offset, forge.storage(data, numel=numel, **storage)
    )


SPOILT = {
    "beyond its storage": {"out.2.bias": claimed([1000])},
    "before its storage": {"out.2.bias": claimed([2], offset=-1)},
    "one number for all": {"out.2.weight": claimed([2, 32, 3, 3], [0, 0, 0, 0])},
    "overlapping": {"out.2.weight": claimed([2, 4], [1, 1])},
    "negative shape": {"out.2.bias": claimed([-2])},
    "a shape of text": {"out.2.bias": lambda forge: forge.tensor(None, ("2",), (1,), 0, forge.storage(b"\0" * 8))},
    "a storage of other size": {"out.2.bias": claimed([2], numel=1 << 40)},
    "a storage that is not there": {"out.2.bias": claimed([2], data=None, numel=2, key="999")},
    "a storage of another file": {"out.2.bias": claimed([2], key="../../../etc/passwd", data=None, numel=2)},
    "something outside": {"out.2.bias": claimed([2], tag="module")},
    "integers": {"out.2.bias": lambda forge: forge.tensor(
        None, (2,), (1,), 0, forge.storage(b"\0" * 16, numel=2, kind=Global("torch", "LongStorage"))
    )},
    "many classes": {"label_emb.weight": claimed([1 << 40, 1], [0, 0])},
    "classes of another width": {"label_emb.weight": zeros(3, 7)},
    "wide": {"time_embed.0.weight": claimed([1 << 30, 1 << 18], [0, 0])},
    "wider than the file": {"time_embed.0.weight": zeros(128, 64)},
    "odd": {"time_embed.0.weight": zeros(128, 33)},
    "flat": {"time_embed.0.weight": zeros(128 * 32)},
    "no channels": {"input_blocks.0.0.weight": zeros(32, 0, 3, 3)},
    "many channels": {"input_blocks.0.0.weight": zeros(32, 1, 3, 3, 1)},
    "no output": {"out.2.weight": zeros(0, 32, 3, 3)},
    "three outputs": {"out.2.weight": zeros(3, 32, 3, 3)},
    "a kernel of five": {"out.2.weight": zeros(2, 32, 5, 5)},
    "attention of one axis": {"middle_block.1.qkv.weight": zeros(96)},
    "attention of five axes": {"middle_block.1.qkv.weight": zeros(96, 32, 1, 1, 1)},
    "a decoder of holes": {"output_blocks.7.0.in_layers.0.weight": zeros(32)},
    "an endless decoder": {"output_blocks.9999.0.in_layers.0.weight": zeros(32)},
    "a decoder of other places": {"output_blocks.0.7.in_layers.0.weight": zeros(32)},
    "an upsampler nowhere": {"output_blocks.0.1.conv.weight": zeros(32, 32, 3, 3)},
    "a long decoder": {f"output_blocks.{k}.0.in_layers.0.weight": zeros(1) for k in range(150)},
    "many levels": {
        name: zeros(1)
        for k in range(60)
        for name in (f"output_blocks.{k}.0.in_layers.0.weight", f"output_blocks.{k}.1.conv.weight")
    },
    "a width of nothing": {"output_blocks.0.0.out_layers.0.weight": zeros(0)},
    "a width of another": {"output_blocks.0.0.out_layers.0.weight": zeros(64)},
    "an embedding of another": {"output_blocks.0.0.emb_layers.1.weight": zeros(5, 128)},
    "many more tensors": {f"extra.{k}": zeros(1) for k in range(800)},
    "a name that ends the line": {"x\n\x1b[31mred\x07": zeros(1)},
    "a table among the tensors": {"out.2.bias": lambda forge: {"a": 1}},
    "text among the tensors": {"out.2.bias": lambda forge: "0, 0"},
    "lacking": {"input_blocks.0.0.bias": None},
    "without a middle": dict.fromkeys(("middle_block.1.qkv.weight", "middle_block.1.norm.weight")),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_networks(case, state, tmp_path):
    forge = Forge()
    table = forge.table(state)
    for name, make in SPOILT[case].items():
        table.pop(name, None)
        if make is not None:
            table[name] = make(forge)
    assert attempt(tmp_path / "x.pt", forge.zip(table), load=load) is not None


@pytest.mark.parametrize("name", ["x" * 100_000, (1, 2)])
def test_what_has_no_name_is_left_aside(name, state, tmp_path):
    forge = Forge()
    assert (
        attempt(tmp_path / "x.pt", forge.zip({**forge.table(state), name: forge.tensor(torch.zeros(1))}), load=load)
        is None
    )


def test_views_of_one_small_storage_are_no_large_network(state, tmp_path):
    forge = Forge()
    shared = forge.storage(b"\0" * 4 * 3 * 10**6, key="0")
    wide = ADMPrecond(4, 1, model_channels=64, widths=[256], num_blocks=0, attention_levels=[])
    table = {
        name.removeprefix("model."): forge.tensor(value, storage=shared) for name, value in wide.state_dict().items()
    }
    assert sum(value.nbytes for value in wide.state_dict().values()) > 13e6
    assert "asks for more memory than the file is long" in attempt(tmp_path / "x.pt", forge.zip(table), load=load)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("part", range(4))
def test_cut_off_and_changed_bytes(legacy, part, state, tmp_path):
    torch.save(state, tmp_path / "whole.pt", _use_new_zipfile_serialization=not legacy)
    data, rng = (tmp_path / "whole.pt").read_bytes(), random.Random(f"{legacy}{part}")
    for _ in range(3):
        assert attempt(tmp_path / "x.pt", data[: rng.randrange(len(data))], load=load) is not None
    for _ in range(4):
        broken = bytearray(data)
        for _ in range(rng.choice([1, 4, 30])):
            near = rng.random() < 0.5  # of the pickle, or anywhere
            broken[rng.randrange(min(len(data), 9000) if near else len(data))] = rng.randrange(256)
        attempt(tmp_path / "x.pt", bytes(broken), load=load)


BESIDE = {
    "too long": lambda: '{"image_size": 4, "x": "' + "x" * (2 << 20) + '"}',
    "deep": lambda: '{"image_size":' * 100_000,
    "NaN": lambda: '{"image_size": NaN}',
    "huge": lambda: '{"image_size": 1' + "0" * 4000 + "}",
    "many": lambda: json.dumps({f"n{k}": k for k in range(10_000)}),
    "control characters": lambda: '{"\\u001b[31m\\n": 1}',
    "not text": lambda: "\udcff\udcfe",
    "large steps": lambda: json.dumps({**SAID, "diffusion_steps": 1 << 62}),
    "large images": lambda: json.dumps({**SAID, "image_size": 1 << 62}),
    "many heads": lambda: json.dumps({**SAID, "num_heads": 1 << 62}),
    "infinite dropout": lambda: '{"image_size": 4, "dropout": Infinity}',
}


@pytest.mark.parametrize("case", BESIDE)
def test_hostile_options_beside_the_file(case, state, tmp_path):
    (tmp_path / "x.json").write_text(BESIDE[case](), encoding="utf-8", errors="surrogateescape")
    forge = Forge()
    assert attempt(tmp_path / "x.pt", forge.zip(forge.table(state)), load=load_teacher) is not None
