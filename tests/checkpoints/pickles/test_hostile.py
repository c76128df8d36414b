"""Hostile and broken files: each is refused with one clear line, or loads with the right numbers; nothing is run.

Every case of this file goes through `attempt`, which holds it to that, and to limits of time and memory.
"""

import io
import json
import os
import random
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch

from refine.checkpoints import load_generator, load_teacher
from refine.checkpoints.pickles.inert import Blob
from refine.metrics.image_sets import ImageSet
from refine.networks.edm import EDMPrecond
from refine.networks.stylegan2 import Generator
from refine.training.finding import training_states
from refine.training.state import load_training_state
from tests.checkpoints import builders
from tests.checkpoints.builders import Call, Format, Global, New, PersistentId, dumps, edm_file, stylegan2_file, write
from tests.limits import outcome, zip_of

LIMIT_SECONDS = 2.0  # of processor time
LIMIT_BYTES = 1 << 30  # of memory above what the process had
TRAP = "REFINE_TEST_TRAP"  # an environment variable that the payloads would set


@pytest.fixture(scope="module")
def G():
    torch.manual_seed(1)
    kwargs = {"z_dim": 4, "c_dim": 0, "w_dim": 4, "img_resolution": 4, "img_channels": 1}
    return Generator(
        **kwargs, mapping_kwargs={"num_layers": 1}, synthesis_kwargs={"channel_base": 16, "channel_max": 4}
    )


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(1)
    return EDMPrecond(
        8, 1, model_type="SongUNet", model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[]
    )


