"""`compare_fid.py --before=A --after=B --ref=…`: is one network better than the other, and at what cost in diversity?

Both networks get the same seeds, hence the same latents and labels where their latents have the same shape. Every seed
range gives one paired difference per metric; a paired bootstrap over the images and the agreement of the ranges decide
the verdict. Where --after is a run folder, all its snapshots are measured: a curve over kimg, a verdict on the best.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from refine.checkpoints import load_generator, load_teacher, source_file
from refine.checkpoints.native import read_metadata
from refine.checkpoints.sniff import sniff
from refine.dnnlib import check_outdir, replaced_atomically, sha256_of_file
from refine.errors import option
from refine.evaluation.comparison import compared, differences, in_words, summarise
from refine.evaluation.panels import ROWS, curve_figure, look_alikes, nearest_real
from refine.evaluation.report import side_by_side, write_html
from refine.evaluation.run_folder import Snapshot, read_run_folder
from refine.images import save_png
from refine.metrics.detectors import Detector, classifies, load_detector
from refine.metrics.evaluate import Measurement, measure
from refine.metrics.pipeline import my_share, rank_and_world
from refine.metrics.references import Looking, Reference, load_reference
from refine.metrics.registry import ON_REQUEST, USUAL, WITH_CLASSES, chosen
from refine.metrics.sampling import Batch, sample_images, sample_teacher, with_progress
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
    gan_kwargs: Mapping[str, Any] | None = None,
    sigma_init: float | None = None,
    also: Sequence[str] = (),
    ref_num: int = 50_000,
    cache: bool = True,
    progress: bool = True,
    trust_detector: bool = False,
) -> dict[str, Any]:
    """Compares two generators (or diffusion models) on the same seeds.

    Args:
        before, after: Files or names of generators; a diffusion model is sampled with 18 Heun steps. `after` may be a
            run folder: then all its snapshots are measured, and the one that the run itself found best (or else the
            last one) is what the verdict is about.
        ref: Reference, see `refine.metrics.references.load_reference`.
        detector: Feature space, see `refine.metrics.detectors.load_detector`.
        num: Images per seed range.
        seed_ranges: At least three; range k holds the seeds k·num … (k+1)·num − 1.
        outdir: Where comparison.json, comparison.png and report.html go; None = nowhere. Made if it does not exist.
        batch: Images per batch.
        device: Where networks and detector run.
        noise_mode: Noise of a StyleGAN2, for the numbers; the pictures always use its constant noise.
        truncation_psi: Truncation of a StyleGAN2.
        gan_kwargs: Of `before`, see `refine.load_generator`.
        sigma_init: Noise level of a `one-step:FILE`.
        also: Further metrics that take longer, of `refine.metrics.registry.ON_REQUEST`, such as 'fdinf' (FID∞).
        ref_num: Images drawn from a generator that serves as the reference. Of a teacher there are `num`.
        cache: Keep what was measured of a reference that is images.
        progress: Show a bar with the time left on stderr.
        trust_detector: Run a detector that is TorchScript, a program that can do more than compute.

    Returns:
        JSON-able dict. `before`, `after` and `difference` hold for each metric `mean`, `std` and `values` (one per seed
        range), `difference` also `interval` (95 %), `method` and `verdict`; `metric` names the leading distance,
        `ratio` is its mean after by its mean before, `verdict` ('better', 'not distinguishable', 'worse') and `summary`
        are about it. `curve` has a row for each snapshot of a run folder: kimg, name, whether it is `judged`, numbers,
        difference to `before`.
        What the numbers are based on: num, seeds, detector, reference, quantisation, versions, seconds.

    Raises:
        ValueError: If an input cannot be used; the message begins with its option.
    """
    start = time.monotonic()
    check_numbers(num, seed_ranges, batch)
    with option("--after"):
        run = read_run_folder(after)
    sampling = (device, batch, noise_mode, truncation_psi)
    paths = {"before": before, "after": after if run is None else run.judged.path}
    sides = {
        name: _load_side(name, path, *sampling, gan_kwargs if name == "before" else None, sigma_init)
        for name, path in paths.items()
    }
    check_same_images(sides["before"], sides["after"])
    with option("--outdir"):
        folder = None if outdir is None else check_outdir(outdir)
    looking = Looking(batch=batch, device=device, num=ref_num, bank=num, cache=cache, progress=progress)
    judge, reference = _load_space(detector, ref, sides["before"].image_shape, looking, trust_detector)
    kinds = _kinds(also, judge, sides)
    job = Job(judge, reference, num, tuple(seed_ranges), kinds, batch, progress)
    runs = {"before": job.run(sides["before"], "before")}
    curve = []
    for snapshot in () if run is None else run.others:
        side = _load_side("after", snapshot.path, *sampling)
        curve.append(_curve_row(snapshot, False, runs["before"], job.run(side, "after")))
    runs["after"] = job.run(sides["after"], "after")
    results = _results(sides, runs, job)
    if run is not None:
        if run.judged in run.snapshots:
            curve.append(_curve_row(run.judged, True, runs["before"], runs["after"]))
        results["curve"] = sorted(curve, key=lambda row: row["kimg"])
        results["summary"] += f" {run.describe()}"
    results |= {"device": str(device), "seconds": round(time.monotonic() - start, 1)}
    if folder is not None and is_first_process():
        _write_report(folder, sides, results, judge, reference)
    return results


class Side:
    """A network that makes images, a generator or a diffusion model: loaded from a file, and how it is sampled."""

    def __init__(
        self,
        path: str | os.PathLike,
        device: str,
        batch: int,
        noise_mode: str,
        truncation_psi: float,
        gan_kwargs: Mapping[str, Any] | None = None,
        sigma_init: float | None = None,
    ):
        self.network, self.is_teacher = _load_any(path, device, gan_kwargs, sigma_init)
        for note in self.network.notes if is_first_process() else ():
            print(f"assumed: {note}", file=sys.stderr)
        file = source_file(path)
        self.path, self.name, self.sha256 = str(file), file.name, sha256_of_file(file)
        self.refined_with = _refined_with(file)
        self.image_shape = [self.network.img_channels, self.network.img_resolution, self.network.img_resolution]
        self._common: dict[str, Any] = {"device": device, "batch": batch}
        self._stylegan: dict[str, Any] = {"noise_mode": noise_mode, "truncation_psi": truncation_psi}
        self.sampling = "18 Heun steps" if self.is_teacher else _sampling(self.network, truncation_psi, noise_mode)

    @property
    def num_classes(self) -> int:
        return self.network.label_dim if self.is_teacher else self.network.c_dim

    def sample(
        self, seeds: Sequence[int], classes: int | Sequence[int] | None = None, **options: Any
    ) -> Iterator[Batch]:
        """Batches of images for seeds, see `refine.metrics.sampling`; options override those of a StyleGAN2."""
        if self.is_teacher:
            return sample_teacher(self.network, seeds, classes=classes, **self._common)
        return sample_images(self.network, seeds, classes=classes, **self._common, **{**self._stylegan, **options})

    def describe(self) -> dict[str, Any]:
        described = {"path": self.path, "name": self.name, "sha256": self.sha256, "sampling": self.sampling}
        return described if self.refined_with is None else {**described, "refined_with": self.refined_with}


def _refined_with(file: Path) -> str | None:
    """What a snapshot of `refine.py` learnt from; None for other files."""
    origins = read_metadata(file)["provenance"] if file.is_file() and sniff(file).kind == "native" else {}
    if not isinstance(origins, dict) or not isinstance(teacher := origins.get("teacher"), dict):
        return None
    data = origins.get("data")
    with_data = f"and the real images of {data.get('file')}" if isinstance(data, dict) else "alone, without data"
    return f"the teacher {teacher.get('file')} {with_data}"


def _sampling(G: Generator, truncation_psi: float, noise_mode: str) -> str:
    """How images are drawn, in words."""
    words = [f"psi {truncation_psi:g}"] if G.takes_truncation else []
    words += [f"noise {noise_mode}"] if G.noise_modes else []
    return ", ".join(words) or "G(z, c)"


def _load_any(
    path: str | os.PathLike, device: str, init_kwargs: Mapping[str, Any] | None, sigma_init: float | None
) -> tuple[Any, bool]:
    """(generator, False) or (diffusion model, True), whichever the file holds. Raises ValueError if neither."""
    try:
        # channels_last halves a generator's time on a CPU: no page faults for copies between layouts
        G: Any = load_generator(path, init_kwargs, sigma_init)
        return G.to(device, memory_format=torch.channels_last), False
    except ValueError as error:
        try:
            return load_teacher(path, init_kwargs).to(device), True
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


def is_first_process() -> bool:
    """Whether this process is the one that writes: under torchrun the first, otherwise the only one."""
    return rank_and_world()[0] == 0


def _load_side(name: str, path: str | os.PathLike, *sampling: Any) -> Side:
    with option(f"--{name}"):
        return Side(path, *sampling)


def _load_space(
    detector: str | os.PathLike, ref: str | os.PathLike, image_shape: Sequence[int], looking: Looking, trust: bool
) -> tuple[Detector, Reference]:
    """Detector and reference; two black images tell, before any long work, whether all go together."""
    with option("--detector"):
        judge = load_detector(detector, trust).to(looking.device)
        try:
            with torch.no_grad():
                judge(torch.zeros([2, *image_shape], dtype=torch.uint8, device=looking.device))
        except RuntimeError as error:  # what TorchScript raises for an input that does not fit
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"{judge.name} cannot take images {list(image_shape)}: {reason}") from None
    with option("--ref"):
        return judge, load_reference(ref, judge, looking)


def _kinds(also: Sequence[str], detector: Detector, sides: Mapping[str, Side]) -> tuple[str, ...]:
    """Names of the metrics to be measured."""
    with option("--also"):
        if unknown := set(also) - set(ON_REQUEST):
            raise ValueError(f"{', '.join(sorted(unknown))} is unknown; expected some of {', '.join(ON_REQUEST)}")
        for metric in chosen(also):
            if metric.detector == "probabilities" and not classifies(detector):
                raise ValueError(f"{metric.name} needs a detector that classifies, found {detector.name}")
    with_classes = WITH_CLASSES if all(side.num_classes > 1 for side in sides.values()) else ()
    return (*USUAL, *with_classes, *also)


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
        """Measurements on each seed range."""
        runs = []
        rank, world = rank_and_world()
        interval = 0.1 if sys.stderr.isatty() else 10.0  # seconds; a log file wants few lines
        shown = {"total": self.num * len(self.seed_ranges), "desc": f"{name} {side.name}", "unit": "img"}
        with tqdm(**shown, disable=not self.progress or rank > 0, mininterval=interval) as bar:
            for index in self.seed_ranges:
                seeds = my_share(range(index * self.num, (index + 1) * self.num), self.batch)
                with option(f"--{name}"):
                    images = with_progress(side.sample(seeds), lambda count: bar.update(count * world))
                    runs.append(measure(images, self.detector, self.reference, self.kinds, contributions=True))
        return runs


def _results(sides: dict[str, Side], runs: dict[str, list[Measurement]], job: Job) -> dict[str, Any]:
    """The numbers of both networks beside each other, and the verdict."""
    results = compared(runs["before"], runs["after"])
    results |= {name: {**side.describe(), **results[name]} for name, side in sides.items()}
    results["num"] = job.num
    results["seeds"] = [f"{index * job.num}-{(index + 1) * job.num - 1}" for index in job.seed_ranges]
    results["summary"] = in_words(results)
    return results


def _curve_row(snapshot: Snapshot, judged: bool, before: list[Measurement], runs: list[Measurement]) -> dict[str, Any]:
    """The numbers of one snapshot, and their difference to the network to start from."""
    numbers = {**summarise(runs), "difference": differences(before, runs)}
    return {"kimg": snapshot.kimg, "name": snapshot.path.name, "judged": judged, **numbers}


def _write_report(
    folder: Path, sides: dict[str, Side], results: dict[str, Any], detector: Detector, reference: Reference
) -> None:
    pictures, columns = _grids(sides)
    metric = results["metric"]
    captions = [f"{name}: {results[name]['name']}, {metric} {results[name][metric]['mean']:.3g}" for name in sides]
    figures = {"comparison": side_by_side(pictures[0], pictures[1], captions, columns)}
    # look-alikes of one class show missing diversity; images of different classes are compared with real ones
    figures["diversity"] = look_alikes(_panel_images(sides, [0] * PANEL_IMAGES), detector)
    nearest = nearest_real(_panel_images(sides, range(ROWS)), detector, reference)
    figures |= {} if nearest is None else {"nearest": nearest}
    figures |= {"curve": curve_figure(results)} if results.get("curve") else {}
    with option("--outdir"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            save_png(folder / f"{name}.png", figure)
        write_html(folder / "report.html", results, figures)
        with replaced_atomically(folder / "comparison.json") as temporary:
            temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _panel_images(sides: dict[str, Side], classes: Sequence[int]) -> dict[str, torch.Tensor]:
    """An image for each of the classes, which count modulo the network's own; of the seeds 0, 1, …"""

    def images(side: Side) -> torch.Tensor:
        own = [index % side.num_classes for index in classes] if side.num_classes > 1 else None
        return torch.cat([batch.images for batch in side.sample(range(len(classes)), own, noise_mode="const")])

    return {name: images(side) for name, side in sides.items()}


def _grids(sides: dict[str, Side]) -> tuple[list[torch.Tensor], int]:
    """Images of both networks from the same latents with constant noise; where there are classes, a column for each."""
    counts = [side.num_classes for side in sides.values()]
    num_classes = counts[0] if counts[0] == counts[1] else 0
    room = min(max(1600 // sides["before"].image_shape[-1], 2), 10)
    columns = min(num_classes, room) if num_classes > 1 else min(room, 8)
    seeds = range(columns * min(columns, 8))
    classes = [seed % columns for seed in seeds] if num_classes else None
    pictures = [
        torch.cat([batch.images.cpu() for batch in side.sample(seeds, classes, noise_mode="const")])
        for side in sides.values()
    ]
    return pictures, columns
