"""Verdicts over seed ranges against Student's table."""

import numpy as np
import pytest

from refine.evaluation.paired import mean_and_std, paired_difference


def test_verdicts():
    assert paired_difference([5, 6, 7], [1, 2.1, 3], lower_is_better=True)["verdict"] == "better"
    assert paired_difference([5, 6, 7], [1, 2.1, 3], lower_is_better=False)["verdict"] == "worse"
    assert paired_difference([5, 6, 7], [7, 6, 5], lower_is_better=True)["verdict"] == "not distinguishable"
    one_sided = paired_difference([0, 0, 0], [1.0, 2.0, 3.0], lower_is_better=True)
    # Student, 2 degrees of freedom: 2 ± 4.303 · 1/√3
    assert one_sided["interval"] == pytest.approx([2 - 2.4841, 2 + 2.4841], abs=1e-4)
    assert one_sided["verdict"] == "not distinguishable"


def test_mean_and_std():
    assert mean_and_std([1.0, 2.0, 4.5]) == {
        "mean": 2.5,
        "std": pytest.approx(np.std([1, 2, 4.5], ddof=1)),
        "values": [1.0, 2.0, 4.5],
    }
