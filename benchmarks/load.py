"""Time and peak memory of loading checkpoints of CIFAR-10 size, against reading their bytes and building the networks.

    python benchmarks/load.py [--folder=/tmp/x]

Builds a StyleGAN2 pickle (G, D, G_ema; 20 M parameters a generator), an EDM pickle (56 M parameters) and a `.pt` of
guided-diffusion (125 M) with random weights once, then measures in fresh processes: (a) reading the file's bytes, (b)
constructing the network, initialised as for training, (c) loading it from the file. Prints (c) / (a + b), and the peak
memory of (c) above that of a process that has imported everything, in units of the file.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

GENERATOR = {"z_dim": 512, "c_dim": 10, "w_dim": 512, "img_resolution": 32, "img_channels": 3}
GENERATOR["mapping_kwargs"] = {"num_layers": 2}
GENERATOR["synthesis_kwargs"] = {"channel_base": 16384, "channel_max": 512, "num_fp16_res": 4, "conv_clamp": 256}
DISCRIMINATOR = {"c_dim": 10, "img_resolution": 32, "img_channels": 3, "architecture": "orig", "channel_base": 16384}
TEACHER = {"img_resolution": 32, "img_channels": 3, "label_dim": 10, "model_type": "SongUNet", "augment_dim": 9}
TEACHER |= {"channel_mult": [2, 2, 2], "dropout": 0.13}
ADM = {"img_resolution": 64, "img_channels": 3, "label_dim": 1000, "model_channels": 192, "num_blocks": 1}
ADM |= {"widths": [192, 384, 576, 576], "attention_levels": [1, 2, 3]}
SAID = {"image_size": 64, "num_head_channels": 64, "use_new_attention_order": True, "noise_schedule": "cosine"}

# One measurement: {what} of {kind} on {path}; prints seconds of wall clock, of processor time, and bytes of memory.
CHILD = """
import json, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from refine.checkpoints.foreign import container, nvidia, raw_pickle, state_dicts
from refine.checkpoints import load_generator, load_teacher
from refine.networks.adm import ADMPrecond
from refine.networks.edm import EDMPrecond
from refine.networks.stylegan2 import Generator
import benchmarks.load as sizes

def peak():
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith('VmHWM'))

what, kind, path = sys.argv[1:]
warm = nvidia.COMMON_RULES
before, cpu, wall = peak(), time.process_time(), time.perf_counter()
if what == 'read':
    data = Path(path).read_bytes()
elif what == 'build':
    makers = {'generator': (Generator, sizes.GENERATOR), 'teacher': (EDMPrecond, sizes.TEACHER)}
    cls, kwargs = makers.get(kind, (ADMPrecond, sizes.ADM))
    net = cls(**kwargs)
else:
    net = load_generator(path) if kind == 'generator' else load_teacher(path)
print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu, peak() - before]))
"""


def build_files(folder: Path) -> dict[str, Path]:
    """The three files; existing ones are used again."""
    import torch

    from refine.networks.adm import ADMPrecond
    from refine.networks.edm import EDMPrecond
    from refine.networks.stylegan2 import Discriminator, Generator
    from tests.checkpoints.builders import Format, edm_file, stylegan2_file

    files = {kind: folder / f"{kind}.pkl" for kind in ("generator", "teacher")}
    torch.manual_seed(0)
    if not files["generator"].exists():
        G, form = Generator(**GENERATOR), Format(protocol=3, numpy=1, torch_style=1)
        files["generator"].write_bytes(stylegan2_file(form, G, G=G, D=Discriminator(**DISCRIMINATOR)))
    if not files["teacher"].exists():
        files["teacher"].write_bytes(edm_file(Format(), EDMPrecond(**TEACHER)))
    files["adm"] = folder / "adm.pt"
    if not files["adm"].exists():
        state = ADMPrecond(**ADM).state_dict()
        torch.save({name.removeprefix("model."): value for name, value in state.items()}, files["adm"])
        files["adm"].with_suffix(".json").write_text(json.dumps(SAID))
    return files


def measure(what: str, kind: str, path: Path, repeats: int) -> list[float]:
    """Smallest wall-clock seconds, processor seconds and peak bytes of a few fresh processes."""
    results = []
    for _ in range(repeats):
        command = [sys.executable, "-c", CHILD, what, kind, str(path)]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        results.append(json.loads(done.stdout))
    return [min(column) for column in zip(*results, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="Where the files are built. Default: a temporary folder.")
    parser.add_argument("--kind", choices=("generator", "teacher", "adm"), help="Only this one.")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for kind, path in build_files(options.folder or Path(temporary)).items():
            if options.kind not in (None, kind):
                continue
            rows = {what: measure(what, kind, path, options.repeats) for what in ("read", "build", "load")}
            size = path.stat().st_size
            base = [rows["read"][i] + rows["build"][i] for i in range(2)]
            print(f"{kind}, {size / 2**20:.0f} MiB")
            for what, (wall, cpu, memory) in rows.items():
                print(f"  {what:<6} {wall:6.3f} s wall  {cpu:6.3f} s processor  {memory / size:5.2f} x the file")
            wall, cpu = (rows["load"][i] / base[i] for i in range(2))
            print(f"  load / (read + build): {wall:.2f} wall, {cpu:.2f} processor")


if __name__ == "__main__":
    main()
