"""The toolkit from Python: refine.refine, sample, compare, bridge, on networks in memory and in files."""

import contextlib
import copy
import itertools
import sys
import time
import typing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import refine
from refine.checkpoints.native import save_networks
from refine.evaluation.generate import generate
from refine.images import to_uint8
from tests.evaluation.test_compare import small_generator
from tests.training.test_trainer import make_student, make_teacher

SHORT = {
    "kimg": 0.016, "batch": 4, "tick": 0.004, "snap": 2, "lr": 1e-3, "aux_lr": 1e-3, "aux_warmup_kimg": 0.004,
    "adversarial": 0.0, "device": "cpu",
}  # fmt: skip


class Foreign(nn.Module):
    """A generator that knows nothing of this toolkit."""

    z_dim, c_dim, img_resolution, img_channels = 6, 3, 8, 1

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(9, 64)

    def forward(self, z, c):
        return self.layer(torch.cat([z, c], dim=1)).tanh().reshape(-1, 1, 8, 8)


class ForeignTeacher(nn.Module):
    img_resolution, img_channels, label_dim = 8, 1, 3

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x, sigma, class_labels=None):
        return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2) + self.scale


def brightness(G):
    z, c = torch.ones(2, G.z_dim), torch.eye(G.c_dim)[:2]
    assert not torch.is_grad_enabled() and not G.training
    return {"brightness": G(z, c).mean(), "spread": 0.5}


def short_run(G=None, T=None, **options):
    return refine.refine(G or make_student(), T or make_teacher(), quiet=True, **{**SHORT, **options})


