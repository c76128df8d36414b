"""The film of the README: digits of the same latents before a refinement, above, and at each of its snapshots, below.

python refine.py --gan=digits-gan --teacher=digits-teacher-2 --preset=demo --snap=1 --metrics=none --outdir=film
python benchmarks/demo_film.py --run=film/00000-… --out=docs/demo-film.webp
"""

import json
from pathlib import Path

import click
import torch
from demo_picture import CLASSES, MARGIN, ZOOM, grid
from PIL import Image, ImageDraw, ImageFont

from refine.checkpoints import load_generator
from refine.metrics.sampling import sample_images

ROWS, GAP, BAR = 2, 12, 8  # rows of digits; pixels between the blocks, and of the bar below them
HOLD, STEP = 1200, 200  # milliseconds: the first and the last frame, and those between


def drawn(network: str | Path, seed: int) -> torch.Tensor:
    """uint8 (rows · R, 10 · R): a class in each column."""
    seeds, classes = range(seed, seed + ROWS * CLASSES), list(range(CLASSES)) * ROWS
    return grid(torch.cat([part.images for part in sample_images(load_generator(network), seeds, classes=classes)]))


def frame(before: torch.Tensor, now: torch.Tensor, label: str, share: float) -> Image.Image:
    """Both blocks with their labels, and a bar that says how much of the run is over."""
    width, height = before.shape[1] * ZOOM, before.shape[0] * ZOOM
    page = Image.new("L", (MARGIN + width, 2 * height + 2 * GAP + BAR), 255)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(22)
    for top, pixels, text in ((0, before, "before"), (height + GAP, now, label)):
        page.paste(Image.fromarray(pixels.numpy()).resize((width, height), Image.Resampling.NEAREST), (MARGIN, top))
        draw.text((8, top + height // 2), text, fill=0, font=font, anchor="lm")
    top = 2 * (height + GAP)
    draw.rectangle((MARGIN, top, MARGIN + width - 1, top + BAR - 1), fill=220)
    if share > 0:
        draw.rectangle((MARGIN, top, MARGIN + round(share * width) - 1, top + BAR - 1), fill=90)
    return page


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--run", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--before", default="digits-gan", show_default=True)
@click.option("--seed", default=20, show_default=True, help="The first of twenty seeds.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="A .webp, .gif or .png.")
def main(run: Path, before: str, seed: int, out: Path) -> None:
    options = json.loads((run / "training_options.json").read_text(encoding="utf-8"))
    first = drawn(before, seed)
    frames = [frame(first, first, "0 kimg", 0.0)]
    for path in sorted(run.glob("network-snapshot-[0-9]*.safetensors")):
        kimg = float(path.stem.removeprefix("network-snapshot-"))
        frames += [frame(first, drawn(path, seed), f"{kimg:.1f} kimg", kimg / options["kimg"])]
    durations = [HOLD, *[STEP] * (len(frames) - 2), 2 * HOLD]
    how = {"lossless": True, "method": 6} if out.suffix == ".webp" else {"optimize": True}
    frames[0].save(out, save_all=True, append_images=frames[1:], duration=durations, loop=0, **how)
    click.echo(f"{out}: {len(frames)} frames, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
