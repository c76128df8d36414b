"""Images by seed: the same seeds give two networks the same latents and labels, so that they compare in pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from refine.images import to_uint8
from refine.networks.bases import Denoiser, Generator
from refine.networks.sampler import heun_sampler
from refine.networks.sampler_settings import SamplerSettings

_FRESH = 1  # tells the streams of a stochastic sampler from those of latents


class Batch(NamedTuple):
    """Generated images, uint8 [N, C, H, W] unless floats were asked for, and their classes, int64 [N], or None."""

    images: torch.Tensor
    classes: torch.Tensor | None


def latents_of_seeds(
    seeds: Sequence[int], shape: Sequence[int], num_classes: int = 0, classes: int | Sequence[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Latents and classes that belong to seeds, one random stream per seed, independent of batches and devices.

    Seed s gives `RandomState(s).randn(1, z_dim)`, as in NVIDIA's tools, so z agrees with theirs. Where there are
    classes, one is then drawn uniformly from the same stream; asking for a class does not change z.

    Args:
        seeds: Integers in [0, 2³²).
        shape: Shape of one latent, e.g. [z_dim].
        num_classes: Number of classes; 0 = unconditional.
        classes: The class of all images, or one per seed; None = drawn.

    Returns:
        Latents, float32 [N, *shape], and classes, int64 [N], or None if unconditional.

    Raises:
        ValueError: If a class does not exist.
    """
    asked = None if classes is None else np.broadcast_to(np.asarray(classes, dtype=np.int64), [len(seeds)])
    if asked is not None and not (num_classes and asked.min() >= 0 and asked.max() < num_classes):
        found = int(asked[(asked < 0) | (asked >= num_classes)][0])
        has = f"has the classes 0 to {num_classes - 1}" if num_classes else "is unconditional"
        raise ValueError(f"class {found} was asked for, but the network {has}")
    latents = np.empty([len(seeds), *shape], dtype=np.float32)
    drawn = np.zeros([len(seeds)], dtype=np.int64)
    for row, seed in enumerate(seeds):
        stream = np.random.RandomState(seed)
        latents[row] = stream.randn(1, *shape)[0]
        if num_classes:
            drawn[row] = stream.randint(num_classes)
    chosen = drawn if asked is None else asked.copy()
    return torch.from_numpy(latents), torch.from_numpy(chosen) if num_classes else None


def sensible_batch(resolution: int) -> int:
    """Images that are made at once where nobody says how many: 100, and above 256×256 as many as have their pixels."""
    return max(1, min(100, 100 * 256**2 // resolution**2))


@torch.no_grad()
def sample_images(
    G: Generator,
    seeds: Sequence[int],
    *,
    classes: int | Sequence[int] | None = None,
    batch: int = 100,
    device: torch.device | str = "cpu",
    truncation_psi: float = 1.0,
    noise_mode: str = "random",
    floats: bool = False,
) -> Iterator[Batch]:
    """Images of a generator for seeds, in batches.

    Args:
        G: Generator in eval mode on `device`. Truncation and noise mode are passed on where it takes them.
        seeds: Integers in [0, 2³²), one per image.
        classes: The class of all images, or one per seed; None = drawn per seed. See `latents_of_seeds`.
        batch: Images per batch.
        device: Where `G` is.
        truncation_psi: 1 = no truncation, as for metrics in the literature.
        noise_mode: 'random' as in the literature: seeded by the first seed of each batch, and the caller's random
            state is left alone; 'const' makes an image depend on its seed only, not on the batch size.
        floats: Images as the network gives them, float32, about [-1, 1], instead of uint8.

    Yields:
        Batches, images on `device`, classes on the CPU.

    Raises:
        ValueError: If an image holds NaN or infinity, or a class does not exist.
    """
    options = G.accepted(truncation_psi=truncation_psi, noise_mode=noise_mode)
    for part, part_classes in _split(seeds, classes, batch):
        z, drawn = latents_of_seeds(part, [G.z_dim], G.c_dim, part_classes)
        c = None if drawn is None else F.one_hot(drawn, G.c_dim).float().to(device)
        with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
            torch.manual_seed(part[0])
            images = G(z.to(device), c, **options)
        yield Batch(_finished(images, part, floats), drawn)


@torch.no_grad()
def sample_teacher(
    teacher: Denoiser,
    seeds: Sequence[int],
    *,
    classes: int | Sequence[int] | None = None,
    batch: int = 100,
    device: torch.device | str = "cpu",
    settings: SamplerSettings = SamplerSettings(),  # noqa: B008 - frozen
    floats: bool = False,
) -> Iterator[Batch]:
    """Images of a diffusion model for seeds by the Heun sampler (Karras et al. 2022, algorithms 1 and 2).

    Fresh noise, where the settings ask for it, comes from a random stream of each seed's own, too: images depend on
    their seeds, not on batches.

    Args:
        teacher: Denoiser in eval mode on `device`.
        seeds, classes, batch, device: As for `sample_images`; the latent of a seed is an image of unit noise.
        settings: Of the sampler; 18 steps are 35 evaluations of the network.
        floats: As for `sample_images`.

    Yields:
        Batches, images on `device`, classes on the CPU.

    Raises:
        ValueError: If an image holds NaN or infinity, or a class does not exist.
    """
    shape = [teacher.img_channels, teacher.img_resolution, teacher.img_resolution]
    for part, part_classes in _split(seeds, classes, batch):
        noise, drawn = latents_of_seeds(part, shape, teacher.label_dim, part_classes)
        labels = None if drawn is None else F.one_hot(drawn, teacher.label_dim).float().to(device)
        options = dataclasses.asdict(settings)
        fresh = _noise_of_seeds(part) if settings.is_stochastic else torch.randn_like
        images = heun_sampler(
            teacher, noise.to(device), labels, num_steps=options.pop("steps"), **options, randn_like=fresh
        )
        yield Batch(_finished(images, part, floats), drawn)


def _noise_of_seeds(seeds: Sequence[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    """randn_like, of a stream for each image that goes on from call to call; not the streams of the latents."""
    streams = [np.random.RandomState([_FRESH, seed]) for seed in seeds]

    def randn_like(x: torch.Tensor) -> torch.Tensor:
        noise = np.stack([stream.standard_normal(x.shape[1:]) for stream in streams])
        return torch.from_numpy(noise).to(x)

    return randn_like


def with_progress(batches: Iterator[Batch], update: Callable[[int], Any]) -> Iterator[Batch]:
    """The same batches; `update` is told the number of images of each, once it has been used."""
    for batch in batches:
        yield batch
        update(len(batch.images))


def _split(seeds: Sequence[int], classes: int | Sequence[int] | None, batch: int) -> Iterator[tuple]:
    """(seeds, classes) of each batch."""
    for start in range(0, len(seeds), batch):
        part = slice(start, start + batch)
        yield seeds[part], classes if classes is None or isinstance(classes, int) else classes[part]


def _finished(images: torch.Tensor, seeds: Sequence[int], floats: bool) -> torch.Tensor:
    broken = ~images.isfinite().flatten(1).all(dim=1)
    if broken.any():  # one synchronisation per batch
        seed = seeds[int(broken.nonzero()[0])]
        raise ValueError(
            f"the network gave NaN or infinity in {int(broken.sum())} of {len(seeds)} images, first for seed {seed}"
        )
    return images.float() if floats else to_uint8(images)
