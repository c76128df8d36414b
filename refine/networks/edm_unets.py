"""The U-Nets F of EDM (Karras et al. 2022): `SongUNet` for DDPM++ and NCSN++, `DhariwalUNet` for ADM.

Module, parameter and buffer names are those of the published checkpoints. Shape tags: N batch, C channels,
R resolution, L label_dim, A augment_dim.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from refine.networks.attention import as_products
from refine.networks.bases import check_choice
from refine.networks.edm_layers import (
    Conv2d,
    FourierEmbedding,
    GroupNormSilu,
    Init,
    Linear,
    PositionalEmbedding,
    Sum,
    UNetBlock,
    linear_together,
    sorted_together,
)


class LadderUNet(nn.Module):
    """What the two U-Nets share: the ladder of blocks. They add embedding, auxiliary paths and output."""

    def __init__(self, img_resolution: int, label_dim: int, augment_dim: int, label_dropout: float):
        super().__init__()
        self.img_resolution, self.label_dim, self.augment_dim = img_resolution, label_dim, augment_dim
        self.label_dropout = label_dropout

    def _build_encoder(
        self, in_channels: int, stem_channels: int, widths: Sequence[int], num_blocks: int,
        attn_resolutions: Sequence[int], block: Callable[..., UNetBlock], init: Init,
    ) -> list[int]:  # fmt: skip
        """Make ``self.enc``; returns the widths of the feature maps that it hands to the decoder, in order."""
        if self.img_resolution % (divisor := 1 << len(widths) - 1):
            raise ValueError(f"img_resolution is {self.img_resolution}, expected a multiple of {divisor}.")
        self.enc = nn.ModuleDict()
        width, skips = stem_channels, []
        for level, level_width in enumerate(widths):
            res = self.img_resolution >> level
            if level == 0:
                self.enc[f"{res}x{res}_conv"] = Conv2d(in_channels, width, kernel=3, init=init)
            else:
                self.enc[f"{res}x{res}_down"] = block(width, width, down=True)
                self._add_encoder_aux(f"{res}x{res}", width)
            skips.append(width)
            for index in range(num_blocks):
                self.enc[f"{res}x{res}_block{index}"] = block(width, level_width, attention=res in attn_resolutions)
                width = level_width
                skips.append(width)
        return skips

    def _build_decoder(
        self, skips: list[int], widths: Sequence[int], num_blocks: int,
        attend: Callable[[int, int], bool], block: Callable[..., UNetBlock],
    ) -> int:  # fmt: skip
        """Make ``self.dec``; ``attend(res, index)`` says which blocks have attention. Returns the last width."""
        self.dec = nn.ModuleDict()
        width = skips[-1]
        for level, level_width in reversed(list(enumerate(widths))):
            res = self.img_resolution >> level
            if level == len(widths) - 1:
                self.dec[f"{res}x{res}_in0"] = block(width, width, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(width, width)
            else:
                self.dec[f"{res}x{res}_up"] = block(width, width, up=True)
            for index in range(num_blocks + 1):
                attention = attend(res, index)
                self.dec[f"{res}x{res}_block{index}"] = block(width + skips.pop(), level_width, attention=attention)
                width = level_width
            self._add_decoder_aux(level, f"{res}x{res}", width)
        return width

    def _add_encoder_aux(self, prefix: str, width: int) -> None:
        """Hook behind each ``_down`` entry."""

    def _add_decoder_aux(self, level: int, prefix: str, width: int) -> None:
        """Hook behind the blocks of each decoder level."""

    def _params(self, emb: torch.Tensor, x: torch.Tensor) -> Iterator[tuple[torch.Tensor, Any]]:
        """What the blocks, in the order in which they run, make of the embedding [N E], and their qkv; for images x."""
        blocks = [layer for layer in (*self.enc.values(), *self.dec.values()) if isinstance(layer, UNetBlock)]
        params = linear_together([block.affine for block in blocks], emb, x.dtype)
        attending = [block.qkv for block in blocks if block.num_heads]
        assert blocks[0].conv1.weight is not None
        channels_last = not blocks[0].conv1.weight.is_contiguous()  # and so are the activations
        wanted = attending and (channels_last or as_products(x))
        sorted_qkv = iter(sorted_together(attending, x) if wanted else [None] * len(attending))
        qkv = [next(sorted_qkv) if block.num_heads else None for block in blocks]
        return zip(params, qkv, strict=True)

    def _drop_labels(self, class_labels: torch.Tensor | None) -> torch.Tensor:
        """In train mode, blank whole label rows at the rate ``label_dropout``."""
        assert class_labels is not None  # a preconditioning gives zeros for "no label"
        if not (self.training and self.label_dropout):
            return class_labels
        keep = torch.rand(class_labels.shape[0], 1, device=class_labels.device) >= self.label_dropout
        return class_labels * keep.to(class_labels.dtype)


class SongUNet(LadderUNet):
    """U-Net of Song et al. (2021): DDPM++ and NCSN++, as re-implemented for EDM (configurations B–F, except ADM).

    DDPM++ is the default; NCSN++ is ``embedding_type='fourier', channel_mult_noise=2, encoder_type='residual',
    resample_filter=[1, 3, 3, 1]``.

    Args:
        img_resolution: Side of the square images.
        in_channels, out_channels: Channels of the images.
        label_dim: Width of one-hot class labels, 0 = unconditional.
        augment_dim: Width of augmentation labels, 0 = none.
        model_channels: Base width C.
        channel_mult: Width of each resolution level, in multiples of C, from fine to coarse.
        channel_mult_emb: Width of the embedding, in multiples of C.
        num_blocks: Residual blocks per level (the decoder has one more).
        attn_resolutions: Resolutions with self-attention.
        dropout: Inside the blocks, in train mode.
        label_dropout: Rate at which labels are blanked in train mode, for guidance.
        embedding_type: 'positional' (DDPM++) or 'fourier' (NCSN++).
        channel_mult_noise: Width of the noise embedding, in multiples of C.
        encoder_type: 'standard' (DDPM++), 'residual' (NCSN++) or 'skip'.
        decoder_type: 'standard' or 'skip'.
        resample_filter: [1, 1] (DDPM++) or [1, 3, 3, 1] (NCSN++).

    Raises:
        ValueError: If one of the three types is unknown.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ):
        check_choice("embedding_type", embedding_type, ("positional", "fourier"))
        check_choice("encoder_type", encoder_type, ("standard", "skip", "residual"))
        check_choice("decoder_type", decoder_type, ("standard", "skip"))
        super().__init__(img_resolution, label_dim, augment_dim, label_dropout)
        self.encoder_type, self.decoder_type, self.resample_filter = encoder_type, decoder_type, resample_filter
        self.out_channels, self.aux_channels = out_channels, in_channels
        self.init = Init("xavier_uniform")
        emb_channels, noise_channels = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        block = functools.partial(
            UNetBlock, emb_channels=emb_channels, num_heads=1, dropout=dropout, skip_scale=math.sqrt(0.5), eps=1e-6,
            resample_filter=resample_filter, resample_proj=True, adaptive_scale=False,
            init=self.init, init_zero=self.init.scaled(1e-5), init_attn=self.init.scaled(math.sqrt(0.2)),
        )  # fmt: skip

        fourier = embedding_type == "fourier"
        embedding = FourierEmbedding(noise_channels) if fourier else PositionalEmbedding(noise_channels, endpoint=True)
        self.map_noise = embedding
        self.map_label = Linear(label_dim, noise_channels, init=self.init) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False, init=self.init) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels, init=self.init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=self.init)

        widths = [model_channels * mult for mult in channel_mult]
        skips = self._build_encoder(
            in_channels, model_channels, widths, num_blocks, attn_resolutions, block, self.init
        )  # the stem is C wide, whatever channel_mult[0] says
        self._build_decoder(
            skips, widths, num_blocks, lambda res, index: index == num_blocks and res in attn_resolutions, block
        )

    def _add_encoder_aux(self, prefix: str, width: int) -> None:
        resample: dict[str, Any] = {"down": True, "resample_filter": self.resample_filter, "init": self.init}
        if self.encoder_type == "skip":
            self.enc[f"{prefix}_aux_down"] = Conv2d(self.aux_channels, self.aux_channels, kernel=0, **resample)
            self.enc[f"{prefix}_aux_skip"] = Conv2d(self.aux_channels, width, kernel=1, init=self.init)
        elif self.encoder_type == "residual":
            conv = Conv2d(self.aux_channels, width, kernel=3, fused_resample=True, **resample)
            self.enc[f"{prefix}_aux_residual"] = conv
            self.aux_channels = width

    def _add_decoder_aux(self, level: int, prefix: str, width: int) -> None:
        if level > 0 and self.decoder_type != "skip":
            return
        if f"{prefix}_in0" not in self.dec and self.decoder_type == "skip":  # the deepest level has no image to enlarge
            up = Conv2d(self.out_channels, self.out_channels, kernel=0, up=True, resample_filter=self.resample_filter)
            self.dec[f"{prefix}_aux_up"] = up
        self.dec[f"{prefix}_aux_norm"] = GroupNormSilu(width, eps=1e-6)
        self.dec[f"{prefix}_aux_conv"] = Conv2d(width, self.out_channels, kernel=3, init=self.init.scaled(1e-5))

    def forward(
        self,
        x: torch.Tensor,
        noise_labels: torch.Tensor,
        class_labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The raw network F: images [N C R R], c_noise [N] or [1], labels [N L], augmentation [N A] → [N C_out R R]."""
        params = self._params(self._embed(noise_labels, class_labels, augment_labels), x)
        return self._decode(self._encode(x, params), params)

    def _embed(self, noise_labels, class_labels, augment_labels) -> torch.Tensor:
        angles = self.map_noise.angles(noise_labels)
        emb = torch.cat([angles.sin(), angles.cos()], dim=1)  # this family was trained with the sines first
        if self.map_label is not None:
            emb = emb + self.map_label(self._drop_labels(class_labels), gain=math.sqrt(self.label_dim))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = F.silu(self.map_layer0(emb))
        return F.silu(self.map_layer1(emb))

    def _encode(self, image: torch.Tensor, params: Iterator[tuple[torch.Tensor, Any]]) -> list[Sum]:
        skips: list[Sum] = []
        aux = image
        for name, layer in self.enc.items():
            if name.endswith("aux_down"):
                aux = layer(aux)
            elif name.endswith("aux_skip"):
                skips[-1] = Sum(layer(aux), skips[-1].total)
            elif name.endswith("aux_residual"):
                skips[-1] = Sum(layer(aux), skips[-1].total, math.sqrt(0.5))
                aux = skips[-1].total
            elif isinstance(layer, UNetBlock):
                skips.append(layer(skips[-1], None, *next(params)))
            else:
                skips.append(Sum(layer(image)))
        return skips

    def _decode(self, skips: list[Sum], params: Iterator[tuple[torch.Tensor, Any]]) -> torch.Tensor:
        image: torch.Tensor | None = None
        x, normed = skips[-1], None
        for name, layer in self.dec.items():
            if name.endswith("aux_up"):
                image = layer(image)
            elif name.endswith("aux_norm"):
                normed = x.normed(layer)
            elif name.endswith("aux_conv"):
                image = layer(normed) if image is None else image + layer(normed)
            else:
                if x.channels != layer.in_channels:
                    x = x.with_beside(skips.pop())
                x = layer(x, None, *next(params))
        assert image is not None  # the last level ends in an aux_conv
        return image


class DhariwalUNet(LadderUNet):
    """U-Net of Dhariwal & Nichol (2021), "ADM", as re-implemented for EDM.

    Args: see `SongUNet`; attention heads are 64 channels wide, and layers narrower than that have no attention.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0,
    ):
        super().__init__(img_resolution, label_dim, augment_dim, label_dropout)
        init = Init("kaiming_uniform", weight_gain=math.sqrt(1 / 3), bias_gain=math.sqrt(1 / 3))
        init_zero = init.scaled(0)
        emb_channels = model_channels * channel_mult_emb
        block = functools.partial(
            UNetBlock, emb_channels=emb_channels, channels_per_head=64, dropout=dropout, init=init, init_zero=init_zero
        )

        self.map_noise = PositionalEmbedding(model_channels)
        self.map_augment = Linear(augment_dim, model_channels, bias=False, init=init_zero) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels, init=init)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=init)
        label_init = Init("kaiming_normal", weight_gain=math.sqrt(label_dim))
        self.map_label = Linear(label_dim, emb_channels, bias=False, init=label_init) if label_dim else None

        widths = [model_channels * mult for mult in channel_mult]
        skips = self._build_encoder(in_channels, widths[0], widths, num_blocks, attn_resolutions, block, init)
        width = self._build_decoder(skips, widths, num_blocks, lambda res, _: res in attn_resolutions, block)
        self.out_norm = GroupNormSilu(width)
        self.out_conv = Conv2d(width, out_channels, kernel=3, init=init_zero)

    def forward(
        self,
        x: torch.Tensor,
        noise_labels: torch.Tensor,
        class_labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The raw network F: images [N C R R], c_noise [N] or [1], labels [N L], augmentation [N A] → [N C_out R R]."""
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(self._drop_labels(class_labels))
        params = self._params(F.silu(emb), x)

        skips: list[Sum] = []
        for layer in self.enc.values():
            block = isinstance(layer, UNetBlock)
            skips.append(layer(skips[-1], None, *next(params)) if block else Sum(layer(x)))
        h = skips[-1]
        for layer in self.dec.values():
            if h.channels != layer.in_channels:
                h = h.with_beside(skips.pop())
            h = layer(h, None, *next(params))
        return self.out_conv(h.normed(self.out_norm))


UNETS = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}
