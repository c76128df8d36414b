"""generate.py: mixed styles, styles of a file, films, class columns, pairs and folders of a thousand."""

import itertools
import resource
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from refine.checkpoints import load_generator
from refine.checkpoints.native import save_networks
from refine.evaluation.styles import _write_mp4
from refine.images import to_uint8
from refine.metrics.sampling import latents_of_seeds
from refine.networks.r3gan import Generator as R3GAN
from tests.evaluation.test_generate import files, read, run  # noqa: F401 - a fixture


@pytest.fixture
def networks(files):  # noqa: F811
    if not (files / "plain.safetensors").exists():
        torch.manual_seed(1)
        G = R3GAN(4, 0, 16, 1, widths=[8, 8, 8], cardinalities=[2, 2, 2], blocks=[1, 1, 1])
        save_networks(files / "plain.safetensors", {"G_ema": G}, provenance={})
    return files


def near(found, expected):
    return abs(np.asarray(found).astype(int) - np.asarray(expected).astype(int)).max() <= 1


def styles(G, seeds):
    z, _ = latents_of_seeds(seeds, [8])
    with torch.no_grad():
        return G.mapping(z, None)


def drawn(G, w):
    with torch.no_grad():
        return to_uint8(G.synthesis(w, noise_mode="const")).permute(0, 2, 3, 1).numpy()


def test_mixed_styles(networks, tmp_path, capsys):
    network, out = networks / "rgb.safetensors", tmp_path / "out"
    args = [f"--network={network}", "--rows=1,2", "--cols=3-5", "--col-styles=0,1", f"--outdir={out}"]
    code, stdout, err = run(capsys, *args)
    assert (code, err) == (0, "") and stdout.startswith("6 images")
    G = load_generator(network)
    row, column = styles(G, [2])[0], styles(G, [5])[0]
    mixed = torch.stack([torch.cat([column[:2], row[2:]])])
    assert near(read(out / "2-5.png"), drawn(G, mixed)[0])
    assert not near(read(out / "2-5.png"), drawn(G, row[None])[0])
    grid = read(tmp_path / "out-grid.png")
    assert grid.shape == (3 * 16, 4 * 16, 3) and not grid[:16, :16].any()
    assert near(grid[:16, 16:32], drawn(G, styles(G, [3]))[0]) and near(grid[32:, :16], drawn(G, row[None])[0])
    assert near(grid[32:, 48:], read(out / "2-5.png"))


def test_styles_of_a_file(networks, tmp_path, capsys):
    G = load_generator(networks / "rgb.safetensors")
    w = styles(G, [7, 8])
    np.savez(tmp_path / "w.npz", w=w.numpy())
    code, _, _ = run(
        capsys, f"--network={networks}/rgb.safetensors", f"--projected-w={tmp_path}/w.npz", f"--outdir={tmp_path}/out"
    )
    assert code == 0 and near(read(tmp_path / "out" / "proj01.png"), drawn(G, w)[1])


def test_a_file_that_holds_no_styles_is_refused(networks, tmp_path, capsys):
    canary = tmp_path / "canary"

    class Hostile:
        def __reduce__(self):
            return open, (str(canary), "w")

    arrays = {
        "other": {"x": np.zeros(3)},
        "shape": {"w": np.zeros([1, 3, 8], dtype=np.float32)},
        "dtype": {"w": np.zeros([1, 6, 8], dtype=np.int64)},
        "nan": {"w": np.full([1, load_generator(networks / "rgb.safetensors").num_ws, 8], np.nan)},
        "object": {"w": np.array([Hostile()], dtype=object)},
    }
    for name, content in arrays.items():
        np.savez(tmp_path / f"{name}.npz", **content)
    (tmp_path / "text.npz").write_text("hello")
    for name in (*arrays, "text", "nothing"):
        args = [f"--network={networks}/rgb.safetensors", f"--outdir={tmp_path}/out"]
        code, _, err = run(capsys, *args, f"--projected-w={tmp_path}/{name}.npz")
        assert code == 2 and err.startswith("Error: --projected-w: ") and err.count("\n") == 1, err
    assert not canary.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("network", ["labels", "plain"])
