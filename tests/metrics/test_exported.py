"""Programs of torch.export: the same features as torch gives, and nothing but features from a hostile one."""

import io
import json
import os
import struct
import zipfile

import pytest
import torch

from refine.metrics import exported
from refine.metrics.detectors import load_detector
from refine.metrics.exported import load_exported
from refine.metrics.operators import OFF, OPERATORS
from tests.metrics.networks import metric_names

pytestmark = pytest.mark.filterwarnings("ignore")
IMAGES = torch.arange(5 * 3 * 8 * 8).remainder(256).to(torch.uint8).reshape(5, 3, 8, 8)


class Small(torch.nn.Module):
    """Convolution, normalisation, work in place, sizes that depend on the batch, constants, several results."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)
        self.register_buffer("shift", torch.ones(1), persistent=False)

    def forward(self, images):
        x = torch.nn.functional.interpolate(images.float() / 255, size=(12, 12), mode="bilinear", antialias=True)
        x = torch.nn.functional.relu(self.bn(self.conv(x)), inplace=True) + self.shift
        one, two = x.chunk(2, dim=1)
        x = torch.cat([one, two.flip(3), torch.zeros(x.shape[0], 1, 10, 10)], 1)
        return torch.nn.functional.layer_norm(x.reshape(x.shape[0], 5, -1).mean(2), [5]) * torch.tensor([2.0] * 5)


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.place = torch.nn.Conv2d(3, 8, 4, 4), torch.nn.Parameter(torch.randn(1, 4, 8))
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, images):
        x = self.patches(images.float() / 255).flatten(2).transpose(1, 2) + self.place
        return (x + self.attention(x, x, x, need_weights=False)[0]).mean(1)


def save(path, net):
    sizes = ({0: torch.export.Dim("N", min=1, max=4096)},)
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    torch.export.save(torch.export.export(net.eval(), (images,), dynamic_shapes=sizes), path)
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    torch.manual_seed(0)
    net = Small()
    net.bn.running_mean.normal_()
    return save(tmp_path_factory.mktemp("export") / "small.pt2", net), net


def test_the_features_are_the_networks(good):
    detector = load_detector(good[0])
    with torch.no_grad():
        assert torch.equal(detector(IMAGES), good[1](IMAGES)) and metric_names(detector)[0] == "fd_small"
        assert torch.equal(detector(IMAGES[:1]), good[1](IMAGES[:1]))
    assert detector.feature_dim == 5 and detector.classify(IMAGES) is None


def test_attention(tmp_path):
    path = save(tmp_path / "a.pt2", Attention())
    torch.testing.assert_close(load_exported(path)(IMAGES), torch.export.load(path).module()(IMAGES))


@pytest.mark.parametrize(
    "images", [IMAGES.float(), IMAGES[..., :7], IMAGES[:, :1], IMAGES[0], IMAGES[:1].expand(4097, -1, -1, -1)]
)
def test_images_that_the_program_is_not_for(good, images):
    with pytest.raises(ValueError, match=r"it takes uint8 \['any', 3, 8, 8\] and got"):
        load_exported(good[0])(images)


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def write(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def changed(good, path, change, ending="/models/model.json"):
    """The good file with another JSON document in it."""
    files = members(good[0])
    (name,) = (name for name in files if name.endswith(ending))
    document = json.loads(files[name])
    change(document)
    return write(path, {**files, name: json.dumps(document)})


class T(str):
    """The name of a tensor, as an argument."""


def argument(value):
    kinds = {T: "as_tensor", str: "as_string", bool: "as_bool", int: "as_int", float: "as_float", list: "as_ints"}
    if isinstance(value, dict):
        return value
    return {"as_none": True} if value is None else {kinds[type(value)]: {"name": value} if type(value) is T else value}


def node(target, gives="evil", **inputs):
    entries = [{"name": name, "arg": argument(value), "kind": 1} for name, value in inputs.items()]
    target = target if "." in target.replace(".", "", 1) or target[:2] in ("os", "_o") else f"torch.ops.aten.{target}"
    return {"target": target, "inputs": entries, "outputs": [{"as_tensor": {"name": gives}}], "metadata": {}}


def with_node(evil, use=True):
    """The program with one more step, of whose result one uses something."""

    def change(document):
        graph = document["graph_module"]["graph"]
        result = document["graph_module"]["signature"]["output_specs"][0]["user_output"]["arg"]["as_tensor"]
        graph["nodes"].append(evil)
        if use:
            graph["nodes"].append(node("mul.Tensor", gives="end", self=T(result["name"]), other=T("evil")))
        result["name"] = "end" if use else result["name"]

    return change


FILE = "/tmp/refine-test-of-a-detector-that-writes"
X, SQUARE = T("images"), [1 << 20, 1 << 20]
STEPS = {
    "a file": node("from_file.default", filename=FILE, shared=True, size=23),
    "torch's hub": node("torch.hub.load", repo="a/b"),
    "os": node("os.system", command="true"),
    "builtins": node("_operator.methodcaller", name="x"),
    "an attribute of an operator": node("torch.ops.aten.add.Tensor.__class__", self=X),
    "another library": node("torch.ops.profiler._record_function_enter.default", name="x"),
    "a higher-order operator": node("torch.ops.higher_order.cond", pred=X),
    "random numbers": node("rand_like.default", self=X),
    "memory that is not set": node("empty.memory_format", size=[4]),
    "a view anywhere": node("as_strided.default", self=X, size=SQUARE, stride=[1, 1]),
    "a resize": node("resize_.default", self=X, size=SQUARE),
    "an out variant": node("add.out", self=X, other=X, out=X),
    "a subgraph": node("add.Tensor", self={"as_graph": {"name": "g", "graph": {}}}),
    "an object": node("add.Tensor", self={"as_custom_obj": {"name": "x", "class_fqn": "y"}}),
    "an operator as an argument": node("add.Tensor", self={"as_operator": "os.system"}),
    "text": node("add.Tensor", self=X, other="__import__('os')"),
    "a name that is not there": node("relu.default", self=T("nobody")),
    "a name that comes later": node("relu.default", self=T("end")),
    "a name twice": node("relu.default", self=X, gives="images"),
    "training": node("dropout.default", input=X, p=0.5, train=True),
    "an unknown argument": node("relu.default", self=X, device={"as_device": {"type": "cpu"}}),
    "no argument": node("relu.default"),
}


@pytest.mark.parametrize("case", STEPS)
def test_steps_that_are_refused_before_anything_runs(good, tmp_path, case):
    path = changed(good, tmp_path / "x.pt2", with_node(STEPS[case]))
    with pytest.raises(ValueError, match=r"x\.pt2: it") as caught:
        load_detector(path)
    assert "\n" not in str(caught.value) and not os.path.exists(FILE)


DEAR = {
    "zeros": node("zeros.default", size=SQUARE),
    "full without a device": node("full.default", size=SQUARE, fill_value=1),
    "repeat": node("repeat.default", self=X, repeats=[1, 1, 1 << 15, 1 << 15]),
    "padding": node("constant_pad_nd.default", self=X, pad=[0, 1 << 40]),
    "arange": node("arange.default", end=1 << 40),
    "upsampling": node("upsample_nearest2d.vec", input=X, output_size=SQUARE, scale_factors=None),
    "the images": node("mul_.Tensor", self=X, other=1),
    "a weight": node("mul_.Tensor", self=T("p_conv_weight"), other=1),
    "types": node("cat.default", tensors={"as_tensors": [{"name": "images"}]}, dim=None),
}


@pytest.mark.parametrize("case", DEAR)
def test_steps_that_ask_for_too_much_or_change_what_is_not_theirs(good, tmp_path, case):
    detector = load_detector(changed(good, tmp_path / "x.pt2", with_node(DEAR[case])))
    weights = [buffer.clone() for buffer in detector._module.buffers()]
    with pytest.raises((ValueError, RuntimeError)) as caught:
        detector(IMAGES)
    assert isinstance(caught.value, ValueError) or "alloc" not in str(caught.value)
    assert all(map(torch.equal, weights, detector._module.buffers()))


def test_many_steps_of_some_size(good, tmp_path, monkeypatch):
    monkeypatch.setattr(exported, "MAX_NUMBERS_IN_ALL", 3000)
    with pytest.raises(ValueError, match="too many"):
        load_exported(good[0])(IMAGES)


def spec(index, value):
    def change(document):
        document["graph_module"]["signature"]["input_specs"][index] = value

    return change


def entry(**parts):
    def change(document):
        document["config"]["conv.weight"].update(parts)

    return change


def meta(**parts):
    def change(document):
        document["config"]["conv.weight"]["tensor_meta"].update(parts)

    return change


def named(kind, name):
    return spec(0, {kind: {"arg": {"name": "x", "class_fqn": "y"}, f"{kind}_name": name, "persistent": True}})


PLACES = {
    "a token": ("/models/model.json", named("token", "x")),
    "an object": ("/models/model.json", named("custom_obj", "x")),
    "a buffer by a path": ("/models/model.json", named("buffer", "__class__")),
    "a pickle": ("weights_config.json", entry(use_pickle=True)),
    "another file": ("weights_config.json", entry(path_name="../../etc/passwd")),
    "an opaque object": ("weights_config.json", entry(path_name="opaque_obj_0")),
    "a larger tensor": ("weights_config.json", meta(sizes=[{"as_int": 1 << 40}], strides=[{"as_int": 0}])),
    "a tensor beyond": ("weights_config.json", meta(storage_offset={"as_int": 100})),
    "a tensor before": ("weights_config.json", meta(storage_offset={"as_int": -1})),
    "an expression": ("weights_config.json", meta(sizes=[{"as_expr": {"expr_str": "__import__('os')"}}])),
    "another dtype": ("weights_config.json", meta(dtype=99)),
    "another layout": ("weights_config.json", meta(layout=1)),
    "no list": ("weights_config.json", meta(sizes=7)),
}  # fmt: skip


@pytest.mark.parametrize("case", PLACES)
def test_what_it_holds_is_plain_tensors(good, tmp_path, case):
    ending, change = PLACES[case]
    with pytest.raises(ValueError, match=r"x\.pt2: it") as caught:
        load_detector(changed(good, tmp_path / "x.pt2", change, ending))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"[", b"[]", b"{}", b"nothing", b"[" * 100_000, b"\xff"])
def test_what_is_no_document(good, tmp_path, text):
    files = members(good[0])
    (name,) = (name for name in files if name.endswith("model.json"))
    with pytest.raises(ValueError, match=r"no whole archive|more memory"):
        load_detector(write(tmp_path / "x.pt2", {**files, name: text}))


def test_expressions_and_conditions_are_not_evaluated(good, tmp_path):
    """torch's own reader would run these: a result that is the good one's shows that nothing here looks at them."""

    def change(document):
        def walk(value):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                if key == "expr_str":
                    value[key] = f"__import__('pathlib').Path({FILE!r}).touch()"
                elif isinstance(item, dict | list):
                    walk(item)

        walk(document["graph_module"])
        document["guards_code"] = ["exit()"]

    path = changed(good, tmp_path / "x.pt2", change)
    with torch.no_grad():
        assert torch.equal(load_detector(path)(IMAGES), good[1](IMAGES))
    assert not os.path.exists(FILE)


def test_one_weight_under_many_names(good, tmp_path):
    """Each is read into memory of its own: a thousand of 4 MiB took 4 GB."""

    def change(document, count):
        specs = document["graph_module"]["signature"]["input_specs"]
        first = next(spec for spec in specs if "parameter" in spec)
        for index in range(count):
            content = {**first["parameter"], "arg": {"name": f"more{index}"}}
            specs.insert(0, {"parameter": content})

    path = changed(good, tmp_path / "x.pt2", lambda document: change(document, 2000))
    files = members(path)
    (weight,) = (name for name in files if name.endswith("/weights/weight_0"))
    (table,) = (name for name in files if name.endswith("model_weights_config.json"))
    config = json.loads(files[table])
    for entry in config["config"].values():
        if entry["path_name"] == "weight_0":
            entry["tensor_meta"] |= {"sizes": [{"as_int": 1 << 16}], "strides": [{"as_int": 1}]}
    write(path, {**files, weight: bytes(4 << 16), table: json.dumps(config)})
    with pytest.raises(ValueError, match="its tensors take more memory than the file is long"):
        load_exported(path)
    with pytest.raises(ValueError, match="more than 3,000 steps, or tensors"):
        load_exported(changed(good, path, lambda document: change(document, 3000)))


def test_two_central_directories(good, tmp_path):
    """One archive for Python's reader and another for torch's: only the first is ever read."""

    def parts(files):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in files.items():
                archive.writestr(zipfile.ZipInfo(name), data)
        raw = file.getvalue()
        end = raw.rfind(b"PK\x05\x06")
        size, offset = struct.unpack("<II", raw[end + 12 : end + 20])
        return raw[:offset], raw[offset : offset + size], bytearray(raw[end:])

    def moved(directory, by):
        result, position = bytearray(directory), 0
        while position < len(directory):
            lengths = struct.unpack("<HHH", directory[position + 28 : position + 34])
            offset = struct.unpack("<I", directory[position + 42 : position + 46])[0]
            result[position + 42 : position + 46] = struct.pack("<I", offset + by)
            position += 46 + sum(lengths)
        return bytes(result)

    evil = members(changed(good, tmp_path / "e.pt2", with_node(STEPS["a file"])))
    evil_data, evil_directory, end = parts(evil)
    data, directory, _ = parts(members(good[0]))
    pad = max(0, len(data) - len(evil_data)) + 64
    start, size = len(evil_data) + pad, len(evil_directory)
    end[12:20] = struct.pack("<II", size, start)
    both = evil_data + b"\0" * pad + evil_directory + data + moved(directory, start - len(data)) + bytes(end)
    (tmp_path / "two.pt2").write_bytes(both)
    torchs = torch._C.PyTorchFileReader(str(tmp_path / "two.pt2")).get_record("models/model.json")
    assert b"from_file" in torchs
    with torch.no_grad():
        assert torch.equal(load_detector(tmp_path / "two.pt2")(IMAGES), good[1](IMAGES))
    assert not os.path.exists(FILE)


def test_operators_are_functions_of_their_arguments():
    """None makes random numbers or memory that is not set, and only those whose name says so write into anything."""
    for name in OPERATORS:
        packet, overload = name.split(".")
        operator = getattr(getattr(torch.ops.aten, packet), overload)
        writes = [a.name for a in operator._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        assert writes == (["self"] if packet.endswith("_") else []), name
        assert torch.Tag.nondeterministic_seeded not in operator.tags or packet in OFF, name
        assert "empty" not in name and "file" not in name and "strided" not in name
