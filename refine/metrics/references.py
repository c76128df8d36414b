"""References: what generated images are compared with, in any form people have it.

Statistics, told apart by their keys: `mu, sigma` (EDM, pytorch-fid, clean-fid, torch-fidelity's caches, also inside
ADM's reference batches), `raw_mean, raw_cov, num_items` or `all_features` (StyleGAN's caches), `feats` (clean-fid's for
KID), and our own richer form with `num, features, detector, detector_sha256, detector_resize`. Images, which a detector
has yet to look at: a folder, a zip with or without dataset.json, ADM's samples (`arr_0`), another generator, or a
teacher, whose images are drawn once (`refine.metrics.bank`). What comes of images is cached by their content.

With features the kernel distance, precision and recall can be computed; with a mean and a covariance the Fréchet
distance only. Covariances are divided by N − 1, as EDM's are; StyleGAN divides by N, and its caches hold sums, so they
are divided by N − 1 here as well (at N = 50,000 a difference of 2e-5 of the traces).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refine.checkpoints import archives, load_generator, resolve
from refine.checkpoints.foreign.diffusers_folder import find_weights
from refine.checkpoints.pickles.inert import Refused, shown
from refine.checkpoints.sniff import Sniffed, sniff
from refine.checkpoints.sources.fetch import cache_dir
from refine.checkpoints.teachers import TeacherSource
from refine.dnnlib import distrust, keep_from_others, make_folder, replaced_atomically, sha256_of_file
from refine.errors import describe_os_error
from refine.metrics.bank import Bank, describe_bank, teacher_bank
from refine.metrics.detectors import Detector, holds_teacher
from refine.metrics.image_sets import ImageSet, SampleArray
from refine.metrics.pipeline import gathered, made_by_all, my_share, prefetched, rank_and_world
from refine.metrics.sampling import Batch, sample_images, sensible_batch
from refine.metrics.statistics import FeatureStatistics, unusable
from refine.metrics.stored import read_stored
from refine.networks.bases import Generator
from refine.networks.sampler_settings import SamplerChoice
from refine.torch_utils.misc import exact_products

#: Features of a reference made from images are kept up to this size; beyond, only mean and covariance are.
MAX_FEATURE_BYTES = 1 << 30
#: Seeds of a generator that serves as a reference begin here, far from those of the generators it judges.
REFERENCE_SEED = 1 << 31
MAX_WIDTH = 4096  # features; detectors in use have up to as many
#: A covariance of features [N, D] takes N·D² products. So many are made at any rate, and so many for a byte of the
#: file, which has up to half a number of 4096 features (float16); a second of one core makes some 1e10.
MAX_PRODUCTS, PRODUCTS_PER_BYTE = 10_000_000_000, MAX_WIDTH // 2
_ROUNDING = 1e-5
_TILE, _PIECE = 128, 2048
_EDM2_PARTS = {  # of its pickles, one for each feature space
    "fid": "Inception's features (fid)",
    "fd_dinov2": "those of DINOv2's vitl14, resized in the mode torch (fd_dinov2)",
}
_CACHE_VERSION = 2  # of the rules by which images are read, ordered and labelled
_STATISTICS = "statistics (.npz with mu and sigma, a StyleGAN or torch-fidelity cache), images (folder, zip, .npz of"
EXPECTED = f"{_STATISTICS} samples), a generator, or a teacher"


@dataclass(frozen=True)
class Reference:
    """Statistics of the images to be matched.

    Attributes:
        name: File name, for people.
        sha256: Checksum of the file, or, for a folder, over the names and contents of its images.
        mu: Mean, float64 [D].
        sigma: Covariance, float64 [D, D].
        num: Number of images behind it; None if the file does not say.
        features: float32 [num, D], or None: then only the Fréchet distance can be computed.
        detector: Name of the detector that made it, or None.
        detector_sha256: Checksum of that detector's weights, or None.
        detector_resize: What that detector did to the size of images, in its words, or None.
        form: In words, what the file was.
        classes: int64 [num], the classes of the images that the features are of, or None.
        images: The images themselves where they can be read again, or None.
        is_teacher: Whether the images are of a teacher, which stands for the data.
        is_drawn: Whether the images are of a network, a teacher or a generator.
    """

    name: str
    sha256: str
    mu: torch.Tensor
    sigma: torch.Tensor
    num: int | None = None
    features: torch.Tensor | None = None
    detector: str | None = None
    detector_sha256: str | None = None
    detector_resize: str | None = None
    form: str = "statistics"
    classes: torch.Tensor | None = None
    images: ImageSet | SampleArray | None = None
    is_teacher: bool = False
    is_drawn: bool = False

    @property
    def shortage(self) -> str | None:
        """A line where there are fewer real images than features, so that their covariance is known in part only."""
        if self.num is None or self.is_drawn or self.num >= len(self.mu):
            return None
        return (
            f"--ref: {self.name} is of {self.num} images, too few for {len(self.mu)} features: "
            "distances to it depend on which images these are; expected several thousand"
        )

    def check_detector(self, detector: Detector) -> None:
        """Raises ValueError if features of this detector cannot be compared with this reference."""
        if detector.feature_dim not in (None, len(self.mu)):
            raise ValueError(
                f"{self.name} holds statistics of {len(self.mu)} features, "
                f"but the detector {detector.name} gives {detector.feature_dim}"
            )
        if self.detector_sha256 not in (None, detector.sha256):
            raise ValueError(
                f"{self.name} was made with other detector weights ({shown(str(self.detector))}, sha256 "
                f"{shown(self.detector_sha256[:12])}…) than {detector.name} (sha256 {detector.sha256[:12]}…)"
            )
        if self.detector_resize not in (None, detector.resize):
            raise ValueError(
                f"{self.name} was made of images that were resized otherwise ({shown(self.detector_resize)}) than "
                f"{detector.name} does ({detector.resize})"
            )


@dataclass(frozen=True)
class Looking:
    """How images of a reference are looked at.

    Attributes:
        batch: Images per batch; None = what is sensible for their size, see `refine.metrics.sampling.sensible_batch`.
        device: Where the detector is.
        num: How many images are drawn from a generator that serves as the reference.
        bank: How many images there are of a teacher that serves as the reference; at least 2.
        sampler: How that teacher is sampled.
        draw: Whether these may be drawn; if not, `NotDrawn` is raised.
        cache: Keep what was measured, and use what was kept. Off = measure again, keep nothing.
        progress: Show a bar with the time left on stderr.
    """

    batch: int | None = None
    device: torch.device | str = "cpu"
    num: int = 50_000
    bank: int = 2000
    sampler: SamplerChoice = SamplerChoice()  # noqa: RUF009 - frozen
    draw: bool = True
    cache: bool = True
    progress: bool = False


class NeedsDetector(ValueError):
    """A reference is not statistics, but images, which only a detector can look at."""


class NotDrawn(Exception):
    """Images of a teacher would be needed, which `Looking.draw` did not want."""


def load_reference(
    path_or_name: str | os.PathLike | TeacherSource,
    detector: Detector | None = None,
    looking: Looking | None = None,
) -> Reference:
    """Reads a reference; nothing in a file is executed.

    Args:
        path_or_name: A file, folder, URL, or a name of pretrained/index.toml; or a teacher.
        detector: Needed where the reference is images, a generator or a teacher; otherwise what it is checked against.
        looking: How such images are looked at. None = the defaults.

    Raises:
        ValueError: It does not exist, is none of the known forms, or does not fit the detector.
        NotDrawn: See `Looking`.
    """
    try:
        if isinstance(path_or_name, TeacherSource):
            return _of_teacher(path_or_name, detector, looking or Looking())
        return _load(path_or_name, detector, looking or Looking())
    except MemoryError:
        raise ValueError(f"reference {path_or_name} asks for more memory than there is") from None


def _load(path_or_name: str | os.PathLike, detector: Detector | None, looking: Looking) -> Reference:
    text = os.fspath(path_or_name)
    if os.path.isdir(text) and not _is_network(text):
        return _measured(ImageSet(Path(text)), Path(text), "folder of images", detector, looking)
    path = resolve(path_or_name)
    found = sniff(path)
    if found.kind == "npz":
        reference = _from_npz(path, detector, looking)
    elif found.kind == "zip" and path.suffix != ".npz":
        reference = _measured(ImageSet(path), path, "zip of images", detector, looking)
    elif found.kind in ("pickle", "torch", "native", "safetensors"):
        reference = _from_checkpoint(path, found, detector, looking)
    elif path.suffix == ".npz":
        raise ValueError(f"reference {path} is not a whole .npz file of plain arrays, expected one with mu and sigma")
    else:
        raise ValueError(f"reference {path} is {found.description}; expected {EXPECTED}")
    if detector is not None:
        reference.check_detector(detector)
    return reference


def save_reference(path: str | os.PathLike, statistics: FeatureStatistics, detector: Detector, **more: Any) -> None:
    """Writes what `load_reference` reads: statistics made with `detector`, and the features where they were kept.

    Args:
        path: The .npz file, replaced as a whole.
        statistics: At least two images.
        detector: Whose features they are.
        **more: Further arrays, such as `classes`.
    """
    arrays = {
        "mu": statistics.mean.numpy(),
        "sigma": statistics.covariance.numpy(),
        "num": np.int64(statistics.num),
        "detector": np.str_(detector.name),
        "detector_sha256": np.str_(detector.sha256),
        "detector_resize": np.str_(detector.resize),
        **more,
    }
    if statistics.keep_features:
        arrays["features"] = statistics.features.numpy()
    with replaced_atomically(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


# Statistics.


def _from_npz(path: Path, detector: Detector | None, looking: Looking) -> Reference:
    arrays = _read_npz(path)
    keys = set(arrays)
    if {"mu", "sigma"} <= keys:
        form = "ADM reference batch (mu, sigma)" if "sigma_s" in keys else "statistics (mu, sigma)"
        return _from_arrays(path, arrays, form)
    if "feats" in keys:
        features = _floats(path, arrays["feats"], "feats")
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(
                f"reference {path} has feats of shape {list(features.shape)}, expected [N, D], N at least 2"
            )
        return _from_features(path, [features], "features (feats)")
    if "arr_0" in keys:
        return _measured(SampleArray(path), path, "npz of samples (arr_0)", detector, looking)
    found = ", ".join([shown(key) for key in sorted(keys)[:5]] + ["…"] * (len(keys) > 5)) or "nothing"
    raise ValueError(f"reference {path} holds {found}, expected mu and sigma")


def _from_arrays(path: Path, arrays: dict[str, np.ndarray], form: str) -> Reference:
    mu, sigma = (_floats(path, arrays[key], key) for key in ("mu", "sigma"))
    features = _floats(path, arrays["features"], "features") if "features" in arrays else None
    _check_shapes(path, mu, sigma, features)
    said = {key: str(arrays[key]) for key in ("detector", "detector_sha256", "detector_resize") if key in arrays}
    return Reference(
        name=path.name,
        sha256=sha256_of_file(path),
        mu=mu.double(),
        sigma=sigma.double(),
        num=_count(path, arrays, features),
        features=None if features is None else features.float(),
        detector=said.get("detector"),
        detector_sha256=said.get("detector_sha256"),
        detector_resize=said.get("detector_resize"),
        form=form,
        classes=_classes(path, arrays, features),
    )


def _from_features(path: Path, parts: list[torch.Tensor], form: str) -> Reference:
    """Of features [N, D] in one or more parts, at least two in all; takes little memory beyond theirs."""
    for width in {part.shape[1] for part in parts}:
        _check_width(path, width)
    num, width = sum(map(len, parts)), parts[0].shape[1]
    if num * width * width > MAX_PRODUCTS + PRODUCTS_PER_BYTE * path.stat().st_size:  # they are packed, or named often
        raise ValueError(f"reference {path} holds {num} times {width} features, many times what the file is long")
    statistics = FeatureStatistics()
    try:
        for piece in (piece for part in parts for piece in part.split(_PIECE)):
            statistics.update(piece)
    except ValueError as error:
        raise ValueError(f"reference {path}: {error}") from None
    return Reference(
        name=path.name,
        sha256=sha256_of_file(path),
        mu=statistics.mean,
        sigma=statistics.covariance,
        num=num,
        features=parts[0].float() if len(parts) == 1 else torch.cat([part.float() for part in parts]),
        form=form,
    )


def _from_checkpoint(path: Path, found: Sniffed, detector: Detector | None, looking: Looking) -> Reference:
    """Cached statistics in a pickle or `.pt`, otherwise a generator or a teacher, whichever it is."""
    if found.kind in ("pickle", "torch"):
        value = None
        with contextlib.suppress(ValueError):  # what cannot be read as plain arrays is perhaps a generator
            value = read_stored(path, EXPECTED)
        if (reference := _from_table(path, value, detector)) is not None:
            return reference
    try:
        G = load_generator(path)
    except ValueError as error:
        if holds_teacher(path):
            return _of_teacher(TeacherSource.of(path), detector, looking)
        raise ValueError(f"reference {path} is {found.description}; expected {EXPECTED} ({error})") from None
    return _of_generator(G, path, detector, looking)


def _is_network(folder: str) -> bool:
    """Whether a folder is not one of images, but of a diffusion model."""
    try:
        find_weights(folder)
    except ValueError:
        return False
    return True


def _from_table(path: Path, value: Any, detector: Detector | None) -> Reference | None:
    """A reference from a table of arrays, or from features alone; None if the value is neither."""
    if isinstance(value, torch.Tensor) and value.ndim == 2 and value.is_floating_point() and len(value) >= 2:
        return _from_features(path, [value], "torch-fidelity features")
    if not isinstance(value, dict):
        return None
    if any(isinstance(value.get(part), dict) for part in _EDM2_PARTS):
        part = getattr(detector, "edm2_part", "fid")
        if not isinstance(value.get(part), dict):
            found = " and ".join(text for part, text in _EDM2_PARTS.items() if isinstance(value.get(part), dict))
            raise ValueError(f"reference {path} is of {found}; found the detector {getattr(detector, 'name', None)}")
        value = {"num": value.get("num_images"), **value[part]}
    arrays: dict[str, np.ndarray] = {k: item.numpy() for k, item in value.items() if isinstance(item, torch.Tensor)}
    if isinstance(value.get("num"), int):
        arrays["num"] = np.asarray(value["num"])
    if {"mu", "sigma"} <= set(arrays):
        return _from_arrays(path, arrays, "statistics (mu, sigma) in a pickle or .pt")
    if {"raw_mean", "raw_cov"} <= set(arrays):
        return _from_sums(path, arrays, value.get("num_items"))
    if isinstance(parts := value.get("all_features"), list):
        parts = [part for part in parts if isinstance(part, torch.Tensor) and part.ndim == 2]
        if sum(map(len, parts)) >= 2:
            return _from_features(path, parts, "StyleGAN features cache")
    return None


def _from_sums(path: Path, arrays: dict[str, np.ndarray], num: Any) -> Reference:
    """StyleGAN's cache: sums of features and of their outer products."""
    if isinstance(num, torch.Tensor):
        num = num.item()
    if not isinstance(num, int) or num < 2:
        raise ValueError(f"reference {path} has num_items {num}, expected a number of images of at least 2")
    total, outer = (_floats(path, arrays[key], key) for key in ("raw_mean", "raw_cov"))
    if total.ndim != 1 or outer.shape != (len(total), len(total)):
        shapes = f"raw_mean of shape {list(total.shape)} and raw_cov of shape {list(outer.shape)}"
        raise ValueError(f"reference {path} has {shapes}, expected [D] and [D, D]")
    mean = total.double() / num
    sigma = (outer.double() - num * torch.outer(mean, mean)) / (num - 1)
    _check_shapes(path, mean, sigma, None)
    digest = sha256_of_file(path)
    return Reference(path.name, digest, mean, sigma, num, form="StyleGAN statistics cache (sums, divided by N − 1)")


