"""State dicts of StyleGAN-XL: where stages begin from the stored filters, the rest from names and shapes."""

import pytest
import torch
from safetensors.torch import save_file

from refine.checkpoints import export, load_generator, native, peek
from refine.checkpoints.foreign import stylegan_xl_names
from refine.checkpoints.foreign.stylegan3 import LAYER_OPTIONS
from refine.checkpoints.registry import build_empty
from refine.networks.stylegan_xl import Generator
from tests.checkpoints.foreign.test_forms import WRAPPED
from tests.checkpoints.foreign.test_nvidia import PICKLES
from tests.checkpoints.foreign.test_stylegan3_names import images
from tests.checkpoints.stylegan3_files import refs_of, xl_chain, xl_generator
from tests.golden import ROOT, max_error, read_json
from tests.limits import outcome
from tests.networks.stylegan3_tables import xl_kwargs
from tests.networks.test_golden_stylegan3 import INDEX, golden_generator

OFFICIAL = sorted(path.name.partition(".")[0] for path in (ROOT / "stylegan3/names").glob("*xl_*"))
SIGNAL = ("size", "channels", "rate", "cutoff", "half_width")


def saved(G, path):
    """`torch.save(G.state_dict())`, read again."""
    torch.save(G.state_dict(), path)
    return load_generator(path)


def assert_same(loaded, G):
    """The same network: layers, tensors, images, bit for bit (cutoffs to a rounding of float64)."""
    assert_same_layers(loaded.init_kwargs["layers"], G.init_kwargs["layers"])
    ours, theirs = loaded.state_dict(), G.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert torch.equal(images(loaded), images(G))


def assert_same_layers(found, expected):
    assert [layer["name"] for layer in found] == [layer["name"] for layer in expected]
    for ours, theirs in ((LAYER_OPTIONS | a, LAYER_OPTIONS | b) for a, b in zip(found, expected, strict=True)):
        for key in (*SIGNAL, "use_fp16", "is_torgb", "is_critically_sampled", "filter_size", "lrelu_upsampling"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-12), (ours["name"], key)


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_sizes(name):
    """Every signal of the published chain, as the original's layers have it, and nothing but these tensors."""
    case = read_json(f"stylegan3/names/{name}")
    shapes = [*case["parameters"], *case["buffers"]]
    kwargs = xl_kwargs(case, dict(shapes))
    state = build_empty("stylegan_xl.Generator", kwargs).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == {key: list(shape) for key, shape in shapes}
    found = stylegan_xl_names.describe_generator(refs_of(state))
    assert_same_layers(found.init_kwargs["layers"], kwargs["layers"])
    assert all(
        found.init_kwargs[key] == value for key, value in kwargs.items() if key not in ("layers", "mapping_kwargs")
    )
    empty = build_empty(found.class_name, found.init_kwargs, (len(state), sum(v.numel() for v in state.values())))
    assert {key: value.shape for key, value in empty.state_dict().items()} == {k: v.shape for k, v in state.items()}


