"""Detectors: networks that turn images into the features that distances are measured in.

A number is comparable with another one only if both come from the same detector weights. So every detector carries its
name and its weights' sha256, and its `space` names the metric: `fd_<space>`; `fid` is reserved for the
Inception-2015-12-05 weights that the literature's numbers were made with. When a file counts as those weights:

- By content: its sha256 begins with the eight digits that its publishers put into the file's name (6726825d, of the
  state dict that pytorch-fid and torch-fidelity use), whatever the file is called now.
- By name: it is called as NVIDIA's files are, and its structure is this network's. No checksum of those files is
  established, so the name is taken on trust; every result says so and prints the sha256.

Anything else, such as the same network with other weights, is measured in a space named after its file. FD-DINOv2 is
reserved in the same way, see `refine.metrics.dinov2_detector`.
"""

from __future__ import annotations

import importlib
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from refine.checkpoints import peek, resolve
from refine.checkpoints.native import load_networks, read_metadata
from refine.checkpoints.pickles.tensors import TensorRef
from refine.checkpoints.sniff import sniff
from refine.checkpoints.teachers import TeacherSource
from refine.dnnlib import sha256_of_file
from refine.metrics import dinov2_weights
from refine.metrics.digits import DigitsDetector
from refine.metrics.dinov2_detector import SPACES, DinoV2Detector, split_mode
from refine.metrics.exported import is_exported, load_exported
from refine.metrics.inception import CLASSES, FEATURES, InceptionNetwork
from refine.metrics.inception_weights import load_inception
from refine.metrics.stored import in_memory, opened, tensors_in
from refine.metrics.teacher_features import TeacherDetector

INCEPTION_SPACE = "inception-2015-12-05"

#: First digits of the sha256 of files that hold the Inception-2015-12-05 weights, as published in the files' names.
KNOWN_BY_CONTENT = ("6726825d",)
#: Names of NVIDIA's files with the same weights.
KNOWN_BY_NAME = ("inception-2015-12-05.pt", "inception-2015-12-05.pkl", "inception-v3-2015-12-05.pkl")

EXPECTED = (
    "a detector: the Inception-2015-12-05 weights (.pt, .pth, .pkl), those of a DINOv2 (.pth, .safetensors), a "
    "TorchScript or torch.export file, a native digits detector, a teacher, or one of the names digits, "
    "inception-2015-12-05, dinov2-vitl14, effnet-lite0"
)

_NAMES = {"digits": "digits-classifier", "dinov2": "dinov2-vitl14"}  # of detectors → of the index
_RESERVED = {"digits", "effnet_lite0", *SPACES}  # spaces that no other file is called after


