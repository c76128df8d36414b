"""Descriptors that are written to without waiting for their readers."""

import io
import os
import sys
import time

import pytest

from refine.dnnlib import Outlet, descriptor


@pytest.fixture
def pipe():
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


def test_what_is_read_is_written(pipe):
    outlet = Outlet(pipe[1])
    assert outlet.write(b"one\n", 5) and outlet.write(b"two\n", 5) and not outlet.stuck
    assert os.read(pipe[0], 100) == b"one\ntwo\n"


@pytest.mark.parametrize("blocking", [True, False])
def test_what_is_not_read_is_written_once_it_is(pipe, blocking):
    os.set_blocking(pipe[1], blocking)
    outlet, size, start = Outlet(pipe[1]), 1 << 20, time.monotonic()
    assert not outlet.write(b"x" * size, 0.1) and outlet.stuck
    assert not outlet.write(b"dropped", 0.1) and time.monotonic() - start < 2
    while size:
        data = os.read(pipe[0], size)
        assert not data.strip(b"x")
        size -= len(data)
    while outlet.stuck:
        time.sleep(0.01)
    assert outlet.write(b"y", 5) and os.read(pipe[0], 10) == b"y"


def test_a_reader_that_left_is_told():
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        Outlet(writer).write(b"x", 5)
    os.close(writer)


def test_only_streams_that_write_to_a_descriptor_and_nowhere_else_have_one(pipe):
    assert descriptor(io.StringIO()) is None and descriptor(None) is None and descriptor(object()) is None
    with open(os.dup(pipe[1]), "w") as stream:
        assert descriptor(stream) == stream.fileno()
    assert descriptor(stream) is None  # closed
    assert sys.__stdout__ is not None
    with open(os.dup(pipe[1]), "wb", buffering=0) as raw, io.TextIOWrapper(raw, write_through=True) as stream:
        assert descriptor(stream) == raw.fileno()
