"""Double the resolution of a StyleGAN2 generator without training: one more block, whose images begin at zero.

    python pretrained/recipes/grow_gan.py --gan=digits-gan --out=digits-gan-64.safetensors

The result draws the same images, enlarged by the generator's own filter: soft at first. It is the student with which
the bridge from a larger student to a smaller teacher is tried (docs/objectives.md); a refinement fills the new block.
"""

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from refine.checkpoints import load_generator, resolve
from refine.checkpoints.native import save_networks
from refine.dnnlib import sha256_of_file
from refine.networks.stylegan2 import Generator


@torch.no_grad()
def grow(G: Generator, seed: int = 0) -> Generator:
    """`G` with one more block at twice its resolution: G'(z, c) is G(z, c), upsampled."""
    torch.manual_seed(seed)
    size = 2 * G.img_resolution
    larger = Generator(**{**G.init_kwargs, "img_resolution": size}).eval()
    missing, unexpected = larger.load_state_dict(G.state_dict(), strict=False)
    block = getattr(larger.synthesis, f"b{size}")
    assert not unexpected and all(name.startswith(f"synthesis.b{size}.") for name in missing)
    block.torgb.weight.zero_()
    block.torgb.bias.zero_()
    for conv in (block.conv0, block.conv1):
        conv.noise_strength.zero_()
    return larger


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--gan", required=True, metavar="FILE|NAME")
@click.option("--out", required=True, type=click.Path(dir_okay=False))
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed of the new block's weights.")
def main(gan, out, seed):
    source = resolve(gan, "generator")
    provenance = {
        "recipe": "pretrained/recipes/grow_gan.py",
        "seed": seed,
        "student": {"file": source.name, "sha256": sha256_of_file(source)},
    }
    save_networks(out, {"G_ema": grow(load_generator(gan), seed)}, provenance=provenance)


if __name__ == "__main__":
    main()
