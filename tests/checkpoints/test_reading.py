"""Numbers are read by a few threads: all of them, with the faults of one thread, and no thread stays behind."""

import io
import os
import re
import threading
import time
import weakref

import pytest
import torch

from refine.checkpoints import load_generator, load_teacher, native, reading, sniff
from refine.checkpoints.pickles import tensors
from refine.checkpoints.pickles.inert import Blob, Refused
from tests.checkpoints.builders import Format, edm_file, storage_bytes, write


@pytest.fixture(params=[1, 2, 8])
def threads(request, monkeypatch):
    monkeypatch.setattr(reading, "_THREADS", request.param)
    return request.param


def written(net, form, tmp_path):
    if form == "native":
        native.save_networks(tmp_path / "x.safetensors", {"ema": net}, provenance={})
        return tmp_path / "x.safetensors"
    return write(tmp_path / "x.pkl", edm_file(Format(**form), net))


@pytest.mark.parametrize("form", ["native", {}, {"protocol": 2}, {"channels_last": True}], ids=str)
def test_threads_read_what_one_reads(form, net, threads, tmp_path):
    path, before = written(net, form, tmp_path), threading.active_count()
    found = load_teacher(path).state_dict()
    assert threading.active_count() == before
    assert found.keys() == net.state_dict().keys()
    assert all(torch.equal(value, found[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("form", ["native", {}, {"dtype": torch.float16}, {"protocol": 2}], ids=str)
def test_a_file_that_shrinks_meanwhile_is_cut_off(form, net, threads, tmp_path, monkeypatch):
    path, before, fill = written(net, form, tmp_path), threading.active_count(), reading.in_threads

    def shrinks(work, items):
        os.truncate(path, path.stat().st_size * 2 // 3)
        fill(work, items)

    monkeypatch.setattr(tensors, "in_threads", shrinks)
    monkeypatch.setattr(native, "in_threads", shrinks)
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*cut off") as error:
        load_teacher(path)
    assert "\n" not in str(error.value) and threading.active_count() == before


def test_a_fault_ends_what_is_left(threads):
    begun = []

    def work(items):
        for item in items:
            begun.append(item)
            if item == 3:
                raise Refused("three")
            time.sleep(0.001)

    with pytest.raises(Refused, match="three"):
        reading.in_threads(work, range(1000))
    assert 4 <= len(begun) <= 3 + 10 * threads


def test_where_no_thread_can_be_started_this_one_does_it_all(net, tmp_path, monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    path = written(net, {}, tmp_path)
    monkeypatch.setattr(reading, "_THREADS", 4)
    monkeypatch.setattr(threading.Thread, "start", start)
    found = load_teacher(path).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in net.state_dict().items())


def test_loading_in_inference_mode(net, threads, tmp_path):
    with torch.inference_mode():
        G = load_generator(f"one-step:{written(net, {'dtype': torch.float16}, tmp_path)}")
        assert G(torch.zeros(1, 64)).shape == (1, 1, 8, 8)


def test_a_place_is_read_without_moving_the_stream(tmp_path):
    data = bytes(range(256)) * 100
    (tmp_path / "x").write_bytes(data)
    with open(tmp_path / "x", "rb") as file:
        for stream in (file, io.BytesIO(data)):
            stream.seek(5)
            view = memoryview(bytearray(1000))
            assert reading.read_at(stream, 777, view) == 1000 and view == data[777:1777]
            assert reading.read_at(stream, len(data) - 10, view) == 10 and view[:10] == data[-10:]
            assert reading.read_at(stream, len(data) + 1, view) == 0
            assert stream.tell() == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64])
@pytest.mark.parametrize("numel", [1, 255, 256, 65535, 65536, 100_000])
def test_a_storage_is_recognised_as_the_machine_reads_it(dtype, numel, monkeypatch):
    data = storage_bytes(torch.arange(numel).to(dtype))
    machine, runs = tensors.Machine, []
    monkeypatch.setattr(tensors, "Machine", lambda *args, **kwargs: runs.append(args) or machine(*args, **kwargs))
    monkeypatch.setattr(tensors, "_beginnings", [b""])
    found = [tensors.load_storage(Blob(io.BytesIO(data), 0, len(data))) for _ in range(2)]
    assert len(runs) == (3 if dtype == torch.int64 else 1)  # for the beginning, which is known then, and for the rest
    monkeypatch.setattr(tensors, "_USUAL", re.compile(b"(?!)"))
    found.append(tensors.load_storage(Blob(io.BytesIO(data), 0, len(data))))
    place = dtype, numel, len(data) - numel * dtype.itemsize
    assert [(storage.dtype, storage.numel, storage.start) for storage in found] == [place] * 3


def test_the_header_of_safetensors_is_read_once(net, tmp_path, monkeypatch):
    read, seen = sniff.__globals__["read_safetensors_header"], []
    monkeypatch.setitem(sniff.__globals__, "read_safetensors_header", lambda path: seen.append(path) or read(path))
    load_teacher(written(net, "native", tmp_path))
    assert len(seen) == 1


def test_what_is_arranged_anew_takes_memory_once(threads, tmp_path):
    """The room of a tensor is free again once its numbers are in their order."""
    used, held = [], []

    class Ref:
        def room(self, halves):
            return torch.empty(8)

        def read(self, room):
            used.append(weakref.ref(room))
            held.append(sum(ref() is not None for ref in list(used)))
            return room.clone()

    assert len(tensors.read_all([Ref() for _ in range(30)])) == len(held) == 30
    assert max(held) <= threads
