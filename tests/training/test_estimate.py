"""What a run is said to cost, beside what it does cost."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from refine.networks.stylegan2 import Generator
from refine.training.counting import Counted, count, meta_trainer, weightless
from refine.training.estimate import counted, differing, estimate, in_words, stand_ins
from tests.training.test_trainer import make_run, make_student, make_teacher, run


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
    names = ["pair", "bridge", "parameters", "time", "memory", "disk", "options", "run"]
    assert [line.split()[0] for line in text.splitlines()] == names
    assert "metrics draw" not in text
    counts = counted(config, training.trainer.G, training.trainer.aux, None, critic=False)
    text = in_words(estimate(training.trainer, counts=counts), config, "cpu", "runs/00000-x", ["reduced"])
    names[5:5] = ["counted", "H100"]
    assert [line.split()[0] for line in text.splitlines()] == names
    assert "of a GPU with 4 images at once" in text and "40% of its bf16 peak (assumed)" in text


def test_operations_are_those_that_pytorch_counts(tmp_path):
    training = make_run(tmp_path, adversarial=0.0, aux_steps=1)
    trainer = training.trainer
    networks = [weightless(network) for network in (trainer.G, trainer.aux)]
    counts, again = (count(meta_trainer(trainer.config, *networks)) for _ in range(2))
    without_numbers = meta_trainer(trainer.config, *networks)
    for optimizer in without_numbers.optimizers.values():
        optimizer.apply = lambda: torch.zeros([], device="meta")
    with FlopCounterMode(display=False) as counter:
        without_numbers.step()
    assert counts == again and counts.flops_per_image == counter.get_total_flops() / 2 > 0
    config, steps = trainer.config, trainer.config.num_steps
    images = steps * config.batch
    warm_up = config.warmup_steps * config.batch * counts.warm_up_flops_per_image
    assert counts.flops(config) == pytest.approx(images * counts.flops_per_image + warm_up)
    assert counts.h100_hours(config) == pytest.approx(counts.flops(config) / (0.4 * 989e12) / 3600)
    assert counts.fixed_bytes > 4 * 4 * sum(p.numel() for p in trainer.aux.parameters())
    half = dataclasses.replace(config, batch_gpu=2)
    assert counts.memory(config) - counts.memory(half) == 2 * counts.bytes_per_image > 0


def test_with_a_critic_whose_penalty_is_a_gradient_of_gradients(tmp_path):
    config = make_run(tmp_path).trainer.config
    student, teacher = make_student(3), make_teacher(3)
    alone = counted(config, student, teacher, None, critic=False)
    judged = counted(dataclasses.replace(config, adversarial=0.5), student, teacher, None, critic=True)
    assert judged.flops_per_image > alone.flops_per_image and judged.fixed_bytes > alone.fixed_bytes
    assert not any(p.is_meta for p in student.parameters())


def test_what_cannot_be_counted_is_left_out(tmp_path):
    class Looking(type(make_teacher(3))):
        def forward(self, x, sigma, class_labels=None, **options):
            assert x.sum().item() == x.sum().item()
            return super().forward(x, sigma, class_labels, **options)

    teacher = make_teacher(3)
    teacher.__class__ = Looking
    assert counted(make_run(tmp_path).trainer.config, make_student(3), teacher, None, critic=False) is None


def test_on_a_cpu_what_would_take_days_is_only_counted(tmp_path):
    trainer = make_run(tmp_path).trainer
    huge = Counted(1e13, 1e13, 1 << 30, 1 << 20)
    trainer.step = trainer.warm_up_step = None  # not called
    found = estimate(trainer, counts=dataclasses.replace(huge, flops_per_image=2e13))
    assert found.seconds is found.seconds_per_kimg is found.memory_bytes is None
    assert found.flops_per_image == 2e13 and found.h100_hours > 0 and found.state_bytes > 0
    text = in_words(found, trainer.config, "cpu", "runs/00000-x", [])
    assert "not measured" in text and "20,000 GFLOP an image" in text
