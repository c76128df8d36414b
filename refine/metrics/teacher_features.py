"""The detector that every run has: its own teacher.

A denoiser knows what its images look like, in all sizes of detail. The features of an image are the spatial means of
the activations at the end of each resolution of the teacher's encoder, asked at a noise level that is too small to be
seen, without noise and without a label.

Numbers of two teachers are in two feature spaces and cannot be compared; and a teacher does not see in a generator what
it gets wrong itself (docs/metrics.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from refine.networks.bases import Denoiser
from refine.pair import plan_bridge

#: The noise level that the teacher is asked at, in units of [-1, 1] images.
SIGMA = 0.1
#: Features at most; of a teacher with more, the coarsest resolutions that fit are taken, and at least one.
MAX_FEATURES = 2048


class TeacherDetector:
    """Means of a teacher's activations as features of uint8 images.

    Args:
        teacher: In eval mode, on the CPU.
        sha256: Checksum of its file.

    Raises:
        ValueError: The teacher gives no features.
    """

    fid_basis = None
    judges_classes = False

    def __init__(self, teacher: Denoiser, sha256: str):
        self.teacher, self.sha256 = teacher, sha256
        self.name = self.space = f"teacher-{sha256[:8]}"
        self.resize = f"none: {teacher.img_resolution}x{teacher.img_resolution} images, or larger by a whole factor"
        size = (teacher.img_channels, teacher.img_resolution, teacher.img_resolution)
        try:
            widths = [means.shape[1] for means in self._means(torch.zeros([1, *size], dtype=torch.uint8))]
        except ValueError as error:
            raise ValueError(
                f"the teacher cannot be the detector: {error}; expected a metric with another one, such as fid2k, or "
                "--metrics=none"
            ) from None
        fitting = [level for level in range(len(widths)) if sum(widths[level:]) <= MAX_FEATURES]
        self._first = min(fitting, default=len(widths) - 1)
        self.feature_dim = sum(widths[self._first :])

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._means(images)[self._first :], dim=1)

    def classify(self, images: torch.Tensor) -> None:
        """It is no classifier."""

    def to(self, device: torch.device | str) -> TeacherDetector:
        self.teacher.to(device)
        return self

    @torch.no_grad()
    def _means(self, images: torch.Tensor) -> list[torch.Tensor]:
        return self.teacher.encode(self.prepared(images), SIGMA)

    def image_note(self, shape: Sequence[int]) -> str | None:
        """What is done to images [C, H, W] that are not the teacher's own, for people."""
        size, channels = self.teacher.img_resolution, self.teacher.img_channels
        bridge = plan_bridge((shape[-1], shape[0], 0), (size, channels, 0))
        return "; ".join(bridge.messages(null_label=True)) or None

    def prepared(self, images: torch.Tensor) -> torch.Tensor:
        """Images as the teacher takes them: larger ones are reduced, colours are made to fit, see `refine.pair`."""
        size, channels = self.teacher.img_resolution, self.teacher.img_channels
        fits = images.dtype == torch.uint8 and images.ndim == 4 and images.shape[2] == images.shape[3]
        if fits:
            try:
                bridge = plan_bridge((images.shape[2], images.shape[1], 0), (size, channels, 0))
                return bridge.images(images.to(torch.float32) / 127.5 - 1).clamp(-1, 1)
            except ValueError:
                pass
        raise ValueError(
            f"the detector {self.name} got {str(images.dtype).removeprefix('torch.')} images of shape "
            f"{list(images.shape)}, expected uint8 [N, {channels}, {size}, {size}], or larger by a whole factor"
        )
