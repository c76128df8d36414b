"""The curves of runs side by side: the first metric of every average, precision and recall, loss and gap.

    python benchmarks/curves.py --out=curves.png --labels=good,bad runs/00000-demo runs/00001-demo

For runs with --average=power and a metric that measures precision and recall, such as fd2k-digits.
"""

import json
from pathlib import Path

import click

STYLES = {"raw": ("0.7", "student of the moment"), "0.05": ("C0", "average 0.05"), "0.1": ("C1", "average 0.1")}
STYLES |= {"0.25": ("C2", "average 0.25")}


def read(folder: Path) -> tuple[list[dict], list[dict]]:
    """Lines of the metric and of the statistics. Raises ValueError where a run has none."""
    metrics = sorted(folder.glob("metric-*.jsonl"))
    if not metrics:
        raise click.UsageError(f"{folder} has no metric-*.jsonl; expected the folder of a run with --metrics")
    lines = [json.loads(line) for line in metrics[0].read_text().splitlines()]
    return lines, [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]


def draw(axes, folder: Path, label: str) -> None:
    """One row of the figure."""
    rows, statistics = read(folder)
    start, rows = rows[0]["results"], [row for row in rows if "averages" in row["results"]]
    kimg = [row["kimg"] for row in rows]
    key = next(name for name in start if name.startswith(("fd_", "fid")))
    for ax, name, scale in zip(axes, (key, "precision", "recall"), ("log", "linear", "linear"), strict=False):
        for which, (colour, name_of_line) in STYLES.items():
            values = [row["results"]["averages"].get(which, {}).get(name) for row in rows]
            if all(value is not None for value in values):
                ax.plot([0, *kimg], [start[name], *values], color=colour, label=name_of_line, lw=1.3)
        ax.set(title=name, xlabel="kimg", yscale=scale)
        if scale == "linear":
            ax.set_ylim(0, 1)
    axes[0].set_ylabel(label)
    axes[0].legend(fontsize=8)
    times = [row["kimg"] for row in statistics]
    axes[3].plot(times, [row["Loss/aux"] for row in statistics], color="C3", lw=1.2, label="Loss/aux")
    gap = next(name for name in statistics[0] if name.startswith("Gap/sigma_1-"))
    other = axes[3].twinx()
    other.plot(times, [row.get(gap) for row in statistics], color="C4", lw=1.2, label=gap)
    axes[3].set(title="what does not tell: loss and gap", xlabel="kimg")
    handles = [*axes[3].get_lines(), *other.get_lines()]
    axes[3].legend(handles, [handle.get_label() for handle in handles], fontsize=8)


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--out", type=click.Path(dir_okay=False), required=True, help="A PNG.")
@click.option("--labels", help="One for each run, separated by commas.  [default: names of the folders]")
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(out: str, labels: str | None, runs: tuple[Path, ...]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(runs), 4, figsize=(16, 3.2 * len(runs)), squeeze=False, layout="constrained")
    names = labels.split(",") if labels else [folder.name for folder in runs]
    if len(names) != len(runs):
        raise click.UsageError(f"--labels has {len(names)} names; expected one for each of {len(runs)} runs")
    for row, folder, name in zip(axes, runs, names, strict=True):
        draw(row, folder, name)
    figure.savefig(out, dpi=90)


if __name__ == "__main__":
    main()
