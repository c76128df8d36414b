"""`compare_fid.py --before=A --after=B --ref=…`: options and printing around `refine.evaluation.compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from refine.cli.options import (
    Finite,
    kwargs_option,
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


def _parse_ranges(_ctx: click.Context, _param: click.Parameter, value: str) -> list[int]:
    with option("--seeds"):
        if len(set(value.split(","))) < len(value.split(",")):
            raise ValueError(f"--seeds is {value}; expected different seed ranges")
        return parse_ints(value)


@click.command(
    "compare",
    short_help="Compare two networks on the same seeds.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "--before", required=True, metavar="FILE|NAME|RUN", help="Network to start from: a generator or a diffusion model."
)
@click.option(
    "--after",
    required=True,
    metavar="FILE|NAME|RUN",
    help="Network to judge, or a run folder: all its snapshots, as a curve over kimg; the best one is judged.",
)
@click.option(
    "--ref",
    required=True,
    metavar="FILE|DIR|NAME",
    help="What the images are compared with: statistics, a folder or zip of images, a generator, or a teacher.",
)
@click.option(
    "--detector",
    metavar="FILE|NAME",
    help="Feature space: digits, inception-2015-12-05, dinov2-vitl14, effnet-lite0, or a file with a detector or a "
    "teacher.  [default: the one that --ref was made with, where it says so]",
)
@click.option("--teacher", metavar="FILE|NAME", help="A diffusion model to be measured as well, on images of its own.")
@click.option(
    "--data", metavar="DIR|ZIP", help="Real images to be measured as well: how near to real do real images come?"
)
@click.option(
    "--trust-detector", is_flag=True, help="Run a --detector that is TorchScript, which can do more than compute."
)
@click.option(
    "--num",
    "--num-images",
    "num",
    type=click.IntRange(min=2),
    default=2000,
    show_default=True,
    help="Images per seed range; the longer name is for torchrun, which takes --num for its own.",
)
@click.option(
    "--seeds",
    default="0,1,2",
    show_default=True,
    callback=_parse_ranges,
    metavar="LIST",
    help="Seed ranges; range k begins at seed k·num.",
)
@click.option(
    "--also",
    default="",
    metavar="LIST",
    help="Metrics that take longer: dc, fdinf (FID∞), is (Inception Score), kidsub, mmd, sliced.",
)
@click.option(
    "--ref-num",
    type=click.IntRange(min=2),
    help="Images of a --ref that is a generator.  [default: 50000]",
)
@click.option("--no-curve", is_flag=True, help="Of an --after that is a run folder, measure only the snapshot judged.")
@click.option("--no-cache", is_flag=True, help="Measure the images of --ref again, and keep nothing in the cache.")
@click.option("--outdir", metavar="DIR", help="Where to write comparison.json, the figures and report.html.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    help="Images per batch.  [default: 100, above 256x256 as many as have their pixels]",
)
@teacher_options
@click.option("--device", help="Device, such as cpu or cuda:0.  [default: cuda if there is one]")
@noise_mode_option("random")
@click.option(
    "--trunc", "truncation_psi", type=Finite(), default=1.0, show_default=True, help="Truncation psi of a StyleGAN2."
)
@click.option(
    "--ops", type=click.Choice(OPS_MODES, case_sensitive=False), help=f"{OPS_HELP}  [default: $REFINE_OPS, else auto]"
)
@sampler_options
@kwargs_option("--gan-kwargs", "--before")
@sigma_init_option()
def command(
    as_json: bool,
    seeds: list[int],
    device: str | None,
    also: str,
    no_cache: bool,
    no_curve: bool,
    ops: str | None,
    guide: str | None,
    guidance: float,
    teacher_kwargs: dict[str, Any] | None,
    **options: Any,
) -> None:
    """Compares two networks on the same seeds: Fréchet and kernel distance, precision, recall, classes.

    \b
    --before=my-gan.pkl --after=runs/00000-… --ref=images.zip --detector=inception-2015-12-05
    --before=my-gan.pkl --after=runs/00000-… --ref=my-edm.pkl --detector=my-edm.pkl

    A distance is called FID only with the Inception-2015-12-05 weights as --detector.
    """
    with one_voice():
        from refine.evaluation.compare import compare, is_first_process
        from refine.evaluation.job import check_numbers
        from refine.networks.sampler_settings import SamplerChoice

        check_numbers(options["num"], seeds, options["batch"])
        sampler = SamplerChoice(taken_sampler(options))
        chosen = prepare_device(device, ops)
    further = [name.strip() for name in also.split(",") if name.strip()]
    from refine.evaluation.tables import curve_text, feature_space_note, text_table
    from refine.evaluation.teachers import TeacherOptions
    from refine.metrics.pipeline import sharing

    with together(cuda=False), sharing():
        more: dict[str, Any] = {"sampler": sampler, "curve": not no_curve, "cache": not no_cache}
        more["teachers"] = TeacherOptions(guide, guidance, teacher_kwargs)
        results = compare(**options, seed_ranges=seeds, device=chosen, also=further, **more)
        if not is_first_process():
            return
    if as_json:
        click.echo(json.dumps(results, indent=2))
        return
    click.echo(text_table(results))
    if results.get("curve"):
        click.echo(f"\n{curve_text(results)}")
    click.echo(f"\n{results['summary']}\n{feature_space_note(results)}")
    if options["outdir"]:
        click.echo(f"Report: {Path(options['outdir']) / 'report.html'}")
