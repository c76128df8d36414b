"""What is logged of every batch beside losses: the gap between aux and teacher, and the spread of the images."""

import math

import torch

from refine.torch_utils.misc import RunningMeans

# Where the gap between aux and teacher is reported: bins of the noise level.
SIGMA_EDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
GAP_NAMES = [
    f"Gap/sigma_{low:g}-{high:g}" for low, high in zip((0, *SIGMA_EDGES), (*SIGMA_EDGES, math.inf), strict=True)
]
MAX_CLASSES = 20  # the gap is reported for each class where there are no more


class Observer:
    """Adds to running means; nothing here waits for the device."""

    def __init__(self, means: RunningMeans, device: torch.device):
        self.means, self._edges = means, torch.tensor(SIGMA_EDGES, device=device)

    def gap(self, gap: torch.Tensor, sigma: torch.Tensor, c: torch.Tensor | None) -> None:
        """mean|D_aux − D_teacher| by noise level and by class."""
        self.means.add_binned(GAP_NAMES, torch.bucketize(sigma.flatten(), self._edges), gap)
        if c is not None and c.shape[1] <= MAX_CLASSES:
            names = [f"Gap/class_{index}" for index in range(c.shape[1])]
            self.means.add_binned(names, c.argmax(dim=1), gap)

    def diversity(self, x: torch.Tensor, c: torch.Tensor | None) -> None:
        """Standard deviation of pixels within the batch, and within its classes."""
        if len(x) < 2:
            return
        self.means.add("Diversity/batch_spread", x.var(dim=0).mean().sqrt())
        if c is not None:  # variance around class means, from sums: no loop over classes, no synchronisation
            x, count = x.flatten(1), c.sum(dim=0).clamp_min(1)
            centre = (c.t() @ x) / count[:, None]
            freedom = (count - 1).sum().clamp_min(1)
            within = torch.addmm(x, c, centre, alpha=-1).square().sum(dim=0) / freedom
            self.means.add("Diversity/class_spread", within.mean().sqrt())
