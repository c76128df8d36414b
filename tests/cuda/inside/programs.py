"""The commands on the device that is not there, and on the CPU: a run, the same stopped and resumed, images, a
comparison. Prints JSON, by device: what they print and write, as far as it is to agree."""

import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

from tests.cuda import fake_device

fake_device.install()

import numpy as np
import torch
from PIL import Image

from refine.checkpoints.native import load_networks, save_networks
from refine.cli.main import run_command
from refine.networks.edm import EDMPrecond
from refine.networks.stylegan2 import Generator
from refine.torch_utils.build import custom_ops
from refine.training import fakes

fakes.WIDTH = fakes.HEIGHT = 1  # as in tests/conftest.py
REFINE = ["--batch=4", "--adversarial=0", "--metrics=fd40-teacher", "--lr=0.002", "--aux-lr=0.002"]
REFINE += ["--tick=0.008", "--snap=2", "--aux-warmup-kimg=0.008", "--average=ema", "--aux-augment=0.3"]
REFINE += ["--precision=tf32"]  # the switches of which measuring has to turn off


def command(name, *arguments):
    """What it prints to stdout; a failure ends this program with what it says."""
    printed, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complained):
        code = 0
        try:
            run_command(name, [str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
    if code:
        sys.exit(f"{name} {arguments} ended with {code}: {complained.getvalue()[-2000:]}{printed.getvalue()[-500:]}")
    custom_ops._ready.setdefault("cpu", None)
    return printed.getvalue()


def pair(folder):
    torch.manual_seed(0)
    synthesis = {"channel_base": 64, "channel_max": 8}
    G = Generator(8, 3, 8, 8, 3, {"num_layers": 2}, synthesis)
    kwargs = {
        "model_type": "SongUNet",
        "model_channels": 8,
        "channel_mult": [1, 1],
        "num_blocks": 1,
        "attn_resolutions": [8],
    }
    T = EDMPrecond(8, 3, 3, sigma_min=0.002, sigma_max=80, **kwargs)
    for parameter in T.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_networks(folder / "student.safetensors", {"G_ema": G}, provenance={})
    save_networks(folder / "teacher.safetensors", {"ema": T}, provenance={})
    return [f"--gan={folder}/student.safetensors", f"--teacher={folder}/teacher.safetensors"]


def refined(networks, folder, device, kimg, *more):
    command("refine", *networks, *REFINE, f"--outdir={folder}", f"--device={device}", f"--kimg={kimg}", *more)
    (run,) = folder.iterdir()
    return run


def weights(run):
    newest = max(path for path in run.glob("network-snapshot-*.safetensors") if "best" not in path.name)
    return flat(load_networks(newest, ["G"])["G"])


def flat(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()]).tolist()


def pixels(folder):
    return np.concatenate([np.asarray(Image.open(path)).ravel() for path in sorted(folder.glob("seed*.png"))]).tolist()


def tried(folder, device):
    networks = pair(folder)
    place = folder / device
    run = refined(networks, place / "whole", device, 0.032)
    stopped = None
    if device == "cuda":
        stopped = refined(networks, place / "parts", device, 0.016)
        command("refine", f"--resume={stopped}", "--kimg=0.032", f"--device={device}")
    metrics = [
        json.loads(line) for path in sorted(run.glob("metric-*.jsonl")) for line in path.read_text().splitlines()
    ]
    images = {}
    for name, network in (("student", "student.safetensors"), ("teacher", "teacher.safetensors")):
        outdir = place / name
        command("generate", f"--network={folder / network}", "--seeds=0-3", f"--outdir={outdir}", f"--device={device}")
        images[name] = pixels(outdir)
    files = [f"--before={folder}/student.safetensors", f"--after={run}/network-snapshot-best.safetensors"]
    files += [f"--ref={folder}/teacher.safetensors", f"--detector={folder}/teacher.safetensors", "--ref-num=40"]
    report = command("compare", *files, "--num=24", "--json", f"--device={device}", "--no-cache")
    files = ["--before=digits-gan", "--after=digits-gan-long", "--ref=digits-reference"]  # with classes and features
    command("compare", *files, "--num=12", "--json", f"--device={device}", "--no-cache")
    values = {
        key: value["mean"]
        for key, value in json.loads(report)["after"].items()
        if isinstance(value, dict) and "mean" in value
    }
    return {
        "weights": weights(run),
        "resumed": stopped and weights(stopped),
        "metrics": metrics,
        "images": images,
        "comparison": values,
        "started": flat(load_networks(folder / "student.safetensors", ["G_ema"])["G_ema"]),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        found = {}
        for device in ("cuda", "cpu"):
            folder = Path(name) / device
            folder.mkdir()
            os.environ["REFINE_CACHE"] = str(folder / "cache")
            found[device] = tried(folder, device)
        print(json.dumps(found))
