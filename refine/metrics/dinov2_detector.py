"""FD-DINOv2's detector (Stein et al. 2023, arXiv 2306.04675): images resized to 224×224, features of DINOv2.

The resize changes the numbers, by per cents where images are small, and codes differ in it; so there are modes:

    torch   EDM2's: bicubic, antialiased, in float32, overshoots beyond 0…255 stay
    pil     dgm-eval's: Pillow's bicubic of 8-bit images, rounded to 8 bits
    clean   dgm-eval's "clean": Pillow's bicubic of each channel as floats, clamped to 0…255

A distance is called `fd_dinov2`, FD-DINOv2, with the published weights of ViT-L/14 only, known by their sha256;
another mode stands behind the name.
"""

from __future__ import annotations

import os
import re

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from refine.metrics.dinov2 import VisionTransformer

SIZE = 224
#: Mode → what happens to an image, for people; the first one is the default.
MODES = {
    "torch": f"torch: antialiased bicubic to {SIZE}x{SIZE} in float32, not clamped, as EDM2",
    "pil": f"pil: Pillow's bicubic to {SIZE}x{SIZE}, rounded to 8 bits, as dgm-eval",
    "clean": f"clean: Pillow's bicubic to {SIZE}x{SIZE} of float channels, clamped, as dgm-eval's clean resize",
}
#: The space of FD-DINOv2. No other weights get its name, or that of one of its modes.
SPACE = "dinov2"
SPACES = (SPACE, *(f"{SPACE}_{mode}" for mode in list(MODES)[1:]))
#: sha256 of the published weights that the literature's numbers were made with, and their architecture.
PUBLISHED = "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"
ARCHITECTURE = "vitl14"

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for images in 0…1
_AT_ONCE = 32  # images that are seen at once; activations then take 0.5 GiB with vitl14


class DinoV2Detector:
    """DINOv2's class token as features, float32 [N, D]; grey images are repeated to RGB.

    Args:
        network: With its weights.
        name, sha256: Name and checksum of the file that they came from.
        space: What the space is called if the weights are not those of FD-DINOv2.
        mode: Of `MODES`.
    """

    fid_basis = None
    judges_classes = False

    def __init__(self, network: VisionTransformer, name: str, sha256: str, space: str, mode: str = "torch"):
        self._given = (network, name, sha256, space)
        self.network, self.sha256, self.mode = network, sha256, mode
        self.architecture = network.architecture.name
        self.feature_dim = network.architecture.width
        self.is_published = sha256 == PUBLISHED and self.architecture == ARCHITECTURE
        is_default = mode == next(iter(MODES))
        self.name = name if is_default else f"{name}:{mode}"
        self.space = (SPACE if self.is_published else space) + ("" if is_default else f"_{mode}")
        self.resize = MODES[mode]
        #: The part of EDM2's references that is of these features, if any is.
        self.edm2_part = "fd_dinov2" if is_default and self.architecture == ARCHITECTURE else None

    @property
    def note(self) -> str:
        """For people: what distances in this space are, and are not."""
        features = f"the {self.feature_dim} features of DINOv2 ({self.architecture})"
        if self.is_published:
            weights = "the published weights, by their sha256"
            return f"Distances are measured in {features}, {weights}: this is FD-DINOv2, resize {self.resize}."
        return (
            f"Distances are measured in {features} with the weights of '{self.name}', resize {self.resize}. This is "
            f"not called FD-DINOv2: their sha256 {self.sha256[:12]}… is not that of dinov2_{ARCHITECTURE}_pretrain.pth."
        )

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            found = f"{str(images.dtype).removeprefix('torch.')} images of shape {list(images.shape)}"
            raise ValueError(f"the detector {self.name} got {found}, expected uint8 [N, 3, H, W] or [N, 1, H, W]")
        return torch.cat([self.network(prepared(part, self.mode)) for part in images.split(_AT_ONCE)])

    def classify(self, images: torch.Tensor) -> None:
        """It is no classifier."""

    def resizing(self, mode: str) -> DinoV2Detector:
        """The same detector in another of `MODES`."""
        return DinoV2Detector(*self._given, mode)

    def to(self, device: torch.device | str) -> DinoV2Detector:
        self.network.to(device)
        return self


def split_mode(path_or_name: str | os.PathLike) -> tuple[str, str | None]:
    """A detector's name without the mode behind it, and the mode, if there is one: 'dinov2-vitl14:pil'.

    Raises:
        ValueError: Behind a name of a DINOv2 stands something else.
    """
    text = os.fspath(path_or_name)
    name, colon, mode = text.rpartition(":")
    if not name or not colon or os.path.lexists(text):
        return text, None
    if mode not in MODES:
        if re.fullmatch(r"dinov2[\w-]*", name):
            raise ValueError(f"found {text!r}; expected {name}, or with one of {', '.join(MODES)} behind the colon")
        return text, None
    return name, mode


def prepared(images: torch.Tensor, mode: str) -> torch.Tensor:
    """Images as the network takes them, float32 [N, 3, 224, 224]; their sides are not kept in proportion.

    Args:
        images: uint8 [N, 3, H, W], or [N, 1, H, W], which is repeated.
        mode: Of `MODES`.
    """
    images = images.expand(-1, 3, -1, -1)
    with torch.autocast(images.device.type, enabled=False):
        if mode == "torch":
            x = F.interpolate(images.to(torch.float32), (SIZE, SIZE), mode="bicubic", antialias=True)
        else:
            resize = _resized_as_bytes if mode == "pil" else _resized_as_floats
            x = torch.stack([resize(image) for image in images.cpu().numpy()]).to(images.device)
        mean, std = (torch.tensor(values, device=x.device).reshape(3, 1, 1) for values in (_MEAN, _STD))
        return (x / 255 - mean) / std


def _resized_as_bytes(image: np.ndarray) -> torch.Tensor:
    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    pixels = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32))


def _resized_as_floats(image: np.ndarray) -> torch.Tensor:
    channels = [Image.fromarray(channel.astype(np.float32)) for channel in image]
    resized = [np.asarray(channel.resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for channel in channels]
    return torch.from_numpy(np.stack(resized).clip(0, 255))
