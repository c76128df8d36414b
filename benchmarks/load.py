"""Time and peak memory of loading checkpoints of official sizes, against reading the bytes of their files.

    python benchmarks/load.py [--folder=FOLDER] [--only=edm,adm]

Builds a file of each family with random weights (4 GB in all; those already in FOLDER are used again). Fresh processes
that have imported everything read it, load it, and read it again, with as many threads as they have by default. Printed
are the smallest processor seconds of each; the median over the processes of how much longer loading takes than the
shorter of the two readings, by the clock; and the peak memory of loading above what the process had before, in units of
the file and of its tensors in float32.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refine.networks import adm, edm, edm2, r3gan, stylegan2, stylegan3, stylegan_xl
from tests.checkpoints.builders import Format, New, edm2_file, edm_file, plain_module, stylegan2_file
from tests.checkpoints.rosinality_reference import random_generator
from tests.checkpoints.stylegan3_files import Form, projected_discriminator, stylegan3_file
from tests.golden import read_json
from tests.networks.stylegan3_tables import xl_kwargs
from tests.networks.test_golden_r3gan import kwargs_of

# Loads by the function `load` what is called `name`, and reads `path` before and after. Prints processor seconds and
# seconds of reading, both of loading, bytes of memory, of tensors.
CHILD = """
import gc, importlib, importlib.util, json, sys, time
from pathlib import Path
import torch
from refine import checkpoints
from refine.checkpoints import describe
from refine.checkpoints.foreign import opening
from refine.checkpoints.registry import NETWORK_CLASSES
for entry in NETWORK_CLASSES.values():
    importlib.import_module(entry.module)
if importlib.util.find_spec('diffusers'):
    from diffusers import UNet2DModel

def peak():
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith('VmHWM'))

def timed(function, argument):
    start = time.process_time(), time.perf_counter()
    result = function(argument)
    return time.process_time() - start[0], time.perf_counter() - start[1], result

def reading():
    return timed(Path.read_bytes, Path(path))[:2]