@pytest.mark.parametrize("name", [name for name in OFFICIAL if not name.endswith(("256", "512", "1024"))])
def test_official_layers_with_few_channels(name, tmp_path):
    case = read_json(f"stylegan3/names/{name}")
    kwargs = xl_kwargs(case, dict([*case["parameters"], *case["buffers"]]))
    for layer in kwargs["layers"]:
        channels = layer["channels"] if layer["is_torgb"] else max(layer["channels"] // 256, 1)
        layer |= {"channels": channels, "name": f"{layer['name'].rpartition('_')[0]}_{channels}"}
    sizes = {"z_dim": 4, "c_dim": 3, "w_dim": 4, "input_channels": 4, "mapping_kwargs": {"embedding": [5, 4]}}
    torch.manual_seed(1)
    G = Generator(**{**kwargs, **sizes}).eval()
    assert_same(saved(G, tmp_path / "x.pt"), G)


@pytest.mark.parametrize("name", [name for name in INDEX if name.startswith("x")])
def test_of_the_originals(name, tmp_path):
    G, data = golden_generator(name)
    loaded = saved(G, tmp_path / "x.pt")
    assert_same(loaded, G)
    assert max_error(loaded(data["in/z"], data["in/c"]), data["out/img_psi1"]) < 1e-5
    native.save_networks(tmp_path / "y.safetensors", {"G_ema": loaded}, provenance={})
    assert torch.equal(images(load_generator(tmp_path / "y.safetensors")), images(G))


@pytest.mark.parametrize("name", ["sgxl_stem_cond", "sgxl_super_cond"])
def test_as_from_the_pickle_and_back_into_it(name, tmp_path):
    G = load_generator(PICKLES / f"{name}.pkl").requires_grad_(False)
    assert_same(saved(G, tmp_path / "x.pt"), G)
    G.synthesis.input.weight.add_(0.1)
    loaded = saved(G, tmp_path / "x.pt")
    export.write_like(PICKLES / f"{name}.pkl", tmp_path / "y.pkl", {"G_ema": loaded})
    assert torch.equal(images(load_generator(tmp_path / "y.pkl")), images(G))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrap", WRAPPED)
def test_wherever_it_is(wrap, legacy, tmp_path):
    G, path = xl_chain((16, 4), (32, 4)), tmp_path / "x.pt"
    torch.save(WRAPPED[wrap](G.state_dict()), path, _use_new_zipfile_serialization=not legacy)
    loaded = load_generator(path)
    assert torch.equal(images(loaded), images(G)) and peek(path, "generator").classes == 3
    assert [note.split()[0] for note in loaded.notes] == ["conv_clamp", "output_scale", "lr_multiplier"]


RADIAL = {"conv_kernel": 1, "use_radial_filters": True}
CHAINS = {
    "a stem": ([(16, 5)], {}),
    "a stem of one layer below the critical ones": ([(16, 3)], {}),
    "a stem without classes": ([(16, 5)], {"c_dim": 0}),
    "a stage without classes": ([(16, 4), (32, 4)], {"c_dim": 0}),
    "a stage of few layers": ([(16, 3), (32, 3)], {}),
    "two stages": ([(16, 4), (32, 4), (64, 5)], {}),
    "two stages of few layers": ([(16, 4), (32, 3), (64, 3)], {}),
    "three stages, one of few layers": ([(8, 4), (16, 3), (32, 4), (64, 4)], {}),
    "four times as large": ([(16, 4), (64, 5)], {}),
    "sixteen times as large": ([(8, 4), (128, 5)], {}),
    "three times as large": ([(8, 4), (24, 4), (48, 4)], {}),
    "r": ([(16, 4), (32, 4), (64, 4)], {"options": RADIAL}),
    "a t head on an r stem": ([(16, 4, RADIAL), (32, 4), (64, 4)], {}),
    "an r head on a t stem": ([(16, 4), (32, 4, RADIAL), (64, 4, RADIAL)], {}),
    "other filters of the stem": ([(16, 4, {"filter_size": 4}), (32, 4)], {}),
    "many layers in the mapping": ([(16, 4)], {"mapping_kwargs": {"embedding": [3, 2], "num_layers": 4}}),
    "z unlike w": ([(16, 4)], {"z_dim": 3}),
    "z unlike w, without classes": ([(16, 4)], {"z_dim": 3, "c_dim": 0}),
}


@pytest.mark.parametrize("case", CHAINS)
def test_stages_are_found(case, tmp_path):
    stages, changes = CHAINS[case]
    G = xl_chain(*stages, **changes)
    assert_same(saved(G, tmp_path / "x.pt"), G)


UNUSUAL = {
    "first_cutoff": ({"first_cutoff": 1.5}, {"first_cutoff": 1.5}),
    "first_stopband": ({"first_stopband": 3.0}, {"first_stopband": 3.0}),
    "last_stopband_rel": ({"last_stopband_rel": 1.5}, {"last_stopband_rel": 1.5}),
    "margin_size": ({"margin_size": 4}, {"margin_size": 4}),
    "num_critical": ({"critical": 1}, {"num_critical": 1}),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_another_schedule_is_asked_for(case, tmp_path):
    changes, given = UNUSUAL[case]
    G = xl_chain((16, 5), (32, 5), (64, 5), schedule=changes)
    with pytest.raises(ValueError, match=r"such as L\d+_\d+_\d, are not those of num_critical 2, .*; say with --gan"):
        saved(G, tmp_path / "x.pt")
    assert torch.equal(images(load_generator(tmp_path / "x.pt", given)), images(G))
    assert_same(load_generator(tmp_path / "x.pt", {"layers": G.init_kwargs["layers"]}), G)


def test_what_no_tensor_tells_can_be_given(tmp_path):
    told = {"output_scale": 0.5, "mapping_kwargs": {"embedding": [5, 4], "lr_multiplier": 0.1}}
    G = xl_chain((16, 4), (32, 4), options={"conv_clamp": 0.2, "lrelu_upsampling": 4}, **told)
    with pytest.raises(ValueError, match="are not those of"):
        saved(G, tmp_path / "x.pt")
    given = {"output_scale": 0.5, "mapping_kwargs": {"lr_multiplier": 0.1}, "lrelu_upsampling": 4}
    loaded = load_generator(tmp_path / "x.pt", {**given, "conv_clamp": 0.2, "filter_size": 6})
    assert torch.equal(images(loaded), images(G)) and loaded.notes == ()
    assert max_error(images(load_generator(tmp_path / "x.pt", {**given, "filter_size": 6})), images(G)) > 1e-2


@pytest.mark.parametrize("given, reason", [
    ({"channel_base": 4}, "a StyleGAN-XL takes no argument channel_base"),
    ({"is_torgb": True}, "a StyleGAN-XL takes no argument is_torgb"),
    ({"layers": [], "conv_clamp": 1}, "a StyleGAN-XL whose layers are given takes no argument conv_clamp"),
    ({"layers": []}, "cannot be built"),
    ({"layers": 3}, "cannot be built"),
    ({"num_critical": "x"}, "are not those of num_critical x, first_cutoff 2"),
    ({"num_critical": 1 << 19}, "are not those of num_critical 524288"),
    ({"num_fp16_res": 10**9}, "expected at most"),
    ({"conv_clamp": "x"}, "cannot be built .*: conv_clamp is 'x'"),
    ({"filter_size": 10**5}, "are not those of"),
])  # fmt: skip
def test_what_cannot_be_given(given, reason, tmp_path):
    torch.save(xl_chain((16, 4), (32, 4)).state_dict(), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=reason) as refusal:
        load_generator(tmp_path / "x.pt", given)
    assert str(refusal.value).isprintable()


def test_half_floats_and_what_may_be_missing(tmp_path):
    G, path = xl_chain((16, 4), (32, 4), (64, 4), c_dim=0), tmp_path / "x.pt"
    for dtype in (torch.float16, torch.bfloat16):
        torch.save({name: value.to(dtype) for name, value in G.state_dict().items()}, path)
        loaded = load_generator(path)
        assert_same_layers(loaded.init_kwargs["layers"], G.init_kwargs["layers"])
        assert max_error(images(loaded), images(G)) < 0.05
    left = {name: value for name, value in G.state_dict().items() if not name.endswith(("transform", "w_avg"))}
    save_file({**left, "cur_nimg": torch.ones([])}, tmp_path / "x.safetensors")
    loaded, z = load_generator(tmp_path / "x.safetensors"), torch.randn(2, 8)
    assert torch.equal(loaded(z), G(z)) and any("mean of w" in note for note in loaded.notes)


def test_without_filters_only_a_stem_is_read(tmp_path):
    for stages in ([(16, 4)], [(16, 4), (32, 4)]):
        G, path = xl_chain(*stages), tmp_path / f"{len(stages)}.pt"
        torch.save({name: value for name, value in G.state_dict().items() if "_filter" not in name}, path)
    loaded = load_generator(tmp_path / "1.pt")
    assert_same(loaded, xl_chain((16, 4)))
    assert "no filters are stored: they are computed" in loaded.notes
    with pytest.raises(ValueError, match="it lacks the filters of its layers, which tell where its stages"):
        load_generator(tmp_path / "2.pt")


def hostile():
    state, weight = xl_chain((16, 4), (32, 4)).state_dict(), "synthesis.L0_36_2.weight"
    yield "no tensors", {"synthesis.input.freqs": torch.zeros(2, 2), "mapping.embed.weight": torch.zeros(2, 2)}
    yield "other layers", xl_generator().state_dict()
    yield "no means of w", {name: value for name, value in state.items() if "w_avg" not in name}
    yield "one mean of w", {**state, "mapping.w_avg": torch.zeros(8)}
    yield "more classes than vectors", {**state, "mapping.w_avg": torch.zeros(6, 8)}
    yield "a flat table", {**state, "mapping.embed.weight": torch.zeros(4)}
    yield "no mapping", {name: value for name, value in state.items() if ".fc" not in name}
    yield "huge size", {name.replace("_36_", "_99999_"): value for name, value in state.items()}
    yield "no channels", {name.replace("_36_2", "_36_0"): value for name, value in state.items()}
    yield "two gaps", {name.replace("L6_", "L8_"): value for name, value in state.items()}
    yield "a layer missing", {name: value for name, value in state.items() if "L1_" not in name}
    yield "one index twice", {**state, "synthesis.L0_52_2.weight": torch.zeros(2, 4, 3, 3)}
    yield "another rank", {**state, weight: torch.zeros(6)}
    yield "another kernel", {**state, weight: torch.zeros(2, 4, 9, 9)}
    yield "a huge filter", {**state, "synthesis.L0_36_2.up_filter": torch.zeros(5000)}
    yield "a filter of nobody", {**state, "synthesis.L3_36_2.down_filter": torch.ones(12) / 12}
    yield "not numbers", {**state, "synthesis.L0_36_2.up_filter": torch.full([12], torch.nan)}
    yield "frequencies", {**state, "synthesis.input.freqs": torch.full([4, 2], torch.nan)}
    yield "integers", {**state, "synthesis.L0_36_2.up_filter": torch.ones(12, dtype=torch.int64)}
    wide = torch.zeros(12, 1 << 17)[:, 0]
    yield "a filter spread over megabytes", {**state, "synthesis.L0_36_2.up_filter": wide}
    for size, kind in ((36, "the same"), (8192, "large")):
        layers = {f"synthesis.L{i + (i > 0)}_{size}_1.weight": torch.zeros(1, 1, 3, 3) for i in range(99)}
        filters = {
            f"synthesis.L{i + (i > 0)}_{size}_1.up_filter": state["synthesis.L0_36_2.up_filter"] for i in range(99)
        }
        outer = {name: value for name, value in state.items() if "synthesis.L" not in name}
        last = {f"synthesis.L100_{4096}_1.weight": torch.zeros(1, 1, 1, 1)}
        yield f"a hundred layers, {kind}", {**outer, **layers, **filters, **last}
    equal = xl_chain((8, 4), *[(16, 3)] * 90)
    yield "stages of one layer", equal.state_dict()


HOSTILE = dict(hostile())


@pytest.mark.parametrize("case", HOSTILE)
def test_impossible_ones_are_refused_soon_in_one_line(case, tmp_path):
    torch.save(HOSTILE[case], tmp_path / "x.pt")
    assert outcome(load_generator, tmp_path / "x.pt").startswith(str(tmp_path / "x.pt"))
