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


# Peak of an H100 SXM in 10¹² operations a second, as its maker states it.
PEAK = {"fp32": 67.0, "tf32": 495.0, "bf16": 989.0, "fp16": 989.0}


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
    small = RefineConfig.from_dict({**config.as_dict(), "batch": 2, "batch_gpu": None})
    return config, Trainer(small, student, teacher, device="meta", guide=guide)


class Kept:
    """Adds up what backward passes need: each storage once, the most that is alive at a time."""

    def __init__(self, parameters):
        self.bytes = self.peak = 0
        self._known = {p.untyped_storage()._cdata for p in parameters}
        self._seen = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known and storage._cdata not in self._seen:
            self._seen[storage._cdata] = tensor  # alive, so that no other storage takes its place
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
        return tensor

    def begin_another_pass(self) -> None:
        self.bytes, self._seen = 0, {}


def dry_run(recipe: dict) -> dict:
    """One iteration of the recipe's trainer without numbers.

    Returns:
        'config', 'messages' of the bridge, 'parameters' (student, teacher, guide or 0), 'flops_per_image': of the
        auxiliary and the student steps together, for one image of the batch, and 'bytes': of weights and optimisers,
        and 'bytes_per_image': of what the larger of the two backward passes needs.
    """
    config, trainer = assemble(recipe)
    for optimizer in trainer.optimizers.values():  # Adam has no matrix products; fused, it takes no meta tensors
        optimizer.apply = lambda: torch.zeros([], device="meta")
    networks = (trainer.G, trainer.aux, trainer.teacher)
    kept = Kept(p for network in networks for p in network.parameters())
    for name in ("aux_step", "student_step"):
        step = getattr(trainer, name)
        setattr(trainer, name, lambda *args, step=step, **more: (kept.begin_another_pass(), step(*args, **more)))
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda t: t):
        trainer.step()
    guide = sum(p.numel() for p in getattr(trainer.teacher, "guide", torch.nn.Module()).parameters())
    student, aux, asked = (sum(p.numel() for p in network.parameters()) for network in networks)
    averages = max(len(trainer.averages.networks), 1)
    return {
        "config": config,
        "messages": trainer.bridge.messages(trainer.null_label),
        "parameters": (student, aux, guide),
        "flops_per_image": counter.get_total_flops() / trainer.config.batch,
        "bytes": 4 * (student * (4 + averages) + 4 * aux + asked),  # weight, gradient and Adam's two; averages
        "bytes_per_image": kept.peak / trainer.config.batch,
    }


def describe(recipe: dict, result: dict, share: float, tflops: float | None = None) -> str:
    config, expected = result["config"], recipe["expected"]
    total = result["flops_per_image"] * config.kimg * 1000
    at_once = config.batch_gpu or config.batch
    memory = (result["bytes"] + at_once * result["bytes_per_image"]) / 2**30
    precision = "bf16" if config.precision == "auto" else config.precision  # what it is on an H100
    gpu = f"one GPU that sustains {tflops} TFLOP/s" if tflops else f"an H100 at {share:.0%} of its {precision}"
    tflops = tflops or share * PEAK[precision]
    numbers = f"{expected.get('before', '–')} → {expected.get('after', 'not known')}"
    student, teacher, guide = (f"{count / 1e6:.1f} M" for count in result["parameters"])
    guide = f", guide {guide}" if result["parameters"][2] else ""
    lines = [
        recipe["title"],
        f"  {recipe['command']}",
        f"  expected   {expected['metric']}: {numbers} ({expected['source']})",
        f"  networks   student {student}, teacher {teacher}{guide} parameters",
        *(f"  bridge     {line}" for line in result["messages"]),
        f"  counted    {result['flops_per_image'] / 1e9:,.0f} GFLOP an image, {total / 1e18:.2f} EFLOP "
        f"for {config.kimg:g} kimg at batch {config.batch}",
        f"  memory     {memory:,.1f} GiB at least, with {at_once} images at once "
        f"({result['bytes'] / 2**30:,.1f} GiB of weights and Adam, "
        f"{result['bytes_per_image'] / 2**20:,.0f} MiB an image)",
        f"  estimate   {total / tflops / 1e12 / 3600:,.1f} hours on {gpu}",
    ]
    return "\n".join(lines)


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("recipes", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--share", type=float, default=0.4, show_default=True, help="What an H100 sustains of its peak.")
@click.option("--tflops", type=float, help="Speed that the GPU sustains, in place of a share of an H100's.")
def main(recipes, share, tflops):
    for path in recipes or sorted(FOLDER.glob("*.toml")):
        recipe = read_recipe(path)
        click.echo(describe(recipe, dry_run(recipe), share, tflops) + "\n")


if __name__ == "__main__":
    main()
