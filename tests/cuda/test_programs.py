"""Whole commands with --device=cuda: they do what they do on a CPU."""

import numpy as np
import pytest


@pytest.fixture
def programs(found):
    """What was found on the device, and on the CPU."""
    result = found("programs")
    return result["cuda"], result["cpu"]


def test_a_run_comes_to_the_same_weights(programs):
    device, host = (np.array(result["weights"]) for result in programs)
    moved = np.abs(host - np.array(programs[1]["started"])).max()
    assert moved > 0.01  # 8 steps of 0.002
    assert np.abs(device - host).max() < 1e-3 * moved


def test_a_resumed_run_comes_to_the_same_weights_bit_for_bit(programs):
    assert programs[0]["resumed"] == programs[0]["weights"]


def test_metrics_of_a_run_are_the_same(programs):
    device, host = (result["metrics"] for result in programs)
    assert len(device) == len(host) == 3
    for mine, theirs in zip(device, host, strict=True):
        mine, theirs = mine["results"], theirs["results"]
        for key in (key for key, value in theirs.items() if isinstance(value, float) and key != "seconds"):
            assert mine[key] == pytest.approx(theirs[key], rel=2e-3, abs=1e-6), key


def test_images_are_the_same(programs):
    for name, theirs in programs[1]["images"].items():
        difference = np.abs(np.array(programs[0]["images"][name]) - np.array(theirs))
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01, name
        assert np.std(theirs) > 1, name


def test_a_comparison_finds_the_same(programs):
    device, host = (result["comparison"] for result in programs)
    assert len(host) >= 3 and device.keys() == host.keys()
    for key, value in host.items():
        assert device[key] == pytest.approx(value, rel=2e-3, abs=1e-6), key
