"""Native files: round trips are exact, and whatever else a file may be is refused in one sentence."""

import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch

from refine.checkpoints import native, registry, sniff
from refine.checkpoints.sniff import HEADER_KEY, read_safetensors_header
from refine.networks import edm2
from refine.networks.edm import EDMPrecond, VEPrecond, VPPrecond, iDDPMPrecond
from refine.networks.edm_layers import Init
from refine.networks.own import OwnGenerator
from refine.networks.stylegan2 import Discriminator, Generator
from tests.launch import CONTEXT, wait

UNET = {
    "img_resolution": 8,
    "img_channels": 1,
    "label_dim": 3,
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
}


def make_generator(**overrides) -> Generator:
    kwargs = {"z_dim": 4, "c_dim": 3, "w_dim": 5, "img_resolution": 8, "img_channels": 1}
    kwargs |= {
        "mapping_kwargs": {"num_layers": 2},
        "synthesis_kwargs": {"channel_base": 32, "channel_max": 4},
    } | overrides
    return Generator(**kwargs)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "net.safetensors"
    native.save_networks(path, {"G_ema": make_generator(), "G": make_generator()}, provenance={"seed": 3})
    return path


def assert_same_state(a: torch.nn.Module, b: torch.nn.Module) -> None:
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key].nan_to_num(7), b[key].nan_to_num(7)), key


def rewrite(path, change) -> None:
    """Loads tensors and our JSON, lets `change(tensors, metadata)` spoil them, writes the file again."""
    tensors = safetensors.torch.load_file(path)
    metadata = native.read_metadata(path)
    change(tensors, metadata)
    safetensors.torch.save_file(tensors, path, metadata={HEADER_KEY: json.dumps(metadata)})


def refusal(function, *args) -> str:
    """The message of the ValueError: one line, not empty."""
    with pytest.raises(ValueError) as caught:
        function(*args)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(make_generator, id="Generator"),
        pytest.param(
            lambda: make_generator(c_dim=0, synthesis_kwargs={"architecture": "resnet", "num_fp16_res": 1}), id="fp16"
        ),
        pytest.param(
            lambda: Discriminator(c_dim=3, img_resolution=8, img_channels=1, channel_max=8), id="Discriminator"
        ),
        *(
            pytest.param(lambda cls=cls: cls(**UNET), id=cls.__name__)
            for cls in (EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond)
        ),
        pytest.param(lambda: edm2.Precond(8, 1, 2, model_channels=8, channel_mult=[1], num_blocks=1), id="EDM2"),
    ],
)
def test_round_trip(tmp_path, network):
    network = network()
    native.save_networks(tmp_path / "net", {"net": network}, provenance={})
    rng = torch.get_rng_state()
    loaded = native.load_networks(tmp_path / "net")["net"]
    assert type(loaded) is type(network) and loaded.init_kwargs == network.init_kwargs
    assert_same_state(loaded, network)
    assert torch.equal(torch.get_rng_state(), rng), "loading must not touch the random number generator"
    assert all(t.device.type == "cpu" for t in [*loaded.parameters(), *loaded.buffers()])
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in network.parameters()]


def test_loaded_networks_compute_the_same(tmp_path):
    G, T = make_generator(), EDMPrecond(**UNET)
    native.save_networks(tmp_path / "net", {"G": G, "T": T}, provenance={})
    loaded = native.load_networks(tmp_path / "net")
    z, c, sigma = torch.randn(2, 4), torch.eye(3)[:2], torch.tensor([0.5, 2.0])
    x = G(z, c)
    assert torch.equal(loaded["G"](z, c), x)
    T.eval(), loaded["T"].eval()
    assert torch.equal(loaded["T"](x, sigma, c), T(x, sigma, c))


def test_every_registered_class_exists():
    for name in registry.NETWORK_CLASSES:
        entry = registry.NETWORK_CLASSES[name]
        module = __import__(entry.module, fromlist=[entry.name])
        assert issubclass(getattr(module, entry.name), torch.nn.Module)


def test_what_is_written(file):
    metadata = native.read_metadata(file)
    assert metadata["format"] == "gan-refine" and metadata["version"] == 1 and metadata["kind"] == "networks"
    assert metadata["provenance"] == {"seed": 3} and list(metadata["networks"]) == ["G_ema", "G"]
    assert metadata["networks"]["G"]["class"] == "stylegan2.Generator"
    assert metadata["networks"]["G"]["init_kwargs"] == make_generator().init_kwargs
    assert "G_ema.mapping.w_avg" in safetensors.torch.load_file(file)
    assert sniff(file).kind == "native" and os.listdir(file.parent) == [file.name]


