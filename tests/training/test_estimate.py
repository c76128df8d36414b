"""What a run is said to cost, beside what it does cost."""

import pytest
import torch

from refine.networks.stylegan2 import Generator
from refine.training.estimate import differing, estimate, in_words, stand_ins
from tests.training.test_trainer import make_run, run


@pytest.mark.parametrize("options", [{}, {"average": "ema"}, {"adversarial": 0.5}])
def test_sizes_are_those_of_the_files(tmp_path, options):
    others = stand_ins((8, 1, 3), (8, 1, 3), torch.device("cpu")) if options.get("adversarial") else None
    student = Generator(8, 3, 8, 8, 1, {"num_layers": 2}, {"channel_base": 2048, "channel_max": 128}).eval()
    options |= {"others": others, "snap": 1, "kimg": 0.028}
    training = make_run(tmp_path, student, **options)
    found = estimate(make_run(tmp_path / "dry", student, **options).trainer)
    trainer = run(training)
    states, snapshots = (sorted(tmp_path.glob(f"{name}*")) for name in ("training-state", "network-snapshot"))
    assert states[-1].stat().st_size == pytest.approx(found.state_bytes, rel=0.05)
    assert snapshots[-1].stat().st_size == pytest.approx(found.snapshot_bytes, rel=0.05)
    assert found.disk_bytes == pytest.approx(len(snapshots) * found.snapshot_bytes + 2 * found.state_bytes)
    assert found.parameters["student"] == sum(p.numel() for p in trainer.G.parameters())
    assert ("critic" in found.parameters) == (others is not None)


def test_time_and_images_are_those_of_the_whole_run(tmp_path):
    training = make_run(tmp_path, snap=1)  # 6 steps of 4 images, 2 of warm-up, 3 snapshots, 3 averages
    found = estimate(training.trainer, metric_images=100)
    step = found.seconds_per_kimg * 4 / 1000
    assert 6 * step < found.seconds < 8.5 * step
    assert found.metric_images == 100 * (1 + 3 * 4)
    assert estimate(make_run(tmp_path, snap=0).trainer, metric_images=100).metric_images == 100


def test_words_name_what_is_not_the_preset(tmp_path):
    training = make_run(tmp_path, batch=4, lr=1e-3)
    config = training.config
    assert {"--preset=default", "--batch=4", "--lr=0.001", "--gan=g"} <= set(differing(config))
    assert not any(text.startswith("--betas") for text in differing(config))
    text = in_words(estimate(training.trainer), config, "cpu", "runs/00000-x", ["reduced"])
    assert [line.split()[0] for line in text.splitlines()] == [
        *("pair", "bridge", "parameters", "time", "memory", "disk", "options", "run")
    ]
    assert "metrics draw" not in text
