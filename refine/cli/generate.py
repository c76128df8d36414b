"""`generate.py --network=FILE --seeds=0-35`: images of a generator or a diffusion model as PNG files and a grid."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from refine.cli.main import option
from refine.cli.options import OPS_HELP, check_outdir, parse_ints, prepare_device
from refine.cli.processes import one_voice, together
from refine.config import OPS_MODES

if TYPE_CHECKING:
    import torch

MAX_SEED = 2**32 - 1
GRID_IMAGES = 400  # the grid shows the first so many
WRITERS = 4  # threads that compress images


def generate(
    network: str | os.PathLike,
    seeds: Sequence[int],
    outdir: str | os.PathLike,
    *,
    class_index: int | None = None,
    truncation_psi: float = 1.0,
    noise_mode: str = "const",
    batch: int = 16,
    device: str = "cpu",
    progress: bool = True,
) -> list[Path]:
    """Writes seed0000.png … and grid.png.

    Args:
        network: File or name of a generator; a diffusion model is sampled with 18 Heun steps.
        seeds: One per image, see `refine.metrics.sampling.latents_of_seeds`.
        outdir: Folder of the images; made if it does not exist.
        class_index: Class of all images; None = drawn per seed, where there are classes.
        truncation_psi, noise_mode: Of a StyleGAN2.
        batch: Images per batch.
        device: Where the network runs.
        progress: Show a bar with the time left on stderr.

    Within `refine.metrics.pipeline.sharing` every process makes its share of the images, and the first one the grid.

    Returns:
        The paths of the images, in the order of the seeds, and that of the grid at the end.

    Raises:
        ValueError: If an input cannot be used; the message begins with its option.
    """
    import torch
    from tqdm import tqdm

    from refine.cli.compare import load_any
    from refine.images import save_image_grid
    from refine.metrics.pipeline import gathered, my_share, prefetched, rank_and_world
    from refine.metrics.sampling import latents_of_seeds, sample_images, sample_teacher

    with option("--network"):
        net, is_teacher = load_any(network, device)
    with option("--class"):
        latents_of_seeds(seeds[:1], [1], net.label_dim if is_teacher else net.c_dim, class_index)
    with option("--outdir"):
        folder = check_outdir(outdir)
    paths = [folder / f"seed{seed:04d}.png" for seed in seeds]
    share, (rank, world) = my_share(range(len(seeds)), batch), rank_and_world()
    mine = seeds[share.start : share.stop]
    common = {"classes": class_index, "batch": batch, "device": device}
    stylegan = {"truncation_psi": truncation_psi, "noise_mode": noise_mode}
    batches = sample_teacher(net, mine, **common) if is_teacher else sample_images(net, mine, **common, **stylegan)
    shown: list[torch.Tensor] = []
    done, disable = share.start, not progress or rank > 0
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
            save_image_grid(folder / "grid.png", torch.stack(whole))
    return [*paths, folder / "grid.png"]


def _write(images: torch.Tensor, paths: Sequence[Path]) -> None:
    """PNG files of uint8 images [N, C, H, W], some at a time: compressing does not hold Python's lock."""
    from refine.images import save_png

    paths[0].parent.mkdir(parents=True, exist_ok=True)  # not before there is something to write
    with ThreadPoolExecutor(WRITERS) as writers:
        list(writers.map(save_png, paths, images))


def _parse_seeds(_ctx: click.Context, _param: click.Parameter, value: str) -> list[int]:
    with option("--seeds"):
        seeds = parse_ints(value)
        if max(seeds) > MAX_SEED:
            raise ValueError(f"{max(seeds)} is too large; expected seeds up to {MAX_SEED}")
    return seeds


@click.command("generate", context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--network", required=True, metavar="FILE|NAME", help="A generator, or a diffusion model (18 Heun steps)."
)
@click.option("--seeds", required=True, callback=_parse_seeds, metavar="LIST", help="One image each, e.g. 0-35,40.")
@click.option("--outdir", required=True, metavar="DIR", help="Where seed0000.png … and grid.png go.")
@click.option(
    "--class", "class_index", type=click.IntRange(min=0), help="Class of all images.  [default: drawn per seed]"
)
@click.option(
    "--trunc", "truncation_psi", type=float, default=1.0, show_default=True, help="Truncation psi of a StyleGAN2."
)
@click.option(
    "--noise-mode",
    type=click.Choice(["const", "random", "none"]),
    default="const",
    show_default=True,
    help="Noise of a StyleGAN2.",
)
@click.option("--batch", type=click.IntRange(min=1), default=16, show_default=True, help="Images per batch.")
@click.option("--device", help="cpu, cuda or cuda:N.  [default: cuda where there is one]")
@click.option("--ops", type=click.Choice(OPS_MODES), help=f"{OPS_HELP}  [default: $REFINE_OPS, else auto]")
def command(device: str | None, ops: str | None, **options: Any) -> None:
    """Makes images by seed: the same seed gives the same latent as in NVIDIA's tools."""
    with one_voice():
        device = prepare_device(device, ops)
    from refine.metrics.pipeline import sharing
    from torch_utils import distributed

    with together(cuda=False), sharing():
        paths = generate(**options, device=device)
        if distributed.is_main():
            click.echo(f"{len(paths) - 1} images and grid.png in {paths[-1].parent}")
