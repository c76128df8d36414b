"""`compare_fid.py --before=A --after=B --ref=…`: is one network better than the other, and at what cost in diversity?

Both networks get the same seeds, hence the same latents and labels where their latents have the same shape. Every seed
range gives one paired difference per metric; a paired bootstrap over the images and the agreement of the ranges decide
the verdict. Where --after is a run folder, all its snapshots are measured: a curve over kimg, a verdict on the best.
The teacher and real images, where they are given, stand beside them (`refine.evaluation.scale`).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from refine.dnnlib import check_outdir
from refine.errors import option
from refine.evaluation.comparison import compared, differences, in_words, summarise
from refine.evaluation.job import Job, check_numbers, chosen_kinds
from refine.evaluation.paired import ENOUGH_IMAGES
from refine.evaluation.provenance import describe_run
from refine.evaluation.run_folder import RunFolder, Snapshot, read_run_folder
from refine.evaluation.scale import Column, RealColumn, TeacherColumn
from refine.evaluation.sides import Side, check_choice, check_reach, check_same_images, load_side
from refine.evaluation.space import load_space
from refine.evaluation.teachers import TeacherOptions
from refine.evaluation.written import write_comparison
from refine.metrics.evaluate import Measurement, image_note
from refine.metrics.pipeline import rank_and_world
from refine.metrics.references import Looking
from refine.networks.sampler_settings import SamplerChoice

SHOWN = 400  # images of the teacher and real ones that pictures are chosen from


def compare(
    before: str | os.PathLike | torch.nn.Module,
    after: str | os.PathLike | torch.nn.Module,
    ref: str | os.PathLike,
    detector: str | os.PathLike | None = None,
    num: int = 2000,
    seed_ranges: Sequence[int] = (0, 1, 2),
    outdir: str | os.PathLike | None = None,
    *,
    teacher: str | os.PathLike | torch.nn.Module | None = None,
    data: str | os.PathLike | None = None,
    sampler: SamplerChoice = SamplerChoice(),  # noqa: B008 - frozen
    curve: bool = True,
    batch: int | None = None,
    device: str = "cpu",
    noise_mode: str | None = None,
    truncation_psi: float = 1.0,
    gan_kwargs: Mapping[str, Any] | None = None,
    sigma_init: float | None = None,
    also: Sequence[str] = (),
    ref_num: int | None = None,
    cache: bool = True,
    progress: bool = True,
    trust_detector: bool = False,
    teachers: TeacherOptions | None = None,
) -> dict[str, Any]:
    """Compares two generators (or diffusion models) on the same seeds.

    Args:
        before, after: Files or names of generators or diffusion models, or run folders, of which the snapshot is taken
            that the run itself found best (or else the last one). Of an `after` that is a run folder all snapshots are
            measured, and the verdict is about that one. Or the networks themselves.
        ref: Reference, see `refine.metrics.references.load_reference`.
        detector: Feature space, see `refine.metrics.detectors.load_detector`. None = the one that the reference was
            made with, where it says so.
        num: Images per seed range.
        seed_ranges: At least three; range k holds the seeds k·num … (k+1)·num − 1.
        outdir: Where comparison.json, the figures and report.html go; None = nowhere. Made if it does not exist.
        teacher: A diffusion model whose own images are measured as well.
        data: Folder or zip file of real images, which are measured as well.
        sampler: How diffusion models are sampled; what is not said there is what suits each.
        curve: Whether all snapshots of a run folder are measured, not only the one that is judged.
        batch: Images per batch. None = what is sensible for their size, see `refine.metrics.sampling.sensible_batch`.
        device: Where networks and detector run.
        noise_mode: Noise of a StyleGAN2, for the numbers, None = 'random'; the pictures always use its constant noise.
        truncation_psi: Truncation of a StyleGAN2.
        gan_kwargs: Of `before`, see `refine.load_generator`.
        sigma_init: Noise level of a `one-step:FILE`.
        also: Further metrics that take longer, of `refine.metrics.registry.ON_REQUEST`, such as 'fdinf' (FID∞).
        ref_num: Images drawn from a generator that serves as the reference; None = 50,000. Of a teacher, `num`.
        cache: Keep what was measured of a reference that is images, and images drawn of a teacher.
        progress: Show bars with the time left, and what to know of the choices that were made, on stderr.
        trust_detector: Run a detector that is TorchScript, a program that can do more than compute.
        teachers: How diffusion models among `before`, `after` and `teacher` are built and guided; one as `ref` is not.

    Returns:
        JSON-able dict. `before`, `after` and `difference` hold for each metric `mean`, `std` and `values` (one per seed
        range), `difference` also `interval` (95 %), `method` and `verdict`; `metric` names the leading distance,
        `ratio` is its mean after by its mean before, `verdict` ('better', 'not distinguishable', 'worse') and `summary`
        are about it. `teacher` and `real`, where they were asked for, hold the same numbers as `before`. `curve` has a
        row for each snapshot of a run folder: kimg, name, whether it is `judged`, numbers, difference to `before`.
        What the numbers are based on: num, seeds, detector, reference, quantisation, versions, seconds; `notes` are
        sentences that a reader should know; `run`, what a snapshot says of the run that it comes from.

    Raises:
        ValueError: If an input cannot be used; the message begins with its option.
    """
    start = time.monotonic()
    check_numbers(num, seed_ranges, batch)
    teachers = teachers or TeacherOptions()
    sampling = (device, batch, noise_mode or "random", truncation_psi, teachers, sampler, sigma_init)
    runs, sides = _opened({"before": before, "after": after}, sampling, gan_kwargs)
    unreached = check_reach(sides, truncation_psi, noise_mode, sigma_init)
    drawn = [side for side in sides.values() if side.is_teacher]
    unreached += teachers.check_used([bool(drawn), teacher is not None])
    with option("--outdir"):
        folder = None if outdir is None else check_outdir(outdir)
    looking = Looking(
        batch=batch,
        device=device,
        num=ref_num or Looking.num,
        bank=num,
        sampler=sampler,
        cache=cache,
        progress=progress,
    )
    judge, reference = load_space(detector, ref, sides["before"].image_shape, looking, trust_detector)
    kinds = chosen_kinds(also, judge, list(sides.values()))
    job = Job(judge, reference, num, tuple(seed_ranges), kinds, sides["before"].batch, device, progress)
    with option("--teacher"):
        taught = None if teacher is None else TeacherColumn(teachers.source(teacher), job, sampler, batch)
    with option("--data"):
        real = None if data is None else RealColumn(data, job, batch)
    check_choice(sampler, bool(drawn or taught or reference.is_teacher))
    unused = {
        "--ref-num": ref_num is not None and not reference.form.startswith("generator") and "--ref is not a generator",
        "--no-curve": not curve and runs["after"] is None and "--after is not a run folder",
        "--no-cache": not cache and reference.form == "statistics" and taught is None and "--ref is statistics already",
    }
    notes = [*_notes(job, sides, runs, taught), *unreached]
    notes += [f"{name} has no part in this: {why}" for name, why in unused.items() if why]
    if progress and is_first_process():
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    results = _measured(sides, runs["after"] if curve else None, job, sampling)
    if runs["after"] is not None:
        results["summary"] += f" {runs['after'].describe()}"
    columns = _columns(taught, real, cache)
    for name, column in columns.items():
        results[name] = column.results
        results["summary"] += _beside(name, results)
    results |= {"notes": notes, "device": str(device), "seconds": round(time.monotonic() - start, 1)}
    if described := describe_run(runs["after"], sides["after"].file):
        results["run"] = described
    if folder is not None and is_first_process():
        write_comparison(folder, sides, columns, results, judge, reference)
    return results


def is_first_process() -> bool:
    """Whether this process is the one that writes: under torchrun the first, otherwise the only one."""
    return rank_and_world()[0] == 0


def _opened(
    paths: Mapping[str, str | os.PathLike | torch.nn.Module], sampling: tuple, gan_kwargs: Mapping[str, Any] | None
) -> tuple[dict[str, RunFolder | None], dict[str, Side]]:
    """The run folders that are given, and the networks, by the names of their options."""
    runs, sides = {}, {}
    for name, path in paths.items():
        with option(f"--{name}"):
            runs[name] = None if isinstance(path, torch.nn.Module) else read_run_folder(path)
    for name, run in runs.items():
        kwargs = gan_kwargs if name == "before" else None
        sides[name] = load_side(name, paths[name] if run is None else run.judged.path, *sampling, kwargs)
    check_same_images(sides["before"], sides["after"])
    return runs, sides


def _columns(taught: TeacherColumn | None, real: RealColumn | None, cache: bool) -> dict[str, Column]:
    """What stands beside the two networks."""
    columns = {}
    if taught is not None:
        with option("--teacher"):
            columns["teacher"] = taught.measure(cache, SHOWN)
    if real is not None:
        with option("--data"):
            columns["real"] = real.measure(SHOWN)
    return columns


def _notes(
    job: Job, sides: dict[str, Side], runs: dict[str, RunFolder | None], taught: TeacherColumn | None
) -> list[str]:
    """What a reader should know of how the numbers came about."""
    notes = []
    if (run := runs["before"]) is not None:
        notes.append(run.taken())
    for name, side in sides.items():
        if side.sampling_reason is not None:
            notes.append(f"--{name} is sampled with {side.sampling}, {side.sampling_reason}")
    if taught is not None:
        notes.append(f"--teacher is sampled with {taught.sampling}, {taught.reason}")
    if job.reference.is_teacher:
        notes.append(f"--ref: {job.reference.form}")
    if (note := image_note(job.detector, sides["before"].image_shape)) is not None:
        notes.append(f"the detector {job.detector.name}: {note}")
    if (note := job.reference.shortage) is not None:
        notes.append(note)
    if job.num < ENOUGH_IMAGES:
        notes.append(
            f"{job.num} images per seed range are few (expected {ENOUGH_IMAGES} or more): each interval is the wider "
            "of the bootstrap's and Student's over the seed ranges, so that small differences are not seen"
        )
    return notes


def _measured(sides: dict[str, Side], run: RunFolder | None, job: Job, sampling: tuple) -> dict[str, Any]:
    """The numbers of both networks beside each other, with the curve of a run, and the verdict."""
    before, curve = job.run(sides["before"], "before"), []
    for snapshot in () if run is None else run.others:
        side = load_side("after", snapshot.path, *sampling)
        curve.append(_curve_row(snapshot, False, before, job.run(side, "after")))
    after = job.run(sides["after"], "after")
    results = compared(before, after)
    results |= {name: {**side.describe(), **results[name]} for name, side in sides.items()}
    results |= {"num": job.num, "seeds": job.seeds, "summary": in_words(results)}
    if run is not None:
        if run.judged in run.snapshots:
            curve.append(_curve_row(run.judged, True, before, after))
        results["curve"] = sorted(curve, key=lambda row: (row["kimg"], row["name"]))
    return results


def _curve_row(snapshot: Snapshot, judged: bool, before: list[Measurement], runs: list[Measurement]) -> dict[str, Any]:
    """The numbers of one snapshot, and their difference to the network to start from."""
    which = {"kimg": snapshot.kimg, "name": snapshot.path.name, "judged": judged}
    which |= {"average": snapshot.average} if snapshot.average else {}
    return {**which, **summarise(runs), "difference": differences(before, runs)}


def _beside(name: str, results: dict[str, Any]) -> str:
    """A sentence about a further column."""
    who = {"teacher": "The teacher", "real": f"Real images ({results[name].get('how')})"}[name]
    return f" {who}: {results['metric']} {results[name][results['metric']]['mean']:.3g}."
