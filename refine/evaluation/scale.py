"""What the numbers of two networks are seen beside: those of the teacher itself, and of real images.

The teacher is measured on its bank (`refine.metrics.bank`), so that its images are drawn once for all comparisons.

Real images are measured against others of their own where the reference is statistics, which may have been made of the
same data, or is the data itself: two disjoint halves, drawn anew for each seed range. Where the reference is other
images, or those of a network, they are measured against that, as the networks are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refine.checkpoints.teachers import TeacherSource
from refine.evaluation.comparison import summarise
from refine.evaluation.job import Job
from refine.evaluation.sides import described_guide, provenance_of, refined_with
from refine.metrics.bank import teacher_bank
from refine.metrics.detectors import check_takes
from refine.metrics.evaluate import Measurement, measure
from refine.metrics.image_sets import ImageSet
from refine.metrics.pipeline import gathered, my_share, prefetched
from refine.metrics.references import Reference
from refine.metrics.registry import WITH_CLASSES
from refine.metrics.sampling import Batch, sensible_batch
from refine.metrics.statistics import FeatureStatistics
from refine.networks.sampler_settings import SamplerChoice

POOL = 50_000  # images at most of a data set that is compared with itself


@dataclass(frozen=True)
class Column:
    """A column of a comparison beside those of the two networks.

    Attributes:
        results: JSON-able: what was measured, and the numbers as `comparison.summarise` gives them.
        images: Some of the images, uint8 [N, C, H, W], for pictures.
        classes: int64 [N], or None.
    """

    results: dict[str, Any]
    images: torch.Tensor
    classes: torch.Tensor | None


class TeacherColumn:
    """The teacher's own images; checked when it is made, drawn and measured by `measure`.

    Args:
        source: The teacher, and what guides it.
        job: What is asked of its images.
        choice: How it is sampled; what is not said there is what suits it.
        batch: Images per batch; None = what is sensible for their size.

    Raises:
        ValueError: The file holds no teacher, it cannot be guided like this, or the detector cannot look at its images.
    """

    def __init__(self, source: TeacherSource, job: Job, choice: SamplerChoice, batch: int | None = None):
        self.source, self.job, self.choice = source, job, choice
        info = source.info()
        self.batch = batch or sensible_batch(info.img_resolution)
        settings, self.reason = choice.resolve(info)
        self.sampling = f"{settings.describe()}{source.guided_words}"
        if source.guidance != 1:
            source.load()  # which tells whether the two fit, or whether it knows a missing label
        check_takes(job.detector, [info.img_channels, info.img_resolution, info.img_resolution], job.device)

    def measure(self, cache: bool, shown: int) -> Column:
        """Its numbers, of the images of a bank that come after those of the reference, if that is of the same bank."""
        job, source = self.job, self.source
        alike = job.reference.is_teacher and job.reference.sha256 in (source.sha256, source.identity)
        first = job.reference.num or 0 if alike else 0
        total = first + job.num * len(job.seed_ranges)
        options: dict[str, Any] = {"batch": self.batch, "device": job.device, "progress": job.progress}
        bank = teacher_bank(source, total, choice=self.choice, cache=cache, **options)
        kinds = job.kinds if bank.classes is not None else without_classes(job.kinds)
        runs = []
        for start in range(first, total, job.num):
            share = my_share(range(start, start + job.num), self.batch)
            batches = on_device(bank.batches(self.batch, share), job.device)
            runs.append(measure(batches, job.detector, job.reference, kinds))
        origins = provenance_of(source.path)
        described = {
            "name": source.path.name,
            "sha256": source.sha256,
            "sampling": self.sampling,
            "sampling_reason": self.reason,
            "images": f"{first} to {total - 1} of its bank",
            "guide": described_guide(source),
            "refined_with": refined_with(origins),
        }
        described = {key: value for key, value in described.items() if value is not None}
        head = bank.head(shown)
        return Column({**described, **summarise(runs)}, head.images, head.classes)


class RealColumn:
    """Real images, as a floor: no generator of such images can be expected to be nearer.

    Args:
        path: Folder or zip file of them.
        job: What is asked of them.
        batch: Images per batch; None = what is sensible for their size.

    Raises:
        ValueError: It is no set of images, there are too few, or the detector cannot look at them.
    """

    def __init__(self, path: str | os.PathLike, job: Job, batch: int | None = None):
        self.images, self.job = ImageSet(Path(path)), job
        if len(self.images) < 4:
            raise ValueError(f"{path} holds {len(self.images)} images; expected at least 4")
        self.batch = batch or sensible_batch(self.images.resolution)
        check_takes(job.detector, self.images.read(0).shape, job.device)

    def measure(self, shown: int) -> Column:
        """Its numbers, see the module."""
        digest, reference = self.images.sha256(), self.job.reference
        other_images = reference.images is not None and reference.sha256 != digest
        against_reference = reference.is_drawn or (other_images and not self._has_moments_of(reference))
        runs, how = self._against_reference() if against_reference else self._in_halves()
        described = {"name": self.images.path.name, "sha256": digest, "images": len(self.images), "how": how}
        indices = np.random.RandomState(0).permutation(len(self.images))[:shown].tolist()
        pictures = [batch.images for batch in self.images.batches(1, indices)]
        same = [picture for picture in pictures if picture.shape == pictures[0].shape]
        classes = self.images.classes if len(same) == len(pictures) else None
        first_classes = None if classes is None else classes[indices]
        return Column({**described, **summarise(runs)}, torch.cat(same), first_classes)

    def _against_reference(self) -> tuple[list[Measurement], str]:
        num = min(self.job.num, len(self.images))
        runs = [self._measured(self._order(index)[:num], self.job.reference) for index in self.job.seed_ranges]
        return runs, f"{num} images drawn anew for each seed range, against the reference"

    def _in_halves(self) -> tuple[list[Measurement], str]:
        pool = self._order(0)[:POOL]
        num = min(self.job.num, len(pool) // 2)
        features, runs = self._features(sorted(pool)), []
        for index in self.job.seed_ranges:
            order = np.random.RandomState(index).permutation(len(pool))
            places = np.sort(pool)
            others = torch.from_numpy(order[num:])
            statistics = FeatureStatistics(keep_features=True).update(features[others])
            classes = None if self.images.classes is None else self.images.classes[places[order[num:]]]
            half = Reference(
                name=self.images.path.name,
                sha256="",
                mu=statistics.mean,
                sigma=statistics.covariance,
                num=statistics.num,
                features=features[others],
                form="half of the data",
                classes=classes,
            )
            runs.append(self._measured(places[order[:num]].tolist(), half))
        return runs, f"{num} images against {len(pool) - num} others of the data, drawn anew for each seed range"

    def _measured(self, indices: Sequence[int], reference: Reference) -> Measurement:
        job = self.job
        kinds = job.kinds if self.images.classes is not None else without_classes(job.kinds)
        share = my_share(range(len(indices)), self.batch)
        batches = self.images.batches(self.batch, indices[share.start : share.stop])
        return measure(on_device(batches, job.device), job.detector, reference, kinds)

    @torch.no_grad()
    def _features(self, indices: Sequence[int]) -> torch.Tensor:
        """float32 [N, D] of all processes, in the order of the indices."""
        share = my_share(range(len(indices)), self.batch)
        batches = self.images.batches(self.batch, indices[share.start : share.stop])
        found = [self.job.detector(batch.images.to(self.job.device)).cpu() for batch in prefetched(batches)]
        return torch.cat([part for parts in gathered(found) for part in parts])

    def _has_moments_of(self, reference: Reference) -> bool:
        """Whether the reference was made of the same images under another name, such as a zip of the folder."""
        if reference.num != len(self.images):
            return False
        mean = FeatureStatistics().update(self._features(range(len(self.images)))).mean
        scale = reference.sigma.diagonal().clamp_min(0).sqrt().max()
        return bool(((mean - reference.mu).abs() <= 1e-4 * scale).all())

    def _order(self, seed: int) -> list[int]:
        return np.random.RandomState(seed).permutation(len(self.images)).tolist()


def without_classes(kinds: Sequence[str]) -> tuple[str, ...]:
    """The metrics of these names that need no classes."""
    return tuple(kind for kind in kinds if kind not in WITH_CLASSES)


def on_device(batches: Iterator[Batch], device: torch.device | str) -> Iterator[Batch]:
    for batch in batches:
        yield batch._replace(images=batch.images.to(device))
