"""What the recipes of this folder cost: counted floating-point operations of an iteration, and the time they make.

    python pretrained/recipes/paper/estimate.py [RECIPE.toml …] [--tflops=40]

Every recipe is a dry run: its command is parsed as refine.py would, both networks are built at their official sizes on
PyTorch's meta device (no weights, no memory), and one iteration of the trainer, backward passes included but without
Adam, runs there while PyTorch counts multiplications and additions of convolutions, matrix products and attention.

--tflops is the speed that the GPU is assumed to sustain, in 10¹² operations a second. The default, 40, is a guess for
an A100 in TF32 (156 at the peak); it is not measured, and neither is the time that follows from it.
"""

import shlex
import sys
from pathlib import Path

import click

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[2]))

import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

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
    small = RefineConfig.from_dict({**config.as_dict(), "batch": 2, "batch_gpu": None})
    return config, Trainer(small, student, teacher, device="meta")


def dry_run(recipe: dict) -> dict:
    """One iteration of the recipe's trainer without numbers.

    Returns:
        'config', 'messages' of the bridge, 'parameters' (student, teacher), and 'flops_per_image': of the auxiliary and
        the student step together, for one image of the batch.
    """
    config, trainer = assemble(recipe)
    for optimizer in trainer.optimizers.values():  # Adam has no matrix products; fused, it takes no meta tensors
        optimizer.step = lambda lr: torch.zeros([], device="meta")
    with FlopCounterMode(display=False) as counter:
        trainer.step()
    return {
        "config": config,
        "messages": trainer.bridge.messages(trainer.null_label),
        "parameters": tuple(sum(p.numel() for p in net.parameters()) for net in (trainer.G, trainer.teacher)),
        "flops_per_image": counter.get_total_flops() / trainer.config.batch,
    }


def describe(recipe: dict, result: dict, tflops: float) -> str:
    config, expected = result["config"], recipe["expected"]
    total = result["flops_per_image"] * config.kimg * 1000
    numbers = f"{expected.get('before', '–')} → {expected.get('after', 'not known')}"
    student, teacher = (f"{count / 1e6:.1f} M" for count in result["parameters"])
    lines = [
        recipe["title"],
        f"  {recipe['command']}",
        f"  expected   {expected['metric']}: {numbers} ({expected['source']})",
        f"  networks   student {student}, teacher {teacher} parameters",
        *(f"  bridge     {line}" for line in result["messages"]),
        f"  counted    {result['flops_per_image'] / 1e9:,.0f} GFLOP an image, {total / 1e18:.2f} EFLOP "
        f"for {config.kimg:g} kimg at batch {config.batch}",
        f"  estimate   {total / tflops / 1e12 / 3600:,.1f} hours on one GPU that sustains {tflops:g} TFLOP/s",
    ]
    return "\n".join(lines)


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("recipes", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--tflops", type=float, default=40.0, show_default=True, help="Speed that the GPU is assumed to sustain.")
def main(recipes, tflops):
    for path in recipes or sorted(FOLDER.glob("*.toml")):
        recipe = read_recipe(path)
        click.echo(describe(recipe, dry_run(recipe), tflops) + "\n")


if __name__ == "__main__":
    main()
