"""Steps as graphs: the same numbers as without, on the CPU by a recording that is played back, and on a GPU."""

import copy

import pytest
import torch

from refine.config import RefineConfig
from refine.training import optimise, pace
from refine.training.adversary import Others
from refine.training.graphs import Graphs, why_none
from refine.training.halves import HalfWeights
from refine.training.trainer import Trainer
from tests.training.recorded import GraphsOnHost, with_graphs
from tests.training.test_trainer import make_student, make_teacher

RATE = 2.0**-10  # the same in float32 and float64
OPTIONS = {
    "plain": {},
    "micro-batches": {"batch_gpu": 3, "adversarial": 0.3, "clip": 0.5, "aux_clip": 1.0, "aux_augment": 0.5},
    "reused": {"reuse_batch": True, "adversarial": 0.3},
    "auto": {"aux_steps": "auto", "objective": "sid", "precision": "bf16"},
    "distances": {
        "keep_distances": 0.5,
        "average": "ema",
        "aux_dropout": 0.2,
        "precision": "fp16",
        "lr_schedule": "linear",
    },
}


@pytest.fixture(autouse=True)
def _quickly(monkeypatch):
    """All that happens now and then happens every fourth step."""
    monkeypatch.setattr(optimise, "SIGNAL_EVERY", 4)
    monkeypatch.setattr(pace, "WATCHED_EVERY", 4)
    monkeypatch.setattr(pace, "READ_EVERY", 4)


