"""`compare_fid.py --before=A --after=B --ref=…`: is one network better than the other, and at what cost in diversity?

Both networks get the same seeds, hence the same latents and labels where their latents have the same shape. Every seed
range gives one paired difference per metric; Student's interval of their mean decides the verdict.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from refine.cli.main import option
from refine.cli.options import OPS_HELP, check_outdir, choose_device, choose_ops, parse_ints
from refine.config import OPS_MODES

if TYPE_CHECKING:
    import torch

    from refine.metrics.detectors import Detector
    from refine.metrics.references import Reference
    from refine.metrics.sampling import Batch

MIN_RANGES = 3


def compare(
    before: str | os.PathLike,
    after: str | os.PathLike,
    ref: str | os.PathLike,
    detector: str | os.PathLike = "digits",
    num: int = 2000,
    seed_ranges: Sequence[int] = (0, 1, 2),
    outdir: str | os.PathLike | None = None,
    *,
    batch: int = 100,
    device: str = "cpu",
    noise_mode: str = "random",
    truncation_psi: float = 1.0,
    progress: bool = True,
) -> dict[str, Any]:
    """Compares two generators (or diffusion models) on the same seeds.

    Args:
        before, after: Files or names of generators; a diffusion model is sampled with 18 Heun steps.
        ref: Reference statistics, a file or a name.
        detector: Feature space, see `refine.metrics.detectors.load_detector`.
        num: Images per seed range.
        seed_ranges: At least three; range k holds the seeds k·num … (k+1)·num − 1.
        outdir: Where comparison.json, comparison.png and report.html go; None = nowhere. Made if it does not exist.
        batch: Images per batch.
        device: Where networks and detector run.
        noise_mode: Of a StyleGAN2, for the numbers; the pictures always use its constant noise.
        truncation_psi: Of a StyleGAN2.
        progress: Show a bar with the time left on stderr.

    Returns:
        JSON-able dict. `before`, `after` and `difference` hold for each metric `mean`, `std` and `values` (one per seed
        range), `difference` also `interval` (95 %) and `verdict`; `metric` names the leading distance, `ratio` is its
        mean after by its mean before, `verdict` ('better', 'not distinguishable', 'worse') and `summary` are about it.
        What the numbers stand on: num, seeds, detector, reference, quantisation, versions, seconds.

    Raises:
        ValueError: If an input cannot be used; the message begins with its option.
    """
    start = time.monotonic()
    check_numbers(num, seed_ranges, batch)
    judge, reference = _load_space(detector, ref, device)
    sides = {}
    for name, path in (("before", before), ("after", after)):
        with option(f"--{name}"):
            sides[name] = Side(path, device, batch, noise_mode, truncation_psi)
    check_same_images(sides["before"], sides["after"])
    _try_space(judge, reference, sides["before"].image_shape, device)
    with option("--outdir"):
        folder = None if outdir is None else check_outdir(outdir)
    results = _measure(sides, judge, reference, num, seed_ranges, progress)
    results |= {"device": str(device), "seconds": round(time.monotonic() - start, 1)}
    if folder is not None:
        _write_report(folder, sides, results)
    return results


class Side:
    """One of the two networks: loaded from a file, and how it is sampled."""

    def __init__(self, path: str | os.PathLike, device: str, batch: int, noise_mode: str, truncation_psi: float):
        from dnnlib import sha256_of_file
        from refine.checkpoints import resolve

        self.network, self.is_teacher = load_any(path, device)
        file = resolve(path)
        self.path, self.name, self.sha256 = str(file), file.name, sha256_of_file(file)
        self.image_shape = [self.network.img_channels, self.network.img_resolution, self.network.img_resolution]
        self._common = {"device": device, "batch": batch}
        self._stylegan = {"noise_mode": noise_mode, "truncation_psi": truncation_psi}
        is_stylegan = hasattr(self.network, "synthesis")
        self.sampling = (
            "18 Heun steps"
            if self.is_teacher
            else f"psi {truncation_psi:g}, noise {noise_mode}"
            if is_stylegan
            else "G(z, c)"
        )

    @property
    def num_classes(self) -> int:
        return self.network.label_dim if self.is_teacher else self.network.c_dim

    def sample(self, seeds: Sequence[int], classes: Sequence[int] | None = None, **options: Any) -> Iterator[Batch]:
        """Batches of images for seeds, see `refine.metrics.sampling`; options override those of a StyleGAN2."""
        from refine.metrics.sampling import sample_images, sample_teacher

        if self.is_teacher:
            return sample_teacher(self.network, seeds, classes=classes, **self._common)
        return sample_images(self.network, seeds, classes=classes, **self._common, **{**self._stylegan, **options})

    def describe(self) -> dict[str, Any]:
        return {"path": self.path, "name": self.name, "sha256": self.sha256, "sampling": self.sampling}


def load_any(path: str | os.PathLike, device: str) -> tuple[torch.nn.Module, bool]:
    """(generator, False) or (diffusion model, True), whichever the file holds. Raises ValueError if neither."""
    import torch

    from refine.checkpoints import load_generator, load_teacher

    try:
        # channels_last halves a generator's time on a CPU: no page faults for copies between layouts
        return load_generator(path).to(device, memory_format=torch.channels_last), False
    except ValueError as error:
        try:
            return load_teacher(path).to(device), True
        except ValueError:
            raise error from None


def check_numbers(num: int, seed_ranges: Sequence[int], batch: int) -> None:
    """Raises ValueError for numbers with which no comparison is possible."""
    if num < 2:
        raise ValueError(f"--num is {num}; expected at least 2")
    if batch < 1:
        raise ValueError(f"--batch is {batch}; expected at least 1")
    text = ",".join(map(str, seed_ranges))
    if len(set(seed_ranges)) < len(seed_ranges) or len(seed_ranges) < MIN_RANGES:
        raise ValueError(f"--seeds is {text}; expected at least {MIN_RANGES} different seed ranges")
    if min(seed_ranges) < 0 or (max(seed_ranges) + 1) * num > 2**32:
        raise ValueError(f"--seeds is {text}; expected ranges of {num} seeds within 0 to 4294967295")


def check_same_images(before: Side, after: Side) -> None:
    """Raises ValueError if the two networks do not make the same kind of images."""
    if before.image_shape != after.image_shape:
        raise ValueError(f"--after: its images are {after.image_shape}, but those of --before are {before.image_shape}")


def _load_space(detector: str | os.PathLike, ref: str | os.PathLike, device: str) -> tuple[Detector, Reference]:
    from refine.metrics.detectors import load_detector
    from refine.metrics.references import load_reference

    with option("--detector"):
        judge = load_detector(detector).to(device)
    with option("--ref"):
        reference = load_reference(ref)
        reference.check_detector(judge)
    return judge, reference


def _try_space(detector: Detector, reference: Reference, image_shape: Sequence[int], device: str) -> None:
    """Finds out on two black images, before the long work, whether detector, images and reference go together."""
    import torch

    with option("--detector"):
        try:
            detector(torch.zeros([2, *image_shape], dtype=torch.uint8, device=device))
        except RuntimeError as error:  # what TorchScript raises for an input that does not fit
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"{detector.name} cannot take images {list(image_shape)}: {reason}") from None
    with option("--ref"):
        reference.check_detector(detector)


def _measure(
    sides: dict[str, Side],
    detector: Detector,
    reference: Reference,
    num: int,
    seed_ranges: Sequence[int],
    progress: bool,
) -> dict[str, Any]:
    """Evaluates both networks on every seed range and puts the numbers beside each other."""
    from tqdm import tqdm

    from refine.metrics.detectors import metric_names
    from refine.metrics.evaluate import evaluate
    from refine.metrics.paired import paired_difference

    runs: dict[str, list[dict[str, Any]]] = {"before": [], "after": []}
    interval = 0.1 if sys.stderr.isatty() else 10.0  # seconds; a log file wants few lines
    total = 2 * num * len(seed_ranges)
    with tqdm(total=total, unit="img", desc="compare", disable=not progress, mininterval=interval) as bar:
        for index in seed_ranges:
            seeds = range(index * num, (index + 1) * num)
            for name, side in sides.items():
                with option(f"--{name}"):
                    runs[name].append(evaluate(_counted(side.sample(seeds), bar.update), detector, reference))
    metric = metric_names(detector)[0]
    common = {key: runs["before"][0][key] for key in ("detector", "reference", "quantisation", "versions")}
    results: dict[str, Any] = {name: {**sides[name].describe(), **_summarise(runs[name])} for name in runs}
    results["difference"] = {
        key: paired_difference(value["values"], results["after"][key]["values"], key.startswith(("fid", "fd_", "kid")))
        for key, value in results["before"].items()
        if isinstance(value, dict) and key in results["after"]
    }
    results["metric"] = metric
    results["ratio"] = results["after"][metric]["mean"] / max(results["before"][metric]["mean"], 1e-12)
    results["verdict"] = results["difference"][metric]["verdict"]
    results["summary"] = _summary(results)
    results["num"] = num
    results["seeds"] = [f"{index * num}-{(index + 1) * num - 1}" for index in seed_ranges]
    return results | common


def _counted(batches: Iterator[Batch], update: Callable[[int], Any]) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        update(len(batch.images))


def _summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, std and values of each number over the runs, and the mean class histogram."""
    from refine.metrics.paired import mean_and_std

    numbers = [key for key, value in runs[0].items() if isinstance(value, float) and key != "seconds"]
    summary: dict[str, Any] = {key: mean_and_std([run[key] for run in runs]) for key in numbers}
    if "class_histogram" in runs[0]:
        columns = zip(*(run["class_histogram"] for run in runs), strict=True)
        summary["class_histogram"] = [sum(column) / len(runs) for column in columns]
    summary["seconds"] = round(sum(run["seconds"] for run in runs), 2)
    return summary


