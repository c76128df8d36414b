"""Batches ahead of their use, and several processes that hold the same numbers as one."""

import os
import socket
import threading
import time

import pytest
import torch
from PIL import Image

from refine.metrics.evaluate import measure
from refine.metrics.pipeline import my_share, prefetched, sharing
from refine.metrics.references import Looking, load_reference, save_reference
from refine.metrics.registry import METRICS
from refine.metrics.sampling import sample_images
from refine.metrics.statistics import FeatureStatistics
from refine.torch_utils import distributed
from tests.launch import CONTEXT, wait
from tests.metrics.networks import PixelDetector, PlainGenerator


def test_items_come_in_order_and_errors_where_they_happened():
    assert list(prefetched(iter(range(20)))) == list(range(20))

    def broken():
        yield 1
        raise ValueError("no more")

    items = prefetched(broken())
    assert next(items) == 1
    with pytest.raises(ValueError, match="no more"):
        next(items)


def test_a_consumer_that_stops_ends_the_thread():
    items = prefetched(iter(range(1000)))
    next(items)
    items.close()
    deadline = time.monotonic() + 5
    while any(thread.name == "images" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_shares_cover_everything_in_whole_batches(monkeypatch):
    for world in (1, 2, 3, 7):
        parts = []
        for rank in range(world):
            monkeypatch.setattr("refine.metrics.pipeline.rank_and_world", lambda r=rank, w=world: (r, w))
            parts.append(my_share(range(53), 10))
        assert [index for part in parts for index in part] == list(range(53))
        assert all(part.start % 10 == 0 for part in parts if len(part))


KINDS = tuple(metric.name for metric in METRICS)


def numbers(path):
    detector = PixelDetector(num_classes=4)
    images = sample_images(PlainGenerator(c_dim=4), my_share(range(45), 10), batch=10)
    found = measure(images, detector, load_reference(path), KINDS, contributions=True)
    values = {key: value for key, value in found.results.items() if isinstance(value, float) and key != "seconds"}
    return values, found.contributions["fd_pixels"], found.results["num"]


def _broken_folder(folder):
    """Images of which only the second process's share cannot be read."""
    folder.mkdir()
    for index in range(8):
        Image.new("L", (8, 8), 9 * index).save(folder / f"{index}.png")
    (folder / "7.png").write_bytes(b"no image")
    return folder


def process(rank, port, path, out):
    torch.set_num_threads(1)
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with distributed.session(cuda=False):
        if rank == 0:  # outside of `sharing` nobody is waited for
            assert numbers(path)[2] == 45
        with sharing():
            torch.save(numbers(path), f"{out}{rank}")
            for kind in (ValueError, RuntimeError):  # one process's error is all processes' error: nobody waits for it
                with pytest.raises(kind if rank else ValueError, match="only here"):
                    images = _broken(kind) if rank else sample_images(PlainGenerator(), range(5))
                    measure(images, PixelDetector(), load_reference(path))
            for _ in range(2):  # the images of a reference as well, and each time with an error of its own
                with pytest.raises(ValueError) as caught:
                    load_reference(path.parent / "broken", PixelDetector(), Looking(batch=2, cache=False))
                assert str(caught.value) == f"{path.parent / 'broken' / '7.png'} is broken or no image"


def _broken(kind):
    raise kind("only here")
    yield


def test_two_processes_hold_the_numbers_of_one(tmp_path):
    features = FeatureStatistics(keep_features=True).update(torch.rand(30, 4))
    save_reference(tmp_path / "r.npz", features, PixelDetector())
    _broken_folder(tmp_path / "broken")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        args = (free.getsockname()[1], tmp_path / "r.npz", str(tmp_path / "out"))
    processes = [CONTEXT.Process(target=process, args=(rank, *args)) for rank in range(2)]
    for child in processes:
        child.start()
    assert wait(processes) == [0, 0]
    expected = numbers(tmp_path / "r.npz")
    for rank in range(2):
        values, contributions, num = torch.load(tmp_path / f"out{rank}", weights_only=True)
        assert num == 45 and values == pytest.approx(expected[0], rel=1e-10)
        torch.testing.assert_close(contributions, expected[1], rtol=1e-8, atol=1e-10)
