"""Fuzzing of everything that is read from files: networks, detectors, training states, references, sets of images.

    python benchmarks/fuzz_checkpoints.py --what=networks --minutes=10 [--inputs=N] [--seed=0] [--out=FOLDER]

An answer is what was asked for, or a ValueError of one line. Anything else (another exception, more than 2 seconds of
processor time, 1 GiB of memory, a payload that ran) is a finding: it is printed and the file is kept in FOLDER. At the
end a table tells, for each kind of file, how many were tried and what came of them.

Small good files are changed: bytes, whole opcodes of pickles, values of JSON, files inside a zip whose checksums are
then right, the header of safetensors. With the package atheris (Google's libFuzzer for Python, Linux and macOS), the
fuzzing of networks is guided by the lines of `refine.checkpoints` that a file reaches, and ends at the first finding.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import pickle
import pickletools
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

try:
    import atheris
except ImportError:
    atheris = None

import numpy as np
import torch
from PIL import Image

from refine.networks import edm2
from refine.networks.adm import ADMPrecond, CMPrecond
from refine.networks.edm import EDMPrecond
from refine.networks.stylegan2 import Discriminator, Generator
from tests.checkpoints.builders import Call, Format, Global, dumps, edm2_file, edm_file, stylegan2_file
from tests.checkpoints.stylegan3_files import t_generator, xl_chain
from tests.metrics.networks import PixelDetector

with atheris.instrument_imports(include=["refine.checkpoints"]) if atheris else contextlib.nullcontext():
    import refine.checkpoints.foreign.raw_pickle  # noqa: F401 - some modules are imported when needed, and then not instrumented
    from refine.checkpoints import describe, load_generator, load_teacher, peek
    from refine.checkpoints.foreign import rosinality, state_dicts
from refine.metrics.detectors import load_detector
from refine.metrics.references import Looking, load_reference
from refine.training.state import load_training_state

TRAP = "REFINE_FUZZ_TRAP"
SECONDS, BYTES = 2.0, 1 << 30
Seeds: TypeAlias = "list[tuple[str, bytes]]"  # family, file
PAYLOAD = Call(Global("builtins", "eval"), f"__import__('os').environ.setdefault('{TRAP}', '1')")
SNIPPETS = [
    b"N",
    b"0",
    b"(",
    b"}",
    b"]",
    b")",
    b"R",
    b"b",
    b"\x81",
    b"\x85",
    b"\x86",
    b"\x87",
    b"t",
    b"u",
    b"s",
    b"a",
    b"e",
]
SNIPPETS += [
    b"q\x00",
    b"h\x00",
    b"h\x05",
    b"\x94",
    b"K\xff",
    b"J\xff\xff\xff\xff",
    b"G\x7f\xf0\0\0\0\0\0\0",
    b"\x8a\x08" + b"\xff" * 8,
]
SNIPPETS += [
    b"Q",
    b"\x93",
    b"\x8f",
    b"\x90",
    b".",
    b"C\x01x",
    b"\x8c\x01x",
    b"ccollections\nOrderedDict\n",
    dumps(PAYLOAD, 2)[2:-1],
]
WORDS = ["self", "input", "images", "relu", "p_conv_weight", "as_int", "as_ints", "as_tensor", "as_string", "as_none"]
WORDS += ["torch.ops.aten.add_.Tensor", "torch.ops.aten.zeros.default", "torch.ops.aten.repeat.default", "size"]
warnings.simplefilter("ignore")  # Pillow's about broken pictures
PROTOCOLS = ((2, 1), (3, 1), (5, 2))  # of pickles, each with the layout of numpy's names
GOLDEN = {  # files with the structure of the originals' own: beginning of the name, family
    "pickles/plain_": "StyleGAN2",
    "pickles/converted_": "StyleGAN2",
    "pickles/ok_": "StyleGAN2",
    "pickles/sg2_torchsave": "StyleGAN2, whole module",
    "pickles/sg2_statedict": "StyleGAN2, state dict",
    "pickles/sg2_lightning": "StyleGAN2, state dict",
    "pickles/tf": "StyleGAN2 of TensorFlow",
    "pickles/sg3": "StyleGAN3",
    "pickles/sgxl": "StyleGAN-XL",
    "pickles/r3gan_current": "R3GAN",
    "pickles/r3gan_old": "R3GAN, old names",
    "pickles/edm_": "EDM",
    "adm/tiny_zip": "guided-diffusion",
    "adm/tiny_legacy": "consistency_models",
}
EXTREMES = [0, 1, 4, 8, 127, 128, 255, 1 << 15, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]


def network_seeds() -> Seeds:
    """Small good files of every kind of network."""
    torch.manual_seed(0)
    G = Generator(4, 2, 4, 8, 3, {"num_layers": 1}, {"channel_base": 16, "channel_max": 2})
    D = Discriminator(2, 8, 3, channel_base=16, channel_max=2, mapping_kwargs={"num_layers": 1})
    T = EDMPrecond(8, 1, model_type="SongUNet", model_channels=4, channel_mult=[1], num_blocks=1, attn_resolutions=[])
    E = edm2.Precond(8, 1, model_channels=4, channel_mult=[1], num_blocks=1, attn_resolutions=[], logvar_channels=4)
    files = [
        *(("StyleGAN2", stylegan2_file(Format(protocol=p, numpy=n), G, extras="missing")) for p, n in PROTOCOLS),
        ("StyleGAN2", stylegan2_file(Format(), G, D=D, style=3)),
        ("EDM", edm_file(Format(), T)),
        ("EDM", edm_file(Format(protocol=2, numpy=1), T)),
        ("EDM2", edm2_file(Format(dtype=torch.float16), E)),
    ]
    golden = Path(__file__).resolve().parents[1] / "tests/golden"
    for beginning, family in GOLDEN.items():
        paths = [path for path in sorted(golden.glob(f"{beginning}*")) if path.suffix in (".pkl", ".pt", ".ckpt")]
        files += [(family, path.read_bytes()) for path in paths]
    for cls, family in ((ADMPrecond, "guided-diffusion"), (CMPrecond, "consistency_models")):
        sizes = {"model_channels": 32, "widths": [32], "num_blocks": 0, "attention_levels": []}
        table = cls(4, 1, num_head_channels=None, **sizes).state_dict()
        files.append((family, saved({name.removeprefix("model."): value for name, value in table.items()})))
    files.append(("EDM, state dict", saved(T.state_dict())))
    files += [("StyleGAN3, state dict", saved(t_generator().state_dict(), modern)) for modern in (True, False)]
    X = xl_chain((8, 4), (16, 3)).state_dict()
    files += [("StyleGAN-XL, state dict", saved(X, modern)) for modern in (True, False)]
    small = {"channel_base": 16, "channel_max": 2}
    state, mean = rosinality.generator_state(Generator(4, 0, 4, 8, 3, {"num_layers": 1}, small))
    for table in ({"g_ema": state, "latent_avg": mean}, {"g": state, "d": state, "g_optim": {"state": {0: {}}}}):
        files += [("rosinality", saved(table, modern)) for modern in (True, False)]
    with tempfile.TemporaryDirectory() as folder:
        state_dicts.save_plain(f"{folder}/x", G)
        files.append(("safetensors", Path(f"{folder}/x").read_bytes()))
    file = io.BytesIO()
    np.savez(file, init_kwargs=np.array(json.dumps(G.init_kwargs)), **{k: v.numpy() for k, v in G.state_dict().items()})
    return [*files, ("npz", file.getvalue())]


def saved(value: object, modern: bool = True) -> bytes:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=modern)
    return file.getvalue()


class Colours(torch.nn.Module):
    """A detector of a few steps."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.interpolate(images.float() / 255, size=(12, 12), mode="bilinear")
        one, two = torch.nn.functional.relu(self.norm(self.conv(x)), inplace=True).chunk(2, 1)
        return torch.cat([one, two.flip(3)], 1).reshape(x.shape[0], 4, -1).mean(2)


