"""Coverage-guided fuzzing of the checkpoint readers with atheris (pip install atheris), Google's libFuzzer for Python.

    python benchmarks/fuzz_checkpoints.py --minutes=10 [--seed=0] [--out=FOLDER]

An answer is a loaded network, or a ValueError of one line. Anything else (another exception, more than 2 seconds of
processor time, 1 GB of memory, a payload that ran) is a finding: it is printed, the file is kept in FOLDER, and the
fuzzing ends. libFuzzer chooses what to mutate by the lines of `refine.checkpoints` that a file reaches; what it would
hardly find by chance is helped along: changes of whole opcodes, of files inside a zip, of the header of safetensors.
"""

import argparse
import io
import json
import os
import pickletools
import random
import resource
import sys
import tempfile
import time
import traceback
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

try:
    import atheris
except ImportError:
    sys.exit("Error: fuzzing needs the package atheris (Linux and macOS): pip install atheris")

import numpy as np
import torch

from refine.networks import edm2
from refine.networks.edm import EDMPrecond
from refine.networks.stylegan2 import Discriminator, Generator
from tests.checkpoints.builders import Call, Format, Global, dumps, edm2_file, edm_file, stylegan2_file
from tests.checkpoints.rosinality_reference import random_generator

with atheris.instrument_imports(include=["refine.checkpoints"]):
    import refine.checkpoints.foreign.raw_pickle  # noqa: F401 - some modules are imported when needed, and then not instrumented
    from refine.checkpoints import describe, load_generator, load_teacher, peek
    from refine.checkpoints.foreign import state_dicts

TRAP = "REFINE_FUZZ_TRAP"
SECONDS, BYTES = 2.0, 1 << 30
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
EXTREMES = [0, 1, 4, 8, 127, 128, 255, 1 << 15, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]


def seeds() -> list[bytes]:
    """Small good files of every kind."""
    torch.manual_seed(0)
    G = Generator(4, 2, 4, 8, 3, {"num_layers": 1}, {"channel_base": 16, "channel_max": 2})
    D = Discriminator(2, 8, 3, channel_base=16, channel_max=2, mapping_kwargs={"num_layers": 1})
    T = EDMPrecond(8, 1, model_type="SongUNet", model_channels=4, channel_mult=[1], num_blocks=1, attn_resolutions=[])
    E = edm2.Precond(8, 1, model_channels=4, channel_mult=[1], num_blocks=1, attn_resolutions=[], logvar_channels=4)
    files = [stylegan2_file(Format(protocol=p, numpy=n), G, extras="missing") for p, n in ((2, 1), (3, 1), (5, 2))]
    files += [
        stylegan2_file(Format(), G, D=D, style=3),
        edm_file(Format(), T),
        edm2_file(Format(dtype=torch.float16), E),
        edm_file(Format(protocol=2, numpy=1), T),
    ]
    golden = Path(__file__).resolve().parents[1] / "tests/golden/pickles"
    files += [path.read_bytes() for path in sorted(golden.glob("*.pkl")) if path.stat().st_size < 1 << 20]
    state = {name: torch.ones([1] * value.ndim) for name, value in random_generator(8, layers=1, dim=2).items()}
    for table in (
        {"g_ema": state, "latent_avg": torch.zeros(2)},
        {"g": state, "d": state, "g_optim": {"state": {0: {}}}},
    ):
        for modern in (True, False):
            file = io.BytesIO()
            torch.save(table, file, _use_new_zipfile_serialization=modern)
            files.append(file.getvalue())
    with tempfile.TemporaryDirectory() as folder:
        state_dicts.save_plain(f"{folder}/x", G)
        files.append(Path(f"{folder}/x").read_bytes())
    file = io.BytesIO()
    np.savez(file, init_kwargs=np.array(json.dumps(G.init_kwargs)), **{k: v.numpy() for k, v in G.state_dict().items()})
    return [*files, file.getvalue()]


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
        return atheris.Mutate(data, most)
    return mutate_opcodes(data, rng)[:most]


def mutate_zip(data: bytes, most: int, rng: random.Random) -> bytes:
    """The archive with one of its files changed, and checksums that are right."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            files = {info.filename: archive.read(info) for info in archive.infolist() if info.file_size < 1 << 20}
    except Exception:  # noqa: BLE001 - a mutated archive breaks zipfile in many ways
        return atheris.Mutate(data, most)
    name = rng.choice([*files, "x"])
    changed, result = files.pop(name, b"x"), io.BytesIO()
    small = atheris.Mutate(changed, 2 * len(changed) + 16) if rng.random() < 0.5 else mutate_opcodes(changed, rng)
    with zipfile.ZipFile(result, "w") as archive:
        for key, value in {**files, name: small}.items():
            archive.writestr(key, value)
    return result.getvalue()[:most]


def mutate_header(data: bytes, most: int, rng: random.Random) -> bytes:
    """The safetensors file with another header, and a length that is right."""
    length = min(int.from_bytes(data[:8], "little"), len(data) - 8)
    header = atheris.Mutate(data[8 : 8 + length], length + 16)
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
            other = rng.choice(SEEDS)
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


def attempt(path: Path) -> str | None:
    """None for an answer; otherwise what happened instead."""
    try:
        for kind, load in (("generator", load_generator), ("teacher", load_teacher)):
            network = answer(load, path)
            if network is not None:
                info = peek(path, kind)
                if (info.img_resolution, info.img_channels) != (network.img_resolution, network.img_channels):
                    return f"peek says {info}"
        answer(describe.inspect_file, path)
    except Exception:  # noqa: BLE001 - that is what is looked for
        return traceback.format_exc()
    return None


def answer(function, path: Path):
    """What the function returns, or None for a refusal of one line."""
    try:
        return function(path)
    except ValueError as error:
        text = str(error)
        if "\n" in text or len(text) > 1000 or not text.isprintable():
            raise RuntimeError(f"a message of {len(text)} characters or several lines: {text[:300]!r}") from None
        return None


def test_one_input(data: bytes) -> None:
    """libFuzzer's other hook; an exception is a finding."""
    PATH.write_bytes(data)
    cpu = time.process_time()
    problem = attempt(PATH)
    seconds = time.process_time() - cpu
    if problem is None and seconds > SECONDS:
        problem = f"{seconds:.1f} s of processor time"
    if problem is None and TRAP in os.environ:
        problem = "a payload ran"
    if problem is None and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10 > 2 * BYTES:
        problem = "more than 2 GB of memory in all"
    if problem is not None:
        print(f"FINDING: {problem}", flush=True)
        raise RuntimeError(problem)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    corpus = Path(FOLDER) / "corpus"
    corpus.mkdir()
    for index, data in enumerate(SEEDS):
        (corpus / str(index)).write_bytes(data)
    longest = 2 * max(map(len, SEEDS))
    flags = [f"-max_total_time={60 * options.minutes:.0f}", f"-max_len={longest}", f"-seed={options.seed + 1}"]
    flags += [f"-artifact_prefix={options.out}/", "-rss_limit_mb=4096", "-timeout=60", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], test_one_input, custom_mutator=mutate)
    print(f"{len(SEEDS)} seeds; `cov` is the number of branches reached, `Done` the number of inputs", flush=True)
    atheris.Fuzz()  # ends the process: 0, or 77 after a finding


SEEDS = seeds()
FOLDER = tempfile.mkdtemp(prefix="fuzz-checkpoints-")
PATH = Path(FOLDER) / "x"

if __name__ == "__main__":
    main()
