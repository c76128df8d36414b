"""The digits detector: a small classifier whose embedding is the feature space of `fd_digits`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from refine.networks.bases import Network, records_init_kwargs
from refine.pair import plan_bridge


class DigitsDetector(Network):
    """Classifies 32×32 grey digits and embeds them for Fréchet and kernel distances.

    Convolutions of stride 2, then a linear embedding and a linear read-out. The embedding is z-scored with the training
    images' own mean and standard deviation (buffers of the network), so that each of its dimensions weighs the same
    in a distance. Train it with `pretrained/recipes/train_classifier.py`.

    Two trainings give two feature spaces whose distances differ by a factor: numbers are comparable only
    when they come from the same weights, which is why every result carries their sha256.

    Args:
        num_classes: Number of classes.
        channels: Output channels of the convolutions; each halves the resolution.
        feature_dim: Size of the embedding.
    """

    img_resolution = 32
    img_channels = 1
    name = "digits"
    space = "digits"
    resize = "none: 32x32 grey images; larger ones by a whole factor are reduced"
    fid_basis = None
    judges_classes = True
    feature_mean: torch.Tensor
    feature_std: torch.Tensor

    @records_init_kwargs(defaults=True)
    def __init__(self, num_classes: int = 10, channels: tuple[int, ...] = (16, 32, 64), feature_dim: int = 32):
        super().__init__()
        self.num_classes = num_classes
        self.feature_dim = feature_dim
        layers: list[nn.Module] = []
        for c_in, c_out in itertools.pairwise([self.img_channels, *channels]):
            layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten())
        self.embed = nn.Linear(channels[-1] * (self.img_resolution >> len(channels)) ** 2, feature_dim)
        self.classifier = nn.Linear(feature_dim, num_classes)
        self.register_buffer("feature_mean", torch.zeros(feature_dim))
        self.register_buffer("feature_std", torch.ones(feature_dim))
        self.sha256 = ""  # of the file the weights came from; set by load_detector

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """Raw embedding [N, feature_dim] of floats [N, 1, 32, 32] in [-1, 1]; differentiable, for training."""
        return self.embed(self.trunk(images))

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Class logits [N, num_classes] of floats [N, 1, 32, 32] in [-1, 1]; differentiable, for training."""
        return self.classifier(torch.relu(self.embed_images(images)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """z-scored features, float32 [N, feature_dim], of uint8 images [N, 1, 32, 32].

        Images that are larger by a whole factor are reduced first, see `refine.pair`; colours are refused.
        """
        return (self.embed_images(self._from_uint8(images)) - self.feature_mean) / self.feature_std

    def classify(self, images: torch.Tensor) -> torch.Tensor:
        """Class probabilities, float32 [N, num_classes], of uint8 images [N, 1, 32, 32]."""
        return self.logits(self._from_uint8(images)).softmax(dim=1)

    def classify_features(self, features: torch.Tensor) -> torch.Tensor:
        """Class probabilities, float32 [N, num_classes], of features that `forward` gave."""
        return self.classifier(torch.relu(features * self.feature_std + self.feature_mean)).softmax(dim=1)

    def observe(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward` and `classify` of the same images in one pass."""
        embedding = self.embed_images(self._from_uint8(images))
        probabilities = self.classifier(torch.relu(embedding)).softmax(dim=1)
        return (embedding - self.feature_mean) / self.feature_std, probabilities

    def _from_uint8(self, images: torch.Tensor) -> torch.Tensor:
        expected = (self.img_channels, self.img_resolution, self.img_resolution)
        is_square = images.ndim == 4 and images.shape[2] == images.shape[3]
        if images.dtype != torch.uint8 or not is_square or images.shape[1] != self.img_channels:
            raise self._fault(images, expected)
        x = images.to(torch.float32) / 127.5 - 1
        if images.shape[1:] == expected:
            return x
        try:  # larger: as a teacher of such digits would see them
            bridge = plan_bridge((images.shape[2], images.shape[1], 0), (self.img_resolution, self.img_channels, 0))
        except ValueError:
            raise self._fault(images, expected) from None
        return bridge.images(x).clamp(-1, 1)

    def image_note(self, shape: Sequence[int]) -> str | None:
        """What is done to images [C, H, W] that are not as they should be, for people."""
        size = self.img_resolution
        if shape[-1] == size:
            return None
        return f"{shape[-1]}x{shape[-1]} images are reduced to {size}x{size} (Lanczos): finer detail is not judged"

    @staticmethod
    def _fault(images: torch.Tensor, expected: tuple[int, ...]) -> ValueError:
        return ValueError(
            f"the digits detector got {str(images.dtype).removeprefix('torch.')} images of shape {list(images.shape)}, "
            f"expected uint8 [N, {', '.join(map(str, expected))}], grey digits, or larger ones by a whole factor"
        )
