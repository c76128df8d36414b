"""Coverage-guided fuzzing of the checkpoint readers: mutates good files until something else than an answer comes.

    python benchmarks/fuzz_checkpoints.py --minutes=10 [--seed=0] [--out=FOLDER]

An answer is a loaded network, or a ValueError of one line. Anything else (another exception, more than 2 seconds of
processor time, 1 GB of memory, a payload that ran) is a finding: it is printed and the file kept. Files that reach a
line, or a transition between lines, of `refine.checkpoints` that none before reached become seeds themselves.
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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

import refine.checkpoints
from refine.checkpoints import containers, load_generator, load_teacher, state_dicts
from refine.networks.edm import EDMPrecond
from refine.networks.stylegan2 import Discriminator, Generator
from tests.checkpoints.builders import Call, Format, Global, dumps, edm_file, stylegan2_file

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
    files = [stylegan2_file(Format(protocol=p, numpy=n), G, extras="missing") for p, n in ((2, 1), (3, 1), (5, 2))]
    files += [
        stylegan2_file(Format(), G, D=D, style=3),
        edm_file(Format(), T),
        edm_file(Format(protocol=2, numpy=1), T),
    ]
    golden = Path(__file__).resolve().parents[1] / "tests/golden/pickles"
    files += [path.read_bytes() for path in golden.glob("tf0*.pkl")]
    state = {name: torch.zeros(1) for name in ("conv1.conv.modulation.weight", "to_rgb1.bias", "style.1.weight")}
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


def mutate(data: bytes, pool: list[bytes], rng: random.Random) -> bytes:
    """The file with one to four changes of bytes, opcodes, numbers or parts."""
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
            other = rng.choice(pool)
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


class Coverage:
    """Pairs of consecutive lines of the readers that have been run."""

    def __init__(self) -> None:
        self.folder = str(Path(refine.checkpoints.__file__).parent)
        self.seen: set[tuple] = set()
        self.new = 0
        self.last: tuple | None = None

    def trace(self, frame, event, _arg):
        if not frame.f_code.co_filename.startswith(self.folder):
            return None
        here = (frame.f_code, frame.f_lineno)
        if (self.last, here) not in self.seen:
            self.seen.add((self.last, here))
            self.new += 1
        self.last = here
        return self.trace


def attempt(path: Path) -> str | None:
    """None for an answer; otherwise what happened instead."""
    try:
        try:
            load_generator(path)
        except ValueError as error:
            text = str(error)
            if "\n" in text or len(text) > 1000:
                return f"a message of {len(text)} characters or several lines: {text[:300]!r}"
            if "expected a generator" in text:
                load_teacher(path)
        with containers.open_container(path) as container:
            for name in container.members:
                container.load(name)
    except ValueError as error:
        return None if "\n" not in str(error) else f"a message of several lines: {str(error)[:300]!r}"
    except Exception:  # noqa: BLE001 - that is what is looked for
        return traceback.format_exc()
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng, pool, coverage = random.Random(options.seed), seeds(), Coverage()
    for data in pool:
        assert data
    start, count, loaded, findings = time.monotonic(), 0, len(pool), 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        while time.monotonic() - start < 60 * options.minutes:
            data = pool[count] if count < loaded else mutate(rng.choice(pool), pool, rng)
            path.write_bytes(data)
            coverage.new, coverage.last = 0, None
            guided = count < loaded or count % 4 == 0  # tracing is slow; three of four run without
            cpu = time.process_time()
            sys.settrace(coverage.trace if guided else None)
            problem = attempt(path)
            sys.settrace(None)
            seconds = time.process_time() - cpu
            if problem is None and seconds > SECONDS * (10 if guided else 1):
                problem = f"{seconds:.1f} s of processor time"
            if problem is None and TRAP in os.environ:
                problem = "a payload ran"
            if problem is None and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10 > 2 * BYTES:
                problem = "more than 2 GB of memory in all"
            if problem is not None:
                options.out.mkdir(exist_ok=True)
                (options.out / f"{options.seed}-{count}.bin").write_bytes(data)
                print(f"FINDING {count}: {problem}", flush=True)
                findings += 1
            elif coverage.new and 4 <= len(data) < 1 << 20:
                pool.append(data)
            count += 1
    print(
        f"{count} inputs, {len(pool) - loaded} of them new seeds, {len(coverage.seen)} transitions, {findings} findings"
    )
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
