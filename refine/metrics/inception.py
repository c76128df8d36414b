"""The Inception network of 2015-12-05, whose features define the FID (Szegedy et al. 2015; Heusel et al. 2017).

It is the graph that TensorFlow published on that day, and differs from other "Inception v3" in five ways, each of which
changes an FID by per cents: images are resized by TensorFlow 1's bilinear rule, scaled as (x − 128) / 128, batch
normalisation has eps 1e-3, average pools leave the padding out, and the last block pools by maximum.
Parameters are named as in pytorch-fid's and torch-fidelity's weights file, so that this file is its state dict.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

SIZE = 299  # pixels that the network sees
FEATURES, CLASSES = 2048, 1008


def resize_like_tensorflow1(x: torch.Tensor, size: int = SIZE) -> torch.Tensor:
    """Bilinear resize of floats [N, C, H, W] to [N, C, size, size] as TensorFlow 1 did it without `align_corners`.

    Output pixel j reads input coordinate j·W/size: corners, not pixel centres, are aligned, and shrinking skips pixels
    instead of averaging them. At its own size an image stays as it is.
    """
    for axis in (2, 3):  # rows first: of a large image most are then never read again
        length = x.shape[axis]
        if length == size:
            continue
        position = torch.arange(size, device=x.device) * length  # in units of 1/size: exact in integers
        low = position.div(size, rounding_mode="floor")
        weight = (position % size).to(x.dtype) / size
        weight = weight if axis == 3 else weight[:, None]
        first, second = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=length - 1))
        x = first.add_(second.sub_(first).mul_(weight))
    return x


class Conv(nn.Module):
    """Convolution without bias, batch normalisation (eps 1e-3), ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel: int | tuple[int, int], stride: int = 1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _row(c_in: int, c_out: int) -> Conv:
    return Conv(c_in, c_out, (1, 7), padding=(0, 3))


def _column(c_in: int, c_out: int) -> Conv:
    return Conv(c_in, c_out, (7, 1), padding=(3, 0))


def _average(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class Mixed35(nn.Module):
    """Block at 35×35: 1×1, 5×5, two 3×3, and average pool."""

    def __init__(self, c_in: int, pooled: int):
        super().__init__()
        self.branch1x1 = Conv(c_in, 64, 1)
        self.branch5x5_1 = Conv(c_in, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Conv(c_in, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(c_in, pooled, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average(x))], dim=1)


class Shrink35(nn.Module):
    """From 35×35 to 17×17."""

    def __init__(self, c_in: int):
        super().__init__()
        self.branch3x3 = Conv(c_in, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(c_in, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), three, F.max_pool2d(x, 3, stride=2)], dim=1)


class Mixed17(nn.Module):
    """Block at 17×17: 7×7 convolutions as rows and columns."""

    def __init__(self, c_in: int, width: int):
        super().__init__()
        self.branch1x1 = Conv(c_in, 192, 1)
        self.branch7x7_1 = Conv(c_in, width, 1)
        self.branch7x7_2 = _row(width, width)
        self.branch7x7_3 = _column(width, 192)
        self.branch7x7dbl_1 = Conv(c_in, width, 1)
        self.branch7x7dbl_2 = _column(width, width)
        self.branch7x7dbl_3 = _row(width, width)
        self.branch7x7dbl_4 = _column(width, width)
        self.branch7x7dbl_5 = _row(width, 192)
        self.branch_pool = Conv(c_in, 192, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(_average(x))], dim=1)


class Shrink17(nn.Module):
    """From 17×17 to 8×8."""

    def __init__(self, c_in: int):
        super().__init__()
        self.branch3x3_1 = Conv(c_in, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(c_in, 192, 1)
        self.branch7x7x3_2 = _row(192, 192)
        self.branch7x7x3_3 = _column(192, 192)
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_2(self.branch7x7x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(seven))
        return torch.cat([three, seven, F.max_pool2d(x, 3, stride=2)], dim=1)


class Mixed8(nn.Module):
    """Block at 8×8: 3×3 convolutions that end in a row and a column; the two of them differ in how they pool."""

    def __init__(self, c_in: int, max_pool: bool):
        super().__init__()
        self.max_pool = max_pool
        self.branch1x1 = Conv(c_in, 320, 1)
        self.branch3x3_1 = Conv(c_in, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Conv(c_in, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Conv(c_in, 192, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        once = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.max_pool else _average(x)
        branches = [self.branch1x1(x), self.branch3x3_2a(once), self.branch3x3_2b(once)]
        branches += [self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice), self.branch_pool(pooled)]
        return torch.cat(branches, dim=1)


class InceptionNetwork(nn.Module):
    """uint8 images → features [N, 2048]; 23.9 M parameters. Names and shapes are those of the published state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = Mixed35(192, pooled=32)
        self.Mixed_5c = Mixed35(256, pooled=64)
        self.Mixed_5d = Mixed35(288, pooled=64)
        self.Mixed_6a = Shrink35(288)
        self.Mixed_6b = Mixed17(768, width=128)
        self.Mixed_6c = Mixed17(768, width=160)
        self.Mixed_6d = Mixed17(768, width=160)
        self.Mixed_6e = Mixed17(768, width=192)
        self.Mixed_7a = Shrink17(768)
        self.Mixed_7b = Mixed8(1280, max_pool=False)
        self.Mixed_7c = Mixed8(2048, max_pool=True)
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features, float32 [N, 2048], of uint8 RGB images [N, 3, H, W] of any size."""
        return self.trunk((resize_like_tensorflow1(images.to(self.fc.weight.dtype)) - 128) / 128)

    def trunk(self, x: torch.Tensor) -> torch.Tensor:
        """Features [N, 2048] of floats [N, 3, 299, 299] in [-1, 1)."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # [N, 64, 147, 147]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))  # [N, 192, 71, 71]
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))  # [N, 288, 35, 35]
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # [N, 768, 17, 17]
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # [N, 2048, 8, 8]
        return x.mean(dim=(2, 3))

    def logits(self, features: torch.Tensor, bias: bool = True) -> torch.Tensor:
        """Logits [N, 1008] of features. The Inception Score of the literature is computed without the bias."""
        return F.linear(features, self.fc.weight, self.fc.bias if bias else None)
