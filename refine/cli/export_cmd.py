"""`python -m refine export`: a network in the format that another tool reads."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from refine.cli.options import kwargs_as_typed, kwargs_option, network_file, sigma_init_option
from refine.errors import describe_os_error, option


@click.command("export", short_help="Write networks for other tools.")
@click.option(
    "--network",
    required=True,
    metavar="FILE|RUN",
    help="Networks to export: any file that this toolkit reads; of a run folder the best snapshot.",
)
@click.option("--like", metavar="FILE", help="Write this pickle again, with the networks in place of its own.")
@click.option("--out", required=True, metavar="FILE", help="The file to write.")
@click.option(
    "--format",
    "format_name",
    type=click.Choice(["native", "plain", "rosinality"], case_sensitive=False),
    help="Without --like. Default: rosinality for .pt, native for .safetensors, a graph for .onnx and .pt2; plain is "
    "safetensors with the network's own tensor names.",
)
@kwargs_option("--gan-kwargs", "--network")
@kwargs_option("--teacher-kwargs", "--network")
@sigma_init_option()
def export(
    network: str,
    like: str | None,
    out: str,
    format_name: str | None,
    gan_kwargs: dict[str, Any] | None,
    teacher_kwargs: dict[str, Any] | None,
    sigma_init: float | None,
) -> None:
    """Writes networks for other tools.

    With --like=original.pkl the result is that pickle with the refined weights in it: whatever loads the original
    loads it. With --out=x.onnx or x.pt2 (torch.export) it is a graph from latents to images for other runtimes.

    \b
    --network=runs/00000-… --like=my-gan.pkl --out=my-gan-refined.pkl
    --network=runs/00000-… --out=my-gan-refined.onnx
    """
    from refine.checkpoints import resolve, source_file
    from refine.checkpoints.sources import one_step

    typed = kwargs_as_typed(gan_kwargs, teacher_kwargs)
    suffix = out.rpartition(".")[2].lower()
    defaults = {"pt": "rosinality", "safetensors": "native", "onnx": "graph", "pt2": "graph"}
    if like is not None and format_name is not None:
        raise ValueError(f"--format={format_name} goes without --like, which already says the format")
    if like is None and format_name is None and suffix not in defaults:
        hint = "a .pkl beside --like, the pickle that it came from" if suffix == "pkl" else "another beside --format"
        raise ValueError(f"--out: found {out}; expected .pt, .safetensors, .onnx or .pt2, or {hint}")
    if format_name is not None and defaults.get(suffix) == "graph":
        raise ValueError(f"--format={format_name} does not go with --out={out}, which is a graph; expected no --format")
    if not Path(out).absolute().parent.is_dir():
        raise ValueError(f"--out: {Path(out).parent} is not a folder")
    with option("--network"):
        network = network_file(network, "--network")
        source = source_file(network)
    if sigma_init is not None and one_step.file_of(network) is None:
        raise ValueError("--sigma-init is for a --network of one-step:FILE; expected no --sigma-init")
    with option("--like"):
        original = None if like is None else resolve(like)

    from refine.checkpoints import export as formats  # imports torch

    if original is not None:
        with option("--like"):
            reason = formats.can_write_like(original)
            if reason:
                raise ValueError(reason)
    if like is None and (format_name or defaults[suffix]) == "graph":
        _write_graph(network, out, suffix, *typed, sigma_init)
        return
    with option("--network"):
        networks = _load(network, source, *typed, sigma_init)
    notes: list[str] = [note for net in networks.values() for note in getattr(net, "notes", ())]
    if original is not None:
        kept = _write_like(original, out, networks, notes)
        notes += [f"{name} is the original's" for name in kept]
    elif (format_name or defaults[suffix]) == "rosinality":
        with option("--network"), _writing():
            notes += formats.write_rosinality(out, networks)
    elif (format_name or defaults[suffix]) == "plain":
        with _writing():
            formats.write_plain(out, networks)
    else:
        with _writing():
            formats.write_native(out, networks, source)
    click.echo(f"Wrote {out}" + "".join(f"\n  {note}" for note in notes))


_Kwargs = Mapping[str, Any] | None


def _load(
    network: str, source: Path, kwargs: _Kwargs, in_words_typed: Callable[[str], str], sigma_init: float | None
) -> Mapping[str, Any]:
    from refine.checkpoints import load_generator
    from refine.checkpoints.export import load_all
    from refine.checkpoints.sources import one_step

    try:
        if one_step.file_of(network) is not None:
            return {"G_ema": load_generator(network, kwargs, sigma_init)}
        return load_all(source, kwargs)
    except ValueError as error:
        raise ValueError(in_words_typed(str(error))) from None


def _write_graph(
    network: str, out: str, suffix: str, kwargs: _Kwargs, in_words_typed: Callable[[str], str], sigma_init: float | None
) -> None:
    from refine.checkpoints import deploy, load_generator

    with option("--out"):
        deploy.check_installed(suffix)
    with option("--network"):
        try:
            G = load_generator(network, kwargs, sigma_init)
        except ValueError as error:
            raise ValueError(in_words_typed(str(error))) from None
        with _writing():
            said = deploy.write_graph(out, G)
    click.echo(f"Wrote {out}\n  {said}" + "".join(f"\n  {note}" for note in G.notes))


def _write_like(original: Path, out: str, networks: Mapping[str, Any], notes: list[str]) -> list[str]:
    """Puts those networks into the container that it has names for."""
    from refine.checkpoints.export import members, write_like
    from refine.networks.one_step import OneStepGenerator

    with option("--like"):
        held = members(original)
        if "ema" in held and "ema" not in networks and isinstance(networks.get("G_ema"), OneStepGenerator):
            networks = {"ema": networks["G_ema"].denoiser}  # a one-step generator's file holds the denoiser
        wanted = {name: network for name, network in networks.items() if name in held}
        if not wanted:
            found = ", ".join(networks)
            raise ValueError(f"{original} holds {', '.join(held)}; --network holds {found}, none of these")
        with _writing():
            return write_like(original, out, wanted, notes)


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Around what only writes: whatever the system refuses concerns `--out`."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"--out: {describe_os_error(error)}") from None
