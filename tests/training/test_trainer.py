"""The training loop on tiny networks."""

import copy
import json
import math

import pytest
import torch
from PIL import Image

from refine.checkpoints import load_teacher
from refine.config import RefineConfig
from refine.diff_instruct import aux_loss
from refine.networks import edm2
from refine.networks.edm import EDMPrecond
from refine.networks.stylegan2 import Generator
from refine.objectives import REGISTRY
from refine.pair import check_pair
from refine.training.loop import TrainingRun
from refine.training.observe import GAP_NAMES, SIGMA_EDGES
from refine.training.run_dir import RunDir
from refine.training.snapshots import Best, Standing
from refine.training.state import load_training_state
from refine.training.tensorboard import TensorBoard
from refine.training.trainer import Trainer, select_parameters
from tests.checkpoints.builders import Format, edm2_file, write
from tests.metrics.networks import PlainGenerator


def make_student(c_dim=3, seed=0, resolution=8, channels=1):
    torch.manual_seed(seed)
    return Generator(
        8, c_dim, 8, resolution, channels, {"num_layers": 2}, {"channel_base": 64, "channel_max": 8}
    ).eval()


def make_teacher(label_dim=3, resolution=8, dropout=0.3, seed=1, channels=1):
    torch.manual_seed(seed)
    kwargs = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "dropout": dropout}
    net = EDMPrecond(resolution, channels, label_dim, **kwargs)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net.eval()


def make_run(path, student=None, teacher=None, metrics=None, metric_names=(), others=None, **options):
    defaults = {
        "kimg": 0.024,
        "batch": 4,
        "tick": 0.008,
        "snap": 1,
        "lr": 1e-3,
        "aux_lr": 1e-3,
        "aux_warmup_kimg": 0.008,
        "adversarial": 0.0,
    }
    config = RefineConfig("g", "t", metrics=metric_names, **{**defaults, **options})
    path.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(config, student or make_student(), teacher or make_teacher(), others=others)
    return TrainingRun(trainer, RunDir(path, quiet=True), {}, "", metrics=metrics)


def run(training):
    """To the end; returns the trainer."""
    monitor = TensorBoard(training.run_dir.path)
    training.run(monitor)
    monitor.close()
    return training.trainer


def equal_states(a, b):
    return all(torch.equal(value, b.state_dict()[key]) for key, value in a.state_dict().items())


def test_a_run_leaves_what_users_know(tmp_path, full_pictures):
    trainer = run(make_run(tmp_path))
    names = {path.name for path in tmp_path.iterdir() if not path.name.startswith("events.")}
    assert names == {
        "fakes_init.png",
        *(f"fakes000000.0{n}.png" for n in ("08", "16", "24")),
        "log.txt",
        *(f"network-snapshot-000000.0{n}.safetensors" for n in ("08", "16", "24")),
        "stats.jsonl",
        *(f"training-state-000000.0{n}.pt" for n in (16, 24)),
    }
    lines = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert [line["kimg"] for line in lines] == [0.008, 0.016, 0.024]
    for key in ("Loss/aux", "Loss/student_gradient", "Grad/student", "Grad/aux", "Diversity/batch_spread"):
        assert all(line[key] > 0 for line in lines), key
    assert trainer.nimg == 24
    with Image.open(tmp_path / "fakes000000.024.png") as picture:
        assert picture.size == (30 * 8, 32 * 8)  # whole sets of three classes


def test_student_and_aux_move_and_the_teacher_does_not(tmp_path):
    student, teacher = make_student(), make_teacher()
    before = copy.deepcopy((student, teacher))
    trainer = run(make_run(tmp_path, student, teacher))
    assert equal_states(student, before[0]) and equal_states(teacher, before[1])  # the caller's networks
    assert equal_states(trainer.teacher, teacher)
    assert not equal_states(trainer.G, student)
    assert not equal_states(trainer.G_ema, student)
    assert not equal_states(trainer.aux, teacher)
    assert not torch.equal(trainer.G_ema.mapping.w_avg, student.mapping.w_avg)  # buffers follow, too


