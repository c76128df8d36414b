"""StyleGAN2 generator and discriminator (Karras et al., arXiv 1912.04958), with NVIDIA's parameter names.

Layers are in `stylegan2_layers`. Shapes in comments: N batch, I/O input/output channels, L number of w (`num_ws`).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from refine.networks import bases
from refine.networks.bases import records_init_kwargs
from refine.networks.stylegan2_layers import (
    DEFAULT_FILTER,
    Conv2dLayer,
    FullyConnectedLayer,
    SynthesisLayer,
    ToRGBLayer,
    modulations,
    normalize_2nd_moment,
)
from refine.torch_utils.ops.upfirdn2d import downsample2d, setup_filter, upsample2d

NOISE_MODES = ("random", "const", "none")
ARCHITECTURES = ("orig", "skip", "resnet")


# Generator.


class MappingNetwork(nn.Module):
    """z (N, z_dim) and label vector c (N, c_dim) → w (N, num_ws, w_dim), or (N, w_dim) when num_ws is None.

    Args:
        z_dim: Latent size; 0 = labels only.
        c_dim: Label size; 0 = unconditional.
        w_dim: Size of an intermediate latent.
        num_ws: How many copies of w to return. None = one, without its own axis.
        num_layers: Fully connected layers; 0 = the normalised input itself.
        embed_features: Size of the label embedding. None = w_dim.
        layer_features: Width of the inner layers. None = w_dim.
        activation: Activation of the layers, a key of `bias_act.ACTIVATIONS`.
        lr_multiplier: Learning rate of the layers relative to the rest.
        w_avg_beta: Decay of the running mean of w, used for truncation. None = not tracked.
    """

    w_avg: torch.Tensor

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        num_ws: int | None,
        num_layers: int = 8,
        embed_features: int | None = None,
        layer_features: int | None = None,
        activation: str = "lrelu",
        lr_multiplier: float = 0.01,
        w_avg_beta: float | None = 0.995,
    ):
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim, self.num_ws = z_dim, c_dim, w_dim, num_ws
        self.num_layers, self.w_avg_beta = num_layers, w_avg_beta
        embed_features = 0 if c_dim == 0 else (w_dim if embed_features is None else embed_features)
        layer_features = w_dim if layer_features is None else layer_features
        if c_dim > 0:
            self.embed = FullyConnectedLayer(c_dim, embed_features)
        widths = [z_dim + embed_features] + [layer_features] * (num_layers - 1) + [w_dim]
        for index in range(num_layers):
            layer = FullyConnectedLayer(widths[index], widths[index + 1], True, activation, lr_multiplier)
            setattr(self, f"fc{index}", layer)
        if num_ws is not None and w_avg_beta is not None:
            self.register_buffer("w_avg", torch.zeros(w_dim))

    def forward(
        self,
        z: torch.Tensor | None,
        c: torch.Tensor | None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        skip_w_avg_update: bool = False,
    ) -> torch.Tensor:
        """Map latents; in train() mode the running mean of w is updated unless `skip_w_avg_update`.

        Args:
            z: (N, z_dim), any float dtype; None when z_dim is 0.
            c: (N, c_dim), usually one-hot; None when c_dim is 0.
            truncation_psi: 1 = off; w ← w_avg + psi·(w − w_avg).
            truncation_cutoff: How many of the num_ws are truncated, from the first on. None = all.
            skip_w_avg_update: Leave the running mean alone.

        Raises:
            ValueError: z or c has another shape, or truncation is asked of a network without w_avg.
        """
        inputs = []
        if self.z_dim > 0:
            inputs.append(normalize_2nd_moment(checked_batch("z", z, self.z_dim)))
        if self.c_dim > 0:
            inputs.append(normalize_2nd_moment(self.embed(checked_batch("c", c, self.c_dim))))
        x = torch.cat(inputs, dim=1) if len(inputs) > 1 else inputs[0]
        for index in range(self.num_layers):
            x = getattr(self, f"fc{index}")(x)
        if self.training and self.w_avg_beta is not None and self.num_ws is not None and not skip_w_avg_update:
            self.w_avg.lerp_(x.detach().mean(dim=0), 1 - self.w_avg_beta)
        if self.num_ws is None:
            return x
        ws = x.unsqueeze(1).expand(-1, self.num_ws, -1)  # [NLw]
        if truncation_psi != 1:
            if self.w_avg_beta is None:
                raise ValueError(f"truncation_psi is {truncation_psi}, but this network tracks no mean of w")
            count = self.num_ws if truncation_cutoff is None else truncation_cutoff
            ws = torch.cat([self.w_avg.lerp(ws[:, :count], truncation_psi), ws[:, count:]], dim=1)
        return ws


class SynthesisBlock(bases.MixedPrecision):
    """All layers of one resolution: activations (N, I, r/2, r/2) and an image → (N, O, r, r) and an image."""

    resample_filter: torch.Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        img_channels: int,
        is_last: bool,
        architecture: str = "skip",
        resample_filter: Sequence = DEFAULT_FILTER,
        conv_clamp: float | None = None,
        use_fp16: bool = False,
        fp16_channels_last: bool = False,
        **layer_kwargs,
    ):
        super().__init__()
        self.in_channels, self.architecture, self.use_fp16 = in_channels, architecture, use_fp16
        self.memory_format = torch.channels_last if use_fp16 and fp16_channels_last else torch.contiguous_format
        self.register_buffer("resample_filter", setup_filter(resample_filter))
        self.num_conv = 1 if in_channels == 0 else 2
        self.num_torgb = int(is_last or architecture == "skip")
        layer_kwargs = {"conv_clamp": conv_clamp, **layer_kwargs}
        if in_channels == 0:
            self.const = nn.Parameter(torch.randn(out_channels, resolution, resolution))
        else:
            self.conv0 = SynthesisLayer(
                in_channels, out_channels, w_dim, resolution, up=2, resample_filter=resample_filter, **layer_kwargs
            )
        self.conv1 = SynthesisLayer(out_channels, out_channels, w_dim, resolution, **layer_kwargs)
        if self.num_torgb:
            self.torgb = ToRGBLayer(out_channels, img_channels, w_dim, conv_clamp=conv_clamp)
        if in_channels != 0 and architecture == "resnet":
            self.skip = Conv2dLayer(in_channels, out_channels, 1, bias=False, up=2, resample_filter=resample_filter)

    def layers(self) -> list[SynthesisLayer | ToRGBLayer]:
        """In the order in which they run."""
        convs: list[Any] = [self.conv1] if self.in_channels == 0 else [self.conv0, self.conv1]
        return [*convs, self.torgb] if self.num_torgb else convs

    def dtype(self, force_fp32: bool) -> torch.dtype:
        """Of the activations."""
        return torch.float16 if self.use_fp16 and not force_fp32 else self.compute_dtype

    def takes_scaled(self, dtype: torch.dtype, force_fp32: bool) -> bool:
        """Whether activations of this dtype may come multiplied with the styles of the first layer."""
        return self.architecture != "resnet" and dtype == self.dtype(force_fp32) != torch.float16

    def forward(
        self, x, img, ws, force_fp32=False, fused_modconv=False, noise_mode="random", scaled=False, then=None
    ):  # fmt: skip
        """`ws` has a w, or a `Modulation`, for each layer. x is `scaled` if it has been multiplied with the first one's
        styles; what is returned of the activations is multiplied with `then`, (N, O), those of the block that follows.
        """
        w_iter = iter(ws)
        layer = {"noise_mode": noise_mode, "fused_modconv": fused_modconv}
        dtype = self.dtype(force_fp32)
        onwards: dict[str, Any] = {"then": then, "both": then is not None and self.num_torgb > 0}
        if self.in_channels == 0:
            x = self.const.to(dtype).unsqueeze(0)
            x = x.to(memory_format=self._format(x)).expand(ws[0].styles.shape[0], -1, -1, -1)
            x = self.conv1(x, next(w_iter), **onwards, **layer)
        else:
            x = x.to(dtype=dtype, memory_format=self._format(x))
            if self.architecture == "resnet":
                y = self.skip(x, gain=math.sqrt(0.5))
                x = self.conv0(x, next(w_iter), **layer)
                x = y + self.conv1(x, next(w_iter), gain=math.sqrt(0.5), **layer)
            else:
                first, second = next(w_iter), next(w_iter)
                beforehand = x.dtype != torch.float16 and not fused_modconv
                x = self.conv0(x, first, then=second.styles if beforehand else None, scaled=scaled, **layer)
                x = self.conv1(x, second, scaled=beforehand, **onwards, **layer)
        x, x_scaled = x if onwards["both"] else (x, x)
        if img is not None:
            img = upsample2d(img, self.resample_filter)
        if self.num_torgb:
            img = self.torgb(x, next(w_iter), img)
        return x_scaled, img

    def _format(self, x):
        # A channels_last network (`.to(memory_format=…)` on its convolution weights) keeps its activations so, too.
        if not self.conv1.weight.is_contiguous():
            return torch.channels_last
        return self.memory_format if x.dtype == torch.float16 else torch.contiguous_format


class SynthesisNetwork(nn.Module):
    """ws (N, num_ws, w_dim) → images (N, img_channels, R, R), float32.

    Args:
        w_dim: Size of an intermediate latent.
        img_resolution: R, a power of two ≥ 4.
        img_channels: Colour channels.
        channel_base: Channels at resolution r are channel_base / r …
        channel_max: … at most this many.
        num_fp16_res: How many of the highest resolutions compute in float16 (not below 8×8).
        channels: Channels at 4×4, 8×8, …, where they follow no such rule. None = by channel_base and channel_max.
        block_kwargs: Arguments of `SynthesisBlock` and `SynthesisLayer`.

    Raises:
        ValueError: The resolution is not a power of two ≥ 4, the architecture is unknown, or there are other numbers of
            channels than resolutions.
    """

    def __init__(
        self,
        w_dim: int,
        img_resolution: int,
        img_channels: int,
        channel_base: int = 32768,
        channel_max: int = 512,
        num_fp16_res: int = 0,
        channels: Sequence[int] | None = None,
        **block_kwargs,
    ):
        super().__init__()
        _check_geometry(img_resolution, block_kwargs.get("architecture", "skip"))
        self.w_dim, self.img_resolution, self.img_channels = w_dim, img_resolution, img_channels
        self.block_resolutions = _resolutions(img_resolution)
        if channels is None:
            channels = [min(channel_base // res, channel_max) for res in self.block_resolutions]
        if len(channels) != len(self.block_resolutions):
            raise ValueError(f"channels has {len(channels)} numbers; expected {len(self.block_resolutions)}")
        fp16_from = _fp16_resolution(img_resolution, num_fp16_res)
        self.num_ws = 0
        in_channels = 0
        for res, out_channels in zip(self.block_resolutions, channels, strict=True):
            block = SynthesisBlock(
                in_channels,
                out_channels,
                w_dim,
                res,
                img_channels,
                is_last=res == img_resolution,
                use_fp16=res >= fp16_from,
                **block_kwargs,
            )
            setattr(self, f"b{res}", block)
            self.num_ws += block.num_conv + (block.num_torgb if res == img_resolution else 0)
            in_channels = out_channels

    def forward(
        self,
        ws: torch.Tensor,
        noise_mode: str = "random",
        force_fp32: bool | None = None,
        fused_modconv: bool = False,
    ) -> torch.Tensor:
        """Images from ws.

        Args:
            ws: (N, num_ws, w_dim).
            noise_mode: 'random' (fresh per sample and layer), 'const' (the stored noise) or 'none'.
            force_fp32: Run float16 blocks in float32. None = on a CPU only, where half precision is slow.
            fused_modconv: See `modulated_conv2d`.

        Raises:
            ValueError: ws has another shape, or the noise mode is unknown.
        """
        if ws.ndim != 3 or ws.shape[1:] != (self.num_ws, self.w_dim):
            raise ValueError(f"ws has shape {tuple(ws.shape)}; expected (N, {self.num_ws}, {self.w_dim})")
        if noise_mode not in NOISE_MODES:
            raise ValueError(f"noise_mode is {noise_mode!r}; expected one of {', '.join(NOISE_MODES)}")
        force_fp32 = ws.device.type == "cpu" if force_fp32 is None else force_fp32
        ws = ws.to(torch.float32)
        blocks = [getattr(self, f"b{res}") for res in self.block_resolutions]
        each_w, first = ws.unbind(dim=1), 0
        layers: list[Any] = []
        its_ws: list[torch.Tensor] = []
        dtypes: list[torch.dtype] = []
        for block in blocks:
            layers += (found := block.layers())
            # The toRGB layer of a block shares its w with the first layer of the next one.
            its_ws += each_w[first : first + len(found)]
            dtypes += [torch.float32 if fused_modconv else block.dtype(force_fp32)] * len(found)
            first += block.num_conv
        waiting = iter(modulations(layers, its_ws, dtypes))
        each = [[next(waiting) for _ in block.layers()] for block in blocks]
        x = img = then = None
        for index, block in enumerate(blocks):
            scaled, then = then is not None, None
            if index + 1 < len(blocks) and not fused_modconv:
                follower = blocks[index + 1]
                then = each[index + 1][0].styles if follower.takes_scaled(block.dtype(force_fp32), force_fp32) else None
            x, img = block(x, img, each[index], force_fp32, fused_modconv, noise_mode, scaled, then)
        assert img is not None  # the last block always makes one
        return img


class Generator(bases.Generator):
    """StyleGAN2 generator: z and labels → images (N, img_channels, R, R), float32, about [−1, 1].

    Args:
        z_dim: Latent size.
        c_dim: Label size; 0 = unconditional.
        w_dim: Size of an intermediate latent.
        img_resolution: R, a power of two ≥ 4.
        img_channels: Colour channels.
        mapping_kwargs: Arguments of `MappingNetwork`.
        synthesis_kwargs: Arguments of `SynthesisNetwork`.
    """

    noise_modes = NOISE_MODES
    takes_truncation = True
    trainable_parts = ("all", "mapping", "synthesis")
    training_rate = bases.TrainingRate(2.5e-3, 64)  # StyleGAN2-ADA's: weights are of unit variance at every width

    @records_init_kwargs(defaults=True)
    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        img_resolution: int,
        img_channels: int,
        mapping_kwargs: Mapping[str, Any] = {},
        synthesis_kwargs: Mapping[str, Any] = {},
    ):
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.synthesis = SynthesisNetwork(w_dim, img_resolution, img_channels, **synthesis_kwargs)
        self.num_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(z_dim, c_dim, w_dim, self.num_ws, **mapping_kwargs)

    def forward(
        self,
        z: torch.Tensor,
        c: torch.Tensor | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        **synthesis_kwargs,
    ) -> torch.Tensor:
        """Images from latents; arguments as in `MappingNetwork.forward` and `SynthesisNetwork.forward`."""
        return self.synthesis(self.mapping(z, c, truncation_psi, truncation_cutoff), **synthesis_kwargs)


# Discriminator.


class DiscriminatorBlock(nn.Module):
    """Layers of one resolution: activations (N, tmp, r, r) and/or an image → (N, out, r/2, r/2)."""

    def __init__(
        self,
        in_channels: int,
        tmp_channels: int,
        out_channels: int,
        resolution: int,
        img_channels: int,
        first_layer_idx: int,
        architecture: str,
        activation: str = "lrelu",
        resample_filter: Sequence = DEFAULT_FILTER,
        conv_clamp: float | None = None,
        use_fp16: bool = False,
        fp16_channels_last: bool = False,
        freeze_layers: int = 0,
    ):
        super().__init__()
        self.architecture, self.use_fp16 = architecture, use_fp16
        self.memory_format = torch.channels_last if use_fp16 and fp16_channels_last else torch.contiguous_format
        self.register_buffer("resample_filter", setup_filter(resample_filter))
        self.num_layers = 0

        def conv(cin, cout, kernel_size, clamp=conv_clamp, **kwargs):
            trainable = first_layer_idx + self.num_layers >= freeze_layers
            self.num_layers += 1
            return Conv2dLayer(cin, cout, kernel_size, conv_clamp=clamp, trainable=trainable, **kwargs)

        down = {"down": 2, "resample_filter": resample_filter}
        self.fromrgb = self.skip = None
        if in_channels == 0 or architecture == "skip":
            self.fromrgb = conv(img_channels, tmp_channels, 1, activation=activation)
        self.conv0 = conv(tmp_channels, tmp_channels, 3, activation=activation)
        self.conv1 = conv(tmp_channels, out_channels, 3, activation=activation, **down)
        if architecture == "resnet":
            self.skip = conv(tmp_channels, out_channels, 1, clamp=None, bias=False, **down)

    def forward(self, x, img, force_fp32=False):
        dtype = torch.float16 if self.use_fp16 and not force_fp32 else torch.float32
        if x is not None:
            x = x.to(dtype=dtype, memory_format=self.memory_format)
        if self.fromrgb is not None:
            img = img.to(dtype=dtype, memory_format=self.memory_format)
            y = self.fromrgb(img)
            x = y if x is None else x + y
            img = downsample2d(img, self.resample_filter) if self.architecture == "skip" else None
        if self.architecture == "resnet":
            y = self.skip(x, gain=math.sqrt(0.5))
            return y + self.conv1(self.conv0(x), gain=math.sqrt(0.5)), img
        return self.conv1(self.conv0(x)), img


class MinibatchStdLayer(nn.Module):
    """Append the mean standard deviation within groups of samples as extra channels: (N, C, H, W) → (N, C+F, H, W).

    Groups are strided: sample i belongs to group i mod (N / group_size).
    """

    def __init__(self, group_size: int | None, num_channels: int = 1):
        super().__init__()
        self.group_size, self.num_channels = group_size, num_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        group = n if self.group_size is None else min(self.group_size, n)
        if n % group:
            raise ValueError(f"the batch has {n} images; expected a multiple of the minibatch-std group size {group}")
        y = x.reshape(group, n // group, self.num_channels, c // self.num_channels, h, w)
        y = (y.var(dim=0, unbiased=False) + 1e-8).sqrt().mean(dim=[2, 3, 4])  # [N/g, F]
        y = y.repeat(group, 1)[:, :, None, None].expand(-1, -1, h, w)
        return torch.cat([x, y], dim=1)


class DiscriminatorEpilogue(nn.Module):
    """The 4×4 end of the discriminator, in float32: (N, C, 4, 4) and a label embedding → logits (N, 1)."""

    def __init__(
        self,
        in_channels: int,
        cmap_dim: int,
        resolution: int,
        img_channels: int,
        architecture: str,
        mbstd_group_size: int | None = 4,
        mbstd_num_channels: int = 1,
        activation: str = "lrelu",
        conv_clamp: float | None = None,
    ):
        super().__init__()
        self.cmap_dim = cmap_dim
        self.fromrgb = (
            Conv2dLayer(img_channels, in_channels, 1, activation=activation) if architecture == "skip" else None
        )
        self.mbstd = MinibatchStdLayer(mbstd_group_size, mbstd_num_channels) if mbstd_num_channels > 0 else None
        self.conv = Conv2dLayer(
            in_channels + mbstd_num_channels, in_channels, 3, activation=activation, conv_clamp=conv_clamp
        )
        self.fc = FullyConnectedLayer(in_channels * resolution**2, in_channels, activation=activation)
        self.out = FullyConnectedLayer(in_channels, 1 if cmap_dim == 0 else cmap_dim)

    def forward(self, x, img, cmap):
        x = x.to(torch.float32)
        if self.fromrgb is not None:
            x = x + self.fromrgb(img.to(torch.float32))
        if self.mbstd is not None:
            x = self.mbstd(x)
        x = self.out(self.fc(self.conv(x).flatten(1)))
        if self.cmap_dim > 0:
            x = (x * cmap).sum(dim=1, keepdim=True) / math.sqrt(self.cmap_dim)
        return x


class Discriminator(bases.Network):
    """StyleGAN2 discriminator: images (N, img_channels, R, R) and labels → logits (N, 1).

    Args:
        c_dim: Label size; 0 = unconditional.
        img_resolution: R, a power of two ≥ 4.
        img_channels: Colour channels.
        architecture: 'orig', 'skip' or 'resnet'.
        channel_base: Channels at resolution r are channel_base / r …
        channel_max: … at most this many.
        num_fp16_res: How many of the highest resolutions compute in float16 (not below 8×8).
        conv_clamp: Limit of activations. None = off.
        cmap_dim: Size of the label embedding. None = channels at 4×4.
        block_kwargs: Arguments of `DiscriminatorBlock`.
        mapping_kwargs: Arguments of `MappingNetwork`.
        epilogue_kwargs: Arguments of `DiscriminatorEpilogue`.

    Raises:
        ValueError: The resolution is not a power of two ≥ 4, or the architecture is unknown.
    """

    @records_init_kwargs(defaults=True)
    def __init__(
        self,
        c_dim: int,
        img_resolution: int,
        img_channels: int,
        architecture: str = "resnet",
        channel_base: int = 32768,
        channel_max: int = 512,
        num_fp16_res: int = 0,
        conv_clamp: float | None = None,
        cmap_dim: int | None = None,
        block_kwargs: Mapping[str, Any] = {},
        mapping_kwargs: Mapping[str, Any] = {},
        epilogue_kwargs: Mapping[str, Any] = {},
    ):
        super().__init__()
        _check_geometry(img_resolution, architecture)
        self.c_dim, self.img_resolution, self.img_channels = c_dim, img_resolution, img_channels
        self.block_resolutions = _resolutions(img_resolution)[:0:-1]  # R … 8
        fp16_from = _fp16_resolution(img_resolution, num_fp16_res)

        def channels(res):
            return min(channel_base // res, channel_max)

        cmap_dim = 0 if c_dim == 0 else (channels(4) if cmap_dim is None else cmap_dim)
        num_layers = 0
        for res in self.block_resolutions:
            block = DiscriminatorBlock(
                channels(res) if res < img_resolution else 0,
                channels(res),
                channels(res // 2),
                res,
                img_channels,
                first_layer_idx=num_layers,
                architecture=architecture,
                conv_clamp=conv_clamp,
                use_fp16=res >= fp16_from,
                **block_kwargs,
            )
            setattr(self, f"b{res}", block)
            num_layers += block.num_layers
        if c_dim > 0:
            self.mapping = MappingNetwork(0, c_dim, cmap_dim, None, w_avg_beta=None, **mapping_kwargs)
        self.b4 = DiscriminatorEpilogue(
            channels(4), cmap_dim, 4, img_channels, architecture, conv_clamp=conv_clamp, **epilogue_kwargs
        )

    def forward(self, img: torch.Tensor, c: torch.Tensor | None = None, force_fp32: bool | None = None) -> torch.Tensor:
        """Logits (N, 1), larger for more real; `force_fp32` as in `SynthesisNetwork.forward`.

        Raises:
            ValueError: img or c has another shape.
        """
        expected = (self.img_channels, self.img_resolution, self.img_resolution)
        if img.ndim != 4 or img.shape[1:] != expected:
            raise ValueError(f"img has shape {tuple(img.shape)}; expected (N, {', '.join(map(str, expected))})")
        force_fp32 = img.device.type == "cpu" if force_fp32 is None else force_fp32
        x = None
        for res in self.block_resolutions:
            x, img = getattr(self, f"b{res}")(x, img, force_fp32)
        cmap = self.mapping(None, c) if self.c_dim > 0 else None
        return self.b4(x, img, cmap)


# Shared arithmetic.


def _resolutions(img_resolution: int) -> list[int]:
    return [2**i for i in range(2, img_resolution.bit_length())]


def _fp16_resolution(img_resolution: int, num_fp16_res: int) -> int:
    """The lowest resolution that computes in float16."""
    return max(2 ** (img_resolution.bit_length() - num_fp16_res), 8)


def _check_geometry(img_resolution: int, architecture: str) -> None:
    if img_resolution < 4 or img_resolution & (img_resolution - 1):
        raise ValueError(f"img_resolution is {img_resolution}; expected a power of two ≥ 4")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture is {architecture!r}; expected one of {', '.join(ARCHITECTURES)}")


def checked_batch(name: str, tensor: torch.Tensor | None, width: int) -> torch.Tensor:
    """The tensor (N, width) as float32. Raises ValueError if it has another shape."""
    if tensor is None or tensor.ndim != 2 or tensor.shape[1] != width:
        found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
        raise ValueError(f"{name} is {found}; expected (N, {width})")
    return tensor.to(torch.float32)