def memory_peak(reset=False):
    """Largest memory of this process since the last reset, in bytes; 0 where the system does not tell."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def attempt(path, data, expected=None, load=load_generator):
    """The refusal of a file, or None where it loads and has the expected numbers (or was not expected to have any)."""
    write(path, data)
    os.environ.pop(TRAP, None)
    before, refusal, memory = time.process_time(), None, memory_peak(reset=True)
    try:
        network = load(path)
    except ValueError as error:
        refusal = str(error)
        assert refusal.startswith(str(path)) and "\n" not in refusal and 12 < len(refusal) - len(str(path)) < 500, (
            refusal
        )
    assert TRAP not in os.environ, "something in the file was run"
    assert time.process_time() - before < LIMIT_SECONDS
    assert memory_peak() - memory < LIMIT_BYTES
    if refusal is None and expected is not None:
        for a, b in zip(network.state_dict().values(), expected.state_dict().values(), strict=True):
            assert a.shape == b.shape
    return refusal


# Globals that must not be there, wherever a file can name one.

FORBIDDEN = [
    *(("posix", "system"), ("os", "system"), ("builtins", "eval"), ("builtins", "exec"), ("builtins", "getattr")),
    *(("subprocess", "Popen"), ("importlib", "import_module"), ("runpy", "run_path"), ("pickle", "loads")),
    *(("torch", "load"), ("torch.hub", "load"), ("torch.storage", "_load_from_bytes.__globals__"), ("numpy", "load")),
    *(("operator", "attrgetter"), ("functools", "partial"), ("copyreg", "_reconstructor"), ("types", "CodeType")),
    *(("torch_utils.persistence", "import_hook"), ("refine.checkpoints.pickles.machine", "Machine")),
    *(("torch._utils", "_rebuild_tensor_v2.__class__"), ("collections", "OrderedDict.fromkeys"), ("", "")),
]
PAYLOAD = f"__import__('os').environ.setdefault('{TRAP}', '1')"


STORAGE = builders.storage_bytes(torch.zeros(3))


def bomb(module, name):
    return Call(Global(module, name), PAYLOAD)


def positions(form, G, bad):
    """The hostile value at every level of a file."""
    good = form.module(G, G.init_kwargs)
    state = good.args[0]["state"]

    def changed(**parts):
        return {"G_ema": form.persistent("Generator", {**state, **parts})}

    name = form.name
    rebuild, load = name("torch._utils", "_rebuild_tensor_v2"), name("torch.storage", "_load_from_bytes")
    return {
        "top": bad,
        "value": {"G_ema": good, "extra": bad},
        "before": {"extra": bad, "G_ema": good},
        "data set": {"training_set_kwargs": {"path": bad}, "G_ema": good},
        "attribute": changed(z_dim=bad),
        "hook": changed(_forward_hooks={0: bad}),
        "init kwarg": changed(_init_kwargs={**G.init_kwargs, "c_dim": bad}),
        "init arg": changed(_init_args=(bad,)),
        "parameter": changed(_parameters={"x": bad}),
        "buffer": changed(_buffers={"x": bad}),
        "module": changed(_modules={"x": bad}),
        "storage": changed(_parameters={"x": Call(rebuild, bad, 0, (1,), (1,), False, {})}),
        "shape": changed(_parameters={"x": Call(rebuild, Call(load, STORAGE), 0, bad, (1,), False, {})}),
        "bytes": changed(_parameters={"x": Call(rebuild, Call(load, bad), 0, (1,), (1,), False, {})}),
        "meta": {"G_ema": Call(name("torch_utils.persistence", "_reconstruct_persistent_obj"), bad)},
        "module_src": {
            "G_ema": Call(
                name("torch_utils.persistence", "_reconstruct_persistent_obj"),
                {"type": "class", "version": 6, "module_src": bad, "class_name": "Generator", "state": state},
            )
        },
        "dtype": {"G_ema": good, "x": Call(name("numpy", "dtype"), bad, False, True)},
        "array": {"G_ema": good, "x": Call(name("numpy.core.multiarray", "_reconstruct"), bad, (0,), b"b")},
        "state": {"G_ema": good, "x": New(name("torch.nn.modules.container", "ModuleDict"), {"_modules": bad})},
        "tuple": ({"G_ema": good}, bad),
    }


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("where", list(positions(Format(), Generator(4, 0, 4, 4, 1), 0)))
def test_forbidden_global_at_every_level(where, protocol, G, tmp_path):
    form = Format(protocol=protocol)
    data = form.dumps(positions(form, G, bomb("builtins", "eval"))[where])
    assert "names builtins.eval" in attempt(tmp_path / "x.pkl", data)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("module, name", FORBIDDEN)
def test_forbidden_globals(module, name, protocol, G, tmp_path):
    form = Format(protocol=protocol)
    refusal = attempt(tmp_path / "x.pkl", form.dumps({"x": bomb(module, name), "G_ema": form.module(G, G.init_kwargs)}))
    assert f"names {module}.{name}" in refusal


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("where", list(positions(Format(), Generator(4, 0, 4, 4, 1), 0)))
@pytest.mark.parametrize("bad", ["number", "text", "cycle", "persistent id", "stub"])
def test_wrong_value_at_every_level(where, bad, protocol, G, tmp_path):
    form, cycle = Format(protocol=protocol), []
    cycle.append(cycle)
    values = {"number": -1, "text": "x" * 300, "cycle": cycle, "persistent id": PersistentId("x")}
    value = {**values, "stub": form.name("collections", "OrderedDict")}[bad]
    refusal = attempt(tmp_path / "x.pkl", form.dumps(positions(form, G, value)[where]), G)
    must = where in ("top", "parameter", "buffer", "module", "storage", "shape", "bytes", "meta", "array")
    assert refusal is not None or not (must or bad == "persistent id")


OLD = {
    "endless number": b"(dp0\nVa\nI" + b"1" * 5000 + b"\ns.",
    "endless long": b"(lp0\nL" + b"9" * 5000 + b"L\na.",
    "no number": b"(lp0\nIx\na.",
    "index": b"(lp99999999999\n.",
    "negative index": b"(lp-1\n.",
    "nothing there": b"(lp0\ng7\na.",
    "half a table": b"(Va\nd.",
    "number in a later protocol": b"\x80\x02]I1\na.",
    "text in a later protocol": b"\x80\x04]Vx\na.",
    "no line end": b"(lp0\nVabc",
    "half an escape": b"(lp0\nV\\u12\na.",
    "reconstructed": b"ccopy_reg\n_reconstructor\n(c__builtin__\nobject\nc__builtin__\neval\nNtR.",
    "reconstructed from a number": b"ccopy_reg\n_reconstructor\n(I1\nc__builtin__\nobject\nNtR.",
    "a table of itself": b"ccopy_reg\n_reconstructor\n(cdnnlib.util\nEasyDict\nc__builtin__\ndict\nI1\ntR.",
    "instance": b"(i__builtin__\neval\n.",
    "object": b"(c__builtin__\neval\no.",
    "persistent": b"(lp0\nPx\na.",
}


@pytest.mark.parametrize("case", OLD)
def test_hostile_lines_of_old_protocols(case, tmp_path):
    assert attempt(tmp_path / "x.pkl", OLD[case]) is not None


# Storages inside.


def storage_variants(good):
    """Streams of one storage, with something wrong in each."""
    hostile = [dumps(bomb("builtins", "eval"), 2), dumps(bomb("os", "system"), 2)]
    pickles, rest = [], good
    for _ in range(5):
        end = _pickle_end(rest)
        pickles.append(rest[:end])
        rest = rest[end:]
    cases = {}
    for index in range(5):
        for k, payload in enumerate(hostile):
            cases[f"payload {k} in pickle {index}"] = b"".join([*pickles[:index], payload, *pickles[index + 1 :], rest])
    persistent = ("storage", Global("torch", "FloatStorage"), "0", "cpu", 1, None)
    ids = {
        "global": ("storage", bomb("builtins", "eval"), "0", "cpu", 1, None),
        "numel": (*persistent[:4], 1 << 60, None),
        "negative": (*persistent[:4], -1, None),
        "view": (*persistent[:5], ("v", 0, 1)),
        "short": persistent[:3],
        "kind": ("module", *persistent[1:]),
        "dtype": ("storage", Global("torch", "ComplexFloatStorage"), *persistent[2:]),
        "object": ("storage", Global("builtins", "object"), *persistent[2:]),
        "name": (*persistent[:2], 3, *persistent[3:]),
    }
    for name, value in ids.items():
        cases[f"id: {name}"] = b"".join([*pickles[:3], dumps(PersistentId(value), 2), pickles[4], rest])
    cases |= {
        "magic": b"".join([dumps(1, 2), *pickles[1:], rest]),
        "version": b"".join([pickles[0], dumps(1002, 2), *pickles[2:], rest]),
        "big-endian": b"".join([*pickles[:2], dumps({"little_endian": False}, 2), *pickles[3:], rest]),
        "keys": b"".join([*pickles[:4], dumps(["1"], 2), rest]),
        "two numbers of elements": b"".join([*pickles, struct.pack("<q", 2), rest[8:]]),
        "huge number of elements": b"".join([*pickles, struct.pack("<q", 1 << 62), rest[8:]]),
        "a byte more": good + b"x",
        "a byte less": good[:-1],
        "empty": b"",
        "a zip": b"PK\x03\x04" + good,
        "nested": good[:20] + good,
    }
    return cases


def _pickle_end(data):
    import pickletools

    return next(position for op, _, position in pickletools.genops(data) if op.name == "STOP") + 1


@pytest.mark.parametrize("case", list(storage_variants(STORAGE)))
def test_hostile_storages(case, G, tmp_path):
    variant = storage_variants(STORAGE)[case]
    seen = []

    def wrap(data):  # the first storage of the file
        seen.append(0)
        return variant if len(seen) == 1 else data

    assert attempt(tmp_path / "x.pkl", stylegan2_file(Format(wrap=wrap), G)) is not None


@pytest.mark.parametrize(
    "offset, size, stride",
    [
        *((0, (13,), (1,)), (1, (12,), (1,)), (0, (4, 4), (3, 1)), (0, (2,), (12,)), (0, (1 << 40,), (1,))),
        *((0, (-1,), (1,)), (0, (2,), (-1,)), (0, (3, 3), (1, 1)), (0, (1 << 30,), (0,)), (0, (2, 2), (0, 1))),
        *((0, (1,) * 9, (1,) * 9), (0, (1.0,), (1,)), (0, (True,), (1,)), (None, (1,), (1,)), (0, [1], [1])),
        *((-1, (1,), (1,)), (0, (2,), ()), (1 << 62, (1,), (1,))),
        *((0, (1 << 47,) * 8, (0,) * 8), (12, (1,), (1,)), (0, "x", (1,)), (0, (2,), ("x",))),
    ],
)  # fmt: skip
def test_tensors_beyond_their_storage(offset, size, stride, G, tmp_path):
    form = Format()
    storage = Call(form.name("torch.storage", "_load_from_bytes"), builders.storage_bytes(torch.zeros(12)))
    tensor = Call(form.name("torch._utils", "_rebuild_tensor_v2"), storage, offset, size, stride, False, {})
    assert attempt(tmp_path / "x.pkl", form.dumps({"x": tensor, "G_ema": form.module(G, G.init_kwargs)})) is not None


ARRAYS = {
    "object": ("O8", (1,), b"\x00" * 8, ("|", None)),
    "object by letter": ("O", (1,), b"\x00" * 8, ("|", None)),
    "text": ("U4", (1,), b"\x00" * 16, ("<", None)),
    "void": ("V8", (1,), b"\x00" * 8, ("|", None)),
    "fields": ("f4", (1,), b"\x00" * 4, ("<", ("a",))),
    "too few bytes": ("f4", (2,), b"\x00" * 4, ("<", None)),
    "huge": ("f4", (1 << 39, 1 << 39), b"", ("<", None)),
    "negative": ("f4", (-1,), b"", ("<", None)),
    "complex": ("c8", (1,), b"\x00" * 8, ("<", None)),
    "no code": (None, (1,), b"\x00" * 4, ("<", None)),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_hostile_arrays(case, G, tmp_path):
    code, shape, data, (order, names) = ARRAYS[case]
    form = Format()
    dtype = Call(form.name("numpy", "dtype"), code, False, True, state=(3, order, None, names, None, -1, -1, 0))
    reconstruct = form.name("numpy._core.multiarray", "_reconstruct")
    array = Call(reconstruct, form.name("numpy", "ndarray"), (0,), b"b", state=(1, shape, dtype, False, data))
    scalar = Call(form.name("numpy._core.multiarray", "scalar"), dtype, data)
    G_ema = form.module(G, G.init_kwargs)
    assert attempt(tmp_path / "x.pkl", form.dumps({"x": array, "G_ema": G_ema})) is not None
    assert case == "too few bytes" or attempt(tmp_path / "x.pkl", form.dumps({"x": scalar, "G_ema": G_ema})) is not None


# Bombs, as raw opcodes.


def doubled(levels):
    """A tuple of a tuple … of a tuple, each twice: 2^levels leaves in a few bytes."""
    return b"N" + b"".join(b"q\x00h\x00\x86" for _ in range(levels))


def copied(function, items, times):
    """A global called with the same list many times."""
    made = b"c" + function + b"\nq\x000](" + items + b"eq\x01"
    return b"\x80\x02" + made + b"h\x00h\x01\x85R" * times + b"."


NUMBERS = b"".join(b"J" + struct.pack("<i", i) for i in range(100_000))
WORDS = b"".join(b"X\x05\x00\x00\x00%05d" % i for i in range(100_000))


def colliding(count, between=b""):
    """Numbers with one hash: multiples of the modulus that Python takes of them."""
    values = (i * ((1 << 61) - 1) for i in range(1, count + 1))
    return b"".join(b"\x8a\x0a" + value.to_bytes(10, "little") + between for value in values)


def neighbours(count, between=b""):
    """Small numbers whose places in a table of 2^18 are the same."""
    return b"".join(b"\x8a\x06" + (i << 20).to_bytes(6, "little") + between for i in range(count))


BOMBS = {
    "sets of one list": copied(b"__builtin__\nset", WORDS, 40_000),
    "sets of one list of numbers": copied(b"__builtin__\nset", NUMBERS, 40_000),
    "sizes of one list": copied(b"ctorch\nSize"[1:], NUMBERS, 40_000),
    "a tuple as many arguments": b"\x80\x02ctorch\ndevice\nq\x000("
    + NUMBERS
    + b"tq\x01"
    + b"h\x00h\x01R" * 40_000
    + b".",
    "numbers of one hash in a set": b"\x80\x02\x8f(" + colliding(120_000) + b"\x90.",
    "numbers of one hash in a frozen set": b"\x80\x02(" + colliding(120_000) + b"\x91.",
    "numbers of one hash in a list for a set": copied(b"__builtin__\nset", colliding(3000), 1000),
    "numbers of one hash as keys": b"\x80\x02}(" + colliding(100_000, b"N") + b"u.",
    "numbers of one place as keys": b"\x80\x02}(" + neighbours(100_000, b"N") + b"u.",
    "keys one by one": b"\x80\x02}" + b"".join(b"M" + struct.pack("<H", i) + b"Ns" for i in range(60_000)) + b".",
    "memo index": b"\x80\x04Nr\xff\xff\xff\xff.",
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b".",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b".",
    "text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b".",
    "negative bytes": b"\x80\x04B\xff\xff\xff\xff.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.",
    "long": b"\x80\x04\x8b\xff\xff\xff\x7f.",
    "long digits": b"\x80\x04\x8a\xff" + b"\x7f" * 255 + b".",
    "text integer": b"\x80\x04I" + b"9" * 100_000 + b"\n.",
    "doubling tuples": b"\x80\x02" + doubled(60) + b".",
    "doubling tuple as a key": b"\x80\x02}" + doubled(60) + b"Ns.",
    "doubling tuple in a set": b"\x80\x04\x8f(" + doubled(60) + b"\x90.",
    "doubling tuple as a name": b"\x80\x04" + doubled(60) + doubled(60) + b"\x93.",
    "doubling tuple as arguments": b"\x80\x02ccollections\nOrderedDict\n" + doubled(60) + b"R.",
    "deep tuples": b"\x80\x02)" + b"\x85" * 290_000 + b".",
    "deep tuple as a key": b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.",
    "deep lists": b"\x80\x02" + b"]" * 140_000 + b"a" * 139_999 + b".",
    "deep dicts": b"\x80\x02}" + b"K\x01}" * 90_000 + b"s" * 90_000 + b".",
    "deep marks": b"\x80\x02" + b"(" * 290_000,
    "endless": b"\x80\x02" + b"N0" * 600_000 + b".",
    "many sets": b"\x80\x04" + b"\x8f" * 290_000 + b".",
    "many dicts": b"\x80\x04" + b"}" * 290_000 + b".",
    "pop nothing": b"\x80\x020.",
    "stop at once": b".",
    "no stop": b"\x80\x04N",
    "mark missing": b"\x80\x02t.",
    "unknown opcode": b"\x80\x02\xff.",
    "extension": b"\x80\x02\x82\x01.",
    "old instance": b"\x80\x02(ios\nsystem\n.",
    "old object": b"\x80\x02(cos\nsystem\no.",
    "newobj_ex": b"\x80\x04ccollections\nOrderedDict\n)}\x92.",
    "text persistent id": b"\x80\x02Pstorage\n.",
    "next buffer": b"\x80\x05\x97.",
    "protocol 0": b"\x80\x00N.",
    "protocol 6": b"\x80\x06N.",
    "protocol changes": b"\x80\x04\x80\x00N.",
    "latin1 of nothing": b"\x80\x02c_codecs\nencode\nX\x00\x00\x00\x00X\x06\x00\x00\x00latin1\x86R.",
    "another codec": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x04\x00\x00\x00zlib\x86R.",
    "set of lists": b"\x80\x02c__builtin__\nset\n](]e\x85R.",
    "build on a global": b"\x80\x02ccollections\nOrderedDict\n}b.",
    "build on a list": b"\x80\x02]}b.",
    "call a number": b"\x80\x02K\x01)R.",
    "call without a tuple": b"\x80\x02ccollections\nOrderedDict\nNR.",
    "new with arguments": b"\x80\x02ccollections\nOrderedDict\nN\x85\x81.",
    "new of a function": b"\x80\x02c_codecs\nencode\n)\x81.",
    "items of a list": b"\x80\x02]K\x01K\x02s.",
    "append to a dict": b"\x80\x02}Na.",
    "odd items": b"\x80\x02}(K\x01u.",
    "global without end": b"\x80\x02c" + b"a" * 100_000,
    "global that is no text": b"\x80\x02c\xff\xff\nx\n.",
    "text that is no text": b"\x80\x04\x8c\x02\xff\xff.",
    "storage in itself": b"\x80\x04ctorch.storage\n_load_from_bytes\nC\x10" + b"\x80" * 16 + b"\x85R.",
    "float cut off": b"\x80\x02G\x00.",
    "float key": b"\x80\x02}G" + b"\x00" * 8 + b"Ns.",
}


@pytest.mark.parametrize("case", BOMBS)
def test_bombs(case, tmp_path):
    assert attempt(tmp_path / "x.pkl", BOMBS[case]) is not None


def test_a_long_text_of_bytes_uses_little_memory(tmp_path):
    """Protocol 2 writes bytes as text; decoding all at once would take up to four times the file."""
    text = "\xe9" * (8 << 20) + "\U0001f600"
    data = b"\x80\x02c_codecs\nencode\nX" + struct.pack("<I", len(text.encode())) + text.encode()
    assert "text where there should be bytes" in attempt(tmp_path / "x.pkl", data + b"X\x06\x00\x00\x00latin1\x86R.")


def test_thousands_of_tensors_in_one_text():
    """Bytes written as text are decoded from their beginning, but not again for each tensor."""
    text = ("\xff" * (4 << 20)).encode()
    blob, before = Blob(io.BytesIO(text), 0, 4 << 20, text_length=len(text)), time.process_time()
    assert all(blob.read((4 << 20) - 16, 16) == b"\xff" * 16 for _ in range(2000))
    assert time.process_time() - before < LIMIT_SECONDS


def test_small_values_that_are_copied_are_read(tmp_path):
    table = {"sizes": [Call(Global("torch", "Size"), (1, 2))] * 1000, "sets": [{1, 2, "x"}] * 200}
    assert "keys 'sizes', 'sets'" in attempt(tmp_path / "x.pkl", dumps(table, 2))


# Zips of torch.save.

ENTRIES = ("byteorder", "data.pkl", "version", "data/0")


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "deflated"])
@pytest.mark.parametrize("name", ENTRIES)
def test_zips_with_large_members(name, stored, tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"g_ema": {"x": torch.ones(3)}}, path)
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    method = zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(path, "w", method) as archive:
        for key, data in members.items():
            if not key.endswith(f"/{name}"):
                archive.writestr(key, data)
        with archive.open(f"x/{name}", "w", force_zip64=True) as entry:
            for _ in range(16):
                entry.write(b"\0" * (1 << 24))
    assert outcome(load_generator, path)
    assert "training state" in outcome(load_training_state, path)


def test_a_zip_of_millions_of_entries(tmp_path):
    """A list of entries is read into memory before anything else; one of 100 MB would take gigabytes."""
    entry = b"PK\x01\x02" + b"\0" * 42
    with open(tmp_path / "x.zip", "wb") as file:
        file.write(b"PK\x03\x04" + b"\0" * 26)
        for _ in range(110):
            file.write(entry * ((1 << 20) // len(entry)))
        size = file.tell() - 30
        file.write(b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 0, 0, size, 30, 0))
    assert "a zip archive of very many files" in outcome(load_generator, tmp_path / "x.zip")
    assert "a list of entries of 110 MiB" in outcome(ImageSet, tmp_path / "x.zip")


def test_a_zip_of_more_entries_than_a_network(tmp_path):
    path = zip_of(tmp_path / "x.pt", [b"x/data.pkl", *(b"x/data/%d" % index for index in range(30_000))])
    assert "a zip archive of very many files" in outcome(load_generator, path)
    assert "more than 20000 entries" in outcome(load_training_state, path)


def safetensors_of(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_a_safetensors_header_of_more_tensors_than_a_network(tmp_path):
    """150,000 of them took 8 s."""

    def header(count):
        place = {"dtype": "F32", "shape": [1]}
        return {f"t{index}": {**place, "data_offsets": [4 * index, 4 * index + 4]} for index in range(count)}

    path = safetensors_of(tmp_path / "x.safetensors", header(5990), bytes(4 * 5990))
    assert "nothing tells how its network is built" in outcome(load_generator, path)
    safetensors_of(path, header(6001), bytes(4 * 6001))
    assert "of 6001 tensors; expected at most 6000" in outcome(load_generator, path)
    for text in (b'{"a":[' + b"[]," * 1_300_000 + b"1]}", b'{"a":[' + b"1," * 2_000_000 + b"1]}"):
        assert "no dtype, shape and data_offsets" in outcome(load_generator, safetensors_of(path, text))
    assert "claims 4194306 bytes" in outcome(load_generator, safetensors_of(path, b"{" + b" " * (4 << 20) + b"}"))


# Training states.


def test_a_state_whose_entries_are_the_same_megabytes(tmp_path):
    path = zip_of(tmp_path / "s.pt", [b"x/data/%d" % index for index in range(10_000)], size=4 << 20)
    assert "many times the memory" in outcome(load_training_state, path)


@pytest.mark.parametrize("case", ["sizes of one list", "numbers of one hash as keys", "bytes"])
def test_states_that_are_asked_for_their_images(case, tmp_path):
    """There are several of one kimg. Their pickles are read by the machine, and a pipe is not waited for."""
    with zipfile.ZipFile(tmp_path / "training-state-000001.pt", "w") as archive:
        archive.writestr("x/data.pkl", BOMBS[case])
    os.mkfifo(tmp_path / "training-state-1.pt")
    assert outcome(training_states, tmp_path) == ""
    assert "no regular file" in outcome(load_training_state, tmp_path / "training-state-1.pt")


def test_a_state_is_read_as_torch_reads_it(tmp_path):
    net = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3, 4, 4)).sum().backward()
    optimizer.step()
    state = {
        "networks": {"G": net.state_dict()},
        "optimizer": optimizer.state_dict(),
        "nimg": 1 << 40,
        "warmup_steps_done": 0,
        "skips": 0,
    }
    state |= {
        "config": json.dumps({"text": "é" * 1000}),
        "rng": torch.get_rng_state(),
        "best": None,
        "x": [(1, -2.5), b"\xff" * 300, b"x"],
    }
    torch.save(state, tmp_path / "s.pt")
    read, expected = load_training_state(tmp_path / "s.pt"), torch.load(tmp_path / "s.pt", weights_only=True)

    def same(a, b):
        if isinstance(b, torch.Tensor):
            return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
        if isinstance(b, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in b)
        if isinstance(b, list | tuple):
            return type(a) is type(b) and all(map(same, a, b))
        return type(a) is type(b) and a == b

    assert same(read, expected)


STATES = {
    "a function": {"config": Call(Global("builtins", "eval"), "1")},
    "an object": {"config": Call(Global("collections", "OrderedDict")), "networks": Global("torch", "float32")},
    "sets of one list": copied(b"__builtin__\nset", WORDS, 40_000),
    "sizes of one list": copied(b"torch\nSize", NUMBERS, 40_000),
    "a list in itself": b"\x80\x02}X\x01\x00\x00\x00a]q\x00h\x00as.",
    "doubling tuples": b"\x80\x02}X\x01\x00\x00\x00a" + doubled(60) + b"s.",
    "the same text often": b"\x80\x02]q\x000X" + struct.pack("<I", 1 << 20) + b"x" * (1 << 20) + b"q\x010"
    + b"h\x00" + b"h\x01a" * 200_000 + b".",
}  # fmt: skip


@pytest.mark.parametrize("case", STATES)
def test_hostile_states(case, tmp_path):
    value = STATES[case]
    usual = {"config": "{}", "networks": {}, "nimg": 0, "warmup_steps_done": 0, "rng": None, "skips": 0}
    data = value if isinstance(value, bytes) else dumps({**usual, **value}, 2)
    with zipfile.ZipFile(tmp_path / "s.pt", "w") as archive:
        archive.writestr("s/data.pkl", data)
        archive.writestr("s/version", b"3\n")
    assert outcome(load_training_state, tmp_path / "s.pt")
    assert TRAP not in os.environ


# Arguments that ask for too much.

HUGE = {
    "resolution": {"img_resolution": 1 << 20},
    "resolution beyond integers": {"img_resolution": 1 << 70},
    "resolution no power of two": {"img_resolution": 5},
    "resolution zero": {"img_resolution": 0},
    "resolution negative": {"img_resolution": -4},
    "resolution text": {"img_resolution": "4"},
    "resolution list": {"img_resolution": [4]},
    "resolution true": {"img_resolution": True},
    "resolution missing": {"img_resolution": None},
    "wide": {"w_dim": 1 << 19},
    "wider": {"w_dim": 1 << 40},
    "many classes": {"c_dim": 1 << 20},
    "negative classes": {"c_dim": -1},
    "infinite": {"z_dim": float("inf")},
    "not a number": {"z_dim": float("nan")},
    "layers": {"mapping_kwargs": {"num_layers": 1 << 20}},
    "layers of some width": {"mapping_kwargs": {"num_layers": 256, "layer_features": 1 << 20}},
    "channels": {"synthesis_kwargs": {"channel_base": 1 << 20, "channel_max": 1 << 20}},
    "filter": {"synthesis_kwargs": {"resample_filter": [1] * 100_000}},
    "filter of filters": {"synthesis_kwargs": {"resample_filter": [[[[[[[1]]]]]]]}},
    "unknown": {"synthesis_kwargs": {"import": "os"}},
    "several lines": {"synthesis_kwargs": {"a\nb\x1b[2J": 1}},
    "self": {"self": 1},
    "dunder": {"__class__": 1},
    "kernel": {"synthesis_kwargs": {"kernel_size": 1 << 16}},
    "activation": {"synthesis_kwargs": {"activation": "__import__"}},
    "table of numbers": {"mapping_kwargs": {1: 2}},
    "no table": {"mapping_kwargs": [1]},
}


@pytest.mark.parametrize("case", HUGE)
def test_arguments_that_ask_for_too_much(case, G, tmp_path):
    form = Format()
    kwargs = {**G.init_kwargs, **HUGE[case]}
    assert attempt(tmp_path / "x.pkl", form.dumps({"G_ema": form.module(G, kwargs)})) is not None


@pytest.mark.parametrize(
    "change",
    [
        *({"img_resolution": 1 << 30}, {"model_channels": 1 << 30}, {"channel_mult": [1 << 19] * 900}, {"x": 1}),
        *({"model_type": "os.system"}, {"channel_mult": []}, {"channel_mult": [0]}, {"attn_resolutions": "x"}),
        *({"num_blocks": 1 << 20}, {"label_dropout": "x"}),
        *({"resample_filter": "x"}, {"dropout": []}, {"label_dim": -3}, {"num_blocks": 250, "channel_mult": [1] * 40}),
    ],
)  # fmt: skip
def test_teachers_that_ask_for_too_much(change, teacher, tmp_path):
    form = Format()
    kwargs = {**teacher.init_kwargs, **change}
    live = {"img_resolution": kwargs["img_resolution"], "label_dim": kwargs.get("label_dim", 0)}
    data = form.dumps({"ema": form.module(teacher, kwargs, attributes=live)})
    assert attempt(tmp_path / "x.pkl", data, load=load_teacher) is not None


def test_one_storage_for_a_huge_network(G, tmp_path):
    """Views of one small storage cannot make a network larger than the file."""
    big = Generator(512, 0, 512, 4, 1, {"num_layers": 30, "layer_features": 512}, {"channel_max": 4})
    form = Format()
    shared = form.tensor(torch.zeros(512, 512))
    form.parameter = lambda tensor: shared if tensor.shape == (512, 512) else Format.parameter(form, tensor)
    refusal = attempt(tmp_path / "x.pkl", form.dumps({"G_ema": form.module(big, big.init_kwargs)}))
    assert "more memory than the file" in refusal


# Breakage of whole small files: cut off anywhere, single bytes changed.


def small_files(G, teacher):
    return {
        "stylegan2 p2": (stylegan2_file(Format(protocol=2, numpy=1), G, extras="missing"), load_generator, G),
        "stylegan2 p4": (stylegan2_file(Format(), G), load_generator, G),
        "edm": (edm_file(Format(), teacher, extras=False), load_teacher, teacher),
    }


@pytest.mark.parametrize("name", ["stylegan2 p2", "stylegan2 p4", "edm"])
@pytest.mark.parametrize("part", range(8))
def test_cut_off(name, part, G, teacher, tmp_path):
    data, load, _ = small_files(G, teacher)[name]
    rng = random.Random(f"{name}{part}")
    for _ in range(4):
        length = rng.randrange(len(data))
        refusal = attempt(tmp_path / "x.pkl", data[:length], load=load)
        assert refusal is not None, length


@pytest.mark.parametrize("protocol", [2, 4])
def test_cut_off_at_every_opcode(protocol, tmp_path):
    """A file of every kind of value, cut behind each of its opcodes."""
    import pickletools

    form = Format(protocol=protocol)
    tensor = Call(form.name("torch._utils", "_rebuild_parameter"), form.tensor(torch.ones(2, 2)), False, {})
    table = {
        "a": [1, 2.5, None, True, "x", b"y" * 300],
        "t": tensor,
        "s": form.scalar(2.0),
        "e": form.easy({"k": (1, 2, 3, 4)}),
    }
    data = form.dumps({**table, "set": {"x"}, "p": form.persistent("X", {"_parameters": {}})})
    cuts = [position for _, _, position in pickletools.genops(data)]
    assert len(cuts) > 100
    for position in cuts:
        assert attempt(tmp_path / "x.pkl", data[:position]) is not None, position
    assert "holds p (X)" in attempt(tmp_path / "x.pkl", data)


@pytest.mark.parametrize("name", ["stylegan2 p2", "stylegan2 p4", "edm"])
@pytest.mark.parametrize("part", range(10))
def test_random_bytes_changed(name, part, G, teacher, tmp_path):
    data, load, expected = small_files(G, teacher)[name]
    rng = random.Random(f"{name}{part}")
    for _ in range(5):
        broken = bytearray(data)
        for _ in range(rng.choice([1, 1, 4, 30])):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        attempt(tmp_path / "x.pkl", bytes(broken), expected, load)


# Files that are no pickles, or pickles of something else.

OTHER_FILES = {
    "empty": (b"", "an empty file"),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>", "an HTML page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "a Git LFS pointer"),
    "zip": (b"PK\x05\x06" + b"\x00" * 18, "a zip archive"),
    "broken zip": (b"PK\x03\x04" + b"\x00" * 40, "zip archive"),
    "text": (b"hello\n", "a text file"),
    "json": (b'{"a": 1}', "a text file"),
    "binary": (bytes(range(256)) * 4, "a binary file"),
    "gzip": (b"\x1f\x8b" + b"\x00" * 20, "a gzip archive"),
    "png": (b"\x89PNG\r\n\x1a\n" + b"\x00" * 20, "a PNG image"),
    "npy": (b"\x93NUMPY\x01\x00" + b"\x00" * 20, "a single NumPy array"),
    "7z": (b"7z\xbc\xaf'\x1c" + b"\x00" * 20, "a 7z archive"),
    "tar": (b"net.pkl".ljust(257, b"\x00") + b"ustar\x0000" + b"\x00" * 250, "a tar archive"),
    "gguf": (b"GGUF\x03" + b"\x00" * 20, "a GGUF file"),
    "one byte": (b"\x80", "file"),
    "protocol only": (b"\x80\x04", "cut off"),
}


@pytest.mark.parametrize("case", OTHER_FILES)
@pytest.mark.parametrize("load", [load_generator, load_teacher])
def test_other_files(case, load, tmp_path):
    data, name = OTHER_FILES[case]
    assert name in attempt(tmp_path / "x.pkl", data, load=load)


def test_embedded_source_is_not_read(G, tmp_path):
    """Source text that is no text at all: whoever decoded or compiled it would fail."""
    data = stylegan2_file(Format(), G)
    source = builders.SOURCE.encode()
    assert source in data
    assert attempt(tmp_path / "x.pkl", data.replace(source, b"\xff" * len(source)), G) is None