def test_a_film_goes_from_seed_to_seed_and_back(networks, tmp_path, capsys, network):
    film = tmp_path / "films" / "x.png"
    args = [f"--network={networks}/{network}.safetensors", "--seeds=3,4", "--frames=3", f"--video={film}"]
    code, stdout, _ = run(capsys, *args)
    assert code == 0 and stdout.strip() == str(film)
    run(capsys, *args[:1], "--seeds=3,4", f"--outdir={tmp_path}/out", *(["--class=0"] if network == "labels" else []))
    with Image.open(film) as file:
        assert file.n_frames == 6 and file.size == (16, 16)
        frames = []
        for index in range(6):
            file.seek(index)
            frames.append(np.asarray(file.convert("L")))
    assert all(not np.array_equal(a, b) for a, b in itertools.pairwise(frames))
    if network == "plain":
        assert near(frames[0], read(tmp_path / "out" / "seed0003.png"))


def frames_of(film) -> list[np.ndarray]:
    """uint8 [H, W] each."""
    if film.suffix == ".mp4":
        reader = pytest.importorskip("imageio_ffmpeg").read_frames(str(film), "gray", bits_per_pixel=8)
        width, height = next(reader)["size"]
        return [np.frombuffer(frame, np.uint8).reshape(height, width) for frame in reader]
    with Image.open(film) as file:
        assert file.info["loop"] == 0
        return [np.asarray(frame.convert("L")) for frame in ImageSequence.Iterator(file)]


@pytest.mark.parametrize("kind", ["gif", "webp", "apng", "mp4"])
def test_every_kind_of_film_can_be_seen_and_has_no_seam(networks, tmp_path, capsys, kind):
    if kind == "mp4":
        pytest.importorskip("imageio_ffmpeg")
    film, network = tmp_path / f"x.{kind}", f"--network={networks}/rgb.safetensors"
    code, stdout, err = run(capsys, network, "--seeds=3-5", "--frames=4", f"--video={film}")
    assert code == 0 and stdout.strip() == str(film), err
    run(capsys, network, "--seeds=3-5", f"--outdir={tmp_path}/out")
    frames = [frame.astype(float) for frame in frames_of(film)]
    assert len(frames) == 12 and frames[0].shape == (16, 16)
    stills = [
        np.asarray(Image.open(tmp_path / "out" / f"seed000{n}.png").convert("L")).astype(float) for n in (3, 4, 5)
    ]
    lossy = 16 if kind in ("webp", "mp4") else 4  # grey levels, in the mean; a GIF has a palette
    for index, still in enumerate(stills):
        distances = [abs(frame - still).mean() for frame in frames]
        assert distances[4 * index] <= lossy and np.argmin(distances) == 4 * index
    steps = [abs(a - b).mean() for a, b in itertools.pairwise([*frames, frames[0]])]
    assert steps[-1] <= max(steps[:-1])  # from the end to the beginning it is no further than elsewhere


def test_odd_sizes_fit_into_an_mp4(tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    _write_mp4(tmp_path / "x.mp4", ".mp4", iter(torch.randint(256, [3, 4, 33, 17], dtype=torch.uint8)))
    assert [frame.shape for frame in frames_of(tmp_path / "x.mp4")] == [(34, 18)] * 3


def test_what_ffmpeg_says_is_one_line(networks, tmp_path, capsys, monkeypatch):
    pytest.importorskip("imageio_ffmpeg")
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/bin/false")
    args = [f"--network={networks}/rgb.safetensors", "--seeds=0,1", "--frames=9", f"--video={tmp_path}/x.mp4"]
    code, _, err = run(capsys, *args)
    assert code == 2 and "Error: --video: ffmpeg failed: " in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["mp4", "gif", "webp"])