# Images.


def _measured(
    images: ImageSet | SampleArray, path: Path, form: str, detector: Detector | None, looking: Looking
) -> Reference:
    """The statistics of images in the detector's space, from the cache or measured now."""
    if detector is None:
        raise NeedsDetector(f"reference {path} is images ({form}), which need a detector to be looked at")
    if len(images) < 2:
        raise ValueError(f"reference {path} holds {len(images)} image, expected at least 2")
    batch = looking.batch or sensible_batch(images.resolution)

    def batches() -> Iterator[Batch]:
        return images.batches(batch, my_share(range(len(images)), batch))

    reference = _cached(path, images.sha256(), len(images), batches, detector, looking, lambda: images.classes)
    return replace(reference, form=form, images=images)


def _of_generator(G: Generator, path: Path, detector: Detector | None, looking: Looking) -> Reference:
    if detector is None:
        raise NeedsDetector(f"reference {path} is a generator, whose images need a detector to be looked at")
    seeds = range(REFERENCE_SEED, REFERENCE_SEED + looking.num)
    batch = looking.batch or sensible_batch(G.img_resolution)

    def batches() -> Iterator[Batch]:
        return sample_images(G.to(looking.device), my_share(seeds, batch), batch=batch, device=looking.device)

    content = f"{sha256_of_file(path)} {looking.num} {batch}"
    reference = _cached(path, content, looking.num, batches, detector, looking, lambda: None)
    return replace(reference, sha256=sha256_of_file(path), form=f"generator, {looking.num} images", is_drawn=True)


