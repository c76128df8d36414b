"""A generator that is not a StyleGAN2: a convolutional decoder of digits, trained as a variational autoencoder.

python docs/example_generator.py --out=decoder.pt
export PYTHONPATH=docs DECODER=decoder.pt
python refine.py --gan=example_generator:decoder --teacher=digits-teacher-2 --preset=demo
"""

import argparse
import itertools
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class Decoder(nn.Module):
    """Latents (N, 16) and labels (N, 10) → images (N, 1, 32, 32)."""

    z_dim, c_dim, img_resolution, img_channels = 16, 10, 32, 1

    def __init__(self, width: int = 64):
        super().__init__()
        self.first = nn.Linear(self.z_dim + self.c_dim, width * 4 * 4)
        widths = [width, width, width // 2, width // 4]
        self.up = nn.ModuleList(nn.ConvTranspose2d(i, o, 4, 2, 1) for i, o in itertools.pairwise(widths))
        self.last = nn.Conv2d(widths[-1], self.img_channels, 3, 1, 1)

    def forward(self, z, c):
        x = self.first(torch.cat([z, c], dim=1)).unflatten(1, (-1, 4, 4))
        for conv in self.up:
            x = F.silu(conv(x))
        return torch.tanh(self.last(x))


def decoder() -> Decoder:
    """What `--gan=example_generator:decoder` calls: the network with the weights of the file $DECODER."""
    G = Decoder()
    G.load_state_dict(torch.load(os.environ.get("DECODER", "decoder.pt"), weights_only=True))
    return G


def train(images: torch.Tensor, labels: torch.Tensor, steps: int, batch: int = 64, seed: int = 0) -> Decoder:
    """A variational autoencoder of images (N, 1, 32, 32) in [-1, 1] with labels (N, 10); gives its decoder."""
    torch.manual_seed(seed)
    G, encoder = Decoder(), nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1), nn.SiLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.SiLU(), nn.Flatten(),
        nn.Linear(32 * 8 * 8, 2 * Decoder.z_dim),
    )  # fmt: skip
    optimizer = torch.optim.Adam([*G.parameters(), *encoder.parameters()], lr=2e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        pick = torch.randint(len(images), [batch])
        x, c = images[pick], labels[pick]
        mean, log_var = encoder(x).chunk(2, dim=1)
        z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(dim=1).mean()
        loss = 500 * (G(z, c) - x).square().mean() + kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 200 == 0:
            print(f"step {step} of {steps}  loss {loss.item():.1f}", file=sys.stderr)
    return G.eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pretrained" / "recipes"))
    from digits import load_digits

    digits, classes = load_digits()
    images, labels = torch.from_numpy(digits) / 127.5 - 1, F.one_hot(torch.from_numpy(classes), 10).float()
    torch.save(train(images, labels, options.steps).state_dict(), options.out)
