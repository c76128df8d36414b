"""`generate.py --network=FILE --seeds=0-35`: images of a generator or a diffusion model as PNG files, and a grid."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from refine.dnnlib import check_outdir
from refine.errors import option
from refine.evaluation.sides import Side, check_choice
from refine.evaluation.teachers import TeacherOptions
from refine.images import PICTURE_CHANNELS, save_image_grid, save_png
from refine.metrics.pipeline import gathered, my_share, prefetched, rank_and_world
from refine.metrics.sampling import latents_of_seeds
from refine.networks.sampler_settings import SamplerChoice

MAX_SEED = 2**32 - 1
GRID_IMAGES = 400  # how many of the first images the grid shows
MAX_BATCH = 16  # images at once where nobody says how many, so that the bar moves
WRITERS = 4  # threads that compress images


def generate(
    network: str | os.PathLike,
    seeds: Sequence[int],
    outdir: str | os.PathLike,
    *,
    class_index: int | None = None,
    truncation_psi: float = 1.0,
    noise_mode: str = "const",
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
        class_index: Class of all images; None = drawn per seed, where there are classes.
        truncation_psi, noise_mode: Truncation and noise of a StyleGAN2.
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
        if max(seeds) > MAX_SEED:
            raise ValueError(f"{max(seeds)} is too large; expected seeds up to {MAX_SEED}")
    with option("--network"):
        side = Side(network, device, batch, noise_mode, truncation_psi, teachers, sampler, sigma_init, gan_kwargs)
        if (channels := side.image_shape[0]) not in PICTURE_CHANNELS:
            raise ValueError(f"its images have {channels} channels; expected 1 (grey), 3 (RGB) or 4 (RGBA)")
    side.batch = batch or min(side.batch, MAX_BATCH)
    (teachers or TeacherOptions()).check_used([side.is_teacher])
    check_choice(sampler, side.is_teacher)
    with option("--class"):
        latents_of_seeds(seeds[:1], [1], side.num_classes, class_index)
    with option("--outdir"):
        folder = check_outdir(outdir)
        grid = check_outdir(folder.resolve().parent) / f"{folder.resolve().name}-grid.png"
    if side.is_teacher and progress and rank_and_world()[0] == 0:
        print(f"note: {side.name} is sampled with {side.sampling}, {side.sampling_reason}", file=sys.stderr)
    paths = [folder / f"seed{seed:04d}.png" for seed in seeds]
    share, (rank, world) = my_share(range(len(seeds)), side.batch), rank_and_world()
    batches = side.sample([seeds[index] for index in share], class_index)
    shown: list[torch.Tensor] = []
    done, disable = share.start if share else 0, not progress or rank > 0
    with tqdm(total=len(seeds), unit="img", desc="generate", disable=disable) as bar, option("--network"):
        for images, _ in prefetched(batches):
            images = images.cpu()
            with option("--outdir"):
                _write(images, paths[done : done + len(images)])
            shown += images[: max(GRID_IMAGES - done, 0)]
            done += len(images)
            bar.update(len(images) * world)
    whole = [image for part in gathered(shown) for image in part]
    if rank == 0:
        with option("--outdir"):
            save_image_grid(grid, torch.stack(whole))
    return [*paths, grid]


def _write(images: torch.Tensor, paths: Sequence[Path]) -> None:
    """PNG files of uint8 images [N, C, H, W], some at a time: compressing does not hold Python's lock."""
    paths[0].parent.mkdir(parents=True, exist_ok=True)  # not before there is something to write
    with ThreadPoolExecutor(WRITERS) as writers:
        list(writers.map(save_png, paths, images))
