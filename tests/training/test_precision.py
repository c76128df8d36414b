"""Number formats, loss scale, torch.compile, and that an iteration never waits for the device."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from refine.config import RefineConfig
from refine.torch_utils.threads import sensible_threads
from refine.training.precision import LossScale, compile_networks, set_precision
from refine.training.trainer import Trainer
from tests.training.test_trainer import make_student, make_teacher


def make_trainer(device="cpu", **options):
    config = RefineConfig("g", "t", batch=8, adversarial=0.0, lr=1e-3, aux_lr=1e-3, **options)
    trainer = Trainer(config, make_student(), make_teacher(),
                      device)  # fmt: skip
    with torch.no_grad():
        for p in trainer.aux.parameters():  # equal to the teacher, it would give the student no gradient
            p.mul_(1.1)
    return trainer


def gradients(**options):
    """Gradients of student and aux after a step of each with rate 0, one vector per network."""
    trainer = make_trainer(**options)
    torch.manual_seed(0)
    trainer.aux_step(0.0)
    trainer.student_step(0.0)
    parts = [trainer.student_parameters, list(trainer.aux.parameters())]
    return [torch.cat([p.grad.flatten() for p in part if p.grad is not None]) for part in parts]


# Measured over four seeds: 1 − cosine up to 3e-5 in bf16 and 3e-6 in fp16, the norm off by up to 2.6 % and 0.08 %; with
# the shipped pair 4e-4 and 1.1e-5, 2.8 % and 0.6 %.
@pytest.mark.parametrize(
    ("precision", "angle", "length"), [("tf32", 1e-9, 1e-6), ("bf16", 1e-3, 0.05), ("fp16", 2e-5, 0.01)]
)
def test_gradients_point_where_those_in_float32_do(precision, angle, length):
    for exact, rounded in zip(gradients(), gradients(precision=precision), strict=True):
        assert rounded.dtype == torch.float32
        assert exact.norm() > 0
        assert 1 - torch.cosine_similarity(exact.double(), rounded.double(), dim=0) < angle
        assert rounded.norm() == pytest.approx(exact.norm().item(), rel=length)
        assert precision == "tf32" or not torch.equal(exact, rounded)  # it did compute otherwise


def test_a_format_of_a_gpu_is_told_apart_on_a_cpu():
    assert make_trainer().remarks == []
    assert "same as fp32" in make_trainer(precision="tf32").remarks[0]
    assert "slower than fp32" in make_trainer(precision="fp16").remarks[0]


def test_the_option_wins_over_what_the_file_asks_for():
    G = make_student()
    for block in G.synthesis.children():
        block.use_fp16 = True
    set_precision("bf16", [G], torch.device("cpu"))
    assert all(block.compute_dtype == torch.bfloat16 and not block.use_fp16 for block in G.synthesis.children())
    assert all(p.dtype == torch.float32 for p in G.parameters())


def test_the_moving_average_stays_float32_for_snapshots():
    z, c = torch.randn(2, 8), torch.eye(3)[[0, 1]]
    full, half = (make_trainer(precision=name).G_ema(z, c, noise_mode="none") for name in ("fp32", "bf16"))
    assert torch.equal(full, half)


def test_loss_scale_halves_after_an_overflow_and_doubles_after_a_while():
    scale, fine, broken = LossScale("fp16", "cpu", interval=3), torch.ones([]), torch.tensor(float("inf"))
    start = scale.state[0].item()
    scale.update(broken)
    assert scale.state[0] == start / 2
    for _ in range(2):
        scale.update(fine)
    assert scale.state[0] == start / 2
    scale.update(fine)
    assert scale.state[0] == start
    scale.update(fine)
    scale.update(fine)
    scale.update(broken)  # begins to count anew
    scale.update(fine)
    assert scale.state[0] == start / 2
    for _ in range(60):
        scale.update(broken)
    assert scale.state[0] == 1


def test_loss_scale_saves_gradients_below_the_range_of_float16():
    weight = torch.nn.Parameter(torch.ones(4))
    for precision, expected in (("bf16", 0.0), ("fp16", 2e-8)):
        scale = LossScale(precision, "cpu")
        weight.grad = None
        scale.scale((weight * 2e-8).sum()).backward()
        weight.grad = weight.grad.half().float()  # what a float16 layer would pass on
        scale.unscale([weight])
        assert torch.allclose(weight.grad, torch.full([4], expected), rtol=0.05, atol=0)


def test_an_overflow_leaves_the_step_out_and_the_scale_smaller():
    trainer = make_trainer(precision="fp16")
    before = copy.deepcopy(trainer.aux.state_dict())
    trainer.optimizers["aux"].scale.state[0] = 2.0**120  # no float32 gradient survives that
    trainer.aux_step(1e-3)
    assert all(torch.equal(value, trainer.aux.state_dict()[key]) for key, value in before.items())
    assert trainer.optimizers["aux"].skips.read() == (1, 1)
    assert trainer.optimizers["aux"].scale.state[0] == 2.0**24  # half, and within its limits
    trainer.optimizers["aux"].scale.state[0] = 2.0**8
    trainer.aux_step(1e-3)
    assert trainer.optimizers["aux"].skips.read() == (1, 0)


class NoWaiting(TorchDispatchMode):
    """Fails where a value goes from the device to the host: the CPU's stand-in for `set_sync_debug_mode`."""

    WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.name().split(".")[0] not in self.WAITS, f"{func.name()} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [
        *({}, {"precision": "fp16"}, {"reuse_batch": True}, {"batch_gpu": 4}, {"aux_augment": 0.5}),
        {"objective": "dmd"},
        {"objective": "ikl+sid"},
    ],
)
def test_an_iteration_reads_nothing_back(options):
    trainer = make_trainer(dropout=True, **options)
    trainer.step()  # Adam makes its state
    with NoWaiting():
        trainer.step()
        with pytest.raises(AssertionError, match="waits for the device"):
            torch.ones([]).item()


