"""Files that the commands of docs/mistakes.md name: what people have at hand, as small as can be."""

import json
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from refine.networks.edm import EDMPrecond
from refine.networks.stylegan2 import Generator
from tests.checkpoints.builders import Format, edm_file, stylegan2_file, write


def gan(resolution: int = 32, classes: int = 10) -> Generator:
    return Generator(8, classes, 8, resolution, 3, {"num_layers": 1}, {"channel_base": 64, "channel_max": 8}).eval()


def edm(resolution: int = 32, classes: int = 10) -> EDMPrecond:
    kwargs = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1}
    return EDMPrecond(resolution, 3, classes, **kwargs).eval()


def make(folder: Path) -> None:
    """Writes all of them."""
    form = Format()
    write(folder / "my-gan.pkl", stylegan2_file(form, gan()))
    write(folder / "my-edm.pkl", edm_file(form, edm()))
    write(folder / "edm-64.pkl", edm_file(form, edm(64)))
    write(folder / "edm-imagenet.pkl", edm_file(form, edm(classes=1000)))
    write(folder / "discriminator.pkl", form.dumps({"D": form.persistent("Discriminator", {"_parameters": {}})}))
    whole = (folder / "my-gan.pkl").read_bytes()
    write(folder / "half.pkl", whole[: len(whole) // 2])
    write(folder / "page.pkl", b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>")
    write(folder / "pointer.pkl", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 363869583\n")
    with zipfile.ZipFile(folder / "weights.zip", "w") as archive:
        archive.writestr("weights/readme.txt", "not an image")
    for name, count, size, mode in (("photos", 4, 48, "RGB"), ("drawings", 4, 32, "RGBA"), ("one", 1, 32, "RGB")):
        (folder / name).mkdir()
        for index in range(count):
            pixels = np.full([size, size, len(mode)], index, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    (folder / "stable-diffusion/unet").mkdir(parents=True)
    (folder / "stable-diffusion/model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    config = {"_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4, "sample_size": 64}
    (folder / "stable-diffusion/unet/config.json").write_text(json.dumps(config))
    save_file(
        {"conv_in.weight": torch.zeros(8, 4, 3, 3)},
        folder / "stable-diffusion/unet/diffusion_pytorch_model.safetensors",
    )
    (folder / "a-file").touch()
