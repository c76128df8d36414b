"""`generate.py --network=FILE --seeds=0-35`: images of a generator or a diffusion model as PNG files and a grid."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from refine.cli.main import option
from refine.cli.options import OPS_HELP, check_outdir, choose_device, choose_ops, parse_ints
from refine.config import OPS_MODES

if TYPE_CHECKING:
    import torch

MAX_SEED = 2**32 - 1
GRID_IMAGES = 400  # the grid shows the first so many


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

    Returns:
        The paths of the images, in the order of the seeds, and that of the grid at the end.

    Raises:
        ValueError: If an input cannot be used; the message begins with its option.
    """
    import torch
    from tqdm import tqdm

    from refine.cli.compare import load_any
    from refine.images import save_image_grid, save_png
    from refine.metrics.sampling import latents_of_seeds, sample_images, sample_teacher

    with option("--network"):
        net, is_teacher = load_any(network, device)
    with option("--class"):
        latents_of_seeds(seeds[:1], [1], net.label_dim if is_teacher else net.c_dim, class_index)
    with option("--outdir"):
        folder = check_outdir(outdir)
    common = {"classes": class_index, "batch": batch, "device": device}
    stylegan = {"truncation_psi": truncation_psi, "noise_mode": noise_mode}
    batches = sample_teacher(net, seeds, **common) if is_teacher else sample_images(net, seeds, **common, **stylegan)
    shown: list[torch.Tensor] = []
    paths: list[Path] = []
    with tqdm(total=len(seeds), unit="img", desc="generate", disable=not progress) as bar, option("--network"):
        for images, _ in batches:
            images = images.cpu()
            with option("--outdir"):
                folder.mkdir(parents=True, exist_ok=True)  # not before there is something to write
                for image in images:
                    paths.append(folder / f"seed{seeds[len(paths)]:04d}.png")
                    save_png(paths[-1], image)
            shown += images[: GRID_IMAGES - len(shown)]
            bar.update(len(images))
    with option("--outdir"):
        save_image_grid(folder / "grid.png", torch.stack(shown))
    return [*paths, folder / "grid.png"]


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
    with option("--device"):
        device = choose_device(device)
    choose_ops(ops, device)
    paths = generate(**options, device=device)
    click.echo(f"{len(paths) - 1} images and grid.png in {paths[-1].parent}")