def detector_seeds() -> Seeds:
    """Programs of torch.export."""
    images, sizes = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ({0: torch.export.Dim("N", min=1, max=4096)},)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(Colours().eval(), (images,), dynamic_shapes=sizes), file)
    return [("torch.export", file.getvalue())]


def state_seeds() -> Seeds:
    """Training states, as far as their reader looks."""
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {
        "networks": {"G": net.state_dict()},
        "optimizer": optimizer.state_dict(),
        "nimg": 1000,
        "warmup_steps_done": 9,
        "skips": 0,
    }
    file = io.BytesIO()
    torch.save({**state, "config": json.dumps({"gan": "x" * 300}), "rng": torch.get_rng_state()[:100]}, file)
    return [("training state", file.getvalue())]


def reference_seeds() -> Seeds:
    """Statistics and samples, of the four features of `PixelDetector`."""
    rng = np.random.default_rng(0)
    features = rng.random((20, 4)).astype(np.float32)
    mu, sigma = features.mean(0, dtype=np.float64), np.cov(features, rowvar=False)
    arrays: list[dict[str, np.ndarray]] = [
        {"mu": mu, "sigma": sigma},
        {"mu": mu, "sigma": sigma, "features": features, "num": np.int64(20), "classes": np.arange(20)},
        {"feats": features},
        {"arr_0": rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)},
    ]
    files = []
    for save in (np.savez, np.savez_compressed):
        for table in arrays:
            file = io.BytesIO()
            save(file, **table)  # type: ignore[arg-type] # numpy's stubs know no tables of arrays
            files.append(("npz", file.getvalue()))
    sums = {"raw_mean": 20 * mu, "raw_cov": 19 * sigma + 20 * np.outer(mu, mu), "num_items": 20}
    return [*files, *(("pickle", pickle.dumps(table, 4)) for table in (sums, {"all_features": [features]}))]


