"""StyleGAN3 generator (Karras et al., arXiv 2106.12423), configurations t and r, with NVIDIA's parameter names.

Shapes in comments: N batch, L number of w vectors (`num_ws`).
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from refine.networks import bases
from refine.networks.bases import records_init_kwargs
from refine.networks.stylegan2 import MappingNetwork
from refine.networks.stylegan3_layers import Signal, SynthesisInput, SynthesisLayer

_MAX_SIZE = 8192  # of activations along one axis
_MAX_LAYERS = 1000
_NAME = re.compile(r"L[0-9]{1,4}_[0-9]{1,6}_[0-9]{1,6}")


class SynthesisNetwork(nn.Module):
    """ws (N, num_ws, w_dim) → images (N, img_channels, R, R), float32.

    The first w places the Fourier features, each other one serves one layer.

    Args:
        w_dim: Size of an intermediate latent.
        source: The signal of the Fourier features.
        layers: Name, output signal and further arguments of each `SynthesisLayer`; the last one makes the image.
        output_scale: Factor on the image.

    Raises:
        ValueError: The layers do not fit together, or are none.
    """

    def __init__(
        self,
        w_dim: int,
        source: Signal,
        layers: Iterable[tuple[str, Signal, Mapping[str, Any]]],
        output_scale: float = 0.25,
    ):
        super().__init__()
        if not isinstance(output_scale, int | float):
            raise ValueError(f"output_scale is {output_scale!r}; expected a number")
        self.w_dim, self.output_scale = w_dim, output_scale
        self.input = SynthesisInput(w_dim, source)
        self.layer_names: list[str] = []
        for name, target, options in layers:
            if not _NAME.fullmatch(name) or name in self.layer_names:
                raise ValueError(f"a layer is called {name[:40]!r}; expected another L{{index}}_{{size}}_{{channels}}")
            if type(target.size) is not int or not 1 <= target.size <= _MAX_SIZE:
                raise ValueError(f"{name} makes {target.size!r} samples along an axis; expected 1 to {_MAX_SIZE}")
            self.add_module(name, SynthesisLayer(w_dim, source, target, **options))
            self.layer_names.append(name)
            source = target
        if not self.layer_names:
            raise ValueError("there are no layers")
        self.img_resolution, self.img_channels = source.size, source.channels
        self.num_ws = len(self.layer_names) + 1

    def forward(
        self, ws: torch.Tensor, force_fp32: bool | None = None, update_magnitudes: bool = False
    ) -> torch.Tensor:
        """Images from ws.

        Args:
            ws: (N, num_ws, w_dim).
            force_fp32: Run float16 layers in float32. None = on a CPU only, where half precision is slow.
            update_magnitudes: Let each layer's running mean of its input's square (`magnitude_ema`) follow this batch,
                before it is used; otherwise it is a constant.

        Raises:
            ValueError: ws has another shape.
        """
        if ws.ndim != 3 or ws.shape[1:] != (self.num_ws, self.w_dim):
            raise ValueError(f"ws has shape {tuple(ws.shape)}; expected (N, {self.num_ws}, {self.w_dim})")
        force_fp32 = ws.device.type == "cpu" if force_fp32 is None else force_fp32
        first, *others = ws.to(torch.float32).unbind(dim=1)
        x = self.input(first)
        for name, w in zip(self.layer_names, others, strict=True):
            x = getattr(self, name)(x, w, force_fp32, update_magnitudes)
        return (x if self.output_scale == 1 else x * self.output_scale).to(torch.float32)


def schedule(
    img_resolution: int,
    img_channels: int,
    channel_base: int = 32768,
    channel_max: int = 512,
    num_layers: int = 14,
    num_critical: int = 2,
    first_cutoff: float = 2,
    first_stopband: float = 2**2.1,
    last_stopband_rel: float = 2**0.3,
    margin_size: int = 10,
    num_fp16_res: int = 4,
    first_rate: float | None = None,
    **layer_kwargs: Any,
) -> list[tuple[str, Signal, dict[str, Any]]]:
    """The layers of a StyleGAN3: cutoffs and stopbands grow geometrically until the last `num_critical` ones (arXiv
    2106.12423, section 3.2 and figure 4).

    Args:
        img_resolution: R; rates round up to powers of two, so it need not be one.
        img_channels: Colour channels.
        channel_base: Channels are channel_base / 2 / cutoff, rounded …
        channel_max: … at most this many.
        num_layers: Layers, the Fourier features and ToRGB not among them.
        num_critical: How many layers at the end have half the sampling rate as their cutoff.
        first_cutoff: Of the Fourier features, in cycles per width of the image.
        first_stopband: Of the first layer, likewise.
        last_stopband_rel: Of the last layer, relative to its cutoff.
        margin_size: Samples beyond the image on each side, until the last two layers.
        num_fp16_res: How many of the highest resolutions compute in float16 on a GPU.
        first_rate: Sampling rate of the Fourier features and the first layer. None = by the rule of the others.
        layer_kwargs: Further arguments of `SynthesisLayer`.

    Returns:
        Arguments of `SynthesisNetwork`, ToRGB included.

    Raises:
        ValueError: The numbers make no network.
    """
    numbers = (channel_base, channel_max, first_cutoff, first_stopband, last_stopband_rel)
    counted = 0 <= num_critical < num_layers <= _MAX_LAYERS
    if not (img_resolution >= 4 and counted and margin_size >= 0 and min(numbers) > 0):
        raise ValueError("its resolution, layers, channels or cutoffs make no network")
    last_cutoff = img_resolution / 2
    last_stopband = last_cutoff * last_stopband_rel
    layers = []
    for index in range(num_layers + 1):
        share = min(index / (num_layers - num_critical), 1)
        cutoff = first_cutoff * (last_cutoff / first_cutoff) ** share
        stopband = first_stopband * (last_stopband / first_stopband) ** share
        rate = 2 ** math.ceil(math.log2(min(2 * stopband, img_resolution)))
        if index == 0 and first_rate is not None:
            rate = first_rate
        is_torgb = index == num_layers
        size = img_resolution if index >= num_layers - 1 else rate + 2 * margin_size
        channels = img_channels if is_torgb else round(min(channel_base / 2 / cutoff, channel_max))
        options = {
            "is_torgb": is_torgb,
            "is_critically_sampled": index >= num_layers - num_critical,
            "use_fp16": rate * 2**num_fp16_res > img_resolution,
            **layer_kwargs,
        }
        signal = Signal(channels, size, rate, cutoff, max(stopband, rate / 2) - cutoff)
        layers.append((f"L{index}_{size}_{channels}", signal, options))
    return layers


class StyleGenerator(bases.Generator):
    """What the generators of this family share: z and labels → w → images. Subclasses make the two parts.

    The running mean of w follows the forward passes in train() mode, as StyleGAN2's does. The gains of the layers
    (`magnitude_ema`) are constants: they belong to the function that is refined, and only
    `synthesis(…, update_magnitudes=True)` changes them.
    """

    takes_truncation = True
    trainable_parts = ("all", "mapping", "synthesis")
    # StyleGAN3's, with Adam (0, 0.99). A rule for all networks of this family: weights are of unit variance at every
    # width, as StyleGAN2's are.
    training_rate = bases.TrainingRate(2.5e-3, 32)

    mapping: nn.Module
    synthesis: SynthesisNetwork

    def forward(
        self,
        z: torch.Tensor,
        c: torch.Tensor | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        **synthesis_kwargs,
    ) -> torch.Tensor:
        """Images from latents; arguments as in `mapping.forward` and `SynthesisNetwork.forward`."""
        return self.synthesis(self.mapping(z, c, truncation_psi, truncation_cutoff), **synthesis_kwargs)

    def _check_image(self) -> None:
        found = (self.synthesis.img_resolution, self.synthesis.img_channels)
        if found != (self.img_resolution, self.img_channels):
            raise ValueError(f"its layers make images of {found[0]}×{found[0]}×{found[1]}")


class Generator(StyleGenerator):
    """StyleGAN3 generator: z and labels → images (N, img_channels, R, R), float32, about [−1, 1].

    Args:
        z_dim: Latent size.
        c_dim: Label size; 0 = unconditional.
        w_dim: Size of an intermediate latent.
        img_resolution: R.
        img_channels: Colour channels.
        mapping_kwargs: Arguments of `stylegan2.MappingNetwork`; two layers and a decay of 0.998 unless it says others.
        output_scale: Factor on the image.
        synthesis_kwargs: Arguments of `schedule`, and of `SynthesisLayer` for all layers.
    """

    @records_init_kwargs(defaults=True)
    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        img_resolution: int,
        img_channels: int,
        mapping_kwargs: Mapping[str, Any] = {},
        output_scale: float = 0.25,
        **synthesis_kwargs,
    ):
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        self.img_resolution, self.img_channels = img_resolution, img_channels
        layers = schedule(img_resolution, img_channels, **synthesis_kwargs)
        self.synthesis = SynthesisNetwork(w_dim, layers[0][1], layers, output_scale)
        self.num_ws = self.synthesis.num_ws
        mapping_kwargs = {"num_layers": 2, "w_avg_beta": 0.998, **mapping_kwargs}
        self.mapping = MappingNetwork(z_dim, c_dim, w_dim, self.num_ws, **mapping_kwargs)
        self._check_image()


def layers_of(tables: Sequence[Mapping[str, Any]]) -> list[tuple[str, Signal, dict[str, Any]]]:
    """Arguments of `SynthesisNetwork` from tables of plain values: name, the fields of `Signal`, further options."""
    layers = []
    for table in tables:
        options = dict(table)
        name = options.pop("name")
        signal = Signal(*(options.pop(field) for field in Signal._fields))
        layers.append((name, signal, options))
    return layers
