"""The picture of the README: digits before and after from the same latents, the teacher's, and real ones.

python benchmarks/demo_picture.py --after=demo-out/…/network-snapshot-best.safetensors --out=docs/demo.png
"""

import sys
from pathlib import Path

import click
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pretrained" / "recipes"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from digits import load_digits

from refine.checkpoints import load_generator, load_teacher
from refine.metrics.sampling import sample_images, sample_teacher

CLASSES, ROWS, ZOOM, MARGIN = 10, 3, 3, 150


def grid(images: torch.Tensor) -> torch.Tensor:
    """uint8 (rows · 10, 1, R, R) → (rows · R, 10 · R)."""
    rows, size = len(images) // CLASSES, images.shape[-1]
    return images.reshape(rows, CLASSES, size, size).permute(0, 2, 1, 3).reshape(rows * size, CLASSES * size)


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--before", default="digits-gan", show_default=True)
@click.option("--after", required=True, help="A snapshot of a run.")
@click.option("--teacher", default="digits-teacher-2", show_default=True)
@click.option("--seed", default=20, show_default=True, help="The first of thirty seeds.")
@click.option("--out", type=click.Path(dir_okay=False), required=True, help="A PNG.")
def main(before: str, after: str, teacher: str, seed: int, out: str) -> None:
    seeds, classes = range(seed, seed + ROWS * CLASSES), list(range(CLASSES)) * ROWS
    few = seeds[: 2 * CLASSES], classes[: 2 * CLASSES]
    students = [
        torch.cat([part.images for part in sample_images(load_generator(name).eval(), seeds, classes=classes)])
        for name in (before, after)
    ]
    taught = torch.cat([part.images for part in sample_teacher(load_teacher(teacher), few[0], classes=few[1])])
    images, labels = (torch.from_numpy(array) for array in load_digits())
    real = torch.stack([images[labels == digit][row] for row in range(2) for digit in range(CLASSES)])
    blocks = {"before": students[0], "after": students[1], "the teacher": taught, "real digits": real}
    grids = {name: grid(block) for name, block in blocks.items()}
    gap, height = 12, sum(len(g) * ZOOM for g in grids.values())
    page = Image.new("L", (MARGIN + CLASSES * 32 * ZOOM, height + gap * (len(grids) - 1)), 255)
    draw, font, top = ImageDraw.Draw(page), ImageFont.load_default(22), 0
    for name, pixels in grids.items():
        block = Image.fromarray(pixels.numpy()).resize((pixels.shape[1] * ZOOM, pixels.shape[0] * ZOOM), Image.NEAREST)
        page.paste(block, (MARGIN, top))
        draw.text((8, top + block.height // 2), name, fill=0, font=font, anchor="lm")
        top += block.height + gap
    page.save(out, optimize=True)


if __name__ == "__main__":
    main()