def image_seeds() -> Seeds:
    """Zips of images, one with classes."""
    files = []
    for kind, labels in (("png", True), ("jpeg", False), ("bmp", False), ("webp", False), ("tiff", False)):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            names = [f"00000/img{index}.{kind}" for index in range(3)]
            for index, name in enumerate(names):
                picture = io.BytesIO()
                Image.new("L" if index == 1 else "RGB", (8, 8), 40 * index).save(picture, kind)
                archive.writestr(name, picture.getvalue())
            if labels:
                archive.writestr("dataset.json", json.dumps({"labels": [[name, 1] for name in names]}))
        files.append((f"zip of {kind}", file.getvalue()))
    return files


def opcode_bounds(data: bytes) -> list[int]:
    """Where the opcodes of a pickle begin, as far as it can be followed."""
    bounds = []
    try:
        for _, _, position in pickletools.genops(data):
            bounds.append(position)
    except Exception:  # noqa: BLE001 - a mutated file breaks pickletools in many ways; what was found is enough
        return bounds
    return bounds


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """libFuzzer's hook: the file with something changed, whole opcodes or bytes, also inside of what it contains."""
    rng = random.Random(seed)
    if data.startswith(b"PK") and rng.random() < 0.7:
        return mutate_zip(data, most, rng)
    if data[8:9] == b"{" and rng.random() < 0.7:
        return mutate_header(data, most, rng)
    if rng.random() < 0.4:
        return mutate_bytes(data, most, rng)
    return mutate_opcodes(data, rng)[:most]


def mutate_bytes(data: bytes, most: int, rng: random.Random) -> bytes:
    """A few bytes changed, by libFuzzer where it is there."""
    if atheris is not None:
        return atheris.Mutate(data, most)
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8]) if data else 0):
        changed[rng.randrange(len(changed))] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
    return bytes(changed[: rng.randrange(len(changed) + 1)] if rng.random() < 0.1 else changed)[:most]


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """One to three values or keys of a document changed."""
    try:
        document = json.loads(data)
    except ValueError:
        return data
    for _ in range(rng.choice([1, 1, 2, 3])):
        places: list[tuple[dict | list, str | int]] = []
        stack: list[dict | list] = [document]
        while stack:
            table = stack.pop()
            for key in table if isinstance(table, dict) else range(len(table)):
                places.append((table, key))  # type: ignore[arg-type] # the keys are those of the table
                if isinstance(table[key], dict | list):
                    stack.append(table[key])
        if not places:
            break
        where, key = rng.choice(places)
        other, other_key = rng.choice(places)
        kind = rng.randrange(4)
        if kind == 0:
            where[key] = rng.choice([*EXTREMES, -1, -(1 << 40), 1 << 62, 1.5, None, True, "", "x", [], {}, [1 << 40]])
        elif kind == 1:
            where[key] = json.loads(json.dumps(other[other_key]))
        elif kind == 2:
            del where[key]
        elif isinstance(where, dict):
            where[rng.choice([str(other_key), *WORDS])] = where.pop(key)
        elif isinstance(where[key], int | str):
            where[key] = rng.choice(WORDS)
    return json.dumps(document).encode()