@pytest.mark.gpu
@pytest.mark.parametrize("objective", ["ikl", "ikl+sid"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_an_iteration_never_waits_for_the_gpu(precision, objective):
    trainer = make_trainer("cuda", precision=precision, objective=objective, dropout=True, aux_augment=0.5)
    trainer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_reused_batch_costs_one_forward_pass_less():
    calls = {}
    for reuse in (False, True):
        trainer = make_trainer(reuse_batch=reuse, aux_steps=2)
        seen = calls[reuse] = []
        trainer.G.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output.detach()))
        weights = copy.deepcopy(trainer.student_parameters)
        trainer.step()
        assert not trainer._kept
        assert any(not torch.equal(a, b) for a, b in zip(weights, trainer.student_parameters, strict=True))
    assert len(calls[False]) == 3
    assert len(calls[True]) == 2


def test_a_reused_batch_gives_the_student_its_own_images():
    """With aux at rest the student's gradient is that of `student_step` on the very images of the auxiliary step."""
    trainer = make_trainer(reuse_batch=True)
    trainer.aux_step(0.0, keep=True)
    fakes = trainer._kept[0]
    trainer.student_step(0.0)
    got = [p.grad.clone() for p in trainer.student_parameters if p.grad is not None]
    assert sum(bool(g.abs().max() > 0) for g in got) > 10
    assert fakes.x.grad_fn is not None and fakes.c.shape == (8, 3)


def test_compiled_networks_keep_names_and_numbers():
    """With the mapping network, and no code generator behind it: a U-Net takes 9 seconds, with inductor minutes."""
    mapping = make_student().mapping
    z, c, seen = torch.randn(2, 8), torch.eye(3)[[0, 1]], []
    expected, names = mapping(z, c), list(mapping.state_dict())

    def backend(graph, example_inputs):
        seen.append(graph)
        return graph.forward

    assert compile_networks([mapping], torch.device("cpu"), backend) is None
    seen.clear()  # the function that it tries first
    assert torch.allclose(mapping(z, c), expected, atol=1e-6)
    assert len(seen) == 1
    assert list(mapping.state_dict()) == names
    assert list(copy.deepcopy(mapping).state_dict()) == names


def test_a_missing_compiler_is_one_line(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("\nNo working C++ compiler found\nlong trace")

    monkeypatch.setattr(torch, "compile", broken)
    trainer = make_trainer(compile=True)
    assert len(trainer.remarks) == 1
    assert trainer.remarks[0].startswith("--compile: ") and "No working C++ compiler" in trainer.remarks[0]
    assert "\n" not in trainer.remarks[0]
    trainer.step()  # without it


@pytest.mark.parametrize(
    ("environ", "files", "expected"),
    [
        ({"OMP_NUM_THREADS": "5"}, {}, 5),
        ({}, {"cpu.max": "100000 100000\n"}, 1),
        ({}, {"cpu.max": "50000 100000\n"}, 1),
        ({"LOCAL_WORLD_SIZE": "1000"}, {}, 1),
        ({}, {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"OMP_NUM_THREADS": "many"}, {"cpu.max": "max 100000\n"}, None),
        ({}, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, {"cpu.max": "nonsense"}, None),
    ],
)
def test_threads_fit_quota_affinity_and_neighbours(tmp_path, monkeypatch, environ, files, expected):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert sensible_threads(environ, tmp_path) == (4 if expected is None else expected)