def test_learning_rate_zero_changes_no_parameter(tmp_path):
    student = make_student()
    trainer = run(make_run(tmp_path, student, lr=0.0))
    for G in (trainer.G, trainer.G_ema):
        assert all(torch.equal(p, dict(student.named_parameters())[n]) for n, p in G.named_parameters())


@pytest.mark.parametrize("train", ["synthesis", "mapping"])
def test_only_the_chosen_part_moves(tmp_path, train):
    student = make_student()
    trainer = run(make_run(tmp_path, student, train=train))
    moved = {n.split(".")[0] for n, p in trainer.G.named_parameters() if not torch.equal(p, student.get_parameter(n))}
    assert moved == {train}
    with pytest.raises(ValueError, match="--train is synthesis"):
        select_parameters(PlainGenerator(), "synthesis")


@pytest.mark.parametrize("clamp", [True, False])
def test_both_networks_see_the_images_as_they_are_saved(tmp_path, monkeypatch, clamp):
    class Bright(PlainGenerator):
        def __init__(self):
            super().__init__(c_dim=3)
            self.scale = torch.nn.Parameter(torch.tensor(9.0))

        def forward(self, z, c):
            return self.scale * super().forward(z, c)

    seen = []

    def watched(function, place):
        return lambda *args: (seen.append(args[place]), function(*args))[1]

    training = make_run(tmp_path / "run", Bright(), clamp=clamp).trainer
    monkeypatch.setattr("refine.training.trainer.aux_loss", watched(aux_loss, 1))
    objective = type(training.objective)
    monkeypatch.setattr(objective, "__call__", watched(objective.__call__, 3))
    training.step()
    assert len(seen) == training.config.aux_steps + 1
    assert all((x.abs().max() <= 1) == clamp for x in seen)


def test_equal_seeds_give_equal_snapshots(tmp_path):
    files = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        run(make_run(tmp_path / name, seed=seed))
        files.append((tmp_path / name / "network-snapshot-000000.024.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize(
    ("batch_gpu", "c_dim", "prior"), [(1, 3, None), (2, 3, None), (4, 3, None), (4, 0, None), (2, 0, (1.0, 2.0, 3.0))]
)
def test_micro_batches_give_the_same_gradients(tmp_path, batch_gpu, c_dim, prior):
    """Also with the noise inputs of the student, the dropout of aux, the running mean of w, and labels that are drawn
    for a teacher that knows no missing one."""
    seen = []
    for index, size in enumerate((None, batch_gpu)):
        options = {"batch_gpu": size, "dropout": True, "label_dist": prior}
        trainer = make_run(tmp_path / str(index), make_student(c_dim), batch=6, **options).trainer
        with torch.no_grad():
            for name, p in trainer.G.named_parameters():
                if name.endswith("noise_strength"):
                    p.fill_(0.5)
            for p in trainer.aux.parameters():  # equal to the teacher, it would give the student no gradient
                p.mul_(1.1)
        trainer.aux_step(0.0)
        trainer.student_step(0.0)
        grads = [p.grad for p in (*trainer.G.parameters(), *trainer.aux.parameters()) if p.grad is not None]
        assert sum(bool(p.grad.abs().max() > 0) for p in trainer.G.parameters() if p.grad is not None) > 10
        seen.append([*grads, trainer.G.mapping.w_avg, torch.rand(3)])
    assert len(seen[0]) == len(seen[1]) > 10
    for a, b in zip(*seen, strict=True):  # float32 sums in another order; some biases' gradients nearly cancel
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-4 * a.abs().max().item())


