"""The critic of `--adversarial`: a small convolutional network that tells images of two sources apart."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

from refine.networks.stylegan2 import MinibatchStdLayer


class Critic(nn.Module):
    """Images and labels → logits (N,); larger = more like the other source than like the student.

    Stride-2 convolutions down to 4×4, minibatch standard deviation, and a projection of the label (Miyato & Koyama
    2018, arXiv 1802.05637) where there are classes.

    Args:
        img_resolution, img_channels: Size of the images.
        classes: Number of classes; 0 = labels are ignored.
        width: Channels after the first convolution; they double with each one, up to `max_width`.
        max_width: See `width`.
    """

    def __init__(self, img_resolution: int, img_channels: int, classes: int, width: int = 32, max_width: int = 512):
        super().__init__()
        levels = max(int(math.log2(img_resolution)) - 2, 1)
        widths = [img_channels, *(min(width << level, max_width) for level in range(levels))]
        self.down = nn.ModuleList(nn.Conv2d(i, o, 4, 2, 1) for i, o in itertools.pairwise(widths))
        self.last = nn.Conv2d(widths[-1] + 1, widths[-1], 3, 1, 1)
        self.out = nn.Linear(widths[-1], 1)
        self.embed = nn.Linear(classes, widths[-1], bias=False) if classes else None

    def forward(self, x: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        """Args: x: (N, C, R, R), about [-1, 1]. c: One-hot labels (N, classes), or None without classes."""
        for conv in self.down:
            x = F.leaky_relu(conv(x), 0.2)
        x = MinibatchStdLayer(math.gcd(4, len(x)))(x)  # groups of four where the batch can be cut so
        x = F.leaky_relu(self.last(x), 0.2).mean(dim=[2, 3])
        logits = self.out(x)[:, 0]
        return logits if self.embed is None or c is None else logits + (x * self.embed(c)).sum(dim=1)
