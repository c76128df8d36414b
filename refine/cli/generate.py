"""`generate.py --network=FILE --seeds=0-35`: options and printing; the work is `refine.evaluation.generate`."""

from __future__ import annotations

from typing import Any

import click

from refine.cli.options import (
    kwargs_option,
    network_file,
    parse_ints,
    sampler_options,
    sigma_init_option,
    taken_sampler,
    teacher_options,
)
from refine.config import OPS_HELP, OPS_MODES
from refine.device import prepare_device
from refine.errors import option
from refine.processes import one_voice, together


def _parse_seeds(_ctx: click.Context, _param: click.Parameter, value: str) -> list[int]:
    with option("--seeds"):
        return parse_ints(value)


@click.command("generate", context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--network",
    required=True,
    metavar="FILE|NAME|RUN",
    help="A generator, a diffusion model, one-step:FILE (a diffusion model used once), or a run folder, of which the "
    "best snapshot is taken.",
)
@kwargs_option("--gan-kwargs", "--network")
@sigma_init_option()
@click.option("--seeds", required=True, callback=_parse_seeds, metavar="LIST", help="One image each, e.g. 0-35,40.")
@click.option("--outdir", required=True, metavar="DIR", help="Where seed0000.png … go; a grid of them is DIR-grid.png.")
@click.option(
    "--class", "class_index", type=click.IntRange(min=0), help="Class of all images.  [default: drawn per seed]"
)
@click.option(
    "--trunc", "truncation_psi", type=float, default=1.0, show_default=True, help="Truncation psi of a StyleGAN2."
)
@click.option(
    "--noise-mode",
    type=click.Choice(["const", "random", "none"]),
    default="const",
    show_default=True,
    help="Noise of a StyleGAN2.",
)
@click.option("--batch", type=click.IntRange(min=1), help="Images per batch.  [default: 16, from 1024x1024 on fewer]")
@teacher_options
@click.option("--device", help="cpu, cuda or cuda:N.  [default: cuda where there is one]")
@click.option("--ops", type=click.Choice(OPS_MODES), help=f"{OPS_HELP}  [default: $REFINE_OPS, else auto]")
@sampler_options
def command(
    device: str | None,
    ops: str | None,
    guide: str | None,
    guidance: float,
    teacher_kwargs: dict[str, Any] | None,
    **options: Any,
) -> None:
    """Makes images by seed: the same seed gives the same latent as in NVIDIA's tools."""
    with one_voice():
        given = taken_sampler(options)
        options["network"] = network_file(options["network"], "--network")
        device = prepare_device(device, ops)
    from refine.evaluation.generate import generate
    from refine.evaluation.teachers import TeacherOptions
    from refine.metrics.pipeline import sharing
    from refine.networks.sampler_settings import SamplerChoice
    from refine.torch_utils import distributed

    with together(cuda=False), sharing():
        teachers = TeacherOptions(guide, guidance, teacher_kwargs)
        paths = generate(**options, sampler=SamplerChoice(given), device=device, teachers=teachers)
        if distributed.is_main():
            click.echo(f"{len(paths) - 1} images in {paths[0].parent}, a grid of them in {paths[-1]}")
