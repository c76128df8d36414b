"""Make an unconditional teacher of a class-conditional one that was trained with label dropout, without training.

    python pretrained/recipes/drop_classes.py --teacher=digits-teacher --out=digits-teacher-uncond.safetensors

Such a network knows "no label", and that is a model of all classes together: the result gives the same images as the
original asked without a label. It is the teacher with which a student with classes and a teacher without are tried
(docs/objectives.md).
"""

import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from refine.checkpoints import load_teacher, resolve
from refine.checkpoints.native import save_networks
from refine.dnnlib import sha256_of_file
from refine.networks.bases import Denoiser


@torch.no_grad()
def drop_classes(teacher: Denoiser) -> Denoiser:
    """The denoiser D'(x, sigma) = D(x, sigma, no label), with label_dim 0.

    Args:
        teacher: One of `refine.networks.edm`'s denoisers, trained with label dropout.

    Raises:
        ValueError: It has no classes, or never saw a missing label.
    """
    if not teacher.has_null_label:
        found = "was trained without label dropout" if teacher.label_dim else "has no classes"
        raise ValueError(f"this teacher {found}; expected one that knows a missing label")
    state = teacher.state_dict()
    del state["model.map_label.weight"]
    # SongUNet adds the embedding's bias to what map_layer0 takes, with a label or without; DhariwalUNet has none.
    bias = state.pop("model.map_label.bias", None)
    if bias is not None:
        weight, old = state["model.map_layer0.weight"].double(), state["model.map_layer0.bias"]
        state["model.map_layer0.bias"] = (old.double() + weight @ bias.double()).to(old)
    kwargs = {**teacher.init_kwargs, "label_dim": 0}
    del kwargs["label_dropout"]
    result = type(teacher)(**kwargs).eval().requires_grad_(False)
    result.load_state_dict(state)
    return result


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--teacher", required=True, metavar="FILE|NAME")
@click.option("--out", required=True, type=click.Path(dir_okay=False))
def main(teacher, out):
    source = resolve(teacher, "teacher")
    try:
        network = drop_classes(load_teacher(teacher))
    except ValueError as error:
        raise click.ClickException(f"{teacher}: {error}") from error
    provenance = {
        "recipe": "pretrained/recipes/drop_classes.py",
        "teacher": {"file": source.name, "sha256": sha256_of_file(source)},
    }
    save_networks(out, {"ema": network}, provenance=provenance)


if __name__ == "__main__":
    main()
