"""What `generate.py` makes of a generator's styles: mixed ones, those of a file, and a way from one to the next."""

from __future__ import annotations

import contextlib
import importlib
import os
import struct
import subprocess
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.interpolate import CubicSpline
from tqdm import tqdm

from refine.checkpoints.sniff import sniff
from refine.dnnlib import check_outdir, replaced_atomically
from refine.errors import option
from refine.evaluation.generate import check_seeds, folder_and_grid, write_images
from refine.evaluation.sides import Side
from refine.images import save_image_grid, to_pil, to_uint8
from refine.metrics.sampling import latents_of_seeds

FPS = 30
_CRF = 18  # of H.264: hardly to be told from what went in
_UNREADABLE = (  # of zipfile and of numpy, for whatever a file holds
    *(ValueError, OSError, KeyError, EOFError, NotImplementedError, MemoryError, RuntimeError, SyntaxError, TypeError),
    *(zlib.error, zipfile.BadZipFile, struct.error),
)
_MAX_STYLES = 10_000  # of a file
_PILLOW = {".gif": "GIF", ".png": "PNG", ".apng": "PNG", ".webp": "WEBP"}


def mix_styles(
    side: Side,
    rows: Sequence[int],
    columns: Sequence[int],
    col_styles: Sequence[int],
    outdir: str | os.PathLike,
    class_index: int | None = None,
    truncation_psi: float = 1.0,
) -> list[Path]:
    """Every row's image with some styles of every column's: row-column.png, and a grid with both at its edges.

    Args:
        side: A generator of styles.
        rows, columns: Seeds.
        col_styles: Which of the num_ws styles are those of the column; coarse ones come first.
        outdir: Folder of the images.
        class_index: Class of all images.
        truncation_psi: Truncation.

    Returns:
        The paths of the images, and that of the grid at the end.

    Raises:
        ValueError: The network has no styles, or not these; the message begins with the option.
    """
    G = _styled(side)
    with option("--rows"):
        check_seeds([*rows, *columns])
    with option("--col-styles"):
        if max(col_styles) >= G.num_ws:
            raise ValueError(f"found {max(col_styles)}; expected styles of 0 to {G.num_ws - 1}")
    with option("--outdir"):
        folder, grid = folder_and_grid(outdir)
    seeds = list(dict.fromkeys([*rows, *columns]))
    w = dict(zip(seeds, _styles(side, seeds, class_index, truncation_psi), strict=True))
    mixed, names = [], []
    for row in rows:
        for column in columns:
            both = w[row].clone()
            both[list(col_styles)] = w[column][list(col_styles)]
            mixed.append(both)
            names.append(f"{row}-{column}.png")
    edges = _images(side, [w[seed] for seed in (*columns, *rows)])
    images = _images(side, mixed)
    cells, width = [torch.zeros_like(images[0]), *edges[: len(columns)]], len(columns)
    for index in range(len(rows)):
        cells += [edges[len(columns) + index], *images[index * width : (index + 1) * width]]
    with option("--outdir"):
        paths = [folder / name for name in names]
        write_images(images, paths)
        save_image_grid(grid, torch.stack(cells), width + 1)
    return [*paths, grid]


def images_of_styles(side: Side, file: str | os.PathLike, outdir: str | os.PathLike) -> list[Path]:
    """proj00.png … of the styles `w` in an .npz, as NVIDIA's projector writes it; and a grid at the end.

    Raises:
        ValueError: The file holds no styles of this network; the message begins with the option.
    """
    G = _styled(side)
    with option("--projected-w"):
        w = _read_styles(Path(file), G)
    with option("--outdir"):
        folder, grid = folder_and_grid(outdir)
        images = _images(side, list(w))
        paths = [folder / f"proj{index:02d}.png" for index in range(len(images))]
        write_images(images, paths)
        save_image_grid(grid, images)
    return [*paths, grid]


