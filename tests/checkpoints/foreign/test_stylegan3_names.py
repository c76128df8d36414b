"""State dicts of StyleGAN3: everything from names, shapes and the usual schedule, or a word on what is missing."""

import pytest
import torch

from refine.checkpoints import load_generator, native, peek
from refine.checkpoints.foreign import stylegan3_names
from refine.checkpoints.registry import build_empty
from tests.checkpoints.foreign.test_forms import WRAPPED
from tests.checkpoints.foreign.test_nvidia import PICKLES
from tests.checkpoints.stylegan3_files import refs_of, t_generator
from tests.golden import ROOT, max_error, read_arrays, read_json

RADIAL = {"conv_kernel": 1, "use_radial_filters": True}
OFFICIAL = sorted(path.name.partition(".")[0] for path in (ROOT / "stylegan3/names").glob("[rt]*"))


def images(G):
    z, c = torch.randn(2, G.z_dim, generator=torch.Generator().manual_seed(0)), torch.eye(2, G.c_dim)
    with torch.no_grad():
        return G(z, c if G.c_dim else None, truncation_psi=0.7)


def small(**changes):
    G = t_generator(**changes).requires_grad_(False)
    for name, value in G.state_dict().items():
        if name.endswith(("bias", "w_avg", "magnitude_ema")):
            value.add_(torch.rand_like(value))
    return G


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrap", WRAPPED)
def test_wherever_it_is(wrap, legacy, tmp_path):
    G, path = small(**(RADIAL if legacy else {})), tmp_path / "x.pt"
    torch.save(WRAPPED[wrap](G.state_dict()), path, _use_new_zipfile_serialization=not legacy)
    loaded = load_generator(path)
    assert torch.equal(images(loaded), images(G)) and peek(path, "generator").classes == 3
    assert [note.split()[0] for note in loaded.notes] == ["conv_clamp", "output_scale", "lr_multiplier"]


@pytest.mark.parametrize(
    "changes",
    [
        {"img_channels": 4, "c_dim": 0},
        {"img_channels": 3, "z_dim": 5, "w_dim": 7, "mapping_kwargs": {"num_layers": 3, "layer_features": 6}},
        {"mapping_kwargs": {"embed_features": 5}, "filter_size": 4},
        {"img_resolution": 16, "num_layers": 6, "channel_base": 100, "channel_max": 9, **RADIAL},
        {"channel_base": 32, "channel_max": 6},
    ],
)
def test_sizes_follow_from_names_and_shapes(changes, tmp_path):
    G = small(**changes)
    torch.save(G.state_dict(), tmp_path / "x.pt")
    assert torch.equal(images(load_generator(tmp_path / "x.pt")), images(G))


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_sizes(name):
    case = read_json(f"stylegan3/names/{name}")
    shapes = [*case["parameters"], *case["buffers"]]
    state = build_empty("stylegan3.Generator", case["init_kwargs"]).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == {key: list(shape) for key, shape in shapes}
    found = stylegan3_names.describe_generator(refs_of(state))
    state = build_empty(found.class_name, found.init_kwargs).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == {key: list(shape) for key, shape in shapes}
    for key in ("channel_base", "channel_max", "img_resolution", "conv_kernel"):
        assert found.init_kwargs[key] == case["init_kwargs"].get(key, 3), key


@pytest.mark.parametrize("name", ["sg3t_uncond", "sg3r_cond"])
def test_of_the_originals(name, tmp_path):
    torch.save(load_generator(PICKLES / f"{name}.pkl").state_dict(), tmp_path / "x.pt")
    G, expected = load_generator(tmp_path / "x.pt"), read_arrays(f"pickles/{name}_expected")
    assert max_error(G(expected["z"], expected["c"]), expected["G_ema_img_psi1"]) < 1e-5
    native.save_networks(tmp_path / "y.safetensors", {"G_ema": G}, provenance={})
    assert torch.equal(images(load_generator(tmp_path / "y.safetensors")), images(G))


