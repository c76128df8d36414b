"""Equal generators are not called different, with few images neither; and a real difference is seen."""

import importlib.util

import pytest


@pytest.fixture(scope="module")
def simulation(root):
    spec = importlib.util.spec_from_file_location("false_verdicts", root / "benchmarks" / "false_verdicts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_images_prove_nothing(simulation):
    """By the bootstrap alone one of five verdicts was false; up to five of 40 are within chance of 5 %."""
    found = simulation.rates(dim=32, num=2, far=False, shift=0.0, trials=40)
    for alone, decided in found.values():
        assert alone >= 10 and decided <= 100 * 5 / 40


def test_enough_images_see_a_difference_and_no_other(simulation):
    found = simulation.rates(dim=8, num=200, far=False, shift=0.0, trials=12)
    assert all(decided <= 100 * 2 / 12 for _, decided in found.values())
    shifted = simulation.rates(dim=8, num=200, far=False, shift=0.5, trials=3)
    assert all(decided == 100 for _, decided in shifted.values())
