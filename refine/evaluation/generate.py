"""`generate.py --network=FILE --seeds=0-35`: images of a generator or a diffusion model as PNG files, and a grid."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from refine.dnnlib import check_outdir
from refine.errors import option
from refine.evaluation.sides import Side, check_choice, check_reach, check_same_images
from refine.evaluation.teachers import TeacherOptions
from refine.images import PICTURE_CHANNELS, save_image_grid, save_png
from refine.metrics.pipeline import gathered, my_share, prefetched, rank_and_world
from refine.metrics.sampling import Batch, latents_of_seeds
from refine.networks.sampler_settings import SamplerChoice

MAX_SEED = 2**32 - 1
GRID_IMAGES = 400  # how many of the first images the grid shows
MAX_BATCH = 16  # images at once where nobody says how many, so that the bar moves
WRITERS = 4  # threads that compress images
PER_FOLDER = 1000  # images of a folder with `subdirs`, as in EDM's tools


def generate(
    network: str | os.PathLike,
    seeds: Sequence[int],
    outdir: str | os.PathLike,
    *,
    before: str | os.PathLike | None = None,
    class_index: int | None = None,
    class_columns: bool = False,
    subdirs: bool = False,
    truncation_psi: float = 1.0,
    noise_mode: str | None = None,
    gan_kwargs: Mapping[str, Any] | None = None,
    sigma_init: float | None = None,
    sampler: SamplerChoice = SamplerChoice(),  # noqa: B008 - frozen
    batch: int | None = None,
    device: str = "cpu",
    progress: bool = True,
    teachers: TeacherOptions | None = None,
) -> list[Path]:
    """Writes seed0000.png … into a folder, and a grid of them beside it, where it is not taken for one more image.

    Args:
        network: File or name of a generator or a diffusion model; `one-step:FILE` is a diffusion model used once.
        seeds: One per image, see `refine.metrics.sampling.latents_of_seeds`.
        outdir: Folder of the images; made if it does not exist.
        before: Another network, whose image of the same seed stands to the left of each.
        class_index: Class of all images; None = drawn per seed, where there are classes.
        class_columns: An image of every class for every seed, seed0000-class0.png …; in the grid, a row for each seed.
        subdirs: Folders of 1000 seeds each, 000000/seed000000.png …, for sets too large for one folder.
        truncation_psi, noise_mode: Truncation and noise of a StyleGAN2; None = 'const'.
        gan_kwargs, sigma_init: See `refine.load_generator`.
        sampler: How a diffusion model is sampled; what is not said there is what suits it, and told on stderr.
        batch: Images per batch. None = at most 16, and fewer where that is sensible for their size.
        device: Where the network runs.
        progress: Show a bar with the time left on stderr.
        teachers: How a diffusion model is built and guided.

    Within `refine.metrics.pipeline.sharing` every process makes its share of the images, and the first one the grid.

    Returns:
        The paths of the images, in the order of the seeds, and that of the grid at the end.

    Raises:
        ValueError: If an input cannot be used; the message begins with its option.
    """
    with option("--seeds"):
        check_seeds(seeds)
    how = (device, batch, noise_mode or "const", truncation_psi, teachers, sampler, sigma_init)
    sides = {"network": open_side(network, *how, gan_kwargs)}
    if before is not None:
        with option("--before"):
            sides["before"] = Side(before, *how)
        check_same_images(sides["before"], sides["network"], "network")
    check_sides(sides, sampler, teachers, truncation_psi, noise_mode, sigma_init)
    batch = batch or min(MAX_BATCH, *(side.batch for side in sides.values()))
    for side in sides.values():
        side.batch = batch
    classes: list[int] | int | None = class_index
    with option("--class-columns" if class_columns else "--class"):
        for side in sides.values():
            latents_of_seeds(seeds[:1], [1], side.num_classes, class_index)
        columns = None
        if class_columns:
            columns = sides["network"].num_classes
            if not columns or any(side.num_classes != columns for side in sides.values()):
                raise ValueError("the network has no classes; expected one with classes, and alike in a pair")
            classes = list(range(columns)) * len(seeds)
            seeds = [seed for seed in seeds for _ in range(columns)]
    with option("--outdir"):
        folder, grid = folder_and_grid(outdir)
    for side in sides.values():
        if side.is_teacher and progress and rank_and_world()[0] == 0:
            print(f"note: {side.name} is sampled with {side.sampling}, {side.sampling_reason}", file=sys.stderr)
    paths = [folder / _name(seed, subdirs, None if columns is None else index % columns, columns)
             for index, seed in enumerate(seeds)]  # fmt: skip
    share, (rank, world) = my_share(range(len(seeds)), batch), rank_and_world()
    mine = [seeds[index] for index in share]
    asked = [classes[index] for index in share] if isinstance(classes, list) else classes
    batches = _beside(*(side.sample(mine, asked) for side in reversed(sides.values())))
    shown: list[torch.Tensor] = []
    done, disable = share.start if share else 0, not progress or rank > 0
    with tqdm(total=len(seeds), unit="img", desc="generate", disable=disable) as bar, option("--network"):
        for images in prefetched(batches):
            images = images.cpu()
            with option("--outdir"):
                write_images(images, paths[done : done + len(images)])
            shown += images[: max(GRID_IMAGES - done, 0)]
            done += len(images)
            bar.update(len(images) * world)
    whole = [image for part in gathered(shown) for image in part]
    if rank == 0:
        with option("--outdir"):
            save_image_grid(grid, torch.stack(whole), columns)
    return [*paths, grid]


def open_side(network: str | os.PathLike, *how: Any) -> Side:
    """The network of --network, whose images can be written as pictures."""
    with option("--network"):
        side = Side(network, *how)
        if (channels := side.image_shape[0]) not in PICTURE_CHANNELS:
            raise ValueError(f"its images have {channels} channels; expected 1 (grey), 3 (RGB) or 4 (RGBA)")
    return side


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises ValueError for a seed that numpy does not take."""
    if max(seeds) > MAX_SEED:
        raise ValueError(f"{max(seeds)} is too large; expected seeds up to {MAX_SEED}")


