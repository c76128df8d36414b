"""What metrics say of themselves: names, places, directions; and that tables and verdicts follow it."""

import dataclasses

import numpy as np
import pytest
import torch

from refine.evaluation.comparison import compared, differences
from refine.evaluation.tables import text_table
from refine.metrics import evaluate as evaluate_module
from refine.metrics.detectors import FeatureSpace, space_of
from refine.metrics.evaluate import evaluate, measure
from refine.metrics.metric import Metric, Numbers, Row, is_better, mean_and_std
from refine.metrics.references import load_reference, save_reference
from refine.metrics.registry import METRICS, ON_REQUEST, USUAL, WITH_CLASSES, chosen, ordered, rows_in
from refine.metrics.sampling import sample_images
from refine.metrics.statistics import FeatureStatistics
from tests.metrics.networks import PixelDetector, PlainGenerator


def test_keys_in_a_space_and_in_that_of_fid():
    digits, fid = FeatureSpace("My digits", False), FeatureSpace("inception-2015-12-05", True)
    keys = [list(rows_in(space, beside=True)) for space in (digits, fid)]
    assert {"fd_my_digits", "fdinf_my_digits", "kid_my_digits", "is_my_digits", "is_my_digits_std"} <= set(keys[0])
    assert {"fid", "fidinf", "kid", "is", "is_std"} <= set(keys[1])
    for names in keys:
        assert {"precision", "recall", "label_accuracy", "confidence", "spread"} <= set(names)
    assert "is_std" not in rows_in(fid)


def test_each_metric_is_measured_on_one_occasion():
    names = [metric.name for metric in METRICS]
    assert sorted(USUAL + ON_REQUEST + WITH_CLASSES) == sorted(names) and METRICS[0].name == "fd"
    assert all(set(metric.measured_with) <= set(names) for metric in METRICS)
    leading = [metric.rows[0].direction for metric in METRICS if metric.named_like]
    assert set(leading) <= {"lower", "higher"}, "what leads a training run can be better or worse"


def test_what_is_unknown_is_refused():
    with pytest.raises(ValueError, match=r"the direction of x is 'up'; expected one of lower, higher, information"):
        Row("x", "up", "")
    with pytest.raises(ValueError, match="needs of the reference is 'pixels'"):
        Metric("x", 1, (), lambda sample: Numbers({}), reference="pixels")
    with pytest.raises(ValueError, match=r"fdd is unknown; expected metrics among fd, "):
        chosen(["fdd"])
    with pytest.raises(ValueError, match="two metrics have the place 10"):
        ordered([*METRICS, dataclasses.replace(METRICS[1], name="other", place=10, rows=())])
    with pytest.raises(ValueError, match="two metrics have the row fd"):
        ordered([*METRICS, dataclasses.replace(METRICS[0], name="other", place=11)])
    with pytest.raises(ValueError, match="direction is 'information'"):
        is_better("information", 1.0, 2.0)
    assert is_better("lower", 1, 2) and is_better("higher", 2, 1)
    assert not is_better("lower", 2, 2) and not is_better("higher", 2, 2)


@pytest.fixture
def runs(tmp_path):
    """Three seed ranges of two generators, whose classes differ in nothing."""
    detector = PixelDetector(num_classes=4)
    features = FeatureStatistics(keep_features=True).update(torch.rand(30, 4))
    save_reference(tmp_path / "r.npz", features, detector)
    reference = load_reference(tmp_path / "r.npz")

    def measured(first):
        seeds = [range(first + 20 * index, first + 20 * (index + 1)) for index in range(3)]
        return [measure(sample_images(PlainGenerator(c_dim=4), part), detector, reference) for part in seeds]

    return measured(0), measured(100)


def test_the_table_has_every_number(runs):
    results = compared(*runs)
    keys = [line.split()[0] for line in text_table(results).splitlines()[1:]]
    assert keys == [key for key in rows_in(space_of(PixelDetector())) if key in runs[0][0].results]


def test_numbers_of_unknown_rows_are_a_bug_of_the_metric(tmp_path, monkeypatch):
    liar = Metric("liar", 99, (Row("a", "lower", ""),), lambda sample: Numbers({"b": 1.0}))
    monkeypatch.setattr(evaluate_module, "chosen", lambda kinds: (liar,))
    with pytest.raises(AssertionError, match="a number has a row"):
        evaluate(sample_images(PlainGenerator(), range(4)), PixelDetector(), None)


def test_verdicts_follow_the_rows(runs):
    found = differences(*runs)
    assert found["label_accuracy"]["verdict"] == "not distinguishable"  # equal: 1 and 1
    for run in runs[1]:
        run.results |= {"spread": run.results["spread"] + 1, "precision": run.results["precision"] + 1}
        run.contributions.clear()
    found = differences(*runs)
    assert found["spread"]["verdict"] == "higher"
    assert found["precision"]["values"] == pytest.approx(
        [b.results["precision"] - a.results["precision"] for a, b in zip(*runs, strict=True)]
    )


def test_mean_and_std():
    assert mean_and_std([1.0, 2.0, 4.5]) == {
        "mean": 2.5,
        "std": pytest.approx(np.std([1, 2, 4.5], ddof=1)),
        "values": [1.0, 2.0, 4.5],
    }
