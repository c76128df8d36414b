"""Banks: images of a teacher that are drawn once, kept in the cache, and used by every later run.

A bank is images of consecutive seeds, far from those of the generators that are judged by it. It is drawn and kept in
parts, so that a start that is interrupted goes on where it was, and a larger bank begins with the parts of a smaller
one. Under torchrun, within `refine.metrics.pipeline.sharing`, each process draws its share, and all hold all of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from refine.checkpoints import NetworkInfo, archives
from refine.checkpoints.pickles.inert import Refused
from refine.checkpoints.sources.fetch import cache_dir
from refine.checkpoints.teachers import TeacherSource
from refine.dnnlib import distrust, keep_from_others, make_folder, replaced_atomically
from refine.errors import describe_os_error
from refine.metrics.pipeline import gathered, made_by_all, my_share, rank_and_world
from refine.metrics.sampling import Batch, sample_teacher
from refine.networks.bases import Denoiser
from refine.networks.sampler_settings import SamplerChoice, SamplerSettings
from refine.torch_utils.misc import exact_products

#: Seeds of a bank begin here, far from those of generators, and from those of a generator that is a reference.
BANK_SEED = 3 << 30
PART = 500  # images that are drawn, and kept, at a time
_VERSION = 1


class Bank(NamedTuple):
    """Images of a teacher, uint8 [N, C, H, W] on the CPU, and the classes that were asked for, int64 [N], or None."""

    images: torch.Tensor
    classes: torch.Tensor | None

    def head(self, num: int) -> Bank:
        """The first images of it."""
        return Bank(self.images[:num], None if self.classes is None else self.classes[:num])

    def batches(self, batch: int, indices: range) -> Iterator[Batch]:
        """The images of these indices, `batch` at a time."""
        for start in range(indices.start, indices.stop, batch):
            rows = slice(start, min(start + batch, indices.stop))
            yield Batch(self.images[rows], None if self.classes is None else self.classes[rows])


def teacher_bank(
    teacher: Path | TeacherSource,
    num: int,
    *,
    choice: SamplerChoice = SamplerChoice(),  # noqa: B008 - frozen
    batch: int = 100,
    device: torch.device | str = "cpu",
    cache: bool = True,
    progress: bool = False,
) -> Bank:
    """The bank of a teacher, from the cache as far as it is there; the rest is drawn now.

    Args:
        teacher: The teacher, or its file.
        num: Number of images.
        choice: How the teacher is sampled; what is not said there is what suits the teacher.
        batch: Images that are drawn at once.
        device: Where they are drawn.
        cache: Keep what is drawn, and use what was kept.
        progress: Show a bar with the time left on stderr.

    Raises:
        ValueError: The file holds no teacher, or the teacher gives NaN or infinity; in all processes.
    """
    source = TeacherSource.of(teacher)
    info, digest = source.info(), source.identity
    settings, _ = choice.resolve(info)
    seeds = range(BANK_SEED, BANK_SEED + num)
    shares = [seeds[start : start + PART] for start in range(0, num, PART)]
    places = [_place(digest, share, settings) for share in shares]
    parts = [_kept(place, len(share), info) if cache else None for place, share in zip(places, shares, strict=True)]
    if cache and parts[-1] is None and len(shares[-1]) < PART:  # it may be the beginning of a part of a larger bank
        start = shares[-1].start
        whole_part = _kept(_place(digest, range(start, start + PART), settings), PART, info)
        parts[-1] = None if whole_part is None else whole_part.head(len(shares[-1]))
    held = gathered([part is not None for part in parts])  # machines may have caches of their own
    missing = [index for index in range(len(parts)) if not all(rank[index] for rank in held)]
    if missing:
        network = source.load().to(device)
        rank, cannot_keep = rank_and_world()[0], False
        interval = 0.1 if sys.stderr.isatty() else 10.0  # seconds; a log file wants few lines
        done = num - sum(len(shares[index]) for index in missing)
        desc = f"images of {source.stem}, {settings.describe()}{source.guided_words}"
        shown: dict[str, Any] = {"total": num, "initial": done, "unit": "img", "desc": desc}
        with tqdm(**shown, disable=not (progress and rank == 0), mininterval=interval) as bar:
            for index in missing:
                parts[index] = part = _drawn(network, shares[index], settings, batch, device, bar)
                if cache and rank == 0 and not cannot_keep:
                    cannot_keep = not _keep(places[index], part)
    whole = [part for part in parts if part is not None]
    classes = [part.classes for part in whole if part.classes is not None]
    return Bank(torch.cat([part.images for part in whole]), torch.cat(classes) if classes else None)


def describe_bank(teacher: TeacherSource, num: int, settings: SamplerSettings) -> str:
    """What tells a bank apart from all others."""
    return _key(teacher.identity, range(BANK_SEED, BANK_SEED + num), settings)


def _key(digest: str, seeds: range, settings: SamplerSettings) -> str:
    """With every setting of the sampler; the usual ones are left out, so that banks of older versions are found."""
    steps, *others = dataclasses.astuple(settings)
    usual = list(dataclasses.astuple(SamplerSettings()))[1:]
    return json.dumps([_VERSION, digest, seeds.start, len(seeds), steps, *([] if others == usual else others)])


def _place(digest: str, seeds: range, settings: SamplerSettings) -> Path:
    """Where a part of a bank is kept."""
    key = _key(digest, seeds, settings)
    return cache_dir() / "banks" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"


@exact_products()
def _drawn(
    teacher: Denoiser, seeds: range, settings: SamplerSettings, batch: int, device: torch.device | str, bar: tqdm
) -> Bank:
    """A part of a bank, to which every process gives its share; an error in one of them is raised in all."""

    def draw() -> list[Batch]:
        mine = []
        for drawn in sample_teacher(teacher, my_share(seeds, batch), batch=batch, device=device, settings=settings):
            mine.append(drawn._replace(images=drawn.images.cpu()))
            bar.update(min(len(drawn.images) * rank_and_world()[1], len(seeds)))
        return mine

    everything = [drawn for theirs in made_by_all(draw) for drawn in theirs]
    classes = [drawn.classes for drawn in everything if drawn.classes is not None]
    return Bank(torch.cat([drawn.images for drawn in everything]), torch.cat(classes) if classes else None)


def _keep(place: Path, part: Bank) -> bool:
    """Keeps a part for the next start; where that cannot be, says so, and the images are good all the same."""
    arrays: dict[str, Any] = {"images": part.images.numpy()}
    if part.classes is not None:
        arrays["classes"] = part.classes.numpy()
    try:
        make_folder(place.parent)
        with replaced_atomically(place) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)
        keep_from_others(place)
    except OSError as error:
        why = f"({describe_os_error(error)}); set REFINE_CACHE to a folder that can be written to"
        tqdm.write(f"the images of the teacher cannot be kept {why}", file=sys.stderr)  # by a bar
        return False
    return True


def _kept(place: Path, num: int, info: NetworkInfo) -> Bank | None:
    """A part that was drawn before, if it is there and whole."""
    try:
        if reason := distrust(place, cache_dir()):
            raise ValueError(reason)
        if not os.path.lexists(place):
            return None
        return _read(place, num, info)
    except ValueError as error:
        print(f"images of the teacher are drawn again, because what was kept cannot be used: {error}", file=sys.stderr)
        return None


def _read(place: Path, num: int, info: NetworkInfo) -> Bank:
    try:
        arrays = archives.read_arrays(place)
    except Refused as error:
        raise ValueError(f"{place} is not a whole .npz file of plain arrays ({error})") from None
    images, classes = arrays.get("images"), arrays.get("classes")
    expected = (num, info.img_channels, info.img_resolution, info.img_resolution)
    if images is None or images.dtype != np.uint8 or images.shape != expected:
        raise ValueError(f"{place} does not hold uint8 images {list(expected)}")
    if not info.classes:
        return Bank(torch.from_numpy(images), None)
    if classes is None or classes.dtype != np.int64 or classes.shape != (num,):
        raise ValueError(f"{place} does not hold the classes of {num} images")
    if classes.min() < 0 or classes.max() >= info.classes:
        raise ValueError(f"{place} holds classes that are not 0 to {info.classes - 1}")
    return Bank(torch.from_numpy(images), torch.from_numpy(classes))
