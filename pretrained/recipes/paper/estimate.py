"""What the recipes of this folder cost: counted floating-point operations, memory, and the time that they make.

    python pretrained/recipes/paper/estimate.py [RECIPE.toml …] [--share=0.4] [--tflops=T]

Every recipe is a dry run: its command is parsed as refine.py would, both networks are built at their official sizes on
PyTorch's meta device (no weights, no memory), and one iteration of the trainer, backward passes included but without
Adam, runs there while PyTorch counts multiplications and additions of convolutions, matrix products and attention, and
the tensors that backward passes need are added up.

--share is what an H100 is assumed to sustain of its peak (67 · 10¹² operations a second in float32, 495 in TF32, 989 in
bfloat16 and float16, without sparsity), by the --precision of the recipe. It is not measured, and neither is the time
that follows from it. --tflops says the speed itself, for another GPU. The memory is that of weights, averages, Adam and
what backward passes need, at the recipe's --batch-gpu; a GPU needs more, for convolutions and what lies idle.
"""

import shlex
import sys
from pathlib import Path

import click

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[2]))

import torch  # noqa: E402

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from refine.checkpoints.registry import build_empty  # noqa: E402
from refine.cli.refine_cmd import make_config  # noqa: E402
from refine.cli.refine_cmd import refine as refine_command  # noqa: E402
from refine.config import RefineConfig  # noqa: E402
from refine.networks.one_step import OneStepGenerator  # noqa: E402
from refine.training.assemble import ONE_STEP  # noqa: E402
from refine.training.counting import H100_PEAK, H100_SHARE, count, h100_precision, meta_trainer  # noqa: E402
from refine.training.trainer import Trainer  # noqa: E402


def read_recipe(path: Path) -> dict:
    with path.open("rb") as file:
        return tomllib.load(file)


def parse_command(recipe: dict) -> RefineConfig:
    """The options of a recipe's command, checked as on the command line."""
    words = shlex.split(recipe["command"])
    assert words[:2] == ["python", "refine.py"], recipe["command"]
    params = refine_command.make_context("refine.py", words[2:]).params
    others = ("resume", "config_file", "show", "dry_run", "as_json")
    return make_config({name: value for name, value in params.items() if name not in others})


def build(table: dict) -> torch.nn.Module:
    return build_empty(table["class"], table["kwargs"]).to("meta")


def assemble(recipe: dict) -> tuple[RefineConfig, Trainer]:
    """The recipe's options, and its trainer with a batch of 2 on the meta device."""
    config = parse_command(recipe)
    teacher = build(recipe["teacher"])
    if config.gan == ONE_STEP:
        with torch.device("meta"):
            student = OneStepGenerator.from_teacher(teacher, config.sigma_init)
    else:
        student = build(recipe["student"])
    guide = build(recipe["guide"]) if "guide" in recipe else None
    return config, meta_trainer(config, student, teacher, guide)


def dry_run(recipe: dict) -> dict:
    """One iteration of the recipe's trainer without numbers.

    Returns:
        'config', 'messages' of the bridge, 'parameters' (student, teacher, guide or 0), and what is 'counted'.
    """
    config, trainer = assemble(recipe)
    guide = getattr(trainer.teacher, "guide", torch.nn.Module())
    return {
        "config": config,
        "messages": trainer.bridge.messages(trainer.null_label),
        "parameters": [sum(p.numel() for p in network.parameters()) for network in (trainer.G, trainer.aux, guide)],
        "counted": count(trainer),
    }


def describe(recipe: dict, result: dict, share: float, tflops: float | None = None) -> str:
    config, expected, counted = result["config"], recipe["expected"], result["counted"]
    total, at_once, precision = counted.flops(config), config.batch_gpu or config.batch, h100_precision(config)
    gpu = f"one GPU that sustains {tflops} TFLOP/s" if tflops else f"an H100 at {share:.0%} of its {precision}"
    tflops = tflops or share * H100_PEAK[precision]
    numbers = f"{expected.get('before', '–')} → {expected.get('after', 'not known')}"
    student, teacher, guide = (f"{count / 1e6:.1f} M" for count in result["parameters"])
    guide = f", guide {guide}" if result["parameters"][2] else ""
    lines = [
        recipe["title"],
        f"  {recipe['command']}",
        f"  expected   {expected['metric']}: {numbers} ({expected['source']})",
        f"  networks   student {student}, teacher {teacher}{guide} parameters",
        *(f"  bridge     {line}" for line in result["messages"]),
        f"  counted    {counted.flops_per_image / 1e9:,.0f} GFLOP an image, {total / 1e18:.2f} EFLOP "
        f"for {config.kimg:g} kimg at batch {config.batch}",
        f"  memory     {counted.memory(config) / 2**30:,.1f} GiB at least, with {at_once} images at once "
        f"({counted.fixed_bytes / 2**30:,.1f} GiB of weights and Adam, "
        f"{counted.bytes_per_image / 2**20:,.0f} MiB an image)",
        f"  estimate   {total / tflops / 1e12 / 3600:,.1f} hours on {gpu}",
    ]
    return "\n".join(lines)


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("recipes", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--share", type=float, default=H100_SHARE, show_default=True, help="What an H100 sustains of its peak.")
@click.option("--tflops", type=float, help="Speed that the GPU sustains, in place of a share of an H100's.")
def main(recipes, share, tflops):
    for path in recipes or sorted(FOLDER.glob("*.toml")):
        recipe = read_recipe(path)
        try:
            click.echo(describe(recipe, dry_run(recipe), share, tflops) + "\n")
        except ValueError as error:  # one of diffusers needs that package
            click.echo(f"{path.name} is left out: {error}", err=True)


if __name__ == "__main__":
    main()