@pytest.mark.parametrize("c_dim", [0, 3])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, c_dim):
    networks = make_student(c_dim), make_teacher(c_dim)
    whole = run(make_run(tmp_path / "whole", *networks, dropout=True))
    first = make_run(tmp_path / "part", *networks, dropout=True)
    stop_after(first, 16)
    state = load_training_state(tmp_path / "part" / "training-state-000000.016.pt")
    assert state["nimg"] == 16
    second = make_run(tmp_path / "part", *networks, dropout=True)
    torch.randn(100)  # whatever a new process did before
    second.load_state_dict(state)
    second = run(second)
    for name in ("G", "G_ema", "aux"):
        assert equal_states(getattr(whole, name), getattr(second, name)), name
    snapshots = [tmp_path / name / "network-snapshot-000000.024.safetensors" for name in ("whole", "part")]
    assert snapshots[0].read_bytes() == snapshots[1].read_bytes()


def test_states_hold_what_they_always_held(tmp_path):
    """So that runs begun by earlier versions go on; the last names came later and may be missing."""
    training = make_run(tmp_path, average="ema")
    run(training)
    state = load_training_state(tmp_path / "training-state-000000.024.pt")
    later = {"start_recall", "recall_lost", "rollbacks", "files", "averages", "steps", "pace"}
    assert set(state) == later | {
        *("networks", "student_optimizer", "aux_optimizer", "rng", "cuda_rng", "nimg", "warmup_steps_done"),
        *("loss_scales", "skips", "means", "config", "elapsed", "begun", "tick_start", "best", "since_best"),
    }
    state["best"] = {"metric": "fd", "value": 1.0, "snapshot": "x.safetensors", "kimg": 0.008}
    training.load_state_dict({key: value for key, value in state.items() if key not in later})
    assert training.snapshots.standing == Standing(Best("fd", 1.0, "x.safetensors", 0.008))
    assert training.state_dict()["best"] == state["best"]


def test_a_run_that_ends_between_two_ticks_numbers_them_once_each(tmp_path):
    run(make_run(tmp_path, kimg=0.02, batch=4, tick=0.008))
    lines = [line.split() for line in (tmp_path / "log.txt").read_text().splitlines() if line.startswith("tick")]
    assert [line[1] for line in lines] == ["1", "2", "3"]
    rows = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert [(row["tick"], row["kimg"]) for row in rows] == [(1, 0.008), (2, 0.016), (3, 0.02)]


def test_the_loop_fits_on_a_page():
    import refine.training.loop

    with open(refine.training.loop.__file__) as file:
        assert len(file.readlines()) <= 200


def test_a_sum_of_objectives_trains_reports_its_parts_and_resumes(tmp_path):
    options = {"objective": "ikl:0.7+sid:0.3", "sid_alpha": 1.2}
    whole = run(make_run(tmp_path / "whole", **options))
    lines = [json.loads(line) for line in (tmp_path / "whole" / "stats.jsonl").read_text().splitlines()]
    for key in ("Loss/ikl_gradient", "Loss/sid_gradient", "Loss/sid", "Loss/student_gradient"):
        assert all(math.isfinite(line[key]) for line in lines), key
    stop_after(make_run(tmp_path / "part", **options), 16)
    second = make_run(tmp_path / "part", **options)
    second.load_state_dict(load_training_state(tmp_path / "part" / "training-state-000000.016.pt"))
    assert equal_states(whole.G, run(second).G)


def test_an_objective_that_needs_more_networks_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(REGISTRY["ikl"], "further_networks", ("head",))
    with pytest.raises(ValueError, match="--objective=ikl\\+sid needs head"):
        make_run(tmp_path, objective="ikl+sid")


def stop_after(training, nimg):
    """Run until so many images are done, as a kill right after a snapshot would."""
    trainer = training.trainer
    step = trainer.step

    def limited():
        if trainer.nimg >= nimg:
            raise KeyboardInterrupt
        step()

    trainer.step = limited
    with pytest.raises(KeyboardInterrupt):
        run(training)