def _of_teacher(source: TeacherSource, detector: Detector | None, looking: Looking) -> Reference:
    if detector is None:
        raise NeedsDetector(f"reference {source.name} is a teacher, whose images need a detector to be looked at")
    if not looking.draw:
        raise NotDrawn
    info, banks = source.info(), list[Bank]()
    batch = looking.batch or sensible_batch(info.img_resolution)

    def batches() -> Iterator[Batch]:  # the bank is drawn here and now: all processes together, and in this thread
        how: dict[str, Any] = {"batch": batch, "device": looking.device, "progress": looking.progress}
        how["choice"] = looking.sampler
        banks.append(teacher_bank(source, looking.bank, cache=looking.cache, **how))
        return banks[0].batches(batch, my_share(range(looking.bank), batch))

    settings, _ = looking.sampler.resolve(info)
    content = f"{describe_bank(source, looking.bank, settings)} {batch}"
    classes = lambda: banks[0].classes  # noqa: E731
    reference = _cached(source.path, content, looking.bank, batches, detector, looking, classes)
    form = f"teacher{source.guided_words}, {looking.bank} images, {settings.describe()}"
    return replace(reference, sha256=source.identity, form=form, is_teacher=True, is_drawn=True)


def _cached(
    path: Path,
    content: str,
    num: int,
    batches: Callable[[], Iterator[Batch]],
    detector: Detector,
    looking: Looking,
    classes_of_images: Callable[[], torch.Tensor | None],
) -> Reference:
    """What was measured of these images before, or is now; `content` tells them apart from others.

    The classes are asked for once the images have been looked at.
    """
    key = json.dumps([_CACHE_VERSION, content, detector.sha256, detector.name, detector.resize, num])
    target = cache_dir() / "metrics" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    kept = _kept(target, num, detector) if looking.cache else None
    everywhere = all(gathered(kept is not None))  # machines may have caches of their own
    if kept is not None and everywhere:
        return replace(kept, name=path.name, sha256=content)
    statistics = _look(batches(), num, path.name, detector, looking)
    classes = classes_of_images()
    labels = {} if classes is None else {"classes": classes.numpy()}
    if looking.cache and rank_and_world()[0] == 0:
        _keep(target, lambda: save_reference(target, statistics, detector, **labels))
    return Reference(
        name=path.name,
        sha256=content,
        mu=statistics.mean,
        sigma=statistics.covariance,
        num=num,
        features=statistics.features if statistics.keep_features else None,
        detector=detector.name,
        detector_sha256=detector.sha256,
        detector_resize=detector.resize,
        classes=classes,
    )