load, name, path = sys.argv[1:]
first = reading()
Path('/proc/self/clear_refs').write_text('5')  # the peak is what there is now
before = peak()
*loading, network = timed(getattr(checkpoints, load), name)
memory = peak() - before
tensors = sum(value.nbytes for value in network.state_dict().values())
del network
gc.collect()
print(json.dumps([*map(min, first, reading()), *loading, memory, tensors]))
"""

EDM = {"img_resolution": 32, "img_channels": 3, "label_dim": 10, "model_type": "SongUNet", "augment_dim": 9}
EDM |= {"channel_mult": [2, 2, 2], "dropout": 0.13}


def write_stylegan2(path: Path) -> None:
    synthesis = {"channel_base": 16384, "channel_max": 512, "num_fp16_res": 4, "conv_clamp": 256}
    G = stylegan2.Generator(512, 10, 512, 32, 3, {"num_layers": 2}, synthesis)
    D = stylegan2.Discriminator(10, 32, 3, architecture="orig", channel_base=16384)
    path.write_bytes(stylegan2_file(Format(protocol=3, numpy=1, torch_style=1), G, G=G, D=D))


def write_stylegan3(path: Path) -> None:
    G = stylegan3.Generator(**read_json("stylegan3/names/t256")["init_kwargs"])
    path.write_bytes(stylegan3_file(Form(), G, G=G, D=stylegan2.Discriminator(0, 256, 3)))


def write_stylegan_xl(path: Path) -> None:
    case, form = read_json("stylegan3/names/xl_imagenet64"), Form(dill=1)
    G = stylegan_xl.Generator(**xl_kwargs(case, dict([*case["parameters"], *case["buffers"]])))
    path.write_bytes(stylegan3_file(form, G, D=projected_discriminator(form)))


def write_r3gan(path: Path) -> None:
    table, form = read_json("r3gan/names/imagenet32")["G"], Format()

    def pickled(module: torch.nn.Module) -> New:
        children = {name: pickled(child) for name, child in module.named_children()}
        tensors = {**module._parameters, **module._buffers}
        return plain_module(form, f"R3GAN.Networks.{type(module).__name__}", tensors, children)

    G = pickled(r3gan.Generator(**kwargs_of(table["init_kwargs"], table["stage_dtypes"])))
    path.write_bytes(form.dumps({"G_ema": plain_module(form, "training.networks.Generator", {}, {"Model": G})}))


def write_rosinality(path: Path) -> None:
    torch.save({"g_ema": random_generator(256, layers=8), "latent_avg": torch.zeros(512)}, path)


def write_edm(path: Path) -> None:
    path.write_bytes(edm_file(Format(), edm.EDMPrecond(**EDM)))


def write_edm2(path: Path) -> None:
    channels = {"edm2.pkl": 192, "edm2-xs.pkl": 128}[path.name]
    net = edm2.Precond(64, 3, 1000, model_channels=channels)
    path.write_bytes(edm2_file(Format(dtype=torch.float16), net))


def write_adm(path: Path) -> None:
    sizes = {"model_channels": 192, "widths": [192, 384, 576, 768], "num_blocks": 3, "attention_levels": [1, 2, 3]}
    state = adm.ADMPrecond(64, 3, 1000, **sizes, learn_sigma=True).state_dict()
    torch.save({name.removeprefix("model."): value for name, value in state.items()}, path)


def write_diffusers(path: Path) -> None:
    from diffusers import DDPMScheduler, UNet2DModel  # type: ignore[import-not-found]  # an optional package

    down = ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"]
    up = ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]
    widths = {"block_out_channels": [128, 256, 256, 256], "attention_head_dim": None}
    UNet2DModel(32, down_block_types=down, up_block_types=up, **widths).save_pretrained(path.parent)
    DDPMScheduler().save_pretrained(path.parent)


def write_native(path: Path) -> None:
    from refine.checkpoints.native import save_networks

    save_networks(path, {"ema": edm.EDMPrecond(**EDM)}, provenance={})


ROWS: list[tuple[str, str, Callable[[Path], None], str]] = [  # what, file, who writes it, who loads it
    ("StyleGAN2, CIFAR-10, with D and G_ema", "stylegan2.pkl", write_stylegan2, "load_generator"),
    ("StyleGAN3-t, 256×256, with D and G_ema", "stylegan3.pkl", write_stylegan3, "load_generator"),
    ("StyleGAN-XL, ImageNet-64", "stylegan_xl.pkl", write_stylegan_xl, "load_generator"),
    ("R3GAN, ImageNet-32", "r3gan.pkl", write_r3gan, "load_generator"),
    ("rosinality `.pt`, 256×256", "rosinality.pt", write_rosinality, "load_generator"),
    ("EDM, CIFAR-10", "edm.pkl", write_edm, "load_teacher"),
    ("the same as a one-step generator", "one-step:edm.pkl", write_edm, "load_generator"),
    ("EDM2, ImageNet-64 S, float16", "edm2.pkl", write_edm2, "load_teacher"),
    ("EDM2, ImageNet-64 XS, float16 (a guide)", "edm2-xs.pkl", write_edm2, "load_teacher"),
    ("guided-diffusion `.pt`, ImageNet-64", "adm.pt", write_adm, "load_teacher"),
    ("diffusers, CIFAR-10", "diffusers/diffusion_pytorch_model.safetensors", write_diffusers, "load_teacher"),
    ("EDM, CIFAR-10, as a native file", "native.safetensors", write_native, "load_teacher"),
]


def measure(load: str, name: str, path: Path, repeats: int) -> tuple[float, float, float, float, float]:
    """Processor seconds of reading and of loading, how much longer loading takes, peak bytes, bytes of the tensors."""
    results: list[list[float]] = []
    for _ in range(repeats):
        command = [sys.executable, "-c", CHILD, load, name, str(path)]
        done = subprocess.run(
            command, cwd=Path(__file__).resolve().parents[1], check=True, capture_output=True, text=True
        )
        results.append(json.loads(done.stdout))
    longer = statistics.median(loading / reading for _, reading, _, loading, *_ in results)
    reading, _, loading, _, memory, tensors = (min(column) for column in zip(*results, strict=True))
    return reading, loading, longer, memory, tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="Where the files are built. Default: a temporary folder.")
    parser.add_argument("--only", default="", help="Names of files without suffix, separated by commas. Default: all.")
    parser.add_argument("--repeats", type=int, default=5, help="Processes for each file. Default: 5.")
    options = parser.parse_args()
    print("| file | MB | reading, s | loading, s | ratio | ratio by the clock | peak memory / file | / tensors |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for what, name, write, load in ROWS:
            path = folder / name.removeprefix("one-step:")
            if options.only and path.relative_to(folder).parts[0].partition(".")[0] not in options.only.split(","):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file():
                torch.manual_seed(0)
                write(path)
            source = name.replace(path.relative_to(folder).as_posix(), str(path))
            reading, loading, longer, memory, tensors = measure(load, source, path, options.repeats)
            size = path.stat().st_size
            row = [what, f"{size / 1e6:.0f}", f"{reading:.3f}", f"{loading:.3f}"]
            ratios = (loading / reading, longer, memory / size, memory / tensors)
            print(f"| {' | '.join([*row, *(f'{ratio:.2f}' for ratio in ratios)])} |", flush=True)


if __name__ == "__main__":
    main()
