"""`compare_fid.py --before=A --after=B --ref=…`: is one network better than the other, and at what cost in diversity?

Both networks get the same seeds, hence the same latents and labels where their latents have the same shape. Every seed
range gives one paired difference per metric; a paired bootstrap over the images and the agreement of the ranges decide
the verdict. Where --after is a run folder, all its snapshots are measured: a curve over kimg, a verdict on the last.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refine.dnnlib import check_outdir
from refine.errors import option

if TYPE_CHECKING:
    import torch

    from refine.metrics.detectors import Detector
    from refine.metrics.evaluate import Measurement
    from refine.metrics.references import Looking, Reference
    from refine.metrics.sampling import Batch
    from refine.networks.bases import Generator

MIN_RANGES = 3
PANEL_IMAGES = 64  # that look-alikes are searched for


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
    also: Sequence[str] = (),
    ref_num: int = 50_000,
    cache: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Compares two generators (or diffusion models) on the same seeds.

    Args:
        before, after: Files or names of generators; a diffusion model is sampled with 18 Heun steps. `after` may be a
            run folder: then all its snapshots are measured, and the last one is what the verdict is about.
        ref: Reference, see `refine.metrics.references.load_reference`.
        detector: Feature space, see `refine.metrics.detectors.load_detector`.
        num: Images per seed range.
        seed_ranges: At least three; range k holds the seeds k·num … (k+1)·num − 1.
        outdir: Where comparison.json, comparison.png and report.html go; None = nowhere. Made if it does not exist.
        batch: Images per batch.
        device: Where networks and detector run.
        noise_mode: Of a StyleGAN2, for the numbers; the pictures always use its constant noise.
        truncation_psi: Of a StyleGAN2.
        also: Further metrics that take longer: 'fdinf' (FID∞), 'is' (Inception Score).
        ref_num: Images drawn from a generator that serves as the reference.
        cache: Keep what was measured of a reference that is images.
        progress: Show a bar with the time left on stderr.

    Returns:
        JSON-able dict. `before`, `after` and `difference` hold for each metric `mean`, `std` and `values` (one per seed
        range), `difference` also `interval` (95 %), `method` and `verdict`; `metric` names the leading distance,
        `ratio` is its mean after by its mean before, `verdict` ('better', 'not distinguishable', 'worse') and `summary`
        are about it. `curve` has a row for each snapshot of a run folder: kimg, name, numbers, difference to `before`.
        What the numbers stand on: num, seeds, detector, reference, quantisation, versions, seconds.

    Raises:
        ValueError: If an input cannot be used; the message begins with its option.
    """
    start = time.monotonic()
    check_numbers(num, seed_ranges, batch)
    with option("--after"):
        snapshots = snapshots_of(after)
    sides = {}
    for name, path in (("before", before), ("after", snapshots[-1][1] if snapshots else after)):
        with option(f"--{name}"):
            sides[name] = Side(path, device, batch, noise_mode, truncation_psi)
    check_same_images(sides["before"], sides["after"])
    with option("--outdir"):
        folder = None if outdir is None else check_outdir(outdir)
    judge, reference = _load_space(
        detector, ref, sides["before"].image_shape, _looking(device, batch, ref_num, cache, progress)
    )
    kinds = _kinds(also, judge, reference, sides)
    job = Job(judge, reference, num, tuple(seed_ranges), kinds, batch, progress)
    runs = {"before": job.run(sides["before"], "before")}
    curve = []
    for kimg, path in snapshots[:-1]:
        with option("--after"):
            side = Side(path, device, batch, noise_mode, truncation_psi)
        curve.append(_curve_point(kimg, side, runs["before"], job.run(side, "after")))
    runs["after"] = job.run(sides["after"], "after")
    results = _results(sides, runs, job)
    if snapshots:
        results["curve"] = [*curve, _curve_point(snapshots[-1][0], sides["after"], runs["before"], runs["after"])]
    results |= {"device": str(device), "seconds": round(time.monotonic() - start, 1)}
    if folder is not None and is_first_process():
        _write_report(folder, sides, results, judge, reference)
    return results


