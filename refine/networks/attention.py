"""Self-attention between the pixels of an image: from a 1×1 convolution to the heads, and back to channels.

Attention takes the numbers of a pixel side by side. Images in channels_last have them so; of contiguous ones a GPU
makes them with products of matrices, which read and write either order, so that nothing is copied in between.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from refine.torch_utils.ops.conv3x3 import conv2d

Pointwise: TypeAlias = tuple[torch.Tensor, torch.Tensor]  # weight (O, I, 1, 1) and bias (O,)
Heads: TypeAlias = tuple[torch.Tensor, ...]  # queries, keys and values, (N, heads, c, H·W)


def as_products(x: torch.Tensor) -> bool:
    """Whether 1×1 convolutions around attention are computed as products of matrices: of contiguous images on a GPU."""
    return x.is_contiguous() and x.device.type != "cpu"


def thirds(weight: torch.Tensor) -> torch.Tensor:
    """Rows q0 k0 v0 q1 k1 v1 …, as in the published weights, to q0 q1 … k0 k1 … v0 v1 …; shape (3C, ...).

    With them a convolution gives what attention takes; else its output, which is much larger, would be sorted.
    """
    return torch.cat(in_thirds(weight).unbind())


def in_thirds(weight: torch.Tensor) -> torch.Tensor:
    """The same as a view, (3, C, ...)."""
    return weight.unflatten(0, (-1, 3)).transpose(0, 1)


def pointwise(x: torch.Tensor, weight_and_bias: Pointwise, num_heads: int) -> torch.Tensor:
    """Queries, keys and values of images x by weights in thirds: (N, C, H, W) → (N, H·W, 3, heads, c)."""
    weight, bias = weight_and_bias
    if not as_products(x):
        return by_pixel(conv2d(x, weight, bias), num_heads)
    y = torch.baddbmm(bias, x.flatten(2).mT, weight.flatten(1).mT.expand(x.shape[0], -1, -1))
    return y.unflatten(2, (3, num_heads, -1))


def by_pixel(qkv: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Queries, keys and values, (N, 3C, H, W), as (N, H·W, 3, heads, c) with c = C / heads; dense.

    They lie so in memory already where `qkv` is channels_last.
    """
    n, _, height, width = qkv.shape
    return qkv.permute(0, 2, 3, 1).reshape(n, height * width, 3, num_heads, -1).contiguous()


def split_heads(pixels: torch.Tensor) -> Heads:
    """(N, H·W, 3, heads, c) → queries, keys and values (N, heads, c, H·W), views with the c numbers side by side."""
    return tuple(part.permute(0, 2, 3, 1) for part in pixels.unbind(2))


class SplitHeads(torch.autograd.Function):
    """`split_heads` of `pointwise`, of a layer whose weights are also given as they are published.

    The three gradients are written in the order of those weights, in the layout of x, by the one copy that puts them
    together; from there on it is the derivative of a convolution, whose weights nobody has sorted.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, in_thirds: Pointwise, num_heads: int
    ) -> Heads:
        ctx.save_for_backward(x, weight)
        return split_heads(pointwise(x, in_thirds, num_heads))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        n, _, height, width = x.shape
        if x.is_contiguous():
            dy = torch.stack(gradients, dim=3).reshape(n, -1, height, width)  # [N heads c 3 HW]
        else:
            pixels = torch.stack([part.permute(0, 3, 1, 2) for part in gradients], dim=4)  # [N HW heads c 3]
            dy = pixels.reshape(n, height, width, -1).permute(0, 3, 1, 2)
        geometry: tuple[Any, ...] = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
        wanted = list(ctx.needs_input_grad[:3])
        dx, d_weight, d_bias = torch.ops.aten.convolution_backward(dy, x, weight, [len(weight)], *geometry, wanted)
        return dx, d_weight, d_bias, None, None


def merge_heads(y: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(N, heads, c, H·W) → (N, heads · c, H, W), with the height, width and memory format of `like`."""
    n, heads, c, _ = y.shape
    height, width = like.shape[2:]
    if like.is_contiguous():
        return y.reshape(n, heads * c, height, width).contiguous()
    return y.permute(0, 3, 1, 2).reshape(n, height, width, heads * c).contiguous().permute(0, 3, 1, 2)  # channels_last


def scaled_dot_product(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention over the last axis: softmax(qᵀk / √c) over the keys, applied to v. Shapes (N, heads, c, HW).

    torch's fused attention takes (N, heads, HW, c), on a GPU with the c numbers side by side only; what lies otherwise
    is copied.
    """
    q, k, v = (x.mT if x.stride(-2) == 1 else x.mT.contiguous() for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).mT
