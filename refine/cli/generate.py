"""`generate.py --network=FILE --seeds=0-35`: options and printing; the work is `refine.evaluation.generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from refine.cli.options import (
    Finite,
    is_typed,
    kwargs_option,
    network_file,
    noise_mode_option,
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


def _parse_seeds(_ctx: click.Context, param: click.Parameter, value: str | None) -> list[int] | None:
    with option(param.opts[0]):
        return None if value is None else parse_ints(value)


@click.command(
    "generate",
    short_help="Make images by seed, style mixing, films.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "--network",
    "--after",
    "network",
    required=True,
    metavar="FILE|NAME|RUN",
    help="A generator, a diffusion model, one-step:FILE (a diffusion model used once), or a run folder, of which the "
    "best snapshot is taken.",
)
@click.option("--before", metavar="FILE|NAME|RUN", help="Another network: its image stands to the left of each.")
@click.option("--seeds", callback=_parse_seeds, metavar="LIST", help="One image each, e.g. 0-35,40.")
@click.option("--outdir", metavar="DIR", help="Where seed0000.png … go; a grid of them is DIR-grid.png.")
@click.option("--subdirs", is_flag=True, help="Folders of 1000 seeds each in --outdir.")
@click.option("--class-columns", is_flag=True, help="An image of every class for every seed; a row each in the grid.")
@click.option("--rows", callback=_parse_seeds, metavar="LIST", help="Style mixing: seeds of the rows, beside --cols.")
@click.option("--cols", callback=_parse_seeds, metavar="LIST", help="Style mixing: seeds of the columns.")
@click.option(
    "--col-styles",
    default="0-6",
    show_default=True,
    callback=_parse_seeds,
    metavar="LIST",
    help="Style mixing: which styles are those of the column.",
)
@click.option("--projected-w", metavar="FILE.npz", help="Images of the styles in a file, as NVIDIA's projector has it.")
@click.option("--video", metavar="FILE", help="A film from seed to seed: .mp4 (imageio-ffmpeg), .gif, .png or .webp.")
@click.option("--frames", type=click.IntRange(min=1), default=60, show_default=True, help="From one seed to the next.")
@click.option(
    "--class", "class_index", type=click.IntRange(min=0), help="Class of all images.  [default: drawn per seed]"
)
@click.option(
    "--trunc", "truncation_psi", type=Finite(), default=1.0, show_default=True, help="Truncation psi of a StyleGAN2."
)
@noise_mode_option("const")
@click.option("--batch", type=click.IntRange(min=1), help="Images per batch.  [default: 16, from 1024x1024 on fewer]")
@teacher_options
@click.option("--device", help="cpu, cuda or cuda:N.  [default: cuda where there is one]")
@click.option(
    "--ops", type=click.Choice(OPS_MODES, case_sensitive=False), help=f"{OPS_HELP}  [default: $REFINE_OPS, else auto]"
)
@sampler_options
@kwargs_option("--gan-kwargs", "--network")
@sigma_init_option()
def command(
    device: str | None,
    ops: str | None,
    guide: str | None,
    guidance: float,
    teacher_kwargs: dict[str, Any] | None,
    **options: Any,
) -> None:
    """Makes images by seed: the same seed gives the same latent as in NVIDIA's tools.

    \b
    --seeds=0-35                    images of seeds
    --rows=0-3 --cols=4-9           style mixing
    --projected-w=projected_w.npz   images of styles
    --seeds=0-5 --video=out.gif     a film from seed to seed
    """
    with one_voice():
        work = _work(options)
        given = taken_sampler(options)
        options["network"] = network_file(options["network"], "--network")
        if options["before"] is not None:
            options["before"] = network_file(options["before"], "--before")
        device = prepare_device(device, ops)
    from refine.evaluation.generate import check_sides, generate, open_side
    from refine.evaluation.styles import film, images_of_styles, mix_styles
    from refine.evaluation.teachers import TeacherOptions
    from refine.metrics.pipeline import sharing
    from refine.networks.sampler_settings import SamplerChoice
    from refine.torch_utils import distributed

    with together(cuda=False), sharing():
        teachers, choice = TeacherOptions(guide, guidance, teacher_kwargs), SamplerChoice(given)
        styles = {name: options.pop(name) for name in ("rows", "cols", "col_styles", "projected_w", "video", "frames")}
        if work == "seeds":
            paths = generate(**options, sampler=choice, device=device, teachers=teachers)
        else:  # few images, made by the first process
            if not distributed.is_main():
                return
            psi, index, outdir = options["truncation_psi"], options["class_index"], options["outdir"]
            how = (device, options["batch"], "const", psi, teachers, choice, options["sigma_init"])
            side = open_side(options["network"], *how, options["gan_kwargs"])
            check_sides({"network": side}, choice, teachers, psi, None, options["sigma_init"])
            if work == "video":
                click.echo(film(side, options["seeds"], styles["video"], styles["frames"], index, psi))
                return
            if work == "rows":
                paths = mix_styles(side, styles["rows"], styles["cols"], styles["col_styles"], outdir, index, psi)
            else:
                paths = images_of_styles(side, styles["projected_w"], outdir)
        if distributed.is_main():
            where = Path(options["outdir"])
            click.echo(f"{len(paths) - 1} images in {where}, a grid of them in {paths[-1]}")


# What uses an option; every other one is used by all. Styles that are mixed, read or filmed have constant noise.
_USED_BY = {
    **dict.fromkeys(["before", "class_columns", "subdirs", "noise_mode"], ("seeds",)),
    **dict.fromkeys(["class_index", "truncation_psi"], ("seeds", "rows", "video")),
    **dict.fromkeys(["cols", "col_styles"], ("rows",)),
    "seeds": ("seeds", "video"),
    "frames": ("video",),
    "outdir": ("seeds", "rows", "projected_w"),
}
_FLAGS = {"class_index": "--class", "truncation_psi": "--trunc"}


def _work(options: dict[str, Any]) -> str:
    """What is asked for: 'seeds', 'rows' (style mixing), 'projected_w' or 'video'.

    Raises:
        ValueError: Something is missing for it, or does not belong to it.
    """
    chosen = [name for name in ("rows", "projected_w", "video") if options[name] is not None]
    if len(chosen) > 1:
        raise ValueError(f"{_flag(chosen[0])} and {_flag(chosen[1])} are two different things; expected one of them")
    work = chosen[0] if chosen else "seeds"
    for name, works in _USED_BY.items():
        if is_typed(name) and work not in works:
            raise ValueError(
                f"{_flag(name)} " + (f"does not go with {_flag(work)}" if chosen else f"needs {_flag(works[0])}")
            )
    if options["class_columns"] and options["class_index"] is not None:
        raise ValueError("--class does not go with --class-columns, which shows all of them")
    needed = {"seeds": ("seeds", "outdir"), "rows": ("cols", "outdir"), "video": ("seeds",), "projected_w": ("outdir",)}
    for name in needed[work]:
        if options[name] is None:
            raise ValueError(f"{_flag(name)} is missing" + (f", beside {_flag(work)}" if chosen else ""))
    return work


def _flag(name: str) -> str:
    return _FLAGS.get(name, f"--{name.replace('_', '-')}")