class Side:
    """One of the two networks: loaded from a file, and how it is sampled."""

    def __init__(self, path: str | os.PathLike, device: str, batch: int, noise_mode: str, truncation_psi: float):
        from refine.checkpoints import source_file
        from refine.dnnlib import sha256_of_file

        self.network, self.is_teacher = load_any(path, device)
        file = source_file(path)
        self.path, self.name, self.sha256 = str(file), file.name, sha256_of_file(file)
        self.image_shape = [self.network.img_channels, self.network.img_resolution, self.network.img_resolution]
        self._common = {"device": device, "batch": batch}
        self._stylegan = {"noise_mode": noise_mode, "truncation_psi": truncation_psi}
        self.sampling = "18 Heun steps" if self.is_teacher else _sampling(self.network, truncation_psi, noise_mode)

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


def _sampling(G: Generator, truncation_psi: float, noise_mode: str) -> str:
    """How images are drawn, in words."""
    words = [f"psi {truncation_psi:g}"] if G.takes_truncation else []
    words += [f"noise {noise_mode}"] if G.noise_modes else []
    return ", ".join(words) or "G(z, c)"


def load_any(path: str | os.PathLike, device: str) -> tuple[Any, bool]:
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


def snapshots_of(path: str | os.PathLike) -> list[tuple[float, Path]]:
    """(kimg, file) of the snapshots of a run folder, in order; empty if the path is no folder.

    Raises:
        ValueError: The folder holds no snapshots.
    """
    folder = Path(path)
    if not folder.is_dir():
        return []
    found = [
        (int(match[1]), file)
        for file in folder.iterdir()
        if (match := re.fullmatch(r"network-snapshot-(\d+)\.(safetensors|pkl)", file.name))
    ]
    native = [entry for entry in found if entry[1].suffix == ".safetensors"]
    if not found:
        raise ValueError(f"{folder} holds no network-snapshot-*; expected a run folder or a network's file")
    return sorted(native or found)


def is_first_process() -> bool:
    """Whether this process is the one that writes: under torchrun the first, otherwise the only one."""
    from refine.metrics.pipeline import rank_and_world

    return rank_and_world()[0] == 0


def _looking(device: str, batch: int, num: int, cache: bool, progress: bool) -> Looking:
    from refine.metrics.references import Looking

    return Looking(batch=batch, device=device, num=num, cache=cache, progress=progress)


def _load_space(
    detector: str | os.PathLike, ref: str | os.PathLike, image_shape: Sequence[int], looking: Looking
) -> tuple[Detector, Reference]:
    """Detector and reference; two black images tell, before any long work, whether all go together."""
    import torch

    from refine.metrics.detectors import load_detector
    from refine.metrics.references import load_reference

    with option("--detector"):
        judge = load_detector(detector).to(looking.device)
        try:
            with torch.no_grad():
                judge(torch.zeros([2, *image_shape], dtype=torch.uint8, device=looking.device))
        except RuntimeError as error:  # what TorchScript raises for an input that does not fit
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"{judge.name} cannot take images {list(image_shape)}: {reason}") from None
    with option("--ref"):
        return judge, load_reference(ref, judge, looking)


def _kinds(also: Sequence[str], detector: Detector, reference: Reference, sides: dict[str, Side]) -> tuple[str, ...]:
    from refine.metrics.evaluate import USUAL

    with option("--also"):
        if unknown := set(also) - {"fdinf", "is"}:
            raise ValueError(f"{', '.join(sorted(unknown))} is unknown; expected fdinf, is, or both")
        if "is" in also and not hasattr(detector, "observe") and not hasattr(detector, "classify"):
            raise ValueError(f"is needs a detector that classifies, found {detector.name}")
    classes = ("per_class",) if all(side.num_classes > 1 for side in sides.values()) else ()
    return (*USUAL, *classes, *also)