class Detector(Protocol):
    """What the metrics ask of a feature extractor.

    Attributes:
        name: For people, e.g. 'digits' or a file name.
        space: Names the feature space in metric names, e.g. 'digits'.
        sha256: Checksum of the file that the weights came from.
        feature_dim: Length of a feature vector; None if only known after the first call.
        resize: In words, what happens to the size of an image before the network sees it. References hold these words,
            and are not compared with a detector that has others.
        fid_basis: Why distances in this space may be called FID, for people; None = they may not.
        judges_classes: Whether `classify` is about the classes that generators here are conditioned on.
    """

    @property
    def name(self) -> str: ...
    @property
    def space(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def feature_dim(self) -> int | None: ...
    @property
    def resize(self) -> str: ...
    @property
    def fid_basis(self) -> str | None: ...
    @property
    def judges_classes(self) -> bool: ...

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features, float32 [N, feature_dim], of uint8 images [N, C, H, W]."""

    def classify(self, images: torch.Tensor) -> torch.Tensor | None:
        """Class probabilities, float32 [N, classes], of uint8 images; None if the detector is not a classifier."""

    def to(self, device: torch.device | str) -> Detector:
        """Moves the weights; returns self."""


class InceptionDetector:
    """The Inception-2015-12-05 network on torch; grey images are repeated to RGB, any size is resized to 299×299.

    Args:
        network: With its weights.
        name, sha256: Name and checksum of the file that they came from.
    """

    feature_dim = FEATURES
    resize = "TensorFlow 1 bilinear to 299x299, no antialias"
    judges_classes = False  # it knows ImageNet's classes only

    def __init__(self, network: InceptionNetwork, name: str, sha256: str):
        self.network, self.name, self.sha256 = network, name, sha256
        self.fid_basis = fid_basis(name, sha256)
        self.space = INCEPTION_SPACE if self.fid_basis else _space_of_file(Path(name).stem, sha256)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(_rgb(images, self.name))

    def classify(self, images: torch.Tensor) -> torch.Tensor:
        return self.observe(images)[1]

    def observe(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self(images)
        return features, self.network.logits(features, bias=False).softmax(dim=1)

    def to(self, device: torch.device | str) -> InceptionDetector:
        self.network.to(device)
        return self


class ModuleDetector:
    """A program that maps uint8 [N, C, H, W] to features [N, D]: TorchScript, such as NVIDIA's, or torch.export.

    A TorchScript whose `forward` has an argument `return_features` is one of NVIDIA's: it is called with
    `return_features=True` and sees grey images repeated to RGB. Any other module gets the images as they are.
    """

    resize = "by the detector itself"
    judges_classes = False

    def __init__(self, module: torch.nn.Module, name: str, sha256: str):
        self._module, self.name, self.sha256 = module, name, sha256
        schema = getattr(module.forward, "schema", None)  # of TorchScript
        self._options = [argument.name for argument in schema.arguments] if schema else []
        self.feature_dim: int | None = None
        self.fid_basis = fid_basis(name, sha256) if self._is_inception() else None
        self.space = INCEPTION_SPACE if self.fid_basis else _space_of_file(Path(name).stem, sha256)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if "return_features" in self._options:
            features = self._module(_rgb(images, self.name), return_features=True)
        else:
            features = self._module(images)
        if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != len(images):
            found = list(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            raise ValueError(f"the detector {self.name} returned {found}, expected features [{len(images)}, D]")
        self.feature_dim = features.shape[1]
        return features.to(torch.float32)

    def classify(self, images: torch.Tensor) -> torch.Tensor | None:
        if "no_output_bias" not in self._options:
            return None
        return self._module(_rgb(images, self.name), no_output_bias=True).to(torch.float32)

    def to(self, device: torch.device | str) -> ModuleDetector:
        self._module.to(device)
        return self

    def _is_inception(self) -> bool:
        """Whether it is called as NVIDIA's, and gives as many features and classes; only asked of files named so."""
        if self.name not in KNOWN_BY_NAME or not {"return_features", "no_output_bias"} <= set(self._options):
            return False
        black = torch.zeros([1, 3, 32, 32], dtype=torch.uint8)
        try:
            with torch.no_grad():
                probabilities = self.classify(black)
                found = self(black).shape[1], 0 if probabilities is None else probabilities.shape[1]
                return found == (FEATURES, CLASSES)
        except (RuntimeError, ValueError):
            return False


def load_detector(path_or_name: str | os.PathLike | TeacherSource, trust: bool = False) -> Detector:
    """Loads a detector on the CPU, in eval mode, without gradients.

    A TorchScript file is a program that can write files, and it is loaded only on the caller's word. Of all others
    nothing is executed but the computation of features.

    Args:
        path_or_name: A file or URL: the Inception-2015-12-05 weights as NVIDIA's TorchScript or pickle or as
            pytorch-fid's state dict, a DINOv2's published weights or Hugging Face's (a folder of theirs, too), any
            TorchScript or torch.export file that maps uint8 [N, C, H, W] to features, or a native file that holds a
            detector, or a teacher (`refine.metrics.teacher_features`). Or a name: 'digits' (the shipped classifier),
            'inception-2015-12-05' (pytorch-fid's file, downloaded once), 'dinov2' or 'dinov2-vitl14', 'dinov2-vitb14',
            … (the published files), 'effnet-lite0' (ImageNet weights of a Python package). Behind a DINOv2 may stand
            how it resizes: 'dinov2-vitl14:pil', see `refine.metrics.dinov2_detector`. Or a teacher; what guides it
            has no part in its features.
        trust: Whether the caller knows where a TorchScript file comes from.

    Raises:
        ValueError: If the name is unknown, the file does not exist or is no detector, or is TorchScript without trust.
    """
    if isinstance(path_or_name, TeacherSource):
        return _load_teacher(path_or_name)
    text, mode = split_mode(path_or_name)
    detector = _load(text, trust)
    if mode is None:
        return detector
    if not isinstance(detector, DinoV2Detector):
        raise ValueError(f"{text} is not a DINOv2, which alone resizes in several ways; expected it without ':{mode}'")
    return detector.resizing(mode)


def source_of(path_or_name: str | os.PathLike) -> str:
    """The file, URL or name of the index that a detector comes from."""
    text, _ = split_mode(path_or_name)
    return _NAMES.get(text, text)


def _load(text: str, trust: bool) -> Detector:
    if text == "effnet-lite0":
        # a name, so that nobody else needs its package
        return importlib.import_module("refine.metrics.effnet").EffNetDetector()
    path = (dinov2_weights.find_weights(Path(text)) if os.path.isdir(text) else None) or resolve(source_of(text))
    found = sniff(path)
    if found.kind == "native":
        return _load_native(path)
    if found.kind == "torchscript":
        if not trust:
            raise ValueError(
                f"{path} is TorchScript, a program that can do more than compute; if you know where it comes from, say "
                f"--trust-detector"
            )
        return ModuleDetector(_load_torchscript(path), path.name, sha256_of_file(path))
    if found.kind in ("torch", "pickle", "safetensors") and holds_teacher(path):
        return _load_teacher(TeacherSource.of(path))
    if found.kind in ("torch", "pickle", "safetensors"):
        return _load_weights(path)
    if found.kind == "zip" and is_exported(path):
        return ModuleDetector(load_exported(path), path.name, sha256_of_file(path))
    raise ValueError(f"{path} is {found.description}; expected {EXPECTED}")


def observe(detector: Detector, images: torch.Tensor, classes: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Features and, if asked for, class probabilities of images, in one pass where the detector can."""
    if not classes:
        return detector(images), None
    together = getattr(detector, "observe", None)
    return together(images) if together else (detector(images), detector.classify(images))


def check_takes(judge: Detector, image_shape: Sequence[int], device: torch.device | str) -> None:
    """Raises ValueError if the detector, which is on `device`, cannot look at images [C, H, W]; two black ones tell.

    A teacher has looked at images of its own size before, so that only what makes others into these is tried.
    """
    look = getattr(judge, "prepared", judge)
    try:
        with torch.no_grad():
            look(torch.zeros([2, *image_shape], dtype=torch.uint8, device=device))
    except RuntimeError as error:  # what TorchScript raises for an input that does not fit
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{judge.name} cannot take images {list(image_shape)}: {reason}") from None


def classifies(detector: Detector) -> bool:
    """Whether the detector may give class probabilities; for a program this shows only once it has seen images."""
    return hasattr(detector, "observe") or hasattr(detector, "classify")


def fid_basis(name: str, sha256: str) -> str | None:
    """Why a file with the structure of the Inception network counts as the weights of 2015-12-05; None if not."""
    if sha256.startswith(KNOWN_BY_CONTENT):
        return f"sha256 begins with {sha256[:8]}, as published"
    if name in KNOWN_BY_NAME:
        return f"by the file's name; no published checksum can confirm its sha256 {sha256[:12]}…"
    return None


class FeatureSpace(NamedTuple):
    """The feature space of a detector, as the names of numbers know it.

    Attributes:
        name: For people.
        is_fid: Whether it is that of the Inception-2015-12-05 weights, whose distances are called FID.
        against_teacher: Whether what is compared with is images of a teacher, not of the data.
    """

    name: str
    is_fid: bool
    against_teacher: bool = False

    @property
    def slug(self) -> str:
        """The part of metric names that stands for it."""
        return _slug(self.name)


def space_of(detector: Detector, against_teacher: bool = False) -> FeatureSpace:
    return FeatureSpace(detector.space, detector.fid_basis is not None, against_teacher)


def space_of_results(results: Mapping[str, Any]) -> FeatureSpace:
    """The space that results of `evaluate`, or of a comparison, were measured in."""
    detector, reference = results["detector"], results.get("reference") or {}
    return FeatureSpace(detector["space"], detector["fid_basis"] is not None, reference.get("teacher", False))


def _load_native(path: Path) -> Detector:
    names = read_metadata(path).get("networks", {})
    network = load_networks(path)["detector"] if "detector" in names else None
    if network is None and holds_teacher(path):
        return _load_teacher(TeacherSource.of(path))
    if not isinstance(network, DigitsDetector):
        raise ValueError(f"{path} holds {', '.join(names) or 'no networks'}, expected a detector")
    network.sha256 = sha256_of_file(path)
    return network.eval().requires_grad_(False)


def _load_torchscript(path: Path) -> torch.jit.ScriptModule:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the format that published detectors come in
            return torch.jit.load(str(path), map_location="cpu").eval()
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0][:150]
        raise ValueError(f"{path} is a TorchScript file that torch {torch.__version__} cannot read: {reason}") from None


def holds_teacher(path: Path) -> bool:
    """Whether a file is one that `load_teacher` reads, as far as its header or pickle tells."""
    try:
        peek(path, "teacher")
    except ValueError:
        return False
    return True


def _load_teacher(source: TeacherSource) -> TeacherDetector:
    alone = replace(source, guide=None, guidance=1.0)
    return TeacherDetector(alone.load(), alone.identity)


def _load_weights(path: Path) -> Detector:
    """The network whose weights a file holds: a DINOv2, told by its names, or Inception."""
    with opened(path, expected=EXPECTED) as value:
        tensors = _tensors_at_the_top(value)
        if dinov2_weights.is_dinov2(tensors):
            network = dinov2_weights.load_dinov2(tensors, os.path.getsize(path))
            dinov2_weights.check_config(path, network.architecture.heads)
            digest, title = sha256_of_file(path), dinov2_weights.title(path)
            return DinoV2Detector(network, path.name, digest, _space_of_file(title, digest))
        dinov2_weights.refuse_head(tensors)
        in_file = in_memory(path, value)
    try:
        inception = load_inception(tensors_in(in_file))
    except ValueError as error:
        raise ValueError(f"{path} is not a detector that is known here: {error}; expected {EXPECTED}") from None
    return InceptionDetector(inception, path.name, sha256_of_file(path))


def _tensors_at_the_top(value: Any) -> dict[str, TensorRef]:
    """Dotted name → tensor of a state dict, or of the state dicts in a table."""
    table = value if isinstance(value, dict) else {}
    named = {str(key): item for key, item in table.items()}
    for key, inner in list(named.items()):
        named |= {f"{key}.{name}": item for name, item in inner.items()} if isinstance(inner, dict) else {}
    return {name: item for name, item in named.items() if isinstance(item, TensorRef)}


def _rgb(images: torch.Tensor, name: str) -> torch.Tensor:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        found = f"{str(images.dtype).removeprefix('torch.')} images of shape {list(images.shape)}"
        raise ValueError(f"the detector {name} got {found}, expected uint8 [N, 3, H, W] or [N, 1, H, W]")
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def _space_of_file(title: str, sha256: str) -> str:
    """The space of weights that are known by the name of their file only."""
    slug = _slug(title)
    return f"{slug}_{sha256[:8]}" if slug in _RESERVED else slug


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") or "custom"