def _keep(target: Path, save: Callable[[], None]) -> None:
    """Keeps what was measured for the next time; where that cannot be, the numbers are good all the same."""
    try:
        make_folder(target.parent)
        save()
        keep_from_others(target)
    except OSError as error:
        print(
            f"what was measured of --ref cannot be kept ({describe_os_error(error)}); "
            "set REFINE_CACHE to a folder that can be written to",
            file=sys.stderr,
        )


def _kept(target: Path, num: int, detector: Detector) -> Reference | None:
    """What was measured before, if it is there and whole."""
    try:
        if reason := distrust(target, cache_dir()):
            raise ValueError(reason)
        if not target.is_file():
            return None
        reference = _from_arrays(target, _read_npz(target), "cache")
        reference.check_detector(detector)
        if reference.num != num:
            raise ValueError(f"{target} holds {reference.num} images, expected {num}")
        return reference
    except ValueError as error:
        print(f"measured again, because what was cached cannot be used: {error}", file=sys.stderr)
        return None


@exact_products()
@torch.no_grad()
def _look(batches: Iterator[Batch], num: int, name: str, detector: Detector, looking: Looking) -> FeatureStatistics:
    """Statistics of all processes' batches; features are kept if they fit `MAX_FEATURE_BYTES`."""
    parts = [part for part in made_by_all(lambda: _look_at_share(batches, num, name, detector, looking)) if part]
    whole = FeatureStatistics(keep_features=parts[0].keep_features)
    for part in parts:
        whole.merge(part)
    return whole