def mutate_zip(data: bytes, most: int, rng: random.Random) -> bytes:
    """The archive with one of its files changed, and checksums that are right."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            files = {info.filename: archive.read(info) for info in archive.infolist() if info.file_size < 1 << 20}
    except Exception:  # noqa: BLE001 - a mutated archive breaks zipfile in many ways
        return mutate_bytes(data, most, rng)
    name = rng.choice([*files, "x"])
    changed, result = files.pop(name, b"x"), io.BytesIO()
    if name.endswith(".json") and rng.random() < 0.8:
        small = mutate_json(changed, rng)
    elif name.endswith(".npy") and rng.random() < 0.5:
        small = mutate_bytes(changed[:128], 128, rng) + changed[128:]
    else:
        simple = rng.random() < 0.5
        small = mutate_bytes(changed, 2 * len(changed) + 16, rng) if simple else mutate_opcodes(changed, rng)
    method = rng.choice([zipfile.ZIP_STORED] * 8 + [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
    with zipfile.ZipFile(result, "w", method) as archive:
        for key, value in {**files, name: small}.items():
            archive.writestr(key, value)
    return result.getvalue()[:most]


def mutate_header(data: bytes, most: int, rng: random.Random) -> bytes:
    """The safetensors file with another header, and a length that is right."""
    length = min(int.from_bytes(data[:8], "little"), len(data) - 8)
    header = data[8 : 8 + length]
    header = mutate_json(header, rng) if rng.random() < 0.5 else mutate_bytes(header, length + 16, rng)
    return (len(header).to_bytes(8, "little") + header + data[8 + length :])[:most]


def mutate_opcodes(data: bytes, rng: random.Random) -> bytes:
    """One to four changes of bytes, opcodes, numbers or parts."""
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        kind = rng.randrange(8)
        if kind == 0 or len(data) < 4:
            position = rng.randrange(len(data) + 1)
            data = data[:position] + bytes([rng.randrange(256)]) + data[position + 1 :]
        elif kind == 1:
            width, position = rng.choice([1, 2, 4, 8]), rng.randrange(len(data))
            value = rng.choice(EXTREMES) % (1 << 8 * width)
            data = data[:position] + value.to_bytes(width, rng.choice(["little", "big"])) + data[position + width :]
        elif kind == 2:
            low, high = sorted(rng.randrange(len(data)) for _ in range(2))
            data = data[:low] + data[high:] if high - low < 4000 else data[:high]
        elif kind == 3:
            other = rng.choice(SEEDS)[1]
            data = data[: rng.randrange(len(data))] + other[rng.randrange(len(other)) :]
        else:
            bounds = opcode_bounds(data) or [0]
            index = rng.randrange(len(bounds))
            position, end = bounds[index], bounds[index + 1] if index + 1 < len(bounds) else len(data)
            if kind == 4:
                data = data[:position] + rng.choice(SNIPPETS) + data[position:]
            elif kind == 5:
                data = data[:position] + rng.choice(SNIPPETS) + data[end:]
            elif kind == 6:
                data = data[:position] + data[end:]
            else:
                source = rng.randrange(len(bounds) - 1) if len(bounds) > 1 else 0
                piece = data[bounds[source] : bounds[min(source + rng.randrange(1, 20), len(bounds) - 1)]]
                data = data[:position] + piece + data[position:]
    return data


@dataclass
class Tally:
    """What came of the files of one family; seconds of the processor, bytes above those of before."""

    inputs: int = 0
    read: int = 0
    findings: int = 0
    seconds: float = 0.0
    memory: int = 0


class Finding(RuntimeError):
    """What a file did that is no answer."""


def read_networks(path: Path) -> bool:
    used = False
    for kind, load in (("generator", load_generator), ("teacher", load_teacher)):
        network = answer(load, path)
        if network is not None:
            info, used = peek(path, kind), True
            if (info.img_resolution, info.img_channels) != (network.img_resolution, network.img_channels):
                raise Finding(f"peek says {info}")
    answer(describe.inspect_file, path)
    return used


def read_detector(path: Path) -> bool:
    detector = answer(load_detector, path)
    if detector is not None:
        with contextlib.suppress(RuntimeError):  # what torch says of shapes that do not fit; the programs tell it
            answer(detector, torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    return detector is not None


def read_state(path: Path) -> bool:
    return answer(load_training_state, path) is not None


def read_reference(path: Path) -> bool:
    reference = answer(lambda file: load_reference(file, PixelDetector(), Looking(cache=False, batch=4)), path)
    if reference is not None and not (reference.mu.isfinite().all() and reference.sigma.isfinite().all()):
        raise Finding("statistics that are not finite")
    return reference is not None


def answer(function: Callable, path: Path | torch.Tensor):
    """What the function returns, or None for a refusal of one line."""
    try:
        return function(path)
    except ValueError as error:
        text = str(error)
        if "\n" in text or len(text) > 1000 or not text.isprintable():
            raise Finding(f"a message of {len(text)} characters or several lines: {text[:300]!r}") from None
        return None


def memory(field: str) -> int:
    """Bytes that the process has (VmRSS) or has had at most (VmHWM); elsewhere than on Linux the latter is never less
    than before."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition(f"{field}:")[2].split(maxsplit=1)[0]) << 10
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_one_input(data: bytes, tally: Tally | None = None) -> None:
    """libFuzzer's other hook; an exception is a finding."""
    tally = Tally() if tally is None else tally
    PATH.write_bytes(data)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before, cpu = memory("VmRSS"), time.process_time()
    tally.inputs += 1
    try:
        tally.read += TARGETS[what()][1](PATH)
        problem = None
    except Exception:  # noqa: BLE001 - that is what is looked for
        problem = traceback.format_exc()
    seconds, above = time.process_time() - cpu, memory("VmHWM") - before
    tally.seconds, tally.memory = max(tally.seconds, seconds), max(tally.memory, above)
    if problem is None and seconds > SECONDS:
        problem = f"{seconds:.1f} s of processor time"
    if problem is None and TRAP in os.environ:
        problem = "a payload ran"
    if problem is None and above > BYTES:
        problem = f"{above >> 20} MiB of memory"
    if problem is not None:
        tally.findings += 1
        print(f"FINDING: {problem}", flush=True)
        raise Finding(problem)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", choices=list(TARGETS), default="networks")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--inputs", type=int, help="files of each kind, however long they take; without atheris")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"))
    return parser.parse_args()