def test_a_state_of_other_networks_is_refused(tmp_path):
    first = make_run(tmp_path / "a")
    run(first)
    state = first.state_dict()
    other = make_run(tmp_path / "b", make_student(0), make_teacher(0))
    with pytest.raises(ValueError, match="does not fit"):
        other.load_state_dict(state)
    (tmp_path / "text.pt").write_text("no state")
    with pytest.raises(ValueError, match="cannot be read"):
        load_training_state(tmp_path / "text.pt")
    torch.save({"a": 1}, tmp_path / "dict.pt")
    with pytest.raises(ValueError, match="something else"):
        load_training_state(tmp_path / "dict.pt")


def test_diverged_runs_stop_with_a_hint(tmp_path):
    training = make_run(tmp_path, aux_warmup_kimg=0.0, max_skips=3)
    training.trainer.weighting = lambda sigma, *_: sigma * math.inf
    student = copy.deepcopy(training.trainer.G)
    with pytest.raises(ValueError, match=r"3 steps of the student network in a row .*NaN or infinite.*smaller --lr"):
        run(training)
    assert training.trainer.nimg == 12
    assert all(torch.equal(p, student.get_parameter(n)) for n, p in training.trainer.G.named_parameters())


def test_single_broken_steps_are_skipped_and_counted(tmp_path):
    training = make_run(tmp_path, aux_warmup_kimg=0.0, max_skips=2)
    step, calls = training.trainer.student_step, []

    def sometimes_broken(lr):
        calls.append(lr)
        training.trainer.weighting = lambda sigma, *_: sigma * (math.inf if len(calls) % 2 else 1.0)
        before = [p.clone() for p in training.trainer.G.parameters()]
        step(lr)
        moved = not all(torch.equal(a, b) for a, b in zip(before, training.trainer.G.parameters(), strict=True))
        assert moved == (len(calls) % 2 == 0)

    training.trainer.student_step = sometimes_broken
    run(training)
    assert {name: o.skips.read() for name, o in training.trainer.optimizers.items()} == {
        "student": (3, 0),
        "aux": (0, 0),
    }
    assert all(p.isfinite().all() for p in training.trainer.G.parameters())
    assert "skipped student steps 3" in (tmp_path / "log.txt").read_text()
    last = json.loads((tmp_path / "stats.jsonl").read_text().splitlines()[-1])
    assert last["Progress/skipped_student_steps"] == 3 and all(math.isfinite(v) for v in last.values())


@pytest.mark.parametrize(
    ("student", "teacher", "word"),
    [((3,), (3, 16), "img_resolution 8"), ((3,), (2,), "classes 3")],
)
def test_pairs_that_disagree_are_refused(student, teacher, word):
    with pytest.raises(ValueError, match=word):
        check_pair(make_student(*student), make_teacher(*teacher))


def test_gap_bins_cover_all_noise_levels():
    assert len(GAP_NAMES) == len(SIGMA_EDGES) + 1
    assert GAP_NAMES[0] == "Gap/sigma_0-0.03" and GAP_NAMES[-1] == "Gap/sigma_10-inf"


def test_a_teacher_of_half_weights_trains_as_the_same_in_float32(tmp_path):
    """Its weights stay as EDM2's files have them; what is trained is not."""
    torch.manual_seed(2)
    net = edm2.Precond(8, 1, 3, model_channels=8, channel_mult=[1], num_blocks=1).eval()
    torch.nn.init.constant_(net.unet.out_gain, 0.3)
    teacher = load_teacher(write(tmp_path / "x.pkl", edm2_file(Format(dtype=torch.float16), net)))
    wide = copy.deepcopy(teacher).float()
    half, same = (run(make_run(tmp_path / name, teacher=T)) for name, T in (("half", teacher), ("wide", wide)))
    assert half.teacher.unet.out_conv.weight.dtype == torch.float16
    assert all(p.dtype == torch.float32 for p in half.aux.parameters())
    assert equal_states(half.aux, same.aux) and equal_states(half.G, same.G)
    assert not equal_states(half.aux, wide)