def states(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.fixture(scope="module")
def result():
    events = []
    found = short_run(metrics=[brightness], callbacks=[lambda event: events.append((event, event.images([3, 4])))])
    return found, events


def test_hints_of_everything_can_be_resolved():
    for name in set(refine.__all__) - {"__version__"}:
        hints = typing.get_type_hints(getattr(refine, name))
        assert hints or name == "MetricFunction", name
    assert typing.get_type_hints(refine.refine)["return"] is refine.Result
    assert typing.get_type_hints(refine.load_generator)["return"].__name__ == "Generator"


def test_a_run_leaves_networks_a_history_and_a_verdict(result):
    found, _ = result
    start = states(make_student())
    for network in (found.student, found.average, found.best):
        assert type(network).__name__ == "Generator" and not network.training
        assert not any(p.requires_grad for p in network.parameters())
    assert not equal(states(found.student), start) and not equal(states(found.student), states(found.average))
    assert found.finished and (found.folder / "network-snapshot-best.safetensors").is_file()
    assert equal(states(refine.load_generator(found.folder / "network-snapshot-best.safetensors")), states(found.best))
    assert [row.kimg for row in found.history] == [0, 0.008, 0.016] and found.history[0].snapshot == "init"
    assert {"brightness", "spread"} <= found.history[1].values.keys()
    assert "brightness" in found.verdict and "\n" not in found.verdict
    assert found.config.kimg == 0.016 and found.config.metrics == ("brightness",)


def test_callbacks_are_told_every_tick_and_what_was_measured(result):
    _, events = result
    assert [event.kimg for event, _ in events] == [0, 0.004, 0.008, 0.012, 0.016]
    assert [bool(event.metrics) for event, _ in events] == [True, False, True, False, True]
    assert events[0][0].metrics["brightness/spread"] == 0.5 and not events[0][0].scalars
    assert events[1][0].scalars["Loss/aux"] > 0
    pictures = [images for _, images in events]
    assert pictures[0].dtype == torch.uint8 and pictures[0].shape == (2, 1, 8, 8)
    assert torch.equal(pictures[0], refine.sample(make_student(), [3, 4], device="cpu"))


def test_a_run_from_python_is_that_of_the_command_line(result, tmp_path):
    found, _ = result  # with a callback that draws, in a temporary folder
    gan, teacher = tmp_path / "g.safetensors", tmp_path / "t.safetensors"
    save_networks(gan, {"G_ema": make_student()}, provenance={})
    save_networks(teacher, {"ema": make_teacher()}, provenance={})
    torch.manual_seed(7)
    before, expected = torch.get_rng_state(), states(found.student)
    of_files = refine.refine(gan, str(teacher), outdir=tmp_path / "runs", metrics=[], quiet=True, **SHORT)
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers are its own"
    assert equal(states(of_files.student), expected)
    assert of_files.folder.parent == tmp_path / "runs" and of_files.best is None and of_files.verdict == ""
    assert of_files.history == ()
    longer = refine.refine(resume=of_files.folder, kimg=0.02, quiet=True)
    assert longer.folder == of_files.folder and longer.config.kimg == 0.02
    assert not equal(states(longer.student), expected)


def test_networks_that_were_given_stay_as_they_are_and_runs_of_them_go_on(tmp_path):
    G, T = make_student().train(), make_teacher()
    before = states(G), states(T)
    events = []

    def stop_early(event):
        events.append(event.kimg)
        if event.kimg >= 0.004:
            event.stop()

    found = short_run(G, T, outdir=tmp_path, metrics=[brightness], callbacks=[stop_early])
    assert events == [0, 0.004] and found.finished and G.training
    assert equal(states(G), before[0]) and equal(states(T), before[1])
    said = f"go on with  refine.refine(G, T=T, resume={str(found.folder)!r}, metrics=…) in Python"
    assert "stopped by a callback" in (log := (found.folder / "log.txt").read_text()) and said in log
    whole = short_run(metrics=[])
    resumed = refine.refine(G, T, resume=found.folder, metrics=[brightness], quiet=True)
    assert equal(states(resumed.student), states(whole.student))
    with pytest.raises(ValueError, match="--gan has the sha256"):
        refine.refine(make_student(seed=5), T, resume=found.folder, metrics=[brightness], quiet=True)


def test_a_folder_that_nobody_asked_for_goes_with_the_result():
    found = short_run(metrics=[])
    folder = found.folder
    assert folder.is_dir()
    del found
    assert not folder.exists() and not folder.parent.exists()


def test_a_metric_that_leaves_the_program_ends_no_run():
    def leaves(G):
        sys.exit("enough")

    found = short_run(metrics=[leaves])
    assert "metric leaves failed: leaves called sys.exit('enough')" in (found.folder / "log.txt").read_text()
    assert (found.folder / "stats.jsonl").is_file()


def test_foreign_modules(monkeypatch, tmp_path):
    monkeypatch.setenv("REFINE_CACHE", str(tmp_path))
    torch.manual_seed(0)
    G, T = Foreign(), ForeignTeacher()
    before = states(G)
    found = short_run(G, T, metrics=[refine.OwnMetric("up", lambda G: 1.0, "higher")])
    assert equal(states(G), before) and isinstance(found.student.network, Foreign)
    assert states(found.student).keys() == before.keys() and not equal(states(found.student), before)
    assert isinstance(found.best.network, Foreign)
    images = refine.sample(G, [0, 1], classes=[2, 0], device="cpu")
    assert images.shape == (2, 1, 8, 8) and images.dtype == torch.uint8
    assert refine.sample(T, [0], steps=2, device="cpu").shape == (1, 1, 8, 8)
    assert refine.bridge(G, T).images(torch.ones(1, 1, 8, 8)).shape == (1, 1, 8, 8)


def test_images_by_seed(tmp_path):
    G = make_student()
    path = tmp_path / "g.safetensors"
    save_networks(path, {"G_ema": G}, provenance={})
    images = refine.sample(G, range(5), device="cpu")
    assert images.dtype == torch.uint8 and torch.equal(images, refine.sample(path, range(5), batch=2, device="cpu"))
    floats = refine.sample(G, range(5), floats=True, device="cpu")
    assert floats.dtype == torch.float32 and torch.equal(to_uint8(floats), images)
    generate(path, [4], tmp_path / "out", progress=False)
    assert torch.equal(images[4:], refine.sample(path, [4], device="cpu"))
    one, other = (refine.sample(G, [0], classes=index, device="cpu") for index in (1, 2))
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: short_run(speed=3), "--speed is no option"),
        (lambda: short_run(learning_rate=1e-3), "--learning-rate is no option; did you mean lr?"),
        (lambda: short_run(kimg="many"), "--kimg is many; expected a number > 0"),
        (lambda: short_run(batch=True), "--batch is True; expected a whole number"),
        (lambda: short_run(preset="fast"), "--preset is fast; expected one of"),
        (lambda: short_run(metrics=[3]), "--metrics: found int; expected names, functions, or OwnMetric"),
        (lambda: short_run(metrics="psnr"), "--metrics: unknown metric 'psnr'"),
        (lambda: short_run(callbacks=5), "callbacks: found int; expected a list of functions"),
        (lambda: short_run(callbacks=[None]), "callbacks: found list; expected a list of functions"),
        (lambda: short_run(outdir=5), "--outdir: found int; expected a path"),
        (lambda: refine.refine(resume=5), "--resume: found int; expected a path"),
        (lambda: short_run(make_student().to("meta")), "--gan: Generator is on the device meta"),
        (lambda: short_run(T=make_teacher().to("meta")), "--teacher: EDMPrecond is on the device meta"),
        (lambda: short_run(make_teacher()), "--gan: found a teacher"),
        (lambda: short_run(T=make_student()), "--teacher: found a generator"),
        (lambda: short_run(nn.Linear(1, 1)), "--gan: Linear is a generator whose z_dim is None"),
        (lambda: short_run(T=nn.Linear(1, 1)), "--teacher: Linear is a teacher whose img_resolution is None"),
        (lambda: short_run(make_student(5)), "--gan has classes 5, but --teacher has 3"),
        (lambda: short_run("nowhere.pkl"), "--gan: nowhere.pkl"),
        (lambda: refine.refine(T=make_teacher()), "--gan is missing"),
        (lambda: refine.bridge(make_student(5), make_teacher()), "--gan has classes 5"),
        (lambda: refine.sample(make_student(), []), "--seeds: found 0 seeds"),
        (lambda: refine.sample(make_student(), [-1]), "--seeds"),
        (lambda: refine.sample(make_student(), 5), "--seeds: found 5; expected a sequence of whole numbers"),
        (lambda: refine.sample(make_student(), [1.5]), "--seeds: found [1.5]; expected a sequence of whole numbers"),
        (lambda: refine.compare(make_student(), make_student(), 5), "--ref: found int; expected a path"),
        (lambda: refine.sample(make_student(), [0], classes=9), "--network: class 9 was asked for"),
        (lambda: refine.sample(make_student(), [0, 1], classes=[0]), "found 1 classes for 2 seeds"),
        (lambda: refine.sample(make_student(), [0], steps=3), "--steps is for diffusion models"),
        (lambda: refine.compare(make_student(), make_student(), "nowhere.npz"), "--ref: nowhere.npz"),
    ],
)  # fmt: skip
def test_faults_are_one_line(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert message in text and "\n" not in text, text


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "surroundings",
    [
        lambda: default_dtype(torch.float64),
        lambda: torch.device("meta"),
        torch.inference_mode,
        torch.no_grad,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    ],
    ids=["float64", "meta", "inference", "no_grad", "autocast"],
)
def test_what_the_caller_told_torch_does_not_matter(result, surroundings, tmp_path):
    save_networks(tmp_path / "g.safetensors", {"G_ema": result[0].student}, provenance={})
    images, teacher = refine.sample(result[0].student, range(2), device="cpu"), make_teacher()
    with surroundings():
        before = torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        again = refine.refine(result[0].student, teacher, quiet=True, **{**SHORT, "kimg": 0.008}, metrics=[])
        same = refine.sample(tmp_path / "g.safetensors", range(2), device="cpu")
        assert before == (torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    assert torch.equal(images, same)
    assert all(value.dtype != torch.float64 for value in states(again.student).values())
    assert not equal(states(again.student), states(result[0].student))


def test_one_run_at_a_time():
    said = []

    def elsewhere(event):
        with ThreadPoolExecutor(1) as threads:
            said.append(threads.submit(short_run, metrics=[]).exception())
        if not said[1:]:
            short_run(metrics=[], kimg=0.004)  # in the same thread, it has random numbers of its own

    assert short_run(metrics=[], kimg=0.004, callbacks=[elsewhere]).finished
    assert isinstance(said[0], ValueError) and "another thread of this process refines" in str(said[0])


def test_a_clock_that_is_set_back_ends_no_run(monkeypatch):
    now = itertools.count(time.time(), -3600)
    monkeypatch.setattr(time, "time", lambda: next(now))
    said = []
    assert short_run(metrics=[], callbacks=[said.append]).finished
    assert 0 < said[-1].scalars["Timing/total_hours"] < 1 and said[-1].scalars["Timing/sec_per_tick"] > 0


def test_what_a_callback_raises_is_seen(tmp_path):
    def broken(event):
        raise RuntimeError("no more paper")

    with pytest.raises(RuntimeError, match="no more paper"):
        short_run(metrics=[], callbacks=[broken])


def test_networks_in_memory_are_compared_like_their_files(tmp_path):
    G, worse = small_generator(0), small_generator(0)
    for name, parameter in worse.named_parameters():
        if name.endswith("torgb.bias"):
            parameter.data += 1.0
    path = tmp_path / "g.safetensors"
    save_networks(path, {"G_ema": worse}, provenance={})
    options = {"num": 40, "batch": 40, "device": "cpu", "quiet": True}
    found = refine.compare(copy.deepcopy(G), worse, "digits-reference", outdir=tmp_path / "out", **options)
    of_file = refine.compare(G, path, "digits-reference", **options)
    assert found.metric == "fd_digits" and found.after["fd_digits"] == of_file.after["fd_digits"]
    assert found.ratio == found.after["fd_digits"] / found.before["fd_digits"]
    assert found.verdict == found.results["verdict"] and found.summary in str(found)
    assert "fd_digits" in str(found).splitlines()[1]
    assert (tmp_path / "out" / "report.html").is_file()
    assert found.results["before"]["name"] == "Generator in memory"
