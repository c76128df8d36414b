"""`python -m refine ops build|list|clean`: the compiled ops ahead of time, as for a container image."""

import json
import shutil

import click

from refine.errors import option

DEVICES = ("auto", "cpu", "cuda")


@click.group(short_help="Build the compiled ops ahead of time, list, remove them.")
def ops() -> None:
    """The compiled ops: build them ahead of time, see them, remove them."""


@ops.command(short_help="Build the ops that are not in the cache.")
@click.option(
    "--device",
    type=click.Choice(DEVICES, case_sensitive=False),
    default="auto",
    show_default=True,
    help="auto = the CPU, and CUDA where torch is built for it and there is NVRTC or nvcc.",
)
@click.option(
    "--portable", is_flag=True, help="CPU ops for other machines of this architecture, not for this one only."
)
def build(device: str, portable: bool) -> int:
    """Builds the ops of every device that are not in the cache and says where they lie.

    In a Dockerfile set REFINE_CACHE to a folder that the image keeps, add --portable, and, for CUDA, say the GPUs in
    TORCH_CUDA_ARCH_LIST (default: one target for each generation). The image then needs no compiler.

    Exit code: 0 = all are there, 1 = not all.
    """
    if portable and device == "cuda":
        raise ValueError("--portable is for CPU ops; for CUDA, TORCH_CUDA_ARCH_LIST says for which GPUs")
    import torch

    from refine.torch_utils.build import device_code

    devices = ["cpu", "cuda"] if device == "auto" else [device]
    if device == "auto" and torch.version.cuda is None:
        devices = ["cpu"]
    elif device == "auto" and device_code.find_compiler() is None:
        devices = ["cpu"]
        click.echo("neither NVRTC nor nvcc, so no ops for CUDA", err=True)
    built = [_build_one(name, portable and name == "cpu") for name in devices]
    return 0 if all(built) else 1


def _build_one(device: str, portable: bool) -> bool:
    """Whether they are there now; says where, or why not."""
    from refine.torch_utils.build import custom_ops, device_code
    from refine.torch_utils.build.progress import line
    from refine.torch_utils.ops import bias_act, upfirdn2d  # noqa: F401 - they note their kernels

    try:
        paths = device_code.build() if device == "cuda" else [custom_ops.obtain(device, portable).path]
    except custom_ops.FAILURES as error:
        line.break_off()
        click.echo(f"{device}: {' '.join(str(error).split())}", err=True)
        return False
    for path in paths:
        click.echo(f"{device}: {path}")
    return True


@ops.command("list", short_help="List the libraries in the cache.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def list_libraries(as_json: bool) -> None:
    """Lists the libraries in the cache, those of other versions and machines included."""
    from refine.torch_utils.build import op_cache

    paths = [str(path) for entry in op_cache.entries() for path in sorted(entry.glob("*.*.*"))]
    click.echo(json.dumps(paths, indent=2) if as_json else "\n".join(paths) or "none")


@ops.command(short_help="Remove every compiled op from the cache.")
def clean() -> None:
    """Removes every compiled op from the cache; what is needed is built again at its next use."""
    from refine.torch_utils.build import op_cache

    entries = op_cache.entries()
    with option("clean"):
        for entry in entries:
            shutil.rmtree(entry)
    click.echo(f"{len(entries)} folders removed")
