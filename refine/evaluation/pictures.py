"""The pictures of a comparison: grids of the same latents, rows of the teacher and of real images, panels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from refine.evaluation.panels import ROWS, like, look_alikes, nearest_real
from refine.evaluation.scale import Column
from refine.evaluation.sides import Side
from refine.images import image_grid, to_pil
from refine.metrics.detectors import Detector
from refine.metrics.references import Reference

PANEL_IMAGES = 64  # that look-alikes are searched for
SMALL = 64  # pixels; images up to this size are shown with their pixels


@dataclass(frozen=True)
class Pictures:
    """Everything that is shown beside the numbers, in its own pixels.

    Attributes:
        grids: 'before' and 'after' → images from the same latents, and a caption.
        rows: 'teacher' and 'real', where they are → images, and a caption.
        panels: 'diversity', 'nearest' → caption → images.
        columns: Images per row of a grid.
        is_small: Whether the single images are so small that their pixels are to be seen.
    """

    grids: Mapping[str, tuple[Image.Image, str]]
    rows: Mapping[str, tuple[Image.Image, str]]
    panels: Mapping[str, Mapping[str, Image.Image]] = field(default_factory=dict)
    columns: int = 8
    is_small: bool = True


def make_pictures(
    sides: Mapping[str, Side],
    columns: Mapping[str, Column],
    results: Mapping[str, Any],
    detector: Detector,
    reference: Reference,
) -> Pictures:
    """Draws all pictures of a comparison, whose images `sides` make now and `columns` hold."""
    tensors, per_row = _grids(sides)
    grids = {
        name: (to_pil(image_grid(images, per_row)), _caption(name, results))
        for name, images in zip(sides, tensors, strict=True)
    }
    has_classes = all(side.num_classes > 1 for side in sides.values())
    rows = {
        name: (to_pil(image_grid(_row(column, tensors[0][0], per_row, has_classes), per_row)), _caption(name, results))
        for name, column in columns.items()
    }
    # look-alikes of one class show missing diversity; images of different classes are compared with real ones
    panels = {"diversity": look_alikes(_panel_images(sides, [0] * PANEL_IMAGES), detector)}
    nearest = nearest_real(_panel_images(sides, range(ROWS)), detector, reference)
    panels |= {} if nearest is None else {"nearest": nearest}
    return Pictures(grids, rows, panels, per_row, sides["before"].image_shape[-1] <= SMALL)


def side_by_side(pictures: Pictures) -> Image.Image:
    """One picture: both grids beside each other, the rows below them, each under its caption."""
    first = next(iter(pictures.grids.values()))[0]
    scale = max(640 // first.width, 1)  # whole pixels: small images are enlarged without blurring
    gap, head = 16, 36
    width, height = first.width * scale, first.height * scale
    shown = [*pictures.grids.values(), *pictures.rows.values()]
    enlarged = [
        (picture.convert("RGB").resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST), text)
        for picture, text in shown
    ]
    below = max((picture.height for picture, _ in enlarged[2:]), default=-head - gap)
    page = Image.new("RGB", (2 * width + 3 * gap, height + below + 2 * (head + gap)), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=18)
    for index, (picture, text) in enumerate(enlarged):
        left, top = gap + index % 2 * (width + gap), index // 2 * (height + head + gap)
        draw.text((left, top + head / 2), text, fill="black", font=font, anchor="lm")
        page.paste(picture, (left, top + head))
    return page


def _caption(name: str, results: Mapping[str, Any]) -> str:
    metric = results["metric"]
    return f"{name}: {results[name]['name']}, {metric} {results[name][metric]['mean']:.3g}"


def _panel_images(sides: Mapping[str, Side], classes: Sequence[int]) -> dict[str, torch.Tensor]:
    """An image for each of the classes, which count modulo the network's own; of the seeds 0, 1, …"""

    def images(side: Side) -> torch.Tensor:
        own = [index % side.num_classes for index in classes] if side.num_classes > 1 else None
        return torch.cat([batch.images for batch in side.sample(range(len(classes)), own, noise_mode="const")])

    return {name: images(side) for name, side in sides.items()}


def _grids(sides: Mapping[str, Side]) -> tuple[list[torch.Tensor], int]:
    """Images of both networks from the same latents with constant noise; where there are classes, a column for each."""
    counts = [side.num_classes for side in sides.values()]
    num_classes = counts[0] if counts[0] == counts[1] else 0
    room = min(max(1600 // sides["before"].image_shape[-1], 2), 10)
    columns = min(num_classes, room) if num_classes > 1 else min(room, 8)
    seeds = range(columns * min(columns, 8))
    classes = [seed % columns for seed in seeds] if num_classes else None
    pictures = [
        torch.cat([batch.images.cpu() for batch in side.sample(seeds, classes, noise_mode="const")])
        for side in sides.values()
    ]
    return pictures, columns


def _row(column: Column, pattern: torch.Tensor, per_row: int, has_classes: bool) -> torch.Tensor:
    """Two rows of a column's images in the shape of the pattern; where there are classes, as in the grids."""
    count = min(2 * per_row, len(column.images))
    chosen = list(range(count))
    if has_classes and column.classes is not None:
        of_class = [(column.classes == index).nonzero().flatten().tolist() for index in range(per_row)]
        if all(len(found) >= 2 for found in of_class):
            chosen = [found[turn] for turn in range(2) for found in of_class]
    return torch.stack([like(column.images[index], pattern) for index in chosen])