def test_only_wanted_networks_are_read(file):
    assert list(native.load_networks(file, ["G"])) == ["G"]
    assert "no network 'D'" in refusal(native.load_networks, file, ["D"])


def test_equal_networks_give_equal_bytes(tmp_path):
    G = make_generator()
    for name in "ab":
        native.save_networks(tmp_path / name, {"G_ema": G, "G": G}, provenance={"x": [1, 2], "y": {"z": None}})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_memory_of_any_kind_can_be_saved(tmp_path):
    """channels_last, tied and overlapping tensors: values count, not how they lie in memory."""
    G = make_generator().to(memory_format=torch.channels_last)
    G.synthesis.b8.conv0.bias.data = G.synthesis.b8.conv1.bias.data
    big = torch.randn(7, 5)
    G.mapping.w_avg = big[2]
    G.mapping.fc0.bias.data = big.t()[0, :5]
    native.save_networks(tmp_path / "net", {"G": G}, provenance={})
    assert_same_state(native.load_networks(tmp_path / "net")["G"], G)


def test_values_are_not_judged(tmp_path):
    G = make_generator()
    G.mapping.w_avg[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    native.save_networks(tmp_path / "net", {"G": G}, provenance={})
    assert_same_state(native.load_networks(tmp_path / "net")["G"], G)


def test_loaded_weights_do_not_hang_on_the_file(file):
    G = native.load_networks(file)["G"]
    before = {key: value.clone() for key, value in G.state_dict().items()}
    file.write_bytes(bytes(len(file.read_bytes())))
    assert all(torch.equal(value, before[key]) for key, value in G.state_dict().items())
    G.mapping.fc0.weight.data.add_(1)  # and they can be written to


def test_a_failed_save_leaves_the_old_file(file):
    old = file.read_bytes()
    refusal(lambda: native.save_networks(file, {"G": make_generator()}, provenance={"x": object()}))
    refusal(lambda: native.save_networks(file, {"G": torch.nn.Linear(2, 2)}, provenance={}))
    assert file.read_bytes() == old and os.listdir(file.parent) == [file.name]


def test_what_could_not_be_read_back_is_not_written(tmp_path):
    G = make_generator()
    G.init_kwargs = G.init_kwargs | {"w_dim": 6}
    assert "shape" in refusal(lambda: native.save_networks(tmp_path / "net", {"G": G}, provenance={}))
    G = make_generator().double()
    assert "float64; expected torch.float32" in refusal(
        lambda: native.save_networks(tmp_path / "net", {"G": G}, provenance={})
    )

    class Mine(Generator):
        pass

    mine = Mine(**make_generator().init_kwargs)
    assert "cannot be saved natively" in refusal(
        lambda: native.save_networks(tmp_path / "net", {"G": mine}, provenance={})
    )
    assert "without dots" in refusal(lambda: native.save_networks(tmp_path / "net", {"a.b": G}, provenance={}))
    assert "no network" in refusal(lambda: native.save_networks(tmp_path / "net", {}, provenance={}))
    assert os.listdir(tmp_path) == []


# -- what else a file may be ------------------------------------------------------------------------------------------


def zip_bytes(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return buffer.getvalue()


def torch_save_bytes() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer)
    return buffer.getvalue()


def npz_bytes() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, mu=np.zeros(3))
    return buffer.getvalue()


