"""The recipes of the paper's rows and of public pairs: commands that parse, networks of the official sizes that fit."""

import importlib.util
import sys

import pytest

from refine.checkpoints.sources.index import pretrained_dir, read_index
from tests.conftest import ROOT

FOLDER = ROOT / "pretrained" / "recipes" / "paper"
# Parameters, as published for the files that the commands name (students: counted by their own definition).
TEACHERS = {
    "cifar10-uncond-refine": 55_733_891,
    "cifar10-cond-refine": 55_735_299,
    "cifar10-uncond-distill": 55_733_891,
    "cifar10-cond-distill": 55_735_299,
    "imagenet64-distill": 295_899_267,
    "ffhq256-bridge": 61_805_571,
    "afhqv2-512-bridge": 61_805_571,
    "stylegan3-ffhq1024-bridge": 61_805_571,
    "stylegan3-ffhqu256-bridge": 61_805_571,
    "stylegan3-afhqv2-512-bridge": 61_805_571,
    "church256": 113_673_219,
    "cat256": 552_814_086,
    "horse256": 552_814_086,
    "cat256-consistency": 526_304_771,
    "r3gan-imagenet64": 280_209_381,
    "imagenet64-autoguided-distill": 280_209_381 + 124_710_949,
}


@pytest.fixture(scope="module")
def estimate():
    spec = importlib.util.spec_from_file_location("estimate", FOLDER / "estimate.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def test_there_is_one_for_every_row():
    assert {path.stem for path in FOLDER.glob("*.toml")} == set(TEACHERS)


@pytest.mark.parametrize("name", TEACHERS)
def test_commands_parse_and_networks_of_the_official_size_fit(estimate, name):
    if name == "church256":
        pytest.importorskip("diffusers")
    recipe = estimate.read_recipe(FOLDER / f"{name}.toml")
    config, trainer = estimate.assemble(recipe)
    assert sum(p.numel() for p in trainer.teacher.parameters()) == TEACHERS[name]
    assert all(p.is_meta for p in trainer.G.parameters())
    index = read_index(pretrained_dir())
    if config.guide is not None:  # as the index says that they belong together
        entry = index[config.teacher]
        assert (entry.guide, entry.guidance) == (config.guide, config.guidance) and index[config.guide].url
    for value, kind in ((config.gan, "generator"), (config.teacher, "teacher"), (config.guide, "teacher")):
        if value not in ("one-step", None) and not value.endswith("/"):
            entry, network = index[value], trainer.G if kind == "generator" else trainer.teacher
            assert entry.kind == kind and entry.resolution == network.img_resolution
            assert entry.classes == (network.c_dim if kind == "generator" else network.label_dim)
    assert bool(trainer.bridge.messages(trainer.null_label)) == name.endswith("bridge")
    assert config.batch == 128 and config.lr == config.aux_lr == 1e-5


def test_a_teacher_of_guided_diffusion_is_counted_at_its_official_size(estimate):
    """256×256: a U-Net of 2.2 TFLOP forward, 3 for aux's step and 2 for the student's, and the student."""
    result = estimate.dry_run(estimate.read_recipe(FOLDER / "cat256.toml"))
    counted = result["counted"]
    assert 11e12 < counted.flops_per_image < 12e12 and 10 < counted.fixed_bytes / 2**30 < 12
    assert 35 < counted.h100_hours(result["config"]) < 45 and 20 < counted.memory(result["config"]) / 2**30 < 30


def test_an_iteration_is_counted_and_the_estimate_printed(estimate):
    recipe = estimate.read_recipe(FOLDER / "cifar10-cond-refine.toml")
    result = estimate.dry_run(recipe)
    counted = result["counted"]
    assert 200e9 < counted.flops_per_image < 300e9  # U-Net 42 GFLOP forward: 3 for aux's step, 2 for the student's
    assert 1e9 < counted.fixed_bytes < 2e9 and 1e8 < counted.bytes_per_image < 1e9
    text = estimate.describe(recipe, result, share=0.4)
    assert "2.42 → 2.27" in text and "GFLOP an image" in text and "hours on an H100 at 40% of its bf16" in text
    hours = [
        float(estimate.describe(recipe, result, 0.4, tflops).split("estimate")[1].split()[0]) for tflops in (40, 80)
    ]
    assert hours[0] == pytest.approx(2 * hours[1], rel=0.03)
