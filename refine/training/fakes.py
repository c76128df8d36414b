"""The pictures of a run: images of the same latents at every snapshot, in a grid that shows every class.

As many images as NVIDIA's tools show, 7 to 32 columns and 4 to 32 rows, by the size of an image. The picture has at
most 2048×1024 pixels, so that hundreds of them may lie in a run folder and in TensorBoard: about 5 MB of photographs.
Images above 256 pixels, of which fewer than 7×4 would fit, are reduced.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from refine.images import image_grid, to_uint8
from refine.metrics.sampling import latents_of_seeds
from refine.networks.bases import Generator

WIDTH, HEIGHT = 2048, 1024  # of a picture, where the limits of columns and rows allow
COLUMNS, ROWS = (7, 32), (4, 32)
LARGEST = 256  # side of an image in the picture
_AT_ONCE = 16


def grid_shape(resolution: int, num_classes: int = 0) -> tuple[int, int]:
    """(rows, columns) for images of a resolution; where the classes fit in a row, columns are whole sets of them."""
    rows = min(max(HEIGHT // resolution, ROWS[0]), ROWS[1])
    columns = min(max(WIDTH // resolution, COLUMNS[0]), COLUMNS[1])
    if 1 < num_classes <= columns:
        columns -= columns % num_classes
    return rows, columns


def grid_classes(count: int, columns: int, num_classes: int) -> torch.Tensor:
    """The class of each image, int64 [count]: a column each where they fit, otherwise one after the other, and where
    there are more classes than images at even distances."""
    index = torch.arange(count)
    if num_classes <= columns:
        return index % columns % num_classes
    return index % num_classes if num_classes <= count else index * num_classes // count


class FakesGrid:
    """Images of fixed latents, the seeds 0, 1, …

    Args:
        G: A generator like those that are to be drawn.
        device: Where these are.
    """

    def __init__(self, G: Generator, device: torch.device):
        rows, self.columns = grid_shape(G.img_resolution, G.c_dim)
        count = rows * self.columns
        self._z = latents_of_seeds(range(count), [G.z_dim])[0].to(device)
        self._c: torch.Tensor | None = None
        if G.c_dim > 0:
            self._c = F.one_hot(grid_classes(count, self.columns, G.c_dim), G.c_dim).float().to(device)

    @torch.no_grad()
    def draw(self, G: Generator) -> torch.Tensor:
        """The picture with the stored noise, uint8 (C, H, W)."""
        options = G.accepted(noise_mode="const")
        factor = -(-G.img_resolution // LARGEST)
        images = []
        for first in range(0, len(self._z), _AT_ONCE):
            part = slice(first, first + _AT_ONCE)
            drawn = to_uint8(G(self._z[part], None if self._c is None else self._c[part], **options))
            if factor > 1:
                drawn = F.avg_pool2d(drawn.float(), factor).round().to(torch.uint8)
            images.append(drawn.cpu())
        return image_grid(torch.cat(images), self.columns)
