"""TensorBoard events, read back."""

import re
import sys
import types

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from refine.metrics.named import NamedMetric
from refine.training import weights_and_biases
from refine.training.snapshots import beside
from refine.training.tensorboard import TensorBoard
from refine.training.weights_and_biases import WeightsAndBiases, check_available
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
    assert "custom_scalars__config__" in tensors
    assert len(list(tmp_path.glob("events.*"))) == 1 and not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_the_layout_asks_first_whether_it_is_better_and_finds_the_numbers(tmp_path):
    monitor = TensorBoard(tmp_path)
    monitor.begin({"kimg": 1.0}, {"fd2k-x.y": "fd_x"})
    tags = [f"Metrics/fd2k-x.y/{name}" for name in ("fd_x", "fd_x_0.05", "fd_x_raw", "precision", "recall", "kid_x")]
    monitor.scalars(dict.fromkeys(tags, 1.0), 0.5)
    monitor.outcome({"fd_x": 0.5, "fd_x_before": 2.0, "hours": 0.1})
    monitor.close()
    events = read(tmp_path)
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category][:2] == ["Is it better?", "At what cost?"]
    shown = {}
    for category in layout.category:
        for chart in category.chart:
            matched = [tag for tag in tags if any(re.match(regex, tag) for regex in chart.multiline.tag)]
            shown[chart.title] = [tag.rpartition("/")[2] for tag in matched]
    assert shown["fd2k-x.y: fd_x"] == ["fd_x"] and shown["fd_x of each"] == ["fd_x_0.05", "fd_x_raw"]
    assert shown["fd2k-x.y: precision"] == ["precision"] and shown["fd2k-x.y: recall"] == ["recall"]
    assert events.Scalars("Result/fd_x_before")[0].value == 2.0
    content = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    assert b"Result/fd_x_before" in content and b"Result/hours" in content


class Wandb(types.SimpleNamespace):
    """A stand-in for the package, which writes down what it is told."""

    def __init__(self, refuses=False):
        self.told, self.summary, self.refuses, self.opened = [], {}, refuses, []

    def init(self, **kwargs):
        if self.refuses:
            raise RuntimeError("api_key not configured")
        self.opened.append(kwargs)
        return self

    def Settings(self, **kwargs):
        return kwargs

    def Image(self, picture):
        return picture.size

    def Histogram(self, np_histogram):
        return np_histogram

    def define_metric(self, name, **kwargs):
        self.told.append((name, kwargs))

    def log(self, values):
        self.told.append(values)

    def finish(self):
        self.told.append("finished")


@pytest.fixture
def wandb(monkeypatch):
    package = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setattr(weights_and_biases, "find_spec", lambda name: True)
    return package


def test_weights_and_biases_is_told_once_a_tick(tmp_path, wandb):
    training = make_run(tmp_path, metrics=[FakeMetric()], average="ema")
    monitor = WeightsAndBiases(tmp_path, training.config.as_dict())
    training.run(monitor)
    monitor.outcome({"fd_fake": 1.0})
    monitor.close()
    assert wandb.told[:2] == [("kimg", {"hidden": True}), ("*", {"step_metric": "kimg"})]
    ticks = wandb.told[2:-1]
    assert [tick["kimg"] for tick in ticks] == [0, 0.008, 0.016, 0.024] and wandb.told[-1] == "finished"
    assert ticks[0]["Metrics/fd10-fake/fd_fake"] == 5.0 and "Fakes/before" in ticks[0]
    assert ticks[1]["Metrics/fd10-fake/fd_fake"] == 1.0 and ticks[1]["Loss/aux"] > 0
    assert ticks[1]["Classes/histogram"] == ([0.5, 0.5], [0, 1, 2])
    assert wandb.summary == {"Result/fd_fake": 1.0}
    WeightsAndBiases(tmp_path, {})
    first, second = wandb.opened
    assert first["id"] == second["id"] and second["resume"] == "allow" and first["config"]["batch"] == 4
    assert first["dir"] == str(tmp_path)


def test_weights_and_biases_refused(tmp_path, wandb, monkeypatch):
    wandb.refuses = True
    with pytest.raises(ValueError, match=r"api_key not configured.*WANDB_MODE=offline"):
        WeightsAndBiases(tmp_path, {})
    monkeypatch.setattr(weights_and_biases, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"gan-refine\[wandb\]"):
        check_available()


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


@pytest.mark.parametrize(
    ("columns", "num_classes", "half"), [(30, 10, 10), (30, 3, 15), (30, 0, 15), (7, 0, 3), (8, 6, 4)]
)
def test_before_and_after_show_the_same_latents(columns, num_classes, half):
    pixels = 3
    before = torch.arange(columns).repeat_interleave(pixels).expand(1, 6, -1).to(torch.uint8)
    both = beside(before, before + 100, columns, num_classes)
    assert both.shape == (1, 6, 2 * half * pixels + 8) and both.shape[2] <= before.shape[2] + 8
    assert torch.equal(both[:, :, : half * pixels] + 100, both[:, :, -half * pixels :])
    assert len(both[:, :, : half * pixels].unique()) == half and (both[:, :, half * pixels :][:, :, :8] == 255).all()
