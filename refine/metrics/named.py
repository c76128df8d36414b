"""Metrics by name, as training runs ask for them: `fd2k-digits` takes 2,000 images and the space of `digits`."""

import re
from typing import Any

import torch

from refine.metrics.detectors import load_detector, metric_names
from refine.metrics.evaluate import evaluate
from refine.metrics.references import load_reference
from refine.metrics.sampling import sample_images


class NamedMetric:
    """A metric of generators: everything `evaluate` measures, on the seeds 0 … N−1, led by the Fréchet distance.

    Args:
        name: `fd<N>-<detector>`; N is a number, `k` counts thousands: fd500-digits, fd2k-digits.
        reference: File, or name in pretrained/index.toml, of the reference statistics.

    Raises:
        ValueError: The name is no metric, or detector and reference cannot be read or do not fit.
    """

    def __init__(self, name: str, reference: str):
        match = re.fullmatch(r"fd(\d+)(k?)-(.+)", name)
        if not match or int(match[1]) == 0:
            raise ValueError(f"unknown metric {name!r}; expected fd<N>-<detector>, such as fd2k-digits")
        self.name = name
        self.num = int(match[1]) * (1000 if match[2] else 1)
        if self.num < 2:
            raise ValueError(f"{name} measures {self.num} image; expected at least 2")
        self._detector = load_detector(match[3])
        self._reference = load_reference(reference)
        self._reference.check_detector(self._detector)
        self.key = metric_names(self._detector)[0]  # of the distance in the results; smaller is better

    def measure(self, G: torch.nn.Module, device: torch.device | str) -> dict[str, Any]:
        """Results of `evaluate`; neither the network nor the caller's random state changes."""
        detector = self._detector.to(device)
        return evaluate(sample_images(G, range(self.num), device=device), detector, self._reference)