@dataclass(frozen=True)
class Job:
    """What is measured of every network, with the same seeds."""

    detector: Detector
    reference: Reference
    num: int
    seed_ranges: tuple[int, ...]
    kinds: tuple[str, ...]
    batch: int
    progress: bool

    def run(self, side: Side, name: str) -> list[Measurement]:
        """Measurements on each seed range; features are let go of as soon as what they contribute is known."""
        from tqdm import tqdm

        from refine.metrics.evaluate import measure
        from refine.metrics.pipeline import my_share, rank_and_world
        from refine.metrics.sampling import with_progress

        runs = []
        rank, world = rank_and_world()
        interval = 0.1 if sys.stderr.isatty() else 10.0  # seconds; a log file wants few lines
        shown = {"total": self.num * len(self.seed_ranges), "desc": f"{name} {side.name}", "unit": "img"}
        with tqdm(**shown, disable=not self.progress or rank > 0, mininterval=interval) as bar:
            for index in self.seed_ranges:
                seeds = my_share(range(index * self.num, (index + 1) * self.num), self.batch)
                with option(f"--{name}"):
                    images = with_progress(side.sample(seeds), lambda count: bar.update(count * world))
                    found = measure(images, self.detector, self.reference, self.kinds, contributions=True)
                found.features = None
                runs.append(found)
        return runs


def _results(sides: dict[str, Side], runs: dict[str, list[Measurement]], job: Job) -> dict[str, Any]:
    """The numbers of both networks beside each other."""
    from refine.evaluation.comparison import differences, summarise
    from refine.metrics.detectors import metric_names

    metric = metric_names(job.detector)[0]
    first = runs["before"][0].results
    common = {key: first[key] for key in ("detector", "reference", "quantisation", "covariance", "versions")}
    results: dict[str, Any] = {name: {**sides[name].describe(), **summarise(runs[name])} for name in runs}
    results["difference"] = differences(runs["before"], runs["after"])
    results["metric"] = metric
    results["ratio"] = results["after"][metric]["mean"] / max(results["before"][metric]["mean"], 1e-12)
    results["verdict"] = results["difference"][metric]["verdict"]
    results["num"] = job.num
    results["seeds"] = [f"{index * job.num}-{(index + 1) * job.num - 1}" for index in job.seed_ranges]
    results["summary"] = _summary(results)
    return results | common


def _curve_point(kimg: float, side: Side, before: list[Measurement], runs: list[Measurement]) -> dict[str, Any]:
    from refine.evaluation.comparison import differences, summarise

    return {"kimg": kimg, "name": side.name, **summarise(runs), "difference": differences(before, runs)}


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


def _write_report(
    folder: Path, sides: dict[str, Side], results: dict[str, Any], detector: Detector, reference: Reference
) -> None:
    from refine.dnnlib import replaced_atomically
    from refine.evaluation.panels import ROWS, curve_figure, look_alikes, nearest_real
    from refine.evaluation.report import side_by_side, write_html
    from refine.images import save_png

    pictures, columns = _grids(sides)
    metric = results["metric"]
    captions = [f"{name}: {results[name]['name']}, {metric} {results[name][metric]['mean']:.3g}" for name in sides]
    figures = {"comparison": side_by_side(*pictures, captions, columns)}
    # look-alikes of one class tell of missing diversity; what is held against real images is of different classes
    figures["diversity"] = look_alikes(_panel_images(sides, [0] * PANEL_IMAGES), detector)
    nearest = nearest_real(_panel_images(sides, range(ROWS)), detector, reference)
    figures |= {} if nearest is None else {"nearest": nearest}
    figures |= {"curve": curve_figure(results)} if "curve" in results else {}
    with option("--outdir"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            save_png(folder / f"{name}.png", figure)
        write_html(folder / "report.html", results, figures)
        with replaced_atomically(folder / "comparison.json") as temporary:
            temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _panel_images(sides: dict[str, Side], classes: Sequence[int]) -> dict[str, torch.Tensor]:
    """An image for each of the classes, which count modulo the network's own; of the seeds 0, 1, …"""
    import torch

    def images(side: Side) -> torch.Tensor:
        own = [index % side.num_classes for index in classes] if side.num_classes > 1 else None
        return torch.cat([batch.images for batch in side.sample(range(len(classes)), own, noise_mode="const")])

    return {name: images(side) for name, side in sides.items()}


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
