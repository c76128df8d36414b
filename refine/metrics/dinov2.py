"""DINOv2's vision transformers (Oquab et al. 2023, arXiv 2304.07193), whose class token is the feature of FD-DINOv2.

A network is its architecture and a table of tensors under the names of the published files: nothing is built, so
weights are in memory once. All numbers are float32, also inside autocast and where TF32 is on.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

PATCH = 14  # pixels
HEAD = 64  # channels of an attention head in all published networks
NATIVE_GRID = 37  # patches a side of the images that the published networks were trained on, 518 px
_EPS = 1e-6  # of every layer norm

#: Names of the published networks → width, depth, whether their blocks are gated.
_PUBLISHED = {
    "vits14": (384, 12, False),
    "vitb14": (768, 12, False),
    "vitl14": (1024, 24, False),
    "vitg14": (1536, 40, True),
}
_REGISTERS = 4


@dataclass(frozen=True)
class Architecture:
    """What tells the networks apart.

    Attributes:
        width: Channels of a token, D.
        depth: Number of blocks.
        heads: Of attention.
        grid: Patches a side that the position table is for.
        registers: Number of register tokens (Darcet et al. 2023); 0 = none.
        gated: Whether the blocks have a SwiGLU in place of the perceptron.
    """

    width: int
    depth: int
    heads: int
    grid: int
    registers: int = 0
    gated: bool = False

    @classmethod
    def published(cls, name: str) -> Architecture:
        """That of 'vits14', 'vitb14', 'vitl14' or 'vitg14', with '_reg' behind it for the one with registers."""
        base, _, registers = name.partition("_")
        width, depth, gated = _PUBLISHED[base]
        return cls(width, depth, width // HEAD, NATIVE_GRID, _REGISTERS if registers else 0, gated)

    @property
    def name(self) -> str:
        """The name of the published network of this architecture; otherwise its sizes."""
        for base in _PUBLISHED:
            for name in (base, f"{base}_reg"):
                if self == Architecture.published(name):
                    return name
        return f"{self.width} wide, {self.depth} deep, {self.registers} registers"

    @property
    def hidden(self) -> int:
        """Channels between the two layers of a block's second half; a SwiGLU's are rounded up to a multiple of 8."""
        return 8 * math.ceil(int(4 * self.width * 2 / 3) / 8) if self.gated else 4 * self.width

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of every tensor, as the published files have them."""
        d, hidden = self.width, self.hidden
        shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, d), "pos_embed": (1, 1 + self.grid**2, d)}
        shapes |= {"register_tokens": (1, self.registers, d)} if self.registers else {}
        shapes |= {"mask_token": (1, d)} | _affine("patch_embed.proj", (d, 3, PATCH, PATCH))
        for i in range(self.depth):
            block = f"blocks.{i}"
            shapes |= _affine(f"{block}.norm1", (d,)) | _affine(f"{block}.norm2", (d,))
            shapes |= _affine(f"{block}.attn.qkv", (3 * d, d)) | _affine(f"{block}.attn.proj", (d, d))
            shapes |= {f"{block}.ls1.gamma": (d,), f"{block}.ls2.gamma": (d,)}
            if self.gated:
                shapes |= _affine(f"{block}.mlp.w12", (2 * hidden, d)) | _affine(f"{block}.mlp.w3", (d, hidden))
            else:
                shapes |= _affine(f"{block}.mlp.fc1", (hidden, d)) | _affine(f"{block}.mlp.fc2", (d, hidden))
        return shapes | _affine("norm", (d,))


