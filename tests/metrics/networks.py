"""Small stand-ins for networks: what they draw depends on z and c in a way that tests can predict."""

import torch
from torch import nn

from refine.metrics.detectors import space_of
from refine.metrics.dinov2 import Architecture
from refine.metrics.registry import rows_in
from refine.networks.bases import Generator


class PlainGenerator(Generator):
    """A generator that is not a StyleGAN2: z is the image; with classes, its top left pixel tells the class."""

    def __init__(self, c_dim: int = 0, img_channels: int = 1, img_resolution: int = 8):
        super().__init__()
        self.c_dim, self.img_channels, self.img_resolution = c_dim, img_channels, img_resolution
        self.z_dim = img_channels * img_resolution**2

    def forward(self, z: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
        x = z.reshape(-1, self.img_channels, self.img_resolution, self.img_resolution).clone() / 3
        if self.c_dim:
            x[:, 0, 0, 0] = c.argmax(dim=1) / self.c_dim
        return x


class PixelDetector:
    """Features: the means of the image's quadrants. Classes: how bright the top left pixel is."""

    name = space = "pixels"
    sha256 = "0" * 64
    feature_dim = 4
    resize = "none"
    fid_basis = None
    judges_classes = True

    def __init__(self, num_classes: int = 0):
        self.num_classes = num_classes

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float().mean(dim=1, keepdim=True), 2).flatten(1) / 255

    def classify(self, images: torch.Tensor) -> torch.Tensor | None:
        if not self.num_classes:
            return None
        level = (images[:, 0, 0, 0].float() - 128) / 127.5 * self.num_classes
        index = level.round().long().clamp(0, self.num_classes - 1)
        return 0.9 * nn.functional.one_hot(index, self.num_classes) + 0.1 / self.num_classes

    def to(self, device):
        return self


def metric_names(detector) -> tuple[str, str]:
    """What results call the Fréchet and the kernel distance in the detector's space."""
    return _key(detector, "fd"), _key(detector, "kid")


def score_name(detector) -> str:
    """What results call the Inception Score."""
    return _key(detector, "is")


def _key(detector, name: str) -> str:
    return next(key for key, row in rows_in(space_of(detector)).items() if row.name == name)


def dinov2_state(width: int = 64, depth: int = 1, registers: int = 0, gated: bool = False) -> dict[str, torch.Tensor]:
    """Random weights of a small DINOv2 under the published names."""
    shapes = Architecture(width, depth, width // 64, 37, registers, gated).shapes()
    rng = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=rng) * 0.1 for name, shape in shapes.items()}
    scales = [name for name in state if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma"))]
    return state | {name: 1 + state[name] for name in scales}