def _look_at_share(
    batches: Iterator[Batch], num: int, name: str, detector: Detector, looking: Looking
) -> FeatureStatistics | None:
    """Statistics of this process's batches; None if there are none."""
    from tqdm import tqdm

    statistics: FeatureStatistics | None = None
    has_bar = looking.progress and rank_and_world()[0] == 0
    interval = 0.1 if sys.stderr.isatty() else 10.0  # seconds; a log file wants few lines
    options: dict[str, Any] = {"unit": "img", "disable": not has_bar, "mininterval": interval}
    with tqdm(total=num, desc=f"reference {name}", **options) as bar:
        for images, _ in prefetched(batches):
            try:
                features = detector(images.to(looking.device))
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[-1][:150]
                raise ValueError(f"{detector.name} cannot take images {list(images.shape[1:])}: {reason}") from None
            if statistics is None:
                statistics = FeatureStatistics(keep_features=num * features.shape[1] * 4 <= MAX_FEATURE_BYTES)
            statistics.update(features)
            bar.update(len(images) * rank_and_world()[1])
    return statistics


# Arrays.


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    """Arrays of an .npz; images (`arr_0`) are only named, they may be gigabytes."""
    try:
        return archives.read_arrays(path, skip="arr_0")
    except Refused as error:
        raise ValueError(
            f"reference {path} is not a whole .npz file of plain arrays, expected one with mu and sigma ({error})"
        ) from None