def film(
    side: Side,
    seeds: Sequence[int],
    file: str | os.PathLike,
    frames: int = 60,
    class_index: int | None = None,
    truncation_psi: float = 1.0,
    progress: bool = True,
) -> Path:
    """A film from seed to seed and back to the first: .mp4 where imageio-ffmpeg is installed, .gif, .png or .webp.

    The way is a closed cubic spline through the seeds' styles, or through their latents in a generator without styles,
    where it has the lengths of the latents, too, because the mean of two latents is shorter than either.

    Args:
        side: A generator.
        seeds: At least two.
        file: What is written.
        frames: From one seed to the next.
        class_index: Class of all images; None = one drawn for the first seed, since there is nothing between classes
            without styles.
        truncation_psi: Truncation.
        progress: Show a bar on stderr.

    Raises:
        ValueError: The file is of another kind, or the network is no generator; the message begins with the option.
    """
    path = Path(file)
    with option("--video"):
        if side.is_teacher:
            raise ValueError(f"{side.name} is a diffusion model; expected a generator")
        if len(seeds) < 2:
            raise ValueError("a film goes from one seed to the next; expected --seeds of at least two")
        if path.suffix.lower() not in (".mp4", *_PILLOW):
            raise ValueError(f"found {path.name}; expected .mp4, {', '.join(_PILLOW)}")
        if path.suffix.lower() == ".mp4":
            _check_ffmpeg()
        check_outdir(path.resolve().parent)
    with option("--seeds"):
        check_seeds(seeds)
    G: Any = side.network
    if hasattr(G, "num_ws"):
        way = _closed_way(torch.stack(_styles(side, seeds, class_index, truncation_psi)), frames)
        made = (_images(side, [w])[0] for w in way)
    else:
        z, classes = latents_of_seeds(seeds, [G.z_dim], G.c_dim, class_index)
        way = _closed_way(z, frames)
        way = way / way.norm(dim=1, keepdim=True) * _closed_way(z.norm(dim=1, keepdim=True), frames)
        c = None if classes is None else F.one_hot(classes[:1], G.c_dim).float()
        made = (_called(side, point[None], c)[0] for point in way)
    shown = iter(tqdm(made, total=len(way), unit="frame", desc="video", disable=not progress))
    with option("--video"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_atomically(path) as temporary:
            (_write_mp4 if path.suffix.lower() == ".mp4" else _write_animation)(Path(temporary), path.suffix, shown)
    return path


def _styled(side: Side) -> Any:
    G: Any = side.network
    if side.is_teacher or not all(hasattr(G, name) for name in ("mapping", "synthesis", "num_ws")):
        raise ValueError(f"--network: {side.name} has no styles; expected a StyleGAN2, StyleGAN3 or StyleGAN-XL")
    return G


@torch.no_grad()
def _styles(side: Side, seeds: Sequence[int], class_index: int | None, psi: float) -> list[torch.Tensor]:
    """(num_ws, w_dim) of each seed, of the same latents and classes as the images of seeds."""
    G, device = _styled(side), side.device
    with option("--class"):
        z, drawn = latents_of_seeds(seeds, [G.z_dim], G.c_dim, class_index)
    c = None if drawn is None else F.one_hot(drawn, G.c_dim).float().to(device)
    return list(G.mapping(z.to(device), c, truncation_psi=psi))


@torch.no_grad()
def _images(side: Side, styles: Sequence[torch.Tensor]) -> torch.Tensor:
    """uint8 [N, C, H, W] on the CPU, with the stored noise."""
    G = _styled(side)
    options = G.accepted(noise_mode="const")
    parts = [torch.stack(list(styles[start : start + side.batch])) for start in range(0, len(styles), side.batch)]
    return torch.cat([to_uint8(G.synthesis(part.to(side.device), **options)).cpu() for part in parts])


@torch.no_grad()
def _called(side: Side, z: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
    G: Any = side.network
    options = G.accepted(noise_mode="const")
    return to_uint8(G(z.to(side.device), None if c is None else c.to(side.device), **options)).cpu()


def _closed_way(points: torch.Tensor, frames: int) -> torch.Tensor:
    """[N, …] → [N·frames, …] along a closed cubic spline, which begins at the first point."""
    values = points.cpu().double().numpy()
    spline = CubicSpline(np.arange(len(values) + 1), np.concatenate([values, values[:1]]), bc_type="periodic")
    return torch.from_numpy(spline(np.arange(len(values) * frames) / frames)).float()


def _read_styles(path: Path, G: Any) -> torch.Tensor:
    """[N, num_ws, w_dim] of an .npz, of which nothing is executed."""
    expected = f"an .npz with the array w, [N, {G.num_ws}, {G.w_dim}]"
    if (found := sniff(path)).kind != "npz":
        raise ValueError(f"{path} is {found.description}; expected {expected}")
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file, file.zip.open("w.npy") as entry:
            version = np.lib.format.read_magic(entry)
            reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = reader(entry)
            shape = (1, *shape) if len(shape) == 2 else shape
            if shape[1:] != (G.num_ws, G.w_dim) or not 0 < shape[0] <= _MAX_STYLES or dtype.kind != "f":
                raise ValueError(f"its w is {dtype} {list(shape)}")
            w = torch.from_numpy(np.asarray(file["w"], dtype=np.float32)).reshape(shape)
    except _UNREADABLE as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise ValueError(f"{path} cannot be used ({reason}); expected {expected}") from None
    if not w.isfinite().all():
        raise ValueError(f"{path} holds NaN or infinity; expected {expected}")
    return w


def _write_animation(path: Path, suffix: str, frames: Iterator[torch.Tensor]) -> None:
    first, *others = [to_pil(frame) for frame in frames]
    options: dict[str, Any] = {"save_all": True, "append_images": others, "duration": 1000 / FPS, "loop": 0}
    with open(path, "wb") as file:
        first.save(file, format=_PILLOW[suffix.lower()], **options)


def _check_ffmpeg() -> None:
    """Raises ValueError where there is nothing that writes an .mp4."""
    try:
        importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe()
    except ImportError:
        raise ValueError(
            "an .mp4 needs imageio-ffmpeg (pip install imageio-ffmpeg); .gif, .png and .webp do without"
        ) from None
    except RuntimeError:  # a package without a binary, as on some platforms
        raise ValueError(
            "imageio-ffmpeg finds no ffmpeg (IMAGEIO_FFMPEG_EXE names one); .gif, .png and .webp do without"
        ) from None


def _write_mp4(path: Path, _suffix: str, frames: Iterator[torch.Tensor]) -> None:
    """H.264 of the usual pixels, which need even sizes. imageio-ffmpeg brings the program; its writer does not tell
    whether that came to its end."""
    first: Image.Image = to_pil(next(frames)).convert("RGB")
    even = (first.width + first.width % 2, first.height + first.height % 2)
    given = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "{}x{}".format(*even), "-r", str(FPS), "-i", "-"]
    made = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", str(_CRF), "-f", "mp4", str(path)]
    program = importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe()
    with tempfile.TemporaryFile() as said:  # a pipe that nobody reads could fill up
        command = [program, "-nostdin", "-y", "-v", "error", *given, *made]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said)
        with contextlib.suppress(BrokenPipeError), process:  # it gave up, and says why
            assert process.stdin is not None, "it is a pipe"
            process.stdin.write(first.resize(even).tobytes())
            for frame in frames:
                process.stdin.write(to_pil(frame).convert("RGB").resize(even).tobytes())
        said.seek(0)
        lines = said.read().decode(errors="replace").strip().splitlines()
    if process.returncode or lines:
        raise ValueError(f"ffmpeg failed: {(lines or [f'exit code {process.returncode}'])[-1][:200]}")
