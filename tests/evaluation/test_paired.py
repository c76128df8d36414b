"""Verdicts over seed ranges against Student's table."""

import pytest

from refine.evaluation.paired import paired_difference


def test_verdicts():
    assert paired_difference([5, 6, 7], [1, 2.1, 3], "lower")["verdict"] == "better"
    assert paired_difference([5, 6, 7], [1, 2.1, 3], "higher")["verdict"] == "worse"
    assert paired_difference([5, 6, 7], [7, 6, 5], "lower")["verdict"] == "not distinguishable"
    one_sided = paired_difference([0, 0, 0], [1.0, 2.0, 3.0], "lower")
    # Student, 2 degrees of freedom: 2 ± 4.303 · 1/√3
    assert one_sided["interval"] == pytest.approx([2 - 2.4841, 2 + 2.4841], abs=1e-4)
    assert one_sided["verdict"] == "not distinguishable"
    assert paired_difference([5, 6, 7], [1, 2.1, 3], "information")["verdict"] == "lower"
    assert paired_difference([1, 2.1, 3], [5, 6, 7], "information")["verdict"] == "higher"
    assert paired_difference([5, 6, 7], [7, 6, 5], "information")["verdict"] == "not distinguishable"
    with pytest.raises(ValueError, match="direction is 'up'"):
        paired_difference([5, 6, 7], [7, 6, 5], "up")
