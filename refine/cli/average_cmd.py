"""`python -m refine average RUN --length=…`: an average of the student of another length, after the run."""

import click


@click.command(
    "average",
    short_help="Make an average of a run's student of any length.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.argument("run")
@click.option(
    "--length",
    type=float,
    required=True,
    help="Standard deviation of the average relative to the run so far: 0.01 = its last steps, 0.288 = all alike.",
)
@click.option("--kimg", type=float, help="Where in the run the average ends.  [default: at the last snapshot]")
@click.option("--out", required=True, metavar="FILE.safetensors", help="The file to write.")
def average(run: str, length: float, kimg: float | None, out: str) -> None:
    """Makes an average of the student of any length from what the snapshots of a RUN folder keep."""
    from refine.checkpoints.native import save_networks
    from refine.errors import option
    from refine.evaluation.run_folder import read_run_folder
    from refine.training.averages import reconstruct

    with option("RUN"):
        folder = read_run_folder(run)
        if folder is None:
            raise ValueError(f"{run} is not a folder; expected a run folder")
        if not folder.snapshots:
            raise ValueError(f"{run} holds no snapshot that says when it was saved")
        snapshots = [(snapshot.kimg, snapshot.path) for snapshot in folder.snapshots]
        last = snapshots[-1][0]
    if kimg is not None and not 0 < kimg <= last:
        raise ValueError(f"--kimg is {kimg:g}; expected a number up to {last:g}, the last snapshot's")
    if not out.endswith(".safetensors"):
        raise ValueError(f"--out: found {out}; expected a name that ends with .safetensors")
    with option("--length"):
        network, error = reconstruct(snapshots, length, kimg or last)
    provenance = {"run": folder.path.name, "average_length": length, "kimg": kimg or last, "profile_error": error}
    with option("--out"):
        save_networks(out, {"G_ema": network}, provenance=provenance)
    click.echo(f"Wrote {out}: length {length:g} at {kimg or last:g} kimg, its profile met up to {100 * error:.2g} %")