def _summary(results: dict[str, Any]) -> str:
    """The verdict in plain words, with what precision and recall did meanwhile."""
    metric, difference = results["metric"], results["difference"]
    before, after = (results[side][metric]["mean"] for side in ("before", "after"))
    low, high = difference[metric]["interval"]
    opening = {
        "better": f"The second network is better: {metric} fell from {before:.3g} to {after:.3g}",
        "worse": f"The second network is worse: {metric} rose from {before:.3g} to {after:.3g}",
        "not distinguishable": f"They are not distinguishable: {metric} is {before:.3g} before and {after:.3g} after",
    }[results["verdict"]]
    parts = [f"{opening} (difference {difference[metric]['mean']:+.3g}, 95 % interval {low:+.3g} to {high:+.3g})."]
    for key, meaning in (("precision", "quality"), ("recall", "diversity"), ("label_accuracy", "obedience to labels")):
        if key in difference:
            verb = {"better": "rose", "worse": "fell"}.get(difference[key]["verdict"], "did not change measurably")
            a, b = (results[side][key]["mean"] for side in ("before", "after"))
            parts.append(f"{key.replace('_', ' ').capitalize()} ({meaning}) {verb}: {a:.3f} → {b:.3f}.")
    return " ".join(parts)


def _write_report(folder: Path, sides: dict[str, Side], results: dict[str, Any]) -> None:
    from dnnlib import replaced_atomically
    from refine.images import save_png
    from refine.report import side_by_side, write_html

    pictures, columns = _grids(sides)
    metric = results["metric"]
    captions = [f"{name}: {results[name]['name']}, {metric} {results[name][metric]['mean']:.3g}" for name in sides]
    picture = side_by_side(*pictures, captions, columns)
    with option("--outdir"):
        folder.mkdir(parents=True, exist_ok=True)
        save_png(folder / "comparison.png", picture)
        write_html(folder / "report.html", results, picture)
        with replaced_atomically(folder / "comparison.json") as temporary:
            temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _grids(sides: dict[str, Side]) -> tuple[list[torch.Tensor], int]:
    """Images of both networks from the same latents with constant noise; where there are classes, a column for each."""
    import torch

    counts = {side.num_classes for side in sides.values()}
    num_classes = counts.pop() if len(counts) == 1 else 0
    room = min(max(1600 // sides["before"].image_shape[-1], 2), 10)
    columns = min(num_classes, room) if num_classes > 1 else min(room, 8)
    seeds = range(columns * min(columns, 8))
    classes = [seed % columns for seed in seeds] if num_classes else None
    pictures = [
        torch.cat([batch.images.cpu() for batch in side.sample(seeds, classes, noise_mode="const")])
        for side in sides.values()
    ]
    return pictures, columns


def _parse_ranges(_ctx: click.Context, _param: click.Parameter, value: str) -> list[int]:
    with option("--seeds"):
        if len(set(value.split(","))) < len(value.split(",")):
            raise ValueError(f"--seeds is {value}; expected at least {MIN_RANGES} different seed ranges")
        return parse_ints(value)


@click.command("compare", context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--before", required=True, metavar="FILE|NAME", help="Network to start from: a generator or a diffusion model."
)
@click.option("--after", required=True, metavar="FILE|NAME", help="Network to judge: a generator or a diffusion model.")
@click.option("--ref", required=True, metavar="FILE|NAME", help="Reference statistics (.npz with mu and sigma).")
@click.option(
    "--detector",
    default="digits",
    show_default=True,
    metavar="FILE|NAME",
    help="Feature space: digits, or a TorchScript file.",
)
@click.option("--num", type=click.IntRange(min=2), default=2000, show_default=True, help="Images per seed range.")
@click.option(
    "--seeds",
    default="0,1,2",
    show_default=True,
    callback=_parse_ranges,
    metavar="LIST",
    help="Seed ranges; range k begins at seed k·num.",
)
@click.option("--outdir", metavar="DIR", help="Where to write comparison.json, comparison.png and report.html.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
@click.option("--batch", type=click.IntRange(min=1), default=100, show_default=True, help="Images per batch.")
@click.option("--device", help="Device, such as cpu or cuda:0.  [default: cuda if there is one]")
@click.option(
    "--noise-mode",
    type=click.Choice(["random", "const", "none"]),
    default="random",
    show_default=True,
    help="Noise of a StyleGAN2.",
)
@click.option(
    "--trunc", "truncation_psi", type=float, default=1.0, show_default=True, help="Truncation psi of a StyleGAN2."
)
@click.option("--ops", type=click.Choice(OPS_MODES), help=f"{OPS_HELP}  [default: $REFINE_OPS, else auto]")
def command(as_json: bool, seeds: list[int], device: str | None, ops: str | None, **options: Any) -> None:
    """Compares two networks on the same seeds: Fréchet and kernel distance, precision, recall, classes.

    A distance is called FID only with the Inception-2015-12-05 weights as --detector.
    """
    check_numbers(options["num"], seeds, options["batch"])
    with option("--device"):
        chosen = choose_device(device)
    choose_ops(ops, chosen)
    results = compare(**options, seed_ranges=seeds, device=chosen)
    if as_json:
        click.echo(json.dumps(results, indent=2))
        return
    from refine.report import feature_space_note, text_table

    click.echo(text_table(results))
    click.echo(f"\n{results['summary']}\n{feature_space_note(results)}")
    if options["outdir"]:
        click.echo(f"Report: {Path(options['outdir']) / 'report.html'}")