def _affine(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


class VisionTransformer:
    """A network in eval mode.

    Args:
        architecture: What the tensors are for.
        weights: Name → float32 tensor, of `Architecture.shapes`; 'mask_token' is not needed.
    """

    def __init__(self, architecture: Architecture, weights: Mapping[str, torch.Tensor]):
        self.architecture = architecture
        self._weights = dict(weights)
        self._positions: dict[tuple[int, int], torch.Tensor] = {}  # they depend on the size of the images only

    def to(self, device: torch.device | str) -> VisionTransformer:
        """Moves the weights; returns self."""
        self._weights = {name: tensor.to(device) for name, tensor in self._weights.items()}
        self._positions.clear()
        return self

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Features, float32 [N, D]: the class token after the last layer norm.

        Args:
            x: Normalised images, float32 [N, 3, H, W]; H and W are multiples of 14.
        """
        return self.tokens(x)[:, 0]

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """All tokens after the last layer norm, [N, 1 + registers + H·W/14², D]: class, registers, patches by rows."""
        with _plain_float32(x.device):
            h = self.embed(x)
            for i in range(self.architecture.depth):
                h = h + self._scaled(f"blocks.{i}.ls1", self._attention(f"blocks.{i}", h))
                h = h + self._scaled(f"blocks.{i}.ls2", self._perceptron(f"blocks.{i}", h))
            return self._norm("norm", h)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """What the first block takes; registers have no position."""
        n, (rows, columns) = len(x), (size // PATCH for size in x.shape[2:])
        patches = x.reshape(n, 3, rows, PATCH, columns, PATCH).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        kernel = self._weights["patch_embed.proj.weight"].flatten(1)  # a convolution whose stride is its size
        h = F.linear(patches, kernel, self._weights["patch_embed.proj.bias"])
        h = torch.cat([self._weights["cls_token"].expand(n, -1, -1), h], dim=1) + self._position(rows, columns)
        if self.architecture.registers:
            h = torch.cat([h[:, :1], self._weights["register_tokens"].expand(n, -1, -1), h[:, 1:]], dim=1)
        return h

    def _position(self, rows: int, columns: int) -> torch.Tensor:
        if (rows, columns) not in self._positions:
            table = self._weights["pos_embed"]
            resampled = resample_positions(table, rows, columns, bool(self.architecture.registers))
            self._positions[rows, columns] = resampled
        return self._positions[rows, columns]

    def _attention(self, block: str, h: torch.Tensor) -> torch.Tensor:
        n, length, width = h.shape
        heads = self.architecture.heads
        qkv = self._linear(f"{block}.attn.qkv", self._norm(f"{block}.norm1", h))
        q, k, v = qkv.reshape(n, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)  # [n, heads, length, D/heads]
        attention = ((q * (width // heads) ** -0.5) @ k.transpose(2, 3)).softmax(dim=3)
        return self._linear(f"{block}.attn.proj", (attention @ v).transpose(1, 2).reshape(n, length, width))

    def _perceptron(self, block: str, h: torch.Tensor) -> torch.Tensor:
        h = self._norm(f"{block}.norm2", h)
        if self.architecture.gated:
            gate, value = self._linear(f"{block}.mlp.w12", h).chunk(2, dim=-1)
            return self._linear(f"{block}.mlp.w3", F.silu(gate) * value)
        return self._linear(f"{block}.mlp.fc2", F.gelu(self._linear(f"{block}.mlp.fc1", h)))

    def _linear(self, name: str, h: torch.Tensor) -> torch.Tensor:
        return F.linear(h, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])

    def _norm(self, name: str, h: torch.Tensor) -> torch.Tensor:
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return F.layer_norm(h, weight.shape, weight, bias, _EPS)

    def _scaled(self, name: str, h: torch.Tensor) -> torch.Tensor:
        return h * self._weights[f"{name}.gamma"]


def resample_positions(table: torch.Tensor, rows: int, columns: int, registers: bool) -> torch.Tensor:
    """The position table for a grid of patches, as the published code resamples it, which numbers depend on.

    The class's row is kept. The others are resampled bicubically: for networks without registers without antialiasing
    and by a factor of (size + 0.1) / grid, so that output j reads the input at (j + ½)·grid / (size + 0.1) − ½; for
    networks with registers with antialiasing and by the plain factor.

    Args:
        table: [1, 1 + grid², D].
        rows, columns: Of the grid that is wanted. A square grid of the table's own size is the table itself.
        registers: Whether the network has register tokens.

    Returns:
        [1, 1 + rows·columns, D].
    """
    grid = math.isqrt(table.shape[1] - 1)
    if rows == columns == grid:
        return table
    patches = table[:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    if registers:
        patches = F.interpolate(patches, size=(rows, columns), mode="bicubic", antialias=True)
    else:
        factors = ((rows + 0.1) / grid, (columns + 0.1) / grid)
        patches = F.interpolate(patches, scale_factor=factors, mode="bicubic")
    return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


@contextlib.contextmanager
def _plain_float32(device: torch.device) -> Iterator[None]:
    """Products of float32 with all their digits, whatever a run's precision is. torch's switch is the process's:
    images that another thread makes meanwhile are also made without TF32."""
    before = torch.get_float32_matmul_precision()
    switch = _tf32_of_cuda if device.type == "cuda" else torch.set_float32_matmul_precision
    try:
        if before != "highest":
            switch("highest")
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if before != "highest":
            switch(before)


def _tf32_of_cuda(precision: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = precision != "highest"