def test_half_floats_and_what_may_be_missing(tmp_path):
    G = small()
    state = G.state_dict()
    for dtype in (torch.float16, torch.bfloat16):
        torch.save({name: value.to(dtype) for name, value in state.items()}, tmp_path / "x.pt")
        assert max_error(images(load_generator(tmp_path / "x.pt")), images(G)) < 0.05
    left = {name: value for name, value in state.items() if not name.endswith(("_filter", "transform", "w_avg"))}
    torch.save({**left, "cur_nimg": torch.ones([])}, tmp_path / "x.pt")
    loaded, z, c = load_generator(tmp_path / "x.pt"), torch.randn(2, 8), torch.eye(3)[:2]
    assert torch.equal(loaded(z, c), G(z, c)) and any("mean of w" in note for note in loaded.notes)
    torch.save({name: value for name, value in state.items() if "magnitude_ema" not in name}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"lacks 5 of \d+ tensors of a Generator, such as synthesis.L0_28_6.magnitude"):
        load_generator(tmp_path / "x.pt")


def test_what_no_tensor_tells_can_be_given(tmp_path):
    told = {"output_scale": 0.5, "conv_clamp": 0.2, "mapping_kwargs": {"lr_multiplier": 0.1}}
    G = small(**told)
    torch.save(G.state_dict(), tmp_path / "x.pt")
    assert torch.equal(images(load_generator(tmp_path / "x.pt", told)), images(G))
    assert load_generator(tmp_path / "x.pt", told).notes == ()
    assert max_error(images(load_generator(tmp_path / "x.pt")), images(G)) > 1e-2


@pytest.mark.parametrize("unusual", [{"first_cutoff": 1.5}, {"margin_size": 4}, {"num_critical": 1}])
def test_another_schedule_is_asked_for(unusual, tmp_path):
    G = small(**unusual)
    torch.save(G.state_dict(), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"are not those of num_critical 2, .*; say with --gan-kwargs|has shape"):
        load_generator(tmp_path / "x.pt")
    assert torch.equal(images(load_generator(tmp_path / "x.pt", unusual)), images(G))


def test_frequencies_beyond_the_cutoff_are_of_another_schedule(tmp_path):
    state = {name: value for name, value in small(first_cutoff=3).state_dict().items() if "_filter" not in name}
    torch.save({**state, "synthesis.input.freqs": torch.full([6, 2], 2.0)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="such as its Fourier features, are not those of num_critical 2, f"):
        load_generator(tmp_path / "x.pt")


def hostile():
    state = small().state_dict()
    weight = "synthesis.L0_28_6.weight"
    yield "no layers", {"synthesis.input.freqs": torch.zeros(2, 2)}
    yield "huge size", {name.replace("_28_", "_99999_"): value for name, value in state.items()}
    yield "no channels", {name.replace("_28_6", "_28_0"): value for name, value in state.items()}
    yield "a layer missing", {name: value for name, value in state.items() if "L1_" not in name}
    yield "another rank", {**state, weight: torch.zeros(6)}
    yield "another kernel", {**state, weight: torch.zeros(6, 6, 9, 9)}
    yield "an empty filter", {**state, "synthesis.L0_28_6.up_filter": torch.zeros(0)}
    yield "a huge filter", {**state, "synthesis.L0_28_6.up_filter": torch.zeros(5000)}
    yield "not numbers", {**state, "synthesis.L0_28_6.up_filter": torch.full([12], torch.nan)}
    yield "many layers", {**state, **{f"synthesis.L{i}_28_6.weight": torch.zeros(6, 6, 3, 3) for i in range(5, 900)}}
    yield "integers", {**state, weight: torch.zeros(6, 6, 3, 3, dtype=torch.int64)}


@pytest.mark.parametrize("case", range(11))
def test_impossible_ones_are_refused_in_one_line(case, tmp_path):
    what, state = list(hostile())[case]
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError) as refusal:
        load_generator(tmp_path / "x.pt")
    assert str(refusal.value).startswith(str(tmp_path / "x.pt")) and str(refusal.value).isprintable(), what
