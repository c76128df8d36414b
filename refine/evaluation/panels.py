"""Pictures of a comparison beside its grids: look-alikes, nearest real images, the curve of a run."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw, ImageFont

from refine.evaluation.comparison import one_line
from refine.images import image_grid, to_pil
from refine.metrics.detectors import Detector, space_of_results
from refine.metrics.image_sets import ImageSet
from refine.metrics.references import Reference
from refine.metrics.registry import rows_in

if TYPE_CHECKING:
    pass

PAIRS = 8  # of look-alikes
ROWS, NEIGHBOURS = 6, 5  # of nearest real images


def look_alikes(images: Mapping[str, torch.Tensor], detector: Detector) -> dict[str, Image.Image]:
    """Caption → for each network the pairs of its images that are nearest in feature space: nearly the same ones mean
    that it draws few different images.

    Args:
        images: Network's name → images, uint8 [N, C, H, W], N ≥ 4.
        detector: The feature space.
    """
    strips = {}
    for name, mine in images.items():
        pairs, distances = nearest_pairs(_features(mine, detector))
        chosen = torch.cat([mine[[a for a, _ in pairs]], mine[[b for _, b in pairs]]])
        caption = f"{name}: the {len(pairs)} most similar pairs of {len(mine)} images, mean distance {distances:.3g}"
        strips[caption] = to_pil(image_grid(chosen, len(pairs)))
    return strips


def nearest_pairs(features: torch.Tensor, count: int = PAIRS) -> tuple[list[tuple[int, int]], float]:
    """The `count` nearest pairs of features [N, D], each vector in one pair at most, and their mean distance."""
    distances = torch.cdist(features.double(), features.double())
    rows, columns = torch.triu_indices(len(features), len(features), offset=1)
    pairs, used, total = [], set(), 0.0
    for index in distances[rows, columns].argsort().tolist():
        a, b = int(rows[index]), int(columns[index])
        if a not in used and b not in used:
            pairs.append((a, b))
            used |= {a, b}
            total += distances[a, b].item()
        if len(pairs) == min(count, len(features) // 2):
            break
    return pairs, total / max(len(pairs), 1)


def nearest_real(
    images: Mapping[str, torch.Tensor], detector: Detector, reference: Reference
) -> dict[str, Image.Image] | None:
    """Caption → generated images, each with the real ones that are nearest in feature space: does the network copy, or
    invent?

    Args:
        images: Network's name → images, uint8 [N, C, H, W]; the first `ROWS` are shown.
        detector: The feature space.
        reference: The real images; None is returned if it has no images to show.
    """
    if reference.features is None or not isinstance(reference.images, ImageSet):
        return None
    strips = {}
    for name, mine in images.items():
        distances = torch.cdist(_features(mine[:ROWS], detector).double(), reference.features.double())
        nearest = distances.topk(min(NEIGHBOURS, distances.shape[1]), largest=False).indices
        cells = []
        for row, generated in zip(nearest, mine[:ROWS], strict=True):
            real = [like(reference.images.read(int(index)), generated) for index in row]
            cells.append(torch.stack([generated.cpu(), *real]))
        count = cells[0].shape[0]
        strips[f"{name}: generated (first in each row) and the nearest real images"] = to_pil(
            image_grid(torch.cat(cells), count)
        )
    return strips


def curve_figure(results: dict[str, Any]) -> Image.Image:
    """The leading distance of a run's snapshots over kimg, with its spread over the seed ranges, and where it began."""
    from matplotlib.figure import Figure  # a second to import, and only needed here

    metric, curve = results["metric"], one_line(results["curve"])
    kimg = [point["kimg"] for point in curve]
    shares = [key for key, row in rows_in(space_of_results(results)).items() if row.in_curve]
    keys = [metric, *(key for key in shares if key in results["before"])]
    figure = Figure(figsize=(9, 3.2), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2 if len(keys) > 1 else 1, squeeze=False)[0]
    for key in keys:
        panel = panels[0 if key == metric else 1]
        points = [point[key] for point in curve]
        means, stds = [point["mean"] for point in points], [point["std"] for point in points]
        (line,) = panel.plot(kimg, means, marker="o", label=key)  # at fractions of a kimg where they are
        low, high = ([mean + sign * std for mean, std in zip(means, stds, strict=True)] for sign in (-1, 1))
        panel.fill_between(kimg, low, high, alpha=0.25, color=line.get_color(), linewidth=0)
        start = results["before"][key]["mean"]
        panel.axhline(start, color=line.get_color(), linestyle=":", linewidth=1, label=f"{key} before")
    panels[0].set(ylabel=metric, ylim=(0, None))
    for panel in panels:
        for point in curve:
            if point["judged"]:
                panel.axvline(point["kimg"], color="black", linewidth=0.8, label="judged")
        panel.set(xlabel="kimg")
        panel.legend(frameon=False, fontsize="small")
        panel.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer)


@torch.no_grad()
def _features(images: torch.Tensor, detector: Detector) -> torch.Tensor:
    return detector(images).cpu()


def like(real: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
    """A real image in the shape of a generated one."""
    channels, height, width = generated.shape
    if real.shape[0] != channels:
        real = real.expand(3, -1, -1) if channels == 3 else real.float().mean(dim=0, keepdim=True).to(torch.uint8)
    if real.shape[1:] != (height, width):
        resized = torch.nn.functional.interpolate(real[None].float(), [height, width], mode="bilinear", antialias=True)
        real = resized[0].clamp(0, 255).to(torch.uint8)
    return real


def stacked(strips: Mapping[str, Image.Image]) -> Image.Image:
    """Pictures below each other, each under its caption, small images enlarged by whole pixels."""
    widest = max(strip.width for strip in strips.values())
    scale = max(640 // widest, 1)
    gap, head = 16, 36
    height = sum(strip.height * scale + head for strip in strips.values()) + gap
    page = Image.new("RGB", (max(widest * scale, 640) + 2 * gap, height), "white")
    draw, font, top = ImageDraw.Draw(page), ImageFont.load_default(size=18), 0
    for caption, strip in strips.items():
        draw.text((gap, top + head / 2), caption, fill="black", font=font, anchor="lm")
        enlarged = strip.convert("RGB").resize((strip.width * scale, strip.height * scale), Image.Resampling.NEAREST)
        page.paste(enlarged, (gap, top + head))
        top += head + enlarged.height
    return page
