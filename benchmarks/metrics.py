"""What measuring costs: images/s of generator, detector and both as a pipeline, and whether memory grows with N.

    python benchmarks/metrics.py [--quick] [--against-torch-fidelity]

The pipeline makes images in one thread while the detector looks at the previous ones. What it reaches is bounded by the
slower of the two where each has a core of its own (or a GPU), and by their sum where they share one. All are measured
in turn, several times, and compared within each turn, so that other work on the machine hits all alike: by the clock
against the slower part, and in processor seconds of a CPU, which tell what the pipeline itself costs, against the sum
of both.

Against torch-fidelity, where that is installed, on a CPU: the same images through the same random Inception weights to
FID, KID, precision, recall and Inception Score of both; and these numbers alone from 2500 vectors of 2048 features.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from refine.metrics.detectors import Detector, InceptionDetector, load_detector
from refine.metrics.dinov2 import Architecture, VisionTransformer
from refine.metrics.dinov2_detector import DinoV2Detector
from refine.metrics.evaluate import evaluate
from refine.metrics.evaluate import measure as measured
from refine.metrics.inception import InceptionNetwork
from refine.metrics.measures.frechet import frechet_distance
from refine.metrics.measures.kernel_subsets import kernel_distance_of_subsets
from refine.metrics.measures.precision_recall import precision_recall
from refine.metrics.references import Reference
from refine.metrics.sampling import Batch, sample_images
from refine.metrics.statistics import FeatureStatistics
from refine.networks.stylegan2 import Generator

T = TypeVar("T")
CIFAR = {"z_dim": 512, "c_dim": 0, "w_dim": 512, "img_resolution": 32, "img_channels": 3}


def plain_reference(dim: int) -> Reference:
    return Reference("standard normal", "0" * 64, torch.zeros(dim).double(), torch.eye(dim).double())


def cases(quick: bool) -> Iterator[tuple[str, torch.nn.Module, Detector, int, int]]:
    """(name, generator, detector, images, batch)."""
    from refine.checkpoints import load_generator

    # 100 images of 32 pixels fit the cache; as everywhere, channels_last halves a generator's time on a CPU
    G = load_generator("digits-gan").to(memory_format=torch.channels_last)
    yield "digits-gan, digits detector", G, load_detector("digits"), 500 if quick else 4000, 100
    inception = InceptionDetector(InceptionNetwork().eval().requires_grad_(False), "random", "0" * 64)
    yield "digits-gan, Inception", G, inception, 32 if quick else 96, 16
    cifar = Generator(**CIFAR, mapping_kwargs={"num_layers": 2}, synthesis_kwargs={"channel_base": 16384}).eval()
    cifar = cifar.requires_grad_(False).to(memory_format=torch.channels_last)
    yield "StyleGAN2 of CIFAR-10 size, Inception", cifar, inception, 32 if quick else 96, 16
    shapes = Architecture.published("vitb14").shapes()
    transformer = VisionTransformer(
        Architecture.published("vitb14"), {n: torch.randn(s) / 50 for n, s in shapes.items()}
    )
    dino = DinoV2Detector(transformer, "random", "0" * 64, "random")
    yield "StyleGAN2 of CIFAR-10 size, DINOv2 ViT-B/14", cifar, dino, 16 if quick else 48, 8


class Spent(NamedTuple):
    """Seconds of one work."""

    clock: float
    processor: float


def spent(work: Callable[[], object]) -> Spent:
    start = time.perf_counter(), time.process_time()
    work()
    return Spent(time.perf_counter() - start[0], time.process_time() - start[1])


@torch.no_grad()
def measure(name: str, G: torch.nn.Module, detector: Detector, num: int, batch: int, repeats: int, device: str) -> None:
    """Prints images/s and processor seconds of the parts and of the whole, and how they compare."""
    G, detector = G.to(device), detector.to(device)
    ready = list(sample_images(G, range(num), batch=batch, device=device))
    features = detector(ready[0].images)
    reference = plain_reference(features.shape[1])

    def generator_alone() -> None:
        for _ in sample_images(G, range(num), batch=batch, device=device):
            pass
        synchronise(device)

    def detector_alone() -> None:
        for images, _ in ready:
            detector(images)
        synchronise(device)

    def pipeline() -> None:
        evaluate(sample_images(G, range(num), batch=batch, device=device), detector, reference, kinds=())

    def distance() -> None:  # once for all images, however many
        frechet_distance(*moments, reference.mu, reference.sigma)

    moments = torch.randn(reference.mu.shape).double(), torch.cov(torch.randn(len(reference.mu), 4096).double())
    works = {"generator": generator_alone, "detector": detector_alone, "pipeline": pipeline}
    turns = [{key: spent(work) for key, work in works.items()} for _ in range(repeats)]
    print(f"\n{name}: {num} images, batches of {batch}, {device}")
    for key in works:
        clock, processor = (min(getattr(turn[key], field) for turn in turns) for field in Spent._fields)
        print(f"  {key:<28}{num / clock:10.1f} images/s, {1000 * processor / num:10.2f} ms of the processor an image")
    shares = [[max(turn["generator"][i], turn["detector"][i]) / turn["pipeline"][i] for turn in turns] for i in (0, 1)]
    sums = [(turn["generator"].processor + turn["detector"].processor) / turn["pipeline"].processor for turn in turns]
    ratios = {"clock, slower part": shares[0], "processor, slower part": shares[1], "processor, both parts": sums}
    for key, values in ratios.items():  # of the pipeline's
        print(f"  {key:<28}{median(values):10.2f} of the pipeline ({min(values):.2f} to {max(values):.2f})")
    print(f"  then the distance, once     {spent(distance).clock:10.2f} s", flush=True)


def synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_memory(num: int) -> float:
    """MiB that a process of its own needs at most for a Fréchet distance in 2048 dimensions of `num` images."""
    command = [sys.executable, __file__, f"--memory-of={num}"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


class WideDetector:
    """2048 features that cost nothing, so that only the statistics' memory is seen."""

    name = space = "wide"
    sha256, feature_dim, resize, fid_basis, judges_classes = "0" * 64, 2048, "none", None, False

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :1].float() + torch.arange(2048) % 7

    def classify(self, images: torch.Tensor) -> None:
        return None