def _classes(path: Path, arrays: dict[str, np.ndarray], features: torch.Tensor | None) -> torch.Tensor | None:
    if "classes" not in arrays or features is None:
        return None
    classes = arrays["classes"]
    whole = classes.dtype.kind in "iu" and classes.shape == (len(features),) and len(classes) > 0
    if not whole or classes.min() < 0 or classes.max() >= 1 << 20:
        raise ValueError(f"reference {path} has classes that are not numbers from 0, one for each of its features")
    return torch.from_numpy(classes.astype(np.int64))


def _floats(path: Path, array: np.ndarray, key: str) -> torch.Tensor:
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise ValueError(f"reference {path} has {key} of dtype {array.dtype}, expected floats")
    if fault := unusable(float(np.max([array.max(initial=0), -array.min(initial=0)]))):  # NaN is handed on
        raise ValueError(f"reference {path} has {fault} in {key}, expected finite numbers")
    return torch.from_numpy(array)


def _count(path: Path, arrays: dict[str, np.ndarray], features: torch.Tensor | None) -> int | None:
    if "num" not in arrays:
        return None if features is None else len(features)
    if arrays["num"].ndim or arrays["num"].dtype.kind not in "iu":
        raise ValueError(f"reference {path} has a num that is not an integer, expected the number of images")
    num = int(arrays["num"])
    if num < 2:
        raise ValueError(f"reference {path} has a num of {num}, expected the number of images, at least 2")
    if features is not None and num != len(features):
        raise ValueError(
            f"reference {path} has a num of {num} and features of {len(features)} images, expected as many"
        )
    return num


def _check_shapes(path: Path, mu: torch.Tensor, sigma: torch.Tensor, features: torch.Tensor | None) -> None:
    if mu.ndim != 1 or len(mu) == 0 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(
            f"reference {path} has mu of shape {list(mu.shape)} and sigma of shape {list(sigma.shape)}, "
            "expected [D] and [D, D]"
        )
    _check_width(path, len(mu))
    if not _is_symmetric(sigma):
        raise ValueError(f"reference {path} has a sigma that is not symmetric, expected a covariance matrix")
    # Of single precision, covariances have eigenvalues a little below zero.
    raised = sigma.to(torch.float64, copy=True)
    raised.diagonal().add_(_ROUNDING * sigma.diagonal().abs().max().double() + 1e-30)  # of equal images all are zero
    if torch.linalg.cholesky_ex(raised).info.item():
        raise ValueError(f"reference {path} has a sigma with negative eigenvalues, expected a covariance matrix")
    if features is not None and (features.ndim != 2 or features.shape[1] != len(mu) or len(features) < 2):
        found = f"features of shape {list(features.shape)}"
        raise ValueError(f"reference {path} has {found}, expected [N, {len(mu)}], N at least 2")


def _is_symmetric(sigma: torch.Tensor) -> bool:
    """Up to rounding; [D, D] of any floats. By tiles that stay in the processor's cache: an eighth of the time."""
    spare, starts = 1e-6 * sigma.abs().max().item(), range(0, len(sigma), _TILE)
    for top, left in itertools.combinations_with_replacement(starts, 2):
        other = sigma[left : left + _TILE, top : top + _TILE].T.contiguous()
        apart = (sigma[top : top + _TILE, left : left + _TILE] - other).abs_()
        if not (apart.sub_(other.abs_(), alpha=1e-4) <= spare).all():
            return False
    return True


def _check_width(path: Path, width: int) -> None:
    """The covariance of so many features is taken into memory."""
    if not 0 < width <= MAX_WIDTH:
        raise ValueError(f"reference {path} is of {width} features, expected at most {MAX_WIDTH}")