def bank(device="cpu"):
    images = torch.randint(256, [12, 1, 8, 8], generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Others(images, torch.arange(12) % 3, 3, torch.device(device))


def make_trainer(device="cpu", **options):
    defaults = {"batch": 8, "adversarial": 0.0, "lr": RATE, "aux_lr": RATE, "metrics": (), "kimg": 0.512}
    config = RefineConfig("g", "t", **{**defaults, **options})
    trainer = Trainer(config, make_student(), make_teacher(), device, bank(device) if config.adversarial else None)
    with torch.no_grad():
        for p in trainer.aux.parameters():  # equal to the teacher, it would give the student no gradient
            p.mul_(1.1)
    torch.manual_seed(3)
    return trainer


def tensors(state, name=""):
    """name → tensor of everything in a state that changes."""
    if isinstance(state, torch.Tensor):
        return {name: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    found = {}
    for key, value in items:
        if key not in ("lr", "capturable"):  # a number without graphs
            found |= tensors(value, f"{name}/{key}")
    return found


def assert_equal(mine, theirs):
    found, expected = tensors(mine.state_dict()), tensors(theirs.state_dict())
    assert set(found) == set(expected)
    differing = [name for name in found if not torch.equal(found[name], expected[name])]
    assert not differing, differing


def steps(trainer, count=12, warm_up=2):
    """Enough for each kind of step to be recorded and taken as a graph."""
    for _ in range(warm_up):
        trainer.warm_up_step()
    for _ in range(count):
        trainer.step()
    return trainer


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_graphs_change_no_number(options):
    plain = steps(make_trainer(**options))
    graphs = with_graphs(make_trainer(**options))
    told = []
    graphs.graphs.say = told.append
    steps(graphs)
    assert told == []
    assert graphs.graphs.made >= 2
    assert_equal(graphs, plain)
    assert graphs.means.drain() == plain.means.drain()


def test_a_graph_sees_new_rates():
    trainer = with_graphs(make_trainer())
    steps(trainer)
    assert trainer.graphs.made >= 2
    before = copy.deepcopy(trainer.aux.state_dict())
    trainer.aux_step(0.0)
    assert all(torch.equal(x, before[name]) for name, x in trainer.aux.state_dict().items())
    trainer.aux_step(RATE)
    assert any(not torch.equal(x, before[name]) for name, x in trainer.aux.state_dict().items())


def test_after_a_rollback_everything_is_recorded_anew():
    whole = steps(make_trainer(), 10)
    trainer = steps(with_graphs(make_trainer()), 6)
    state = copy.deepcopy(trainer.state_dict())
    steps(trainer, 5, warm_up=0)
    trainer.load_state_dict(state)
    assert trainer.graphs.made == 0
    steps(trainer, 4, warm_up=0)
    assert_equal(trainer, whole)


def test_a_part_that_cannot_be_recorded_goes_without_and_is_told_of_once():
    graphs, told, runs = GraphsOnHost(torch.device("cpu")), [], []
    graphs.say = told.append
    graphs._give_up = lambda name, error: (graphs._without.add(name), told.append(f"{name}: {error}"))
    x = torch.ones([])

    def part():
        runs.append(x.item())

    for variant in (0, 0, 0, 0, 1):
        graphs.run("student", variant, part)
    assert told == ["student: _local_scalar_dense looks at a number, which a graph cannot"]
    assert len(runs) >= 5 and graphs.made == 0


def test_reasons_against_graphs():
    def reason(device="cuda", **options):
        return why_none(RefineConfig("g", "t", **options), torch.device(device), [make_student()])

    assert reason() is None
    assert "CUDA" in reason("cpu")
    assert "--cuda-graphs" in reason(cuda_graphs=False)
    assert reason(batch=8, batch_gpu=4) is None
    assert "masks" in reason(batch=8, batch_gpu=4, aux_dropout=0.1)
    assert reason(batch=8, batch_gpu=8, aux_dropout=0.1) is None


def test_without_cuda_an_attempt_is_one_line():
    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    graphs, told, runs = Graphs(torch.device("cuda")), [], []
    graphs.say = told.append
    for _ in range(4):
        graphs.run("student", (), lambda: runs.append(1))
    assert len(runs) == 4 and len(told) == 1 and told[0].startswith("cuda graphs: none")


# 16-bit weights.


def test_weights_that_are_cast_at_once_are_those_that_layers_cast():
    """Also the gradients, and weights in channels_last keep their strides."""
    found = []
    for at_once in (False, True):
        network = make_teacher().train(False).to(memory_format=torch.channels_last).requires_grad_(True)
        network.compute_dtype = torch.bfloat16
        network.model.map_layer0.weight.requires_grad_(False)
        if at_once:
            HalfWeights(network, torch.bfloat16)
        x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        for _ in range(3):
            network.zero_grad(set_to_none=True)
            y = network(x, torch.ones(4), torch.eye(3)[[0, 1, 2, 0]])
            y.square().sum().backward()
        found.append((y, {name: p.grad for name, p in network.named_parameters()}))
        assert all(isinstance(p, torch.nn.Parameter) and p.dtype == torch.float32 for p in network.parameters())
    (y, gradients), (y_once, gradients_once) = found
    assert torch.equal(y, y_once)
    for name, gradient in gradients.items():
        if gradient is None:
            assert gradients_once[name] is None, name
        else:
            assert torch.equal(gradient, gradients_once[name]), name
    assert sum(gradient is not None for gradient in gradients.values()) > 10


def test_float32_is_asked_for_and_errors_leave_the_weights_in_place():
    network = make_teacher()
    network.compute_dtype = torch.bfloat16
    exact = make_teacher()(x := torch.randn(2, 1, 8, 8), torch.ones(2))
    HalfWeights(network, torch.bfloat16, frozen=True)
    for _ in range(3):
        assert not torch.equal(network(x, torch.ones(2)), exact)
    assert torch.equal(network(x, torch.ones(2), force_fp32=True), exact)
    with pytest.raises(ValueError, match="shape"):
        network(torch.randn(2, 1, 4, 4), torch.ones(2))
    assert all(isinstance(p, torch.nn.Parameter) for p in network.parameters())
    assert torch.equal(network(x, torch.ones(2), force_fp32=True), exact)


# On a GPU.


@pytest.fixture
def exact_kernels():
    """The same kernels in every run, so that numbers can be compared bit for bit."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic
    cudnn.deterministic = True
    yield
    cudnn.deterministic = before


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_graphs_change_no_number_on_a_gpu(options, exact_kernels):
    options = {"precision": "fp32", **options}
    plain = steps(make_trainer("cuda", cuda_graphs=False, **options))
    graphs, told = make_trainer("cuda", **options), []
    graphs.graphs.say = told.append
    steps(graphs)
    assert told == [] and graphs.graphs.reason is None
    assert graphs.graphs.made >= 2
    mine, theirs = graphs.state_dict(), plain.state_dict()
    assert torch.equal(mine["cuda_rng"], theirs["cuda_rng"])  # all numbers were drawn alike
    for name, x in tensors(mine["networks"]).items():
        torch.testing.assert_close(x, tensors(theirs["networks"])[name], rtol=1e-4, atol=1e-5, msg=name)
    logged, expected = graphs.means.drain(), plain.means.drain()
    assert logged.keys() == expected.keys()
    assert logged == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.gpu
def test_a_resumed_run_equals_an_uninterrupted_one_on_a_gpu(exact_kernels):
    whole = steps(make_trainer("cuda"), 12)
    state = copy.deepcopy(steps(make_trainer("cuda"), 6).state_dict())
    resumed = make_trainer("cuda")
    resumed.load_state_dict(state)
    steps(resumed, 6, warm_up=0)
    assert resumed.graphs.made >= 2
    for name, x in tensors(resumed.state_dict()["networks"]).items():
        torch.testing.assert_close(x, tensors(whole.state_dict()["networks"])[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_graphs_wait_for_nothing(options):
    if options.get("aux_steps") == "auto":
        pytest.skip("it reads a number every 16 iterations")
    trainer = steps(make_trainer("cuda", **options), 16)
    assert trainer.graphs.made >= 2
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps(trainer, 8, warm_up=0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_failed_recording_leaves_everything_usable(exact_kernels):
    trainer, told = make_trainer("cuda"), []
    trainer.graphs.say = told.append
    student_part = trainer._student_part

    def reading():
        student_part()
        torch.rand(5, device="cuda").sum().item()

    trainer._student_part = reading
    steps(trainer, 8)
    assert len(told) == 1 and "the student step goes without" in told[0]
    assert trainer.graphs.made >= 1  # aux
    assert all(torch.isfinite(p).all() for p in trainer.student_parameters)
    torch.rand(5, device="cuda")
