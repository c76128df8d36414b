"""Teachers from folders of diffusers: what the library itself writes, and what is refused."""

import json
import os
import re

import pytest
import safetensors.torch
import torch

from refine.checkpoints import load_generator, load_teacher, native, peek, resolve
from refine.checkpoints.foreign import diffusers_folder
from refine.cli.main import run_command
from tests.training.test_trainer import make_student

CONFIG = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": [8, 16], "norm_num_groups": 4}
CONFIG |= {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
CONFIG |= {"layers_per_block": 1, "attention_head_dim": 8}
SCHEDULER = {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
NAMES = "diffusion_pytorch_model.safetensors"


def folder_by_hand(folder, unet=None, scheduler=None, weights=(NAMES,), **parts):
    """A flat folder, as the oldest pipelines are; weights that fit nothing."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", **CONFIG, **(unet or {})}))
    (folder / "scheduler_config.json").write_text(json.dumps({**SCHEDULER, **(scheduler or {})}))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline", **parts}))
    for name in weights:
        safetensors.torch.save_file({"conv_in.bias": torch.zeros(8)}, folder / name)
    return folder


REFUSED = {
    "another model": ({"unet": {"_class_name": "UNet2DConditionModel"}}, "it is a UNet2DConditionModel of diffusers"),
    "latents": ({"vqvae": ["diffusers", "VQModel"]}, r"a pipeline of latents \(with a vqvae\)"),
    "no square": ({"unet": {"sample_size": [8, 16]}}, r"sample_size \[8, 16\]; expected the side of square"),
    "no size": ({"unet": {"sample_size": None}}, "sample_size None"),
    "other time": ({"unet": {"time_embedding_type": "fourier"}}, "time_embedding_type is fourier; expected positional"),
    "other classes": ({"unet": {"class_embed_type": "timestep"}}, "class_embed_type is timestep"),
    "VE": ({"scheduler": {"_class_name": "ScoreSdeVeScheduler", "use_flow_sigmas": True}}, "is a ScoreSdeVeScheduler"),
    "zero SNR": ({"scheduler": {"rescale_betas_zero_snr": True}}, "rescale_betas_zero_snr"),
    "flow": ({"scheduler": {"prediction_type": "flow"}}, "it predicts 'flow'; expected one of epsilon"),
    "betas": ({"scheduler": {"beta_end": "x"}}, "beta_end 'x'; expected a number"),
    "schedule": ({"scheduler": {"beta_schedule": "exotic"}}, "beta_schedule is 'exotic'"),
    "steps": ({"scheduler": {"num_train_timesteps": 10**9}}, "'num_steps' is 1000000000; expected at most"),
    "weights": ({}, "asks? for many more numbers|lacks"),
    "too wide": ({"unet": {"block_out_channels": [8192, 8192]}}, "many more numbers than the file has"),
    "impossible": ({"unet": {"block_out_channels": "x"}}, "cannot be built"),
    "pickle": ({"weights": ["diffusion_pytorch_model.bin"]}, r"diffusion_pytorch_model.bin, which is never loaded"),
    "no weights": ({"weights": []}, "has no weights; expected diffusion_pytorch_model.safetensors"),
    "parts": ({"weights": ["diffusion_pytorch_model-00001-of-00002.safetensors"]}, "in 1 parts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    changes, what = REFUSED[case]
    if case in ("schedule", "steps", "weights", "too wide", "impossible"):
        pytest.importorskip("diffusers", reason="the optional package diffusers is not installed")
    with pytest.raises(ValueError, match=what) as caught:
        load_teacher(folder_by_hand(tmp_path / "x", **changes))
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


def test_other_folders(tmp_path):
    with pytest.raises(ValueError, match="is a folder; expected a file, or a folder of diffusers"):
        load_teacher(tmp_path)
    folder = folder_by_hand(tmp_path / "x")
    (folder / "scheduler_config.json").unlink()
    with pytest.raises(ValueError, match=r"it has no scheduler_config.json beside it"):
        load_teacher(folder)
    (folder / "config.json").write_text("[")
    with pytest.raises(ValueError, match=r"its config.json is not a JSON object"):
        load_teacher(folder)


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(diffusers_folder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"it needs the package diffusers, which is missing: pip install") as caught:
        load_teacher(folder_by_hand(tmp_path / "x"))
    assert "\n" not in str(caught.value)
    native.save_networks(tmp_path / "G", {"G_ema": make_student()}, provenance={})
    load_generator(tmp_path / "G")  # everything else works


def test_names_from_before_attention_was_renamed():
    assert our_names("mid_block.attentions.0.query.weight") == "unet.mid_block.attentions.0.to_q.weight"
    assert our_names("mid_block.attentions.0.proj_attn.bias") == "unet.mid_block.attentions.0.to_out.0.bias"
    assert our_names("mid_block.resnets.0.conv1.bias") == "unet.mid_block.resnets.0.conv1.bias"


our_names = diffusers_folder.our_name


# With the library.


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A pipeline with random weights, and the folder into which the library wrote it."""
    diffusers = pytest.importorskip("diffusers", reason="the optional package diffusers is not installed")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(**CONFIG, num_class_embeds=3).eval()
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    made = diffusers.DDPMPipeline(unet, scheduler)
    folder = tmp_path_factory.mktemp("pipeline")
    made.save_pretrained(folder / "nested")
    made.save_pretrained(folder / "fp16", variant="fp16")
    unet.save_pretrained(folder / "flat")
    scheduler.save_pretrained(folder / "flat")
    old = safetensors.torch.load_file(folder / "flat" / NAMES)
    for now, then in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        old = {re.sub(rf"\.{now}\.", f".{then}.", name): value for name, value in old.items()}
    assert any(".query." in name for name in old)
    safetensors.torch.save_file(old, folder / "flat" / NAMES)
    return made, folder


@pytest.mark.parametrize("layout", ["nested", "flat", "fp16"])
def test_layouts(pipeline, layout):
    made, folder = pipeline
    info, net = peek(folder / layout, "teacher"), load_teacher(folder / layout)
    assert (net.img_resolution, net.img_channels, net.label_dim) == (8, 1, 3)
    assert (info.img_resolution, info.img_channels, info.label_dim) == (8, 1, 3)
    x_t, c = torch.randn(2, 1, 8, 8), torch.eye(3)[[2, 0]]
    with torch.no_grad():
        noise = made.unet(x_t, 500, class_labels=torch.tensor([2, 0])).sample
    signal = made.scheduler.alphas_cumprod[500]
    expected = made.scheduler.step(noise, 500, x_t).pred_original_sample
    D_x = net(x_t / signal.sqrt(), ((1 - signal) / signal).sqrt(), c)
    torch.testing.assert_close(D_x, expected, rtol=0, atol=1e-3 if layout == "fp16" else 2e-5)
    assert load_teacher(resolve(folder / layout)).sigma_max == net.sigma_max  # the weights' own path will do
    with pytest.raises(ValueError, match="is a UNet2DModel of diffusers; expected a generator"):
        load_generator(folder / layout)


def test_native_copy(pipeline, tmp_path):
    net = load_teacher(pipeline[1] / "nested")
    native.save_networks(tmp_path / "x", {"ema": net}, provenance={})
    x, c = torch.randn(1, 1, 8, 8), torch.eye(3)[:1]
    assert torch.equal(load_teacher(tmp_path / "x")(x, 2.0, c), net(x, 2.0, c))


def command(name, capsys, *args):
    with pytest.raises(SystemExit) as stop:
        run_command(name, [str(arg) for arg in args])
    out, err = capsys.readouterr()
    assert stop.value.code == 0, err
    return out


def test_inspect_and_a_short_refinement(pipeline, tmp_path, capsys, monkeypatch):
    report = json.loads(command("inspect", capsys, pipeline[1] / "nested", "--json"))
    assert report["description"] == "a UNet2DModel of diffusers"
    assert report["networks"]["ema"]["serves_as"] == (
        "teacher, with a student for 8×8×1 images (or a whole multiple of that size) and 3 classes (or none)"
    )
    monkeypatch.chdir(pipeline[1])  # a relative folder, so that --resume must have made it absolute
    native.save_networks(tmp_path / "gan", {"G_ema": make_student()}, provenance={})
    options = ["--kimg=0.008", "--batch=4", "--tick=0.004", "--snap=1", "--lr=0.001", f"--outdir={tmp_path / 'runs'}"]
    options += ["--metrics=none", "--adversarial=0"]
    command("refine", capsys, f"--gan={tmp_path / 'gan'}", "--teacher=nested", *options)
    (run,) = (tmp_path / "runs").iterdir()
    G, before = load_generator(next(run.glob("network-snapshot-*.safetensors"))), make_student()
    moved = [(a - b).abs().max().item() for a, b in zip(G.parameters(), before.parameters(), strict=True)]
    assert max(moved) > 0 and all(torch.isfinite(p).all() for p in G.parameters())
    options = json.loads((run / "training_options.json").read_text())
    assert os.path.isabs(options["teacher"]) and len(options["files"]["teacher"]["sha256"]) == 64
