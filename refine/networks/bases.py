"""What networks state of themselves: `Generator` and `Denoiser`, the two kinds that the method joins, and their roots.

A class says here what it can do, and the rest of the toolkit asks it instead of looking at its insides.
"""

from __future__ import annotations

import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec

import torch
from torch import nn

P = ParamSpec("P")


class TrainingRate(NamedTuple):
    """A learning rate of Adam, and the images per step that it goes with."""

    lr: float
    batch: int

    def at(self, batch: int) -> float:
        """The rate for another batch, by the square root: the noise of Adam's steps stays the same."""
        return self.lr * math.sqrt(batch / self.batch)


class Network(nn.Module):
    """A network that can be built again from what a file says.

    Attributes:
        init_kwargs: The constructor's arguments as JSON values, see `records_init_kwargs`.
        notes: What a person should know about how its file was read.
        keeps_halves: Whether float16 weights of its file, but for single numbers, stay so until it is trained, since
            every call widens them.
    """

    init_kwargs: dict[str, Any]
    notes: tuple[str, ...] = ()
    keeps_halves: bool = False

    @property
    def training_rate(self) -> TrainingRate:
        """What networks of this kind and width are trained with from scratch, as published; a guess for others."""
        return TrainingRate(2e-4, 64)


class MixedPrecision(nn.Module):
    """A module whose activations may have another number format than its parameters, which are float32.

    Attributes:
        use_fp16: Whether the file asks for float16, as NVIDIA's do. The module says which of its calls comply.
        compute_dtype: The format in all other calls.
    """

    use_fp16: bool = False
    compute_dtype: torch.dtype = torch.float32


class Generator(Network, ABC):
    """x = G(z, c): latents and labels to images, differentiable.

    Attributes:
        z_dim: Size of a latent, which is drawn from the standard normal distribution.
        c_dim: Number of classes; 0 = unconditional.
        img_resolution, img_channels: Size of the square images.
        noise_modes: The values that a call's `noise_mode` may have; empty = a call takes no `noise_mode`.
        takes_truncation: Whether a call takes `truncation_psi`.
        trainable_parts: The names that `part` knows.
    """

    z_dim: int
    c_dim: int
    img_resolution: int
    img_channels: int
    noise_modes: tuple[str, ...] = ()
    takes_truncation: bool = False
    trainable_parts: tuple[str, ...] = ("all",)

    @abstractmethod
    def forward(self, z: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        """Images for latents.

        Args:
            z: (N, z_dim), float32.
            c: One-hot labels (N, c_dim); None without classes.

        Returns:
            (N, img_channels, img_resolution, img_resolution), float32, about [-1, 1].
        """

    def accepted(self, *, noise_mode: str | None = None, truncation_psi: float | None = None) -> dict[str, Any]:
        """Those of the given arguments that a call takes: `G(z, c, **G.accepted(noise_mode="const"))` always works.

        Leaving one out loses nothing: a generator without noise inputs gives the same image in every mode.
        """
        options: dict[str, Any] = {}
        if truncation_psi is not None and self.takes_truncation:
            options["truncation_psi"] = truncation_psi
        if noise_mode is not None and self.noise_modes:
            options["noise_mode"] = noise_mode
        return options

    def part(self, name: str) -> nn.Module:
        """The part of this name, one of `trainable_parts`."""
        return self if name == "all" else self.get_submodule(name)


class Denoiser(Network, ABC):
    """D(x; sigma, c): the expected clean image behind a noisy one, at every noise level.

    Attributes:
        img_resolution, img_channels: Size of the square images.
        label_dim: Number of classes; 0 = unconditional.
        sigma_min, sigma_max: Range of noise levels for which it is meant; every one, unless a network says otherwise.
        augment_dim: Width of the `augment_labels` that a call takes; 0 = it takes none, or ignores them.
    """

    img_resolution: int
    img_channels: int
    label_dim: int
    sigma_min: float = 0.0
    sigma_max: float = math.inf
    augment_dim: int = 0

    @property
    def has_null_label(self) -> bool:
        """Whether a network with classes was trained to denoise without a label, too, as label dropout does."""
        return False

    def round_sigma(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """The nearest noise level that the network knows: any, unless its levels are discrete."""
        return torch.as_tensor(sigma)

    @abstractmethod
    def forward(
        self, x: torch.Tensor, sigma: torch.Tensor | float, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Denoise.

        Args:
            x: Noisy images, (N, img_channels, img_resolution, img_resolution): clean ones in [-1, 1] plus sigma times
                unit noise.
            sigma: Noise levels > 0: (N,) or anything that reshapes to it, or a single one for all.
            class_labels: One-hot rows (N, label_dim), never class indices; None or zeros mean "no label".
                Ignored by unconditional networks.

        Returns:
            D_x, float32, the shape of x.
        """

    def encode(self, x: torch.Tensor, sigma: float) -> list[torch.Tensor]:
        """What the network sees in images: the spatial means of its activations at the end of each resolution of its
        encoder, from fine to coarse. Without a label, in float32.

        Args:
            x: As for `forward`.
            sigma: A noise level, of which the nearest is taken that the network knows.

        Returns:
            For each resolution float32 (N, C of that resolution).

        Raises:
            ValueError: The network has no such encoder, or knows no missing label.
        """
        raise ValueError(f"a {type(self).__name__} has no encoder whose activations could be features")


def records_init_kwargs(*, defaults: bool) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Decorate a `Network`'s `__init__` so that its arguments end up in `init_kwargs`.

    They stand there by name, those of a `**kwargs` among the others, in the form that JSON gives back: tuples are
    lists. A later change of an argument by the caller does not reach them.

    Args:
        defaults: Whether arguments that were left out are recorded with their defaults, or not at all.
    """

    def decorate(init: Callable[P, None]) -> Callable[P, None]:
        signature = inspect.signature(init)

        @functools.wraps(init)
        def recording(*args: P.args, **kwargs: P.kwargs) -> None:
            bound = signature.bind(*args, **kwargs)
            if defaults:
                bound.apply_defaults()
            network, *_ = bound.arguments.values()
            given: dict[str, Any] = {}
            for name, parameter in list(signature.parameters.items())[1:]:
                if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                    given |= bound.arguments.get(name, {})
                elif name in bound.arguments:
                    given[name] = bound.arguments[name]
            given = _as_json(given)
            init(*args, **kwargs)
            network.init_kwargs = given

        return recording

    return decorate


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return value


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError unless the argument `name` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(choices)}.")
