"""Features → statistics: streaming mean and covariance in float64, which can be merged between processes."""

from __future__ import annotations

import math

import torch

LARGEST = 1e30  # of features and their statistics: the products of four are still numbers


def unusable(largest: float) -> str | None:
    """What is wrong with numbers, of which this one is the largest by magnitude, NaN among them; None = nothing."""
    if not math.isfinite(largest):
        return "NaN or infinity"
    return f"numbers beyond {LARGEST:g}" if largest > LARGEST else None


class FeatureStatistics:
    """Mean and covariance of features that arrive in batches, and the features themselves if asked for.

    The state is the mean and the scatter matrix about it, updated by Chan, Golub and LeVeque's pairwise rule (1983):
    no cancellation between large sums, and merging two objects is the same update as adding a batch. Everything is
    float64; in float32 a Fréchet distance is off in its second decimal.

    Args:
        keep_features: Also keep the features (float32, on the CPU), for metrics that need samples: 4·N·D bytes.

    Attributes:
        num: Number of feature vectors so far.
        dim: Feature dimension, known after the first batch.
    """

    def __init__(self, keep_features: bool = False):
        self.keep_features = keep_features
        self.num = 0
        self.dim: int | None = None
        self._mean: torch.Tensor  # these two are there from the first batch on
        self._scatter: torch.Tensor
        self._features: list[torch.Tensor] = []

    def update(self, features: torch.Tensor) -> FeatureStatistics:
        """Adds a batch of features [N, D], floating point, any device.

        Raises:
            ValueError: If a feature is not finite or beyond `LARGEST`, or the shape differs from earlier batches.
        """
        if features.ndim != 2 or (self.dim is not None and features.shape[1] != self.dim):
            raise ValueError(f"features have shape {list(features.shape)}, expected [N, {self.dim or 'D'}]")
        if len(features) == 0:
            return self
        if fault := unusable(features.detach().abs().amax().item()):
            raise ValueError(f"features hold {fault}; the images they come from are probably broken")
        if self.num == 0:
            self._begin(features.shape[1], features.device)
        batch = features.detach().to(self._mean.device, torch.float64)
        mean = batch.mean(dim=0)
        shift = self._shift(len(batch), mean)
        rows = torch.cat([batch - mean, shift])  # one product in place: a scatter matrix of 2048 features is 32 MiB
        self._scatter.addmm_(rows.T, rows)
        if self.keep_features:
            self._features.append(features.detach().to("cpu", torch.float32, copy=True))
        return self

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Adds what another object has seen, e.g. in another process; returns self."""
        if other.num:
            if self.dim not in (None, other.dim):
                raise ValueError(f"cannot merge statistics of {other.dim} features into statistics of {self.dim}")
            if self.num == 0:
                self._begin(len(other._mean), other._mean.device)
            shift = self._shift(other.num, other._mean.to(self._mean.device))
            self._scatter.add_(other._scatter.to(self._mean.device)).addmm_(shift.T, shift)
            if self.keep_features:
                self._features.append(other.features)
        return self

    @property
    def mean(self) -> torch.Tensor:
        """float64 [D]."""
        self._require(1)
        return self._mean.cpu()

    @property
    def covariance(self) -> torch.Tensor:
        """Unbiased covariance (divided by N − 1), float64 [D, D]."""
        self._require(2)
        return (self._scatter / (self.num - 1)).cpu()

    @property
    def features(self) -> torch.Tensor:
        """All features in the order they came, float32 [N, D] on the CPU."""
        if not self.keep_features:
            raise ValueError("these statistics did not keep their features")
        self._require(1)
        if len(self._features) > 1:
            self._features = [torch.cat(self._features)]  # held once
        return self._features[0]

    def _begin(self, dim: int, device: torch.device) -> None:
        self.dim = dim
        self._mean = torch.zeros([dim], dtype=torch.float64, device=device)
        self._scatter = torch.zeros([dim, dim], dtype=torch.float64, device=device)

    def _shift(self, num: int, mean: torch.Tensor) -> torch.Tensor:
        """Moves the mean by `num` vectors of that mean; returns the row [1, D] that this adds to the scatter matrix,
        as if it were one more centred vector."""
        delta, total = mean - self._mean, self.num + num
        row = delta * (self.num * num / total) ** 0.5
        self._mean += delta * (num / total)
        self.num = total
        return row.unsqueeze(0)

    def _require(self, least: int) -> None:
        if self.num < least:
            raise ValueError(f"statistics of {self.num} images are too few, expected at least {least}")
