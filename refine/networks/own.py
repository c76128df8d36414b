"""A generator of the user's own code, as one of ours."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import nn

from refine.networks.bases import Generator
from refine.networks.stylegan2 import NOISE_MODES


class OwnGenerator(Generator):
    """Puts the toolkit's words around a module that is called as network(z, c), and leaves the module as it is.

    Its state dict is that of the module alone: files hold the tensors under the names that their maker gave them.

    Args:
        network: The module, with the whole numbers z_dim, c_dim, img_resolution and img_channels. Where it has children
            called `mapping` and `synthesis`, they can be trained alone.
        reference: The `module:function` that makes it.
        options: Which of `noise_mode` and `truncation_psi` a call of it takes.

    Attributes:
        network: The module.
        init_kwargs: What a file notes of it, reference and sizes. Only the maker can build it again.
    """

    def __init__(self, network: nn.Module, reference: str, options: Container[str] = ()):
        super().__init__()
        self.network = network
        sizes = {name: getattr(network, name) for name in ("img_resolution", "img_channels", "c_dim", "z_dim")}
        self.img_resolution, self.img_channels, self.c_dim, self.z_dim = sizes.values()
        self.init_kwargs = {"reference": reference, **sizes}
        self.noise_modes = NOISE_MODES if "noise_mode" in options else ()
        self.takes_truncation = "truncation_psi" in options
        children = dict(network.named_children())
        self.trainable_parts = ("all", *(name for name in ("mapping", "synthesis") if name in children))

    def forward(self, z: torch.Tensor, c: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        """Images for latents, see `Generator.forward`; options are those that `accepted` lets through."""
        return self.network(z, c, **options)

    def part(self, name: str) -> nn.Module:
        return self.network if name == "all" else self.network.get_submodule(name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.network.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        return self.network.load_state_dict(state_dict, strict, assign)
