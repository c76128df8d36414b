"""Diffusion models of the user's own code, `--teacher=module:function`, and the examples of docs/teachers.md."""

import re
import shutil

import pytest
import torch

from refine import load_teacher
from refine.checkpoints import peek
from refine.checkpoints.native import save_networks
from refine.checkpoints.teachers import TeacherSource
from refine.evaluation.generate import generate
from refine.metrics.detectors import load_detector
from tests.cli.test_refine import call
from tests.conftest import ROOT
from tests.golden import unlikeness
from tests.training.test_resuming import RUN
from tests.training.test_trainer import make_student

MODULE = """
import torch

class Net(torch.nn.Module):
    img_resolution, img_channels, label_dim = 8, 1, 3

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 1, 3, padding=1)
        self.label = torch.nn.Linear(3, 1, bias=False)

    def forward(self, x, sigma, class_labels):
        assert sigma.shape == (len(x),) and class_labels.shape == (len(x), 3) and x.dtype == torch.float32
        return self.conv(x) / (1 + sigma[:, None, None, None]) + self.label(class_labels)[:, :, None, None]

def make(**changes):
    torch.manual_seed(3)
    net = Net()
    for name, value in changes.items():
        setattr(net, name, value)
    return net

def null(): return make(has_null_label=True, sigma_min=0.01, sigma_max=50)
def encoding(): return make(encode=lambda x, sigma: [x.mean(dim=(2, 3)), x.amax(dim=(2, 3))])
def broken(): raise RuntimeError("no weights\\nat home")
def no_module(): return lambda x, sigma, c: x
def no_sizes(): return torch.nn.Linear(2, 2)
def half_classes(): return make(label_dim=2.5)
def no_schedule(): return make(predicts="epsilon")
def unknown(): return make(predicts="noise", alphas_cumprod=[0.9, 0.5])
def rising(): return make(predicts="epsilon", alphas_cumprod=[0.5, 0.9])
def not_numbers(): return make(predicts="epsilon", alphas_cumprod="0.9")
def latent(): return make(img_channels=4)
def wrong_shape(): return make(forward=lambda x, sigma, c: x[:, :, :4])
def no_gradient(): return make(forward=lambda x, sigma, c: x)
def not_finite(): return make(forward=lambda x, sigma, c: x * float("nan"))

def not_copied():
    net = make()
    net.lock = __import__("threading").Lock()
    return net
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_teacher.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "own_teacher", raising=False)
    monkeypatch.setenv("REFINE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_what_a_module_makes_is_a_teacher(own):
    T, info = load_teacher("own_teacher:make"), peek("own_teacher:make", "teacher")
    assert (T.img_resolution, T.img_channels, T.label_dim, T.sigma_min) == (8, 1, 3, 0)
    assert (info.img_resolution, info.classes, info.kind) == (8, 3, "teacher")
    x, c = torch.randn(2, 1, 8, 8), torch.eye(3)[:2]
    assert torch.equal(T(x, 0.5, c), T.network(x, torch.tensor([0.5, 0.5]), c))
    assert not any(p.requires_grad for p in T.parameters()) and not T.training and not T.has_null_label
    for missing in (None, torch.zeros(2, 3)):
        with pytest.raises(ValueError, match="every image needs one"):
            T(x, 0.5, missing)
    free = load_teacher("own_teacher:null")
    assert free.has_null_label and (free.sigma_min, free.sigma_max) == (0.01, 50)
    assert torch.equal(free(x, 0.5), free(x, 0.5, torch.zeros(2, 3)))


FAULTS = {
    "nothing": "has no function nothing",
    "broken": "own_teacher:broken() failed: RuntimeError: no weights at home",
    "no_module": "gave function; expected a torch.nn.Module",
    "no_sizes": "whose img_resolution is None; expected a whole number",
    "half_classes": "whose label_dim is 2.5; expected a whole number",
    "no_schedule": "predicts 'epsilon' without alphas_cumprod",
    "unknown": "predicts is 'noise', expected one of denoised, epsilon, v_prediction, sample",
    "rising": "noise levels do not rise from step to step",
    "not_numbers": "gave a teacher that cannot be used",
    "latent": "gave a teacher that fails at D(x, sigma, class_labels): RuntimeError",
    "wrong_shape": "RuntimeError",
    "no_gradient": "do not depend differentiably on its parameters",
    "not_finite": "images hold NaN or infinity",
    "not_copied": "gave a teacher that cannot be used: TypeError",
    "make@x.pt": "a teacher of your own code has no file; expected own_teacher:make",
}


@pytest.mark.parametrize("function", FAULTS)
def test_faults_are_one_line(own, function):
    with pytest.raises(ValueError) as refusal:
        load_teacher(f"own_teacher:{function}")
    assert FAULTS[function] in str(refusal.value) and "\n" not in str(refusal.value)


def test_options_of_files_are_not_for_code(own):
    with pytest.raises(ValueError, match="builds its network; expected no --teacher-kwargs"):
        load_teacher("own_teacher:make", {"image_size": 8})


def test_features_come_of_its_own_method_or_not_at_all(own):
    with pytest.raises(ValueError, match="the teacher cannot be the detector: a OwnTeacher has no encoder"):
        load_detector(TeacherSource.of("own_teacher:make"))
    detector = load_detector(TeacherSource.of("own_teacher:encoding"))
    assert detector(torch.zeros([3, 1, 8, 8], dtype=torch.uint8)).shape == (3, 2)


def test_a_run_with_it_goes_on_only_where_it_is_named_again(own, capsys):
    save_networks(own / "gan.safetensors", {"G_ema": make_student(3)}, provenance={})
    args = [f"--gan={own}/gan.safetensors", "--teacher=own_teacher:make", *RUN, f"--outdir={own}/out"]
    code, _, err = call(capsys, *args)
    assert code == 0, err
    resume = (f"--outdir={own}/out", "--resume=latest", "--kimg=0.012")
    code, _, err = call(capsys, *resume)
    assert code == 2 and "code to be imported; give --teacher=own_teacher:make again" in err
    code, _, err = call(capsys, *resume, "--teacher=own_teacher:null")
    assert code == 2 and "--teacher is own_teacher:null, but the run was made with own_teacher:make" in err
    shutil.copy(own / "own_teacher.py", own / "before.py")
    (own / "own_teacher.py").write_text(MODULE.replace("manual_seed(3)", "manual_seed(4)"))
    del __import__("sys").modules["own_teacher"]
    code, _, err = call(capsys, *resume, "--teacher=own_teacher:make")
    assert code == 2 and "--teacher has the sha256" in err and len(err.strip().splitlines()) == 1
    shutil.copy(own / "before.py", own / "own_teacher.py")
    del __import__("sys").modules["own_teacher"]
    assert call(capsys, *resume, "--teacher=own_teacher:make")[0] == 0


def test_it_can_be_sampled_and_not_be_a_student(own, capsys):
    generate("own_teacher:null", [0, 1], own / "images", progress=False)
    assert (own / "images/seed0001.png").is_file()
    code, _, err = call(capsys, "--gan=one-step", "--teacher=own_teacher:make", *RUN, f"--outdir={own}/out")
    assert code == 2 and "--gan: one-step needs a teacher of a file" in err and not (own / "out").exists()


def test_its_images_are_told_apart_by_weights_and_source(own):
    source = TeacherSource.of("own_teacher:make")
    assert source.sha256 == TeacherSource.of("own_teacher:make").sha256 and source.identity != source.sha256
    assert source.identity != TeacherSource.of("own_teacher:encoding").identity


@pytest.mark.parametrize("function", ["denoiser", "k_diffusion", "noise_predictor"])
def test_examples_are_the_model_that_they_wrap(function, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    T, shipped = load_teacher(f"example_teacher:{function}"), load_teacher("digits-teacher-2")
    x, c = torch.randn(4, 1, 32, 32), torch.eye(10)[:4]
    sigma = torch.tensor([0.02, 0.5, 1.3, 40.0])
    x = x * (1 + sigma[:, None, None, None])
    assert unlikeness(T(x, sigma, c), shipped(x, sigma, c)) < 2e-4
    if function == "noise_predictor":
        assert T.sigma_min == pytest.approx(0.01, rel=1e-3) and T.sigma_max == pytest.approx(157.4, rel=1e-3)


def test_the_page_shows_the_code_that_was_run():
    """What docs/teachers.md shows are whole classes of docs/example_teacher.py."""
    source = (ROOT / "docs/example_teacher.py").read_text()
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/teachers.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        assert block.strip() in source