FOREIGN = {
    "empty": (b"", "an empty file"),
    "text": (b"hello\nworld\n", "a text file"),
    "utf-8": ("Größe σ\n".encode() * 1000, "a text file"),
    "html": (b"\n<!DOCTYPE html><html><body>404</body></html>", "an HTML page"),
    "bare html": (b"<html>Not found</html>", "an HTML page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
    "pickle": (pickle.dumps({"G_ema": 1}, protocol=4), "a Python pickle (protocol 4)"),
    "torch.save": (torch_save_bytes(), "written by torch.save"),
    "torchscript": (zip_bytes("m/data.pkl", "m/constants.pkl", "m/code/x.py"), "a TorchScript file"),
    "npz": (npz_bytes(), "a NumPy archive"),
    "data set": (zip_bytes("00000/img.png", "dataset.json"), "a data set"),
    "zip": (zip_bytes("readme.txt"), "a zip archive"),
    "broken zip": (zip_bytes("readme.txt")[:30], "cut-off zip"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(20), "a PNG image"),
    "gzip": (b"\x1f\x8b\x08" + bytes(20), "a gzip archive"),
    "other safetensors": (safetensors.torch.save({"a": torch.zeros(2)}), "of another program"),
    "zeros": (bytes(100), "a binary file of an unknown kind"),
    "noise": (np.random.RandomState(1).bytes(5000), "a binary file of an unknown kind"),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("read", [native.load_networks, native.read_metadata])
def test_foreign_files_are_named(tmp_path, name, read):
    data, what = FOREIGN[name]
    path = tmp_path / "network.pkl"
    path.write_bytes(data)
    message = refusal(read, path)
    assert str(path) in message and what in message and "expected" in message


@pytest.mark.parametrize("read", [native.load_networks, native.read_metadata])
def test_paths_that_are_no_file(tmp_path, read):
    assert "no such file" in refusal(read, tmp_path / "nothing")
    assert "is a folder" in refusal(read, tmp_path)
    assert "no such file" in refusal(read, tmp_path / ("x" * 20) / "y")
    (tmp_path / "loop").symlink_to("loop")
    assert "cannot be read" in refusal(read, tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(read, tmp_path / "pipe")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(file):
    file.chmod(0)
    assert "cannot be read" in refusal(native.load_networks, file)


def test_every_truncation_is_refused(file):
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    lengths = {*range(40), header - 1, header, header + 1, len(data) // 2, len(data) - 1}
    for length in sorted(lengths):
        file.write_bytes(data[:length])
        message = refusal(native.load_networks, file)
        assert length < 9 or ("safetensors" in message and "cut off" in message), (length, message)


def test_extra_bytes_are_refused(file):
    file.write_bytes(file.read_bytes() + b"xyz")
    assert "3 bytes too many" in refusal(native.load_networks, file)


def test_random_byte_flips_give_one_line_or_the_right_structure(file):
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    rng = np.random.RandomState(0)
    refused = 0
    for _ in range(150):
        spoilt = bytearray(data)
        spoilt[rng.randint(header)] ^= 1 << rng.randint(8)
        file.write_bytes(spoilt)
        try:
            networks = native.load_networks(file)
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert all(type(network) is Generator for network in networks.values())
    assert refused > 100


# -- what a spoilt native file may say ---------------------------------------------------------------------------------


def with_json(text: str):
    return lambda path: safetensors.torch.save_file(
        safetensors.torch.load_file(path), path, metadata={HEADER_KEY: text}
    )


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "[" * 100_000, '{"format": "other"}', '{"format": "gan-refine"}']
)
def test_metadata_that_make_no_sense(file, text):
    with_json(text)(file)
    assert str(file) in refusal(native.load_networks, file)


SPOILT = {
    "version 2": (lambda t, m: m.update(version=2), "format version 2; this release reads version 1"),
    "version true": (lambda t, m: m.update(version=True), "format version True"),
    "no version": (lambda t, m: m.pop("version"), "format version None"),
    "unknown kind": (lambda t, m: m.update(kind="sounds"), "unknown kind 'sounds'"),
    "kind is a list": (lambda t, m: m.update(kind=[]), "unknown kind"),
    "no networks": (lambda t, m: m.pop("networks"), "lack the table 'networks'"),
    "empty networks": (lambda t, m: m.update(networks={}), "holds no network"),
    "no provenance": (lambda t, m: m.pop("provenance"), "lack the table 'provenance'"),
    "no class": (lambda t, m: m["networks"]["G"].pop("class"), "lack class or init_kwargs"),
    "class is a list": (lambda t, m: m["networks"]["G"].update({"class": ["os.system"]}), "lack class or init_kwargs"),
    "no kwargs": (lambda t, m: m["networks"]["G"].pop("init_kwargs"), "lack class or init_kwargs"),
    "unknown class": (
        lambda t, m: m["networks"]["G"].update({"class": "os.system"}),
        "unknown network class 'os.system'",
    ),
    "lost tensor": (lambda t, m: t.pop("G.mapping.w_avg"), "lacks 1 of"),
    "extra tensor": (lambda t, m: t.update({"G.extra": torch.zeros(1)}), "has 1 tensors that its class does not have"),
    "stray tensor": (lambda t, m: t.update({"D.b4": torch.zeros(1)}), "belongs to none of the networks"),
    "wrong shape": (lambda t, m: t.update({"G.mapping.w_avg": torch.zeros(6)}), "has shape [6]; expected [5]"),
    "wrong dtype": (
        lambda t, m: t.update({"G.mapping.w_avg": torch.zeros(5).half()}),
        "torch.float16; expected torch.float32",
    ),
    "odd dtype": (lambda t, m: t.update({"G.mapping.w_avg": torch.zeros(5).to(torch.float8_e5m2)}), "has dtype"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_native_files(file, name):
    change, what = SPOILT[name]
    rewrite(file, change)
    message = refusal(native.load_networks, file)
    assert str(file) in message and what in message


@pytest.mark.parametrize(
    ("kwargs", "what"),
    [
        ({"img_resolution": 8192}, "'img_resolution' is 8192; expected at most 4096"),
        (
            {"img_resolution": 4096, "synthesis_kwargs": {"channel_base": 32768}},
            "more numbers than the file has",
        ),  # legal in itself, but the file has no such tensors; nothing big is allocated
        ({"img_resolution": 7}, ""),
        ({"img_resolution": "8"}, ""),
        ({"img_resolution": None}, ""),
        ({"w_dim": 2**40}, "expected at most"),
        ({"w_dim": 2**20, "z_dim": 2**20}, "more numbers than the file has"),  # 4 TiB of weights, never built
        ({"w_dim": -5}, ""),
        ({"w_dim": 5.5}, ""),
        ({"w_dim": float("nan")}, "NaN"),
        ({"mapping_kwargs": {"num_layers": 10**6}}, "'num_layers' is 1000000; expected at most 32"),
        ({"mapping_kwargs": {"layer_features": list(range(2000))}}, "more than 1000 values"),
        ({"mapping_kwargs": 5}, ""),
        ({"mapping_kwargs": {"a": {"b": {"c": {"d": {"e": {}}}}}}}, "four levels"),
        ({"bogus": 1}, "bogus"),
        ({"synthesis_kwargs": {"bogus": 1}}, "bogus"),
        ({"synthesis_kwargs": {"channel_base": 0}}, ""),
        ({"synthesis_kwargs": {"resample_filter": [1] * 145}}, "more than 144 values"),
    ],
)
def test_impossible_init_kwargs(file, kwargs, what):
    rewrite(file, lambda t, m: m["networks"]["G"]["init_kwargs"].update(kwargs))
    message = refusal(native.load_networks, file)
    assert str(file) in message and what in message


@pytest.mark.parametrize("blocks", [32, 10**9])
def test_a_network_of_endless_layers_is_not_built(tmp_path, blocks):
    path = tmp_path / "net"
    native.save_networks(path, {"ema": EDMPrecond(**UNET)}, provenance={})
    rewrite(path, lambda t, m: m["networks"]["ema"]["init_kwargs"].update(num_blocks=blocks, channel_mult=[1] * 900))
    message = refusal(native.load_networks, path)
    assert any(
        text in message for text in ("tensors, which the file cannot", "expected at most 32", "expected a multiple")
    )


@pytest.mark.parametrize(
    ("kwargs", "what"),
    [
        ({"img_resolution": 4096, "channel_mult": [1] * 13, "num_blocks": 32}, "tensors, which the file cannot fill"),
        ({"model_channels": 1 << 16, "label_dim": 1 << 20, "augment_dim": 1 << 20}, "more numbers than the file has"),
        ({"resample_filter": [1] * 900}, "more than 144 values"),
    ],
)
def test_building_ends_where_the_network_is_larger_than_its_file(tmp_path, kwargs, what, monkeypatch):
    """Not after thousands of tensors: what a small file can make us do is small."""
    path, net = tmp_path / "net", EDMPrecond(**UNET)
    native.save_networks(path, {"ema": net}, provenance={})
    rewrite(path, lambda t, m: m["networks"]["ema"]["init_kwargs"].update(kwargs))
    made, draw = [], Init._draw
    monkeypatch.setattr(Init, "_draw", lambda *args: made.append(0) or draw(*args))
    assert what in refusal(native.load_networks, path)
    assert len(made) <= 2 * len(net.state_dict()) + 256


# -- headers written by hand -------------------------------------------------------------------------------------------


def safetensors_bytes(header: dict | bytes, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def tensor(dtype="F32", shape=(1,), offsets=(0, 4)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"{}x", b""),
        (b"{" * 100_000, b""),
        (b'{"\xff": 1}', b""),
        ({"a": 1}, b""),
        ({"a": tensor(dtype="F128")}, bytes(16)),
        ({"a": tensor(dtype=["F32"])}, bytes(4)),
        ({"a": tensor(shape=(-1,))}, bytes(4)),
        ({"a": tensor(shape=(1.0,))}, bytes(4)),
        ({"a": tensor(shape=(True,))}, bytes(4)),
        ({"a": tensor(shape=(2**40, 2**40))}, bytes(4)),
        ({"a": tensor(shape=(2,))}, bytes(4)),
        ({"a": tensor(offsets=(4, 0))}, bytes(4)),
        ({"a": tensor(offsets=(0, 4, 8))}, bytes(4)),
        ({"a": tensor(offsets=(4, 8))}, bytes(8)),
        ({"a": tensor(), "b": tensor()}, bytes(4)),
        ({"a": tensor(), "b": tensor(offsets=(8, 12))}, bytes(12)),
        ({"__metadata__": {"gan-refine": 1}}, b""),
        ({"__metadata__": []}, b""),
    ],
)
def test_headers_that_lie(tmp_path, header, data):
    path = tmp_path / "net"
    path.write_bytes(safetensors_bytes(header, data))
    message = refusal(native.load_networks, path)
    assert "safetensors file" in message
    with pytest.raises(safetensors.SafetensorError):  # the library agrees: none of these is a file that it would read
        safetensors.safe_open(path, framework="pt").__enter__()


def test_a_tensor_of_many_axes(tmp_path):
    (tmp_path / "net").write_bytes(safetensors_bytes({"a": tensor(shape=[2**40] * 100_000)}, bytes(4)))
    assert "impossible shape" in refusal(native.load_networks, tmp_path / "net")


def test_header_length_that_claims_the_world(tmp_path):
    path = tmp_path / "net"
    path.write_bytes((2**31).to_bytes(8, "little") + b"{" + bytes(100))
    assert "cut off in its header" in refusal(native.load_networks, path)


def test_headers_agree_with_the_library(tmp_path):
    tensors = {
        "a": torch.zeros(2, 3),
        "b": torch.zeros(0, 4),
        "c": torch.tensor(1, dtype=torch.int64),
        "d": torch.zeros(5).bool(),
    }
    safetensors.torch.save_file(tensors, tmp_path / "t", metadata={"x": "y"})
    infos, metadata = read_safetensors_header(tmp_path / "t")
    assert metadata == {"x": "y"}
    assert {name: info.shape for name, info in infos.items()} == {name: tuple(t.shape) for name, t in tensors.items()}
    assert {name: info.dtype for name, info in infos.items()} == {"a": "F32", "b": "F32", "c": "I64", "d": "BOOL"}
    assert infos["a"].numel == 6 and infos["b"].numel == 0 and infos["c"].numel == 1


def test_tensors_that_cannot_be_written(tmp_path):
    def save(tensor, provenance):
        G = torch.nn.Module()
        G.register_buffer("a", tensor)
        G.img_resolution, G.img_channels, G.c_dim, G.z_dim = 8, 1, 0, 4
        networks = {"G": OwnGenerator(G, "own:make")}
        native.save_networks(tmp_path / "net", networks, provenance=provenance)

    assert "no place" in refusal(save, torch.zeros(2, dtype=torch.complex64), {})
    assert "no place" in refusal(save, torch.eye(2).to_sparse(), {})
    assert "JSON" in refusal(save, torch.zeros(1), {"a": torch.zeros(1)})
    assert os.listdir(tmp_path) == []


def write_up_to_the_renaming(file):
    os.replace = lambda *_: os._exit(9)
    native.save_networks(file, native.load_networks(file), provenance={})


def test_killed_while_writing_leaves_the_old_file(file):
    """A process that dies between writing and renaming has not touched the target."""
    old = file.read_bytes()
    process = CONTEXT.Process(target=write_up_to_the_renaming, args=(file,))
    process.start()
    assert wait([process]) == [9]
    assert file.read_bytes() == old
