"""Detectors: networks that turn images into the features that distances are measured in.

A number is comparable with another one only if both come from the same detector weights. So every detector carries its
name and its weights' sha256, and its `space` names the metric: `fd_<space>`; `fid` is reserved for the
Inception-2015-12-05 weights that the literature's numbers were made with.
"""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Protocol

import torch

from dnnlib import sha256_of_file
from refine.checkpoints import resolve
from refine.checkpoints.native import load_networks, read_metadata
from refine.metrics.digits import DigitsDetector

INCEPTION_SPACE = "inception-2015-12-05"

#: Weight files that are known by content: sha256 → feature space. Only these make a distance a FID.
#: Empty until a checksum of inception-2015-12-05.pt is established: until then it gives `fd_inception_2015_12_05`.
KNOWN_TORCHSCRIPT: dict[str, str] = {}

_NAMES = {"digits": "digits-classifier"}  # of detectors → of the index


class Detector(Protocol):
    """What the metrics ask of a feature extractor.

    Attributes:
        name: For people, e.g. 'digits' or a file name.
        space: Names the feature space in metric names, e.g. 'digits'.
        sha256: Of the file that the weights came from.
        feature_dim: Length of a feature vector; None if only known after the first call.
    """

    name: str
    space: str
    sha256: str
    feature_dim: int | None

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features, float32 [N, feature_dim], of uint8 images [N, C, H, W]."""

    def classify(self, images: torch.Tensor) -> torch.Tensor | None:
        """Class probabilities, float32 [N, classes], of uint8 images; None if the detector is no classifier."""

    def to(self, device: torch.device | str) -> Detector:
        """Moves the weights; returns self."""


class TorchScriptDetector:
    """A TorchScript file that maps uint8 [N, C, H, W] to features [N, D], such as NVIDIA's inception-2015-12-05.pt.

    A module whose `forward` has an argument `return_features` is one of NVIDIA's: it is called with
    `return_features=True` and sees grey images repeated to RGB. Any other module gets the images as they are.

    Raises:
        ValueError: If the file is not TorchScript.
    """

    def __init__(self, path: str | os.PathLike):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # the format that published detectors come in
                self._module = torch.jit.load(str(path), map_location="cpu").eval()
        except RuntimeError:
            raise ValueError(
                f"{path} is not a detector: expected a native digits detector or a TorchScript file"
            ) from None
        self.sha256 = sha256_of_file(path)
        self.name = Path(path).name
        self.space = KNOWN_TORCHSCRIPT.get(self.sha256) or _slug(Path(path).stem)
        self.feature_dim: int | None = None
        self._nvidia = any(argument.name == "return_features" for argument in self._module.forward.schema.arguments)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if self._nvidia:
            images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
            features = self._module(images, return_features=True)
        else:
            features = self._module(images)
        if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != len(images):
            found = list(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            raise ValueError(f"the detector {self.name} returned {found}, expected features [{len(images)}, D]")
        self.feature_dim = features.shape[1]
        return features.to(torch.float32)

    def classify(self, images: torch.Tensor) -> None:
        return None

    def to(self, device: torch.device | str) -> TorchScriptDetector:
        self._module.to(device)
        return self


def load_detector(path_or_name: str | os.PathLike) -> Detector:
    """Loads a detector on the CPU, in eval mode, without gradients.

    Args:
        path_or_name: 'digits' (the shipped classifier), a native file that holds a detector, or a TorchScript file.

    Raises:
        ValueError: If the name is unknown, the file does not exist or is no detector.
    """
    path = resolve(_NAMES.get(str(path_or_name), path_or_name))
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # TorchScript files are zip archives, native ones are not
    return TorchScriptDetector(path) if is_zip else _load_native(path)


def metric_names(detector: Detector) -> tuple[str, str]:
    """Names of the Fréchet and the kernel distance in the detector's space: ('fid', 'kid') or ('fd_…', 'kid_…')."""
    if detector.space == INCEPTION_SPACE and detector.sha256 in KNOWN_TORCHSCRIPT:
        return "fid", "kid"
    return f"fd_{_slug(detector.space)}", f"kid_{_slug(detector.space)}"


def _load_native(path: Path) -> DigitsDetector:
    names = read_metadata(path).get("networks", {})
    network = load_networks(path)["detector"] if "detector" in names else None
    if not isinstance(network, DigitsDetector):
        raise ValueError(f"{path} holds {', '.join(names) or 'no networks'}, expected a detector")
    network.sha256 = sha256_of_file(path)
    return network.eval().requires_grad_(False)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") or "custom"