def test_a_film_that_the_disk_does_not_hold_is_none(networks, tmp_path, capsys, kind):
    if kind == "mp4":
        pytest.importorskip("imageio_ffmpeg")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    args = [f"--network={networks}/rgb.safetensors", "--seeds=0-5", "--frames=9", f"--video={tmp_path}/x.{kind}"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))  # ffmpeg inherits it
    try:
        code, _, err = run(capsys, *args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and "Error: --video: " in err, err
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_filmed_is_refused(networks, tmp_path, capsys, monkeypatch):
    def without_a_binary():
        raise RuntimeError("No ffmpeg exe could be found.")

    for module, name, words in [
        (None, "x.mp4", "needs imageio-ffmpeg"),
        (SimpleNamespace(get_ffmpeg_exe=without_a_binary), "x.mp4", "finds no ffmpeg"),
        (None, "x.avi", "expected .mp4, .gif"),
    ]:
        monkeypatch.setitem(sys.modules, "imageio_ffmpeg", module)
        args = [f"--network={networks}/rgb.safetensors", "--seeds=0,1", f"--video={tmp_path}/{name}"]
        code, _, err = run(capsys, *args)
        assert code == 2 and words in err and err.count("\n") == 1, err
    assert list(tmp_path.iterdir()) == []


def test_class_columns_pairs_and_folders(networks, tmp_path, capsys):
    network, out = f"--network={networks}/labels.safetensors", tmp_path / "out"
    code, _, err = run(capsys, network, "--seeds=5,1005", f"--outdir={out}", "--class-columns", "--subdirs")
    assert code == 0, err
    assert sorted(path.name for path in out.iterdir()) == ["000000", "001000"]
    assert len(list(out.glob("*/*.png"))) == 20 and (out / "001000/seed001005-class9.png").exists()
    grid = read(tmp_path / "out-grid.png")
    assert grid.shape == (2 * 16, 10 * 16)
    assert near(grid[16:, 48:64], read(out / "001000/seed001005-class3.png"))
    pair = tmp_path / "pair"
    before, after = f"--before={networks}/teacher.safetensors", f"--after={networks}/labels.safetensors"
    code, _, err = run(capsys, before, after, "--seeds=0-2", f"--outdir={pair}", "--class=1", "--steps=2")
    assert code == 0, err
    run(capsys, network, "--seeds=0-2", f"--outdir={tmp_path}/alone", "--class=1")
    image = read(pair / "seed0002.png")
    assert image.shape == (16, 32) and near(image[:, 16:], read(tmp_path / "alone" / "seed0002.png"))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--network={}/rgb.safetensors", "--outdir=out"], "--seeds is missing"),
        (["--network={}/rgb.safetensors", "--seeds=0"], "--outdir is missing"),
        (["--network={}/rgb.safetensors", "--rows=0", "--outdir=out"], "--cols is missing, beside --rows"),
        (["--network={}/rgb.safetensors", "--rows=0", "--cols=1", "--col-styles=99", "--outdir=out"], "--col-styles: "),
        (["--network={}/rgb.safetensors", "--rows=0", "--cols=1", "--video=x.gif"], "two different things"),
        (["--network={}/rgb.safetensors", "--rows=0", "--cols=1", "--seeds=1", "--outdir=out"], "--seeds does not go"),
        (["--network={}/rgb.safetensors", "--seeds=0", "--cols=1", "--outdir=out"], "--cols needs --rows"),
        (["--network={}/rgb.safetensors", "--seeds=0", "--class-columns", "--outdir=out"], "--class-columns: "),
        (["--network={}/rgb.safetensors", "--seeds=1", "--video=x.gif"], "--video: a film goes"),
        (["--network={}/plain.safetensors", "--rows=0", "--cols=1", "--outdir=out"], "has no styles"),
        (["--network={}/teacher.safetensors", "--seeds=0,1", "--video=x.gif"], "is a diffusion model"),
        (["--network={}/plain.safetensors", "--seeds=0", "--trunc=0.5", "--outdir=out"], "--trunc is 0.5"),
        (["--network={}/teacher.safetensors", "--seeds=0", "--trunc=0.5", "--outdir=out"], "--trunc is 0.5"),
        (
            ["--network={}/rgb.safetensors", "--before={}/labels.safetensors", "--seeds=0", "--outdir=out"],
            "--network: its images",
        ),
        (["--network={}/rgb.safetensors", "--seeds=0", "--frames=9", "--outdir=out"], "--frames needs --video"),
        (
            ["--network={}/rgb.safetensors", "--seeds=0", "--col-styles=0-6", "--outdir=out"],
            "--col-styles needs --rows",
        ),
        (["--network={}/rgb.safetensors", "--projected-w=w.npz", "--trunc=0.5", "--outdir=out"], "--trunc does not go"),
        (["--network={}/rgb.safetensors", "--projected-w=w.npz", "--class=0", "--outdir=out"], "--class does not go"),
        (
            ["--network={}/rgb.safetensors", "--seeds=0,1", "--video=x.gif", "--noise-mode=none"],
            "--noise-mode does not",
        ),
        (
            ["--network={}/labels.safetensors", "--seeds=0", "--class-columns", "--class=0", "--outdir=out"],
            "--class does",
        ),
        (["--network={}/teacher.safetensors", "--seeds=0", "--noise-mode=const", "--outdir=out"], "no noise inputs"),
        (["--network={}/rgb.safetensors", "--seeds=0", "--sigma-init=2.5", "--outdir=out"], "given as one-step:FILE"),
        (["--network={}/teacher.safetensors", "--seeds=0", "--s-noise=1", "--outdir=out"], "expected --s-churn beside"),
    ],
)
def test_faults_are_one_line(networks, tmp_path, capsys, monkeypatch, args, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *(arg.format(networks) for arg in args))
    assert code == 2 and words in err and err.count("\n") == 1, err
    assert list(tmp_path.iterdir()) == []
