"""A diffusion model of the user's own code, as one of ours."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from refine.networks.bases import check_choice
from refine.networks.ddpm import PREDICTIONS, log_sigma_table, time_between, vp_scalings
from refine.networks.denoiser import Preconditioner, Scalings, class_indices

DENOISED = "denoised"  # beside `PREDICTIONS`: the module is a denoiser D(x, sigma) itself


class OwnTeacher(Preconditioner):
    """Puts the toolkit's words around a module that is called as network(x, sigma, class_labels), or (x, t, …).

    Its attribute `predicts` says what it gives:

        'denoised'                 D for images x + sigma n; called with sigma. The default.
        'epsilon', 'v_prediction', 'sample'
                                   noise, v or the clean image for √ᾱ_t x + √(1 − ᾱ_t) n; called with the time t. The
                                   ᾱ_t of t = 0 … T − 1 are in its attribute `alphas_cumprod`, and between two of them
                                   the time is interpolated linearly in ln sigma.

    Args:
        network: The module, with the attributes img_resolution, img_channels, and optionally label_dim (0),
            has_null_label (False), predicts, alphas_cumprod, sigma_min, sigma_max.
        reference: The `module:function` that makes it.

    Attributes:
        network: The module.

    Raises:
        ValueError: An attribute is impossible.
    """

    inner_name = "network"
    log_sigmas: torch.Tensor

    def __init__(self, network: nn.Module, reference: str):
        sizes = {name: getattr(network, name) for name in ("img_resolution", "img_channels")}
        super().__init__(network, **sizes, label_dim=getattr(network, "label_dim", 0))
        self.init_kwargs = {"reference": reference, **sizes, "label_dim": self.label_dim}
        self.predicts = getattr(network, "predicts", DENOISED)
        check_choice("predicts", self.predicts, (DENOISED, *PREDICTIONS))
        if self.predicts != DENOISED:
            signal = np.asarray(torch.as_tensor(network.alphas_cumprod).detach().cpu(), dtype=np.float64)
            with np.errstate(all="ignore"):  # what comes of impossible numbers is looked at
                sigmas = np.sqrt((1 - signal) / signal)
            self.register_buffer("log_sigmas", log_sigma_table(sigmas), persistent=False)
            self.sigma_min, self.sigma_max = float(sigmas[0]), float(sigmas[-1])
        self.sigma_min = float(getattr(network, "sigma_min", self.sigma_min))
        self.sigma_max = float(getattr(network, "sigma_max", self.sigma_max))

    @property
    def has_null_label(self) -> bool:
        return self.label_dim > 0 and bool(getattr(self.network, "has_null_label", False))

    def scalings(self, sigma: torch.Tensor) -> Scalings:
        if self.predicts == DENOISED:
            return 0, 1, 1, sigma
        return vp_scalings(self.predicts, sigma, time_between(self.log_sigmas, sigma))

    def encode(self, x: torch.Tensor, sigma: float) -> list[torch.Tensor]:
        """See `Denoiser.encode`; by the module's own `encode(x, sigma)`, where it has one."""
        own = getattr(self.network, "encode", None)
        return super().encode(x, sigma) if own is None else list(own(x, sigma))

    def _ends_of_encoder(self) -> list[nn.Module]:
        return []

    def _evaluate(
        self, x: torch.Tensor, c_noise: torch.Tensor, class_labels: torch.Tensor | None,
        augment_labels: torch.Tensor | None, dtype: torch.dtype,
    ) -> torch.Tensor:  # fmt: skip
        """By autocast, which leaves the user's code as it is."""
        if class_labels is not None:
            if not self.has_null_label:
                class_indices(class_labels)  # raises where a row is empty
            class_labels = class_labels.expand(len(x), -1)
        network: Any = self.network
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            return network(x, c_noise.expand(len(x)), class_labels)
