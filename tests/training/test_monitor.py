"""TensorBoard events, read back."""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from refine.metrics.named import NamedMetric
from refine.training.tensorboard import TensorBoard
from tests.training.test_trainer import make_run


def read(path):
    events = EventAccumulator(str(path), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    events.Reload()
    return events


class FakeMetric(NamedMetric):
    """Two numbers without a detector, worse the second time."""

    def __init__(self):
        self.name, self.key, self.calls = "fd10-fake", "fd_fake", 0

    def measure(self, G, device, progress=False):
        torch.rand(7)  # a metric that disturbs the random state
        self.calls += 1
        return {"fd_fake": {1: 5.0, 2: 1.0, 3: 2.0}[self.calls], "recall": 0.5, "class_histogram": [0.5, 0.5]}


def test_everything_that_is_promised_is_there(tmp_path):
    training = make_run(
        tmp_path, average="ema", kimg=4.0, batch=500, tick=2.0, aux_warmup_kimg=0.0, metrics=[FakeMetric()]
    )
    monitor = TensorBoard(tmp_path)
    training.run(monitor)
    monitor.close()
    events = read(tmp_path)
    scalars = set(events.Tags()["scalars"])
    assert {
        "Loss/aux",
        "Loss/student_gradient",
        "Grad/aux",
        "Grad/student",
        "Progress/lr",
        "Progress/aux_lr",
    } <= scalars
    assert {"Diversity/batch_spread", "Diversity/class_spread", "Timing/img_per_sec"} <= scalars
    assert {"Resources/peak_cpumem_gb", "Metrics/fd10-fake/fd_fake", "Metrics/fd10-fake/recall"} <= scalars
    assert any(name.startswith("Gap/sigma_") for name in scalars)
    assert set(events.Tags()["images"]) == {"Fakes/before", "Fakes/now", "Fakes/before_after"}
    assert events.Tags()["histograms"] == ["Classes/histogram"]
    assert [event.step for event in events.Scalars("Loss/aux")] == [2000, 4000]  # images
    assert [event.step for event in events.Scalars("Metrics/fd10-fake/fd_fake")] == [0, 2000, 4000]
    tensors = events.Tags()["tensors"]
    assert "options/text_summary" in tensors
    text = events.Tensors("options/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"aux_steps": 2' in text
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert len(list(tmp_path.glob("events.*"))) == 1 and not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_the_best_snapshot_is_kept(tmp_path):
    training = make_run(
        tmp_path, average="ema", kimg=2.0, batch=500, tick=1.0, aux_warmup_kimg=0.0, metrics=[FakeMetric()]
    )
    monitor = TensorBoard(tmp_path)
    training.run(monitor)
    monitor.close()
    assert training.snapshots.standing.best.value == 1.0 and training.snapshots.standing.best.kimg == 1.0
    best, first, last = (
        (tmp_path / f"network-snapshot-{name}.safetensors").read_bytes() for name in ("best", "000001", "000002")
    )
    assert best == first != last
    lines = (tmp_path / "metric-fd10-fake.jsonl").read_text().splitlines()
    assert len(lines) == 3 and '"snapshot": "init"' in lines[0]


def test_a_failing_metric_does_not_end_the_run(tmp_path):
    class Failing(FakeMetric):
        def measure(self, G, device, progress=False):
            raise ValueError("images are empty")

    training = make_run(tmp_path, metrics=[Failing()])
    monitor = TensorBoard(tmp_path)
    training.run(monitor)
    monitor.close()
    assert "metric fd10-fake failed: images are empty" in (tmp_path / "log.txt").read_text()
    assert training.trainer.nimg == 24 and training.snapshots.standing.best is None


def test_metrics_do_not_disturb_training(tmp_path):
    states = []
    for name, metrics in (("with", [FakeMetric()]), ("without", [])):
        training = make_run(tmp_path / name, kimg=0.016, metrics=metrics)
        monitor = TensorBoard(tmp_path / name)
        training.run(monitor)
        monitor.close()
        states.append(training.trainer.G.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("name", ["fid50k_half", "fd-digits", "fd0-digits", "fd1-digits", "digits"])
def test_unknown_metrics_are_refused(name):
    with pytest.raises(ValueError, match=name):
        NamedMetric(name, "nowhere.npz")
