"""StyleGAN-XL generator (Sauer et al., arXiv 2202.00273), also as StyleSAN-XL trains it, with their parameter names.

The layers are StyleGAN3's. A network grows: each stage of super-resolution takes away the last three layers of the one
before and adds its own, so that a formula for the layers would need the whole history; here they are listed. Classes
are embedded by a table of vectors, and have a mean of w each.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from refine.networks.bases import records_init_kwargs
from refine.networks.stylegan2 import checked_batch
from refine.networks.stylegan2_layers import FullyConnectedLayer, normalize_2nd_moment
from refine.networks.stylegan3 import StyleGenerator, SynthesisNetwork, layers_of
from refine.networks.stylegan3_layers import Signal


class MappingNetwork(nn.Module):
    """z (N, z_dim) and one-hot labels c (N, c_dim) → w (N, num_ws, w_dim).

    Args:
        z_dim: Latent size.
        c_dim: Number of classes; 0 = unconditional.
        w_dim: Size of an intermediate latent.
        num_ws: How many copies of w to return.
        embedding: Rows and width of the table of class vectors; a network without classes holds it unused.
        num_layers: Fully connected layers.
        lr_multiplier: Learning rate of the layers relative to the rest.
        w_avg_beta: Decay of the running means of w, used for truncation.
    """

    w_avg: torch.Tensor

    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        num_ws: int,
        embedding: Sequence[int] = (1000, 320),
        num_layers: int = 2,
        lr_multiplier: float = 0.01,
        w_avg_beta: float = 0.998,
    ):
        super().__init__()
        rows, width = embedding
        if c_dim > rows:
            raise ValueError(f"{c_dim} classes, but vectors for {rows}")
        self.z_dim, self.c_dim, self.w_dim, self.num_ws = z_dim, c_dim, w_dim, num_ws
        self.num_layers, self.w_avg_beta = num_layers, float(w_avg_beta)
        self.embed = nn.Embedding(rows, width, _weight=torch.randn(rows, width))
        if c_dim > 0:
            self.embed_proj = FullyConnectedLayer(width, z_dim, activation="lrelu")
        widths = [z_dim * (2 if c_dim > 0 else 1)] + [w_dim] * num_layers
        for index in range(num_layers):
            layer = FullyConnectedLayer(widths[index], widths[index + 1], True, "lrelu", lr_multiplier)
            setattr(self, f"fc{index}", layer)
        self.register_buffer("w_avg", torch.zeros([c_dim, w_dim] if c_dim > 0 else [w_dim]))

    def forward(
        self,
        z: torch.Tensor,
        c: torch.Tensor | None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
        skip_w_avg_update: bool = False,
    ) -> torch.Tensor:
        """Map latents; in train() mode the running means of w are updated unless `skip_w_avg_update`.

        Args:
            z: (N, z_dim), any float dtype.
            c: (N, c_dim), of which the largest entry says the class; None when c_dim is 0.
            truncation_psi: 1 = off; w ← w_avg + psi·(w − w_avg), with the mean of the sample's class.
            truncation_cutoff: How many of the num_ws are truncated, from the first on. None = all.
            skip_w_avg_update: Leave the running means alone.

        Raises:
            ValueError: z or c has another shape.
        """
        x = normalize_2nd_moment(checked_batch("z", z, self.z_dim))
        labels = None
        if self.c_dim > 0:
            labels = checked_batch("c", c, self.c_dim).argmax(dim=1)
            x = torch.cat([x, normalize_2nd_moment(self.embed_proj(self.embed(labels)))], dim=1)
        for index in range(self.num_layers):
            x = getattr(self, f"fc{index}")(x)
        if self.training and not skip_w_avg_update:
            self._follow(x.detach(), labels)
        ws = x.unsqueeze(1).repeat(1, self.num_ws, 1)  # [NLw]
        if truncation_psi != 1:
            count = self.num_ws if truncation_cutoff is None else truncation_cutoff
            w_avg = self.w_avg if labels is None else self.w_avg[labels].unsqueeze(1)
            ws = torch.cat([w_avg.lerp(ws[:, :count], truncation_psi), ws[:, count:]], dim=1)
        return ws

    def _follow(self, w: torch.Tensor, labels: torch.Tensor | None) -> None:
        """Update the running means: without classes by the mean of the batch, otherwise by each sample in turn."""
        beta = self.w_avg_beta
        if labels is None:
            self.w_avg.copy_(w.mean(dim=0).lerp(self.w_avg, beta))
            return
        same = labels[:, None] == labels[None, :]
        later = same.triu(1).sum(dim=1)  # updates of the same mean after that of a sample
        share = (1 - beta) * beta ** later.to(w.dtype)
        kept = beta ** torch.zeros_like(self.w_avg[:, 0]).index_add(0, labels, torch.ones_like(share))
        self.w_avg.copy_((self.w_avg * kept[:, None]).index_add(0, labels, w * share[:, None]))


class Generator(StyleGenerator):
    """StyleGAN-XL generator: z and labels → images (N, img_channels, R, R), float32, about [−1, 1].

    Args:
        z_dim: Latent size.
        c_dim: Number of classes; 0 = unconditional.
        w_dim: Size of an intermediate latent.
        img_resolution: R.
        img_channels: Colour channels.
        layers: Each layer: its name, the fields of its output `Signal`, and further arguments of `SynthesisLayer`.
        input_channels: Channels of the Fourier features; the rest of their signal is that of the first layer.
        output_scale: Factor on the image.
        mapping_kwargs: Arguments of `MappingNetwork`.

    Raises:
        ValueError: The layers do not fit together.
    """

    @records_init_kwargs(defaults=True)
    def __init__(
        self,
        z_dim: int,
        c_dim: int,
        w_dim: int,
        img_resolution: int,
        img_channels: int,
        layers: Sequence[Mapping[str, Any]],
        input_channels: int,
        output_scale: float = 0.25,
        mapping_kwargs: Mapping[str, Any] = {},
    ):
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim = z_dim, c_dim, w_dim
        self.img_resolution, self.img_channels = img_resolution, img_channels
        listed = layers_of(layers)
        source: Signal = listed[0][1]._replace(channels=input_channels)
        self.synthesis = SynthesisNetwork(w_dim, source, listed, output_scale)
        self.num_ws = self.synthesis.num_ws
        self.mapping = MappingNetwork(z_dim, c_dim, w_dim, self.num_ws, **mapping_kwargs)
        self._check_image()