def what() -> str:
    return OPTIONS.what


def main() -> None:
    torch.set_num_threads(1)
    OPTIONS.out.mkdir(parents=True, exist_ok=True)
    longest = 2 * max(len(data) for _, data in SEEDS)
    if atheris is None or what() != "networks" or OPTIONS.inputs:
        change_at_random(longest)
        return
    corpus = Path(FOLDER) / "corpus"
    corpus.mkdir()
    for index, (_, data) in enumerate(SEEDS):
        (corpus / str(index)).write_bytes(data)
    flags = [f"-max_total_time={60 * OPTIONS.minutes:.0f}", f"-max_len={longest}", f"-seed={OPTIONS.seed + 1}"]
    flags += [f"-artifact_prefix={OPTIONS.out}/", "-rss_limit_mb=4096", "-timeout=60", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], test_one_input, custom_mutator=mutate)
    print(f"{len(SEEDS)} seeds; `cov` is the number of branches reached, `Done` the number of inputs", flush=True)
    atheris.Fuzz()  # ends the process: 0, or 77 after a finding


def change_at_random(longest: int) -> None:
    """Without guidance: as many changed files as there is time for, or as are asked for, of each kind in turn; what a
    crash leaves behind is the last one."""
    families = list(dict.fromkeys(family for family, _ in SEEDS))
    tallies = {family: Tally() for family in families}
    for _, data in SEEDS:
        test_one_input(data)
    rng, findings = random.Random(OPTIONS.seed), 0
    end = time.monotonic() + 60 * OPTIONS.minutes
    for index in itertools.count():
        done = index >= OPTIONS.inputs * len(families) if OPTIONS.inputs else time.monotonic() > end
        if done or findings == 20:
            break
        family = families[index % len(families)]
        data = mutate(rng.choice([data for name, data in SEEDS if name == family]), longest, rng.randrange(1 << 62))
        if rng.random() < 0.3:
            data = mutate(data, longest, rng.randrange(1 << 62))
        try:
            test_one_input(data, tallies[family])
        except Finding:
            findings += 1
            (OPTIONS.out / f"{what()}-{findings}").write_bytes(data)
    print("| file | inputs | refused in one line | read | findings | slowest, processor s | most memory, MiB |")
    print("|---|---|---|---|---|---|---|")
    for family, t in tallies.items():
        counts = f"{t.inputs} | {t.inputs - t.read - t.findings} | {t.read} | {t.findings}"
        print(f"| {family} | {counts} | {t.seconds:.2f} | {t.memory / 2**20:.1f} |")
    inputs = sum(tally.inputs for tally in tallies.values())
    print(f"{what()}: {len(SEEDS)} seeds, {inputs} inputs, {findings} findings", flush=True)
    sys.exit(77 if findings else 0)


TARGETS: dict[str, tuple[Callable[[], Seeds], Callable[[Path], bool]]] = {
    "networks": (network_seeds, read_networks),
    "detectors": (detector_seeds, read_detector),
    "states": (state_seeds, read_state),
    "references": (reference_seeds, read_reference),
    "images": (image_seeds, read_reference),
}
OPTIONS = parsed()
SEEDS = TARGETS[OPTIONS.what][0]()
FOLDER = tempfile.mkdtemp(prefix="fuzz-checkpoints-")
PATH = Path(FOLDER) / "x.zip"
SAID = {"image_size": 4, "num_heads": 1, "use_new_attention_order": False, "noise_schedule": "linear"}
PATH.with_suffix(".json").write_text(json.dumps(SAID))  # of guided-diffusion, where no shape tells

if __name__ == "__main__":
    main()