def check_sides(
    sides: Mapping[str, Side], sampler: SamplerChoice, teachers: TeacherOptions | None, *reaching: Any
) -> None:
    """Raises ValueError where something is said of a kind of network that is not among these.

    Args:
        sides: The networks.
        sampler, teachers: What is said of diffusion models.
        *reaching: What is said of generators, see `check_reach`.
    """
    are_teachers = [side.is_teacher for side in sides.values()]
    notes = (teachers or TeacherOptions()).check_used(are_teachers)
    check_choice(sampler, any(are_teachers))
    for note in [*notes, *check_reach(sides, *reaching)]:
        print(f"note: {note}", file=sys.stderr)


def folder_and_grid(outdir: str | os.PathLike) -> tuple[Path, Path]:
    """Where the images go, and the grid beside them, named as the user names them; both can be made."""
    folder = check_outdir(outdir)
    named = folder if folder.name not in ("", "..") else folder.resolve()  # '.' has a name by its place only
    grid = check_outdir(named.parent) / f"{named.name}-grid.png"
    grid.exists()  # raises where its name is too long
    return folder, grid


def write_images(images: torch.Tensor, paths: Sequence[Path]) -> None:
    """PNG files of uint8 images [N, C, H, W], some at a time: compressing does not hold Python's lock."""
    for folder in {path.parent for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)  # not before there is something to write
    with ThreadPoolExecutor(WRITERS) as writers:
        list(writers.map(save_png, paths, images))


def _name(seed: int, subdirs: bool, class_index: int | None, classes: int | None) -> str:
    text = f"seed{seed:06d}" if subdirs else f"seed{seed:04d}"
    if class_index is not None and classes is not None:
        text += f"-class{class_index:0{len(str(classes - 1))}d}"
    return f"{seed - seed % PER_FOLDER:06d}/{text}.png" if subdirs else f"{text}.png"


def _beside(*streams: Iterator[Batch]) -> Iterator[torch.Tensor]:
    """The images of several networks side by side."""
    for batches in zip(*streams, strict=True):
        yield torch.cat([batch.images for batch in batches], dim=3)
