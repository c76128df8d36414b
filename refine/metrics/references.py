"""Reference statistics: what the generated images are compared with, read from .npz files.

Told apart by their keys: `mu, sigma` (EDM, pytorch-fid, clean-fid, also inside ADM's reference batches) allow the
Fréchet distance; our own richer form adds `num, features, detector, detector_sha256`, which allows the kernel distance,
precision and recall, and refuses to be compared with features of other weights.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dnnlib import replaced_atomically
from refine.checkpoints import resolve
from refine.metrics.detectors import Detector
from refine.metrics.statistics import FeatureStatistics


@dataclass(frozen=True)
class Reference:
    """Statistics of the images to be matched.

    Attributes:
        name: File name, for people.
        sha256: Of the file.
        mu: Mean, float64 [D].
        sigma: Covariance, float64 [D, D].
        num: Number of images behind it; None if the file does not say.
        features: float32 [num, D], or None: then only the Fréchet distance can be computed.
        detector: Name of the detector that made it, or None.
        detector_sha256: Of that detector's weights, or None.
    """

    name: str
    sha256: str
    mu: torch.Tensor
    sigma: torch.Tensor
    num: int | None = None
    features: torch.Tensor | None = None
    detector: str | None = None
    detector_sha256: str | None = None

    def check_detector(self, detector: Detector) -> None:
        """Raises ValueError if features of this detector cannot be compared with this reference."""
        if detector.feature_dim not in (None, len(self.mu)):
            raise ValueError(
                f"{self.name} holds statistics of {len(self.mu)} features, "
                f"but the detector {detector.name} gives {detector.feature_dim}"
            )
        if self.detector_sha256 not in (None, detector.sha256):
            raise ValueError(
                f"{self.name} was made with other detector weights ({self.detector}, sha256 "
                f"{self.detector_sha256[:12]}…) than {detector.name} (sha256 {detector.sha256[:12]}…)"
            )


def load_reference(path_or_name: str | os.PathLike) -> Reference:
    """Reads reference statistics from an .npz file; nothing in it is executed.

    Args:
        path_or_name: A file, or a name of pretrained/index.toml.

    Raises:
        ValueError: If the file does not exist, is no .npz with mu and sigma, or its arrays do not fit each other.
    """
    path = resolve(path_or_name)
    data = path.read_bytes()
    arrays = _read_npz(path, data)
    if "mu" not in arrays or "sigma" not in arrays:
        found = ", ".join(sorted(arrays)) or "nothing"
        hint = " (images, not statistics)" if "arr_0" in arrays else ""
        raise ValueError(f"reference {path} holds {found}{hint}, expected mu and sigma")
    mu, sigma, features = (_floats(path, arrays, key) for key in ("mu", "sigma", "features"))
    _check_shapes(path, mu, sigma, features)
    return Reference(
        name=path.name,
        sha256=hashlib.sha256(data).hexdigest(),
        mu=mu.double(),
        sigma=sigma.double(),
        num=_count(path, arrays, features),
        features=None if features is None else features.float(),
        detector=str(arrays["detector"]) if "detector" in arrays else None,
        detector_sha256=str(arrays["detector_sha256"]) if "detector_sha256" in arrays else None,
    )


def save_reference(path: str | os.PathLike, statistics: FeatureStatistics, detector: Detector) -> None:
    """Writes what `load_reference` reads: statistics made with `detector`, and the features where they were kept."""
    arrays = {
        "mu": statistics.mean.numpy(),
        "sigma": statistics.covariance.numpy(),
        "num": np.int64(statistics.num),
        "detector": np.str_(detector.name),
        "detector_sha256": np.str_(detector.sha256),
    }
    if statistics.keep_features:
        arrays["features"] = statistics.features.numpy()
    with replaced_atomically(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def _read_npz(path: Path, data: bytes) -> dict[str, np.ndarray]:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise TypeError("numpy gives members that are no arrays as bytes")
        return arrays
    except (ValueError, OSError, EOFError, AttributeError, TypeError, RuntimeError, zlib.error, zipfile.BadZipFile):
        raise ValueError(
            f"reference {path} is not a whole .npz file of plain arrays, expected one with mu and sigma"
        ) from None


def _floats(path: Path, arrays: dict[str, np.ndarray], key: str) -> torch.Tensor | None:
    if key not in arrays:
        return None
    array = arrays[key]
    if array.dtype.kind != "f":
        raise ValueError(f"reference {path} has {key} of dtype {array.dtype}, expected floats")
    if not np.isfinite(array).all():
        raise ValueError(f"reference {path} has NaN or infinity in {key}, expected finite numbers")
    return torch.from_numpy(array)


def _count(path: Path, arrays: dict[str, np.ndarray], features: torch.Tensor | None) -> int | None:
    if "num" not in arrays:
        return None if features is None else len(features)
    if arrays["num"].ndim or arrays["num"].dtype.kind not in "iu":
        raise ValueError(f"reference {path} has a num that is no integer, expected the number of images")
    return int(arrays["num"])


def _check_shapes(path: Path, mu: torch.Tensor, sigma: torch.Tensor, features: torch.Tensor | None) -> None:
    if mu.ndim != 1 or len(mu) == 0 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(
            f"reference {path} has mu of shape {list(mu.shape)} and sigma of shape {list(sigma.shape)}, "
            "expected [D] and [D, D]"
        )
    if not torch.allclose(sigma, sigma.T, rtol=1e-4, atol=1e-6 * sigma.abs().max().item()):
        raise ValueError(f"reference {path} has a sigma that is not symmetric, expected a covariance matrix")
    if features is not None and (features.ndim != 2 or features.shape[1] != len(mu)):
        raise ValueError(f"reference {path} has features of shape {list(features.shape)}, expected [N, {len(mu)}]")