def print_memory(num: int) -> None:
    images = (Batch(torch.randint(0, 256, [100, 3, 32, 32], dtype=torch.uint8), None) for _ in range(num // 100))
    evaluate(images, WideDetector(), plain_reference(2048), kinds=("fd",))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


THEIRS = {  # their names of our numbers
    "fd_random": "frechet_inception_distance",
    "kidsub_random": "kernel_inception_distance_mean",
    "kidsub_random_std": "kernel_inception_distance_std",
    "precision": "precision",
    "recall": "recall",
    "is_random": "inception_score_mean",
}


def against_torch_fidelity(num: int, dim: int = 2048) -> None:
    """Prints processor seconds of both programs for `num` and `num` images, and for vectors of `dim` features."""
    from tests.metrics.oracles import import_torchvision, random_inception_state  # a checkout has them

    try:
        import_torchvision()
        from torch_fidelity import calculate_metrics, metric_fid, metric_kid, metric_prc
    except (ImportError, RuntimeError, AttributeError) as error:
        print(f"\ntorch-fidelity cannot be imported ({str(error).splitlines()[0]}): nothing is compared with it")
        return
    warnings.filterwarnings("ignore", module="torch_fidelity")
    fake, real = (torch.randint(0, 256, [num, 3, 32, 32], dtype=torch.uint8) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.pth"
        torch.save(random_inception_state(), path)
        options = {"input1": Images(fake), "input2": Images(real), "cuda": False, "batch_size": 16, "cache": False}
        options |= {"fid": True, "kid": True, "prc": True, "isc": True, "verbose": False, "samples_shuffle": False}
        options |= {"feature_extractor": "inception-v3-compat", "feature_layer_prc": "2048"}
        theirs, their_time = timed(
            lambda: calculate_metrics(**options, kid_subset_size=num, feature_extractor_weights_path=str(path))
        )
        ours, our_time = timed(lambda: from_images(load_detector(path), fake, real))
    print(f"\nagainst torch-fidelity: {num} and {num} images of 32 px, one thread, processor seconds")
    print(f"  from images to all numbers  {our_time:8.1f} s, torch-fidelity {their_time:8.1f} s")
    for key, name in THEIRS.items():
        difference = abs(ours[key] - float(theirs[name]))
        print(f"  {key:<28}{ours[key]:14.8g}   differs by {difference:.1e}", flush=True)

    x, y = (torch.randn(2500, dim, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    quiet = {"rng_seed": 2020, "verbose": False, "save_cpu_ram": False}
    whole = {"kid_subsets": 100, "kid_subset_size": 1000, "prc_batch_size": 1000, **quiet}
    fid_of, statistics_of = metric_fid.fid_statistics_to_metric, metric_fid.fid_features_to_statistics
    works: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "Fréchet distance": (
            lambda: frechet_distance(*moments(x), *moments(y)),
            lambda: fid_of(statistics_of(x), statistics_of(y), verbose=False),
        ),
        "kernel distance, subsets": (
            lambda: kernel_distance_of_subsets(x, y),
            lambda: metric_kid.kid_features_to_metric(x, y, **whole),
        ),
        "precision and recall": (
            lambda: precision_recall(y, x),
            lambda: metric_prc.prc_features_to_metric(x, y, **whole),
        ),
    }
    print(f"\nnumbers from 2500 and 2500 vectors of {dim} features, processor seconds")
    for name, (our_work, their_work) in works.items():
        print(f"  {name:<28}{timed(our_work)[1]:8.1f} s, torch-fidelity {timed(their_work)[1]:8.1f} s", flush=True)


class Images(torch.utils.data.Dataset):
    """Images as torch-fidelity takes them."""

    def __init__(self, images: torch.Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


@torch.no_grad()
def from_images(detector: Detector, fake: torch.Tensor, real: torch.Tensor) -> dict[str, Any]:
    statistics = FeatureStatistics(keep_features=True)
    for batch in real.split(16):
        statistics.update(detector(batch))
    found = {"mu": statistics.mean, "sigma": statistics.covariance, "features": statistics.features}
    reference = Reference("images", "0" * 64, num=len(real), **found)
    batches = (Batch(batch, None) for batch in fake.split(16))
    return measured(batches, detector, reference, ("fd", "kidsub", "pr", "is")).results


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    statistics = FeatureStatistics().update(x)
    return statistics.mean, statistics.covariance


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """The result, and processor seconds of this process and its children, which other work disturbs less."""
    start = sum(os.times()[:4])
    return work(), sum(os.times()[:4]) - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images, once")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--against-torch-fidelity", action="store_true", help="only this, on a CPU; takes minutes")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)  # one core for making images, one for looking at them
    if options.memory_of:
        print_memory(options.memory_of)
        return
    if options.against_torch_fidelity:
        against_torch_fidelity(16 if options.quick else 32)
        return
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, one thread for each part")
    for case in cases(options.quick):
        measure(*case, repeats=1 if options.quick else 5, device=options.device)
    few, many = (peak_memory(num) for num in ((500, 2000) if options.quick else (1000, 20_000)))
    print(f"\npeak memory, 2048 features: {few:.0f} MiB for few images, {many:.0f} MiB for many")


if __name__ == "__main__":
    main()
