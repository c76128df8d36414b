"""A teacher guided by another network: the numbers of the original, closed forms, and the options of every command."""

import dataclasses
import json

import pytest
import torch

from refine.checkpoints.native import read_metadata, save_networks
from refine.checkpoints.teachers import TeacherSource
from refine.cli.generate import command as generate_command
from refine.cli.main import run_command
from refine.evaluation.compare import Side
from refine.evaluation.teachers import TeacherOptions
from refine.guidance import Autoguided, check_guide
from refine.metrics.bank import describe_bank
from refine.networks import edm2
from refine.networks.bases import Denoiser
from refine.networks.sampler import heun_sampler
from refine.networks.sampler_settings import SamplerSettings
from refine.training.trainer import Trainer
from tests.cli.test_refine import call
from tests.golden import read_arrays, read_json
from tests.golden import sample_error as error
from tests.networks.test_edm2 import network
from tests.networks.test_edm_golden import TOLERANCE
from tests.objectives.gaussians import isotropic, levels
from tests.training.test_resuming import RUN
from tests.training.test_trainer import equal_states, make_run, make_student, make_teacher


def golden():
    """The main network, its guide, and the numbers."""
    facts, data = read_json("edm/edm2_autoguidance"), read_arrays("edm/edm2_autoguidance")
    guide = edm2.Precond(**facts["guide_init_kwargs"])
    prefix = "guide:w:"
    guide.load_state_dict({k.removeprefix(prefix): v.float() for k, v in data.items() if k.startswith(prefix)})
    return network(False), guide.eval().requires_grad_(False), data


def test_golden():
    main, guide, data = golden()
    x, sigma, c = data["x"], data["sigma"], data["class_labels"]
    assert error(guide(x, sigma, c), data["D_guide"]) < TOLERANCE
    for w in (0.0, 1.7, 2.2):
        assert error(Autoguided(main, guide, w)(x, sigma, c), data[f"D_w{w}"]) < TOLERANCE
    assert torch.equal(Autoguided(main, guide, 1)(x, sigma, c), main(x, sigma, c))
    for w, name in ((1.0, "sampler_w1"), (1.7, "sampler_w1.7")):
        images = heun_sampler(Autoguided(main, guide, w), data["latents"], c[:2], num_steps=6)
        assert error(images, data[name]) < 1e-5


def test_gradients_are_those_of_the_two_networks_combined():
    """To images, noise levels and weights: w of D's and 1 − w of the guide's; and those of differences of D."""
    main, guide, data = golden()
    x, sigma, c, w = data["x"], data["sigma"], data["class_labels"], 1.7
    cotangent = torch.randn_like(data["D_w1.7"])

    def gradients(net):
        given = [x.clone().requires_grad_(True), sigma.clone().requires_grad_(True)]
        return torch.autograd.grad(net(*given, c), given, cotangent)

    for found, of_main, of_guide in zip(
        gradients(Autoguided(main, guide, w)), gradients(main), gradients(guide), strict=True
    ):
        assert error(found, w * of_main + (1 - w) * of_guide) < TOLERANCE
        assert error(found, of_main) > 10 * TOLERANCE  # the guide has its part
    guided, direction, step = Autoguided(main, guide, w), torch.randn_like(x), 1e-2
    x = x.requires_grad_(True)
    (slope,) = torch.autograd.grad(guided(x, sigma, c), x, cotangent)
    with torch.no_grad():
        up, down = (guided(x + sign * step * direction, sigma, c).mul(cotangent).double().sum() for sign in (1, -1))
    assert float((up - down) / (2 * step)) == pytest.approx(float((slope * direction).sum()), rel=1e-2)


class Countdown(Denoiser):
    """Fails when it is asked."""

    def __init__(self, like):
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = like.img_resolution, like.img_channels, like.label_dim

    def forward(self, x, sigma, class_labels=None):
        raise AssertionError("the guide was asked")


def test_of_two_gaussians_it_is_the_gaussian_of_their_scores():
    """The score at σ is s_g + w (s_m − s_g): with equal variances that of a normal at μ_g + w (μ_m − μ_g)."""
    std, w = 0.7, 1.7
    main, guide = isotropic([1.0, -2.0], std), isotropic([0.25, 0.5], std)
    for net in (main, guide):
        net.img_resolution, net.img_channels, net.label_dim, net.sigma_min, net.sigma_max = 1, 2, 0, 0.0, 1e9
    mean = [0.25 + w * 0.75, 0.5 + w * -2.5]
    x = torch.randn(16, 2, 1, 1) * 3
    for sigma in (0.05, 1.0, 20.0):
        found = Autoguided(main, guide, w)(x, levels(16, sigma))
        torch.testing.assert_close(found, isotropic(mean, std)(x, levels(16, sigma)), rtol=1e-4, atol=1e-5)


def test_with_w_1_the_guide_is_not_asked_and_the_teacher_is_itself():
    main = make_teacher(3)
    x, c = torch.randn(2, 1, 8, 8), torch.eye(3)[:2]
    assert torch.equal(Autoguided(main, Countdown(main), 1.0)(x, 0.5, c), main(x, 0.5, c))
    with pytest.raises(AssertionError, match="asked"):
        Autoguided(main, Countdown(main), 1.5)(x, 0.5, c)


def test_a_guide_without_classes_ignores_labels():
    main, guide = make_teacher(3), make_teacher(0)
    x, c = torch.randn(2, 1, 8, 8), torch.eye(3)[:2]
    expected = guide(x, 0.5) + 2 * (main(x, 0.5, c) - guide(x, 0.5))
    torch.testing.assert_close(Autoguided(main, guide, 2.0)(x, 0.5, c), expected)


@pytest.mark.parametrize(
    ("guide", "said"),
    [
        ((3, 16, 1), "--guide has img_resolution 16, but the teacher has 8; expected 8"),
        ((3, 8, 3), "--guide has img_channels 3, but the teacher has 1; expected 1"),
        ((4, 8, 1), "--guide has classes 4, but the teacher has 3; expected 3, or none"),
    ],
)
def test_a_guide_that_does_not_fit(guide, said):
    class Sizes:
        label_dim, img_resolution, img_channels = guide

    with pytest.raises(ValueError) as refusal:
        check_guide(make_teacher(3), Sizes)
    assert str(refusal.value) == said
    with pytest.raises(ValueError, match="classes 3, but the teacher has 0; expected 0"):
        check_guide(make_teacher(0), make_teacher(3))


def test_a_run_learns_from_the_guided_teacher_and_w_1_is_a_run_without(tmp_path):
    torch.manual_seed(1)
    teacher, guide = make_teacher(3), make_teacher(3)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    student, ends = make_student(3), {}
    config = make_run(tmp_path, student, teacher).trainer.config
    for name, w, by in (("without", 1.0, None), ("w 1", 1.0, guide), ("w 2", 2.0, guide)):
        trainer = Trainer(dataclasses.replace(config, guidance=w), student, teacher, guide=by)
        assert isinstance(trainer.teacher, Autoguided) == (name == "w 2")
        assert type(trainer.aux) is type(teacher)  # begins as the teacher that is not guided
        for _ in range(2):
            trainer.step()
        ends[name] = trainer.G
    assert equal_states(ends["without"], ends["w 1"]) and not equal_states(ends["without"], ends["w 2"])


@pytest.fixture
def files(tmp_path):
    torch.manual_seed(0)
    save_networks(tmp_path / "gan.safetensors", {"G_ema": make_student(3)}, provenance={})
    for name, net in (("teacher", make_teacher(3)), ("guide", make_teacher(3)), ("grey", make_teacher(0))):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        save_networks(tmp_path / f"{name}.safetensors", {"ema": net}, provenance={})
    save_networks(tmp_path / "large.safetensors", {"ema": make_teacher(3, 16)}, provenance={})
    return tmp_path


def pair(files, *more):
    return [f"--gan={files}/gan.safetensors", f"--teacher={files}/teacher.safetensors", *RUN, *more]


def test_a_run_notes_its_guide_and_resumes_with_the_same_only(files, capsys):
    given = pair(files, f"--guide={files}/guide.safetensors", "--guidance=1.7", f"--outdir={files}/out")
    code, out, err = call(capsys, *given, "--dry-run", "--json")
    assert code == 0 and json.loads(out)["guide"] == f"{files}/guide.safetensors" and not (files / "out").exists()
    code, _, err = call(capsys, *given)
    assert code == 0, err
    folder = files / "out/00000-x"
    assert "guided by guide.safetensors with w 1.7" in (folder / "log.txt").read_text()
    source = TeacherSource.of(files / "guide.safetensors")
    provenance = read_metadata(folder / "network-snapshot-000000.008.safetensors")["provenance"]
    assert provenance["guide"] == {"file": "guide.safetensors", "sha256": source.sha256}
    assert provenance["options"]["guidance"] == 1.7 and "guide" not in provenance["options"]
    code, _, err = call(capsys, f"--outdir={files}/out", "--resume=latest", "--kimg=0.012")
    assert code == 0, err
    for guide, said in (
        (f"{files}/grey.safetensors", "--guide has the sha256"),
        ("none", "--guide is none, but the run was made with"),
        ("json:loads", "--guide is json:loads, but the run was made with"),
    ):
        code, _, err = call(capsys, f"--outdir={files}/out", "--resume=latest", "--kimg=0.016", f"--guide={guide}")
        assert code == 2 and said in err and len(err.strip().splitlines()) == 1
    (files / "guide.safetensors").rename(files / "moved.safetensors")
    code, _, err = call(capsys, f"--outdir={files}/out", "--resume=latest", "--kimg=0.016")
    assert code == 2 and "give --guide where it is now" in err
    again = (f"--guide={files}/moved.safetensors", "--kimg=0.016")
    assert call(capsys, f"--outdir={files}/out", "--resume=latest", *again)[0] == 0


def test_faults_of_guides_are_one_line(files, capsys):
    for guide, said in (
        ("large", "--guide has img_resolution 16, but the teacher has 8; expected 8"),
        ("gan", "--guide: "),
        ("nothing", "no such file"),
    ):
        given = pair(files, f"--guide={files}/{guide}.safetensors", "--guidance=2", f"--outdir={files}/out")
        code, out, err = call(capsys, *given)
        assert code == 2 and said in err and len(err.strip().splitlines()) == 1 and not out
        assert not (files / "out").exists()
    code, _, err = call(capsys, *pair(files, "--guidance=2", f"--outdir={files}/out"))
    assert code == 2 and "or another network as its --guide" in err


def generate(capsys, *args):
    with pytest.raises(SystemExit) as ended:
        run_command(generate_command, [*args, "--seeds=0-1", "--device=cpu"])
    return ended.value.code, capsys.readouterr().err


def test_images_of_a_guided_teacher(files, capsys):
    network = f"--network={files}/teacher.safetensors"
    guide = f"--guide={files}/guide.safetensors"
    for name, more in (("plain", ()), ("one", (guide,)), ("two", (guide, "--guidance=2"))):
        assert generate(capsys, network, *more, f"--outdir={files}/{name}")[0] == 0
    plain, one, two = ((files / name / "seed0000.png").read_bytes() for name in ("plain", "one", "two"))
    assert plain == one != two
    code, err = generate(capsys, f"--network={files}/gan.safetensors", guide, f"--outdir={files}/x")
    assert code == 2 and "--guide is about diffusion models; expected one among the networks" in err
    code, err = generate(capsys, network, f"--guide={files}/large.safetensors", "--guidance=2", f"--outdir={files}/x")
    assert code == 2 and "--guide has img_resolution 16" in err and not (files / "x").exists()


def test_a_comparison_says_how_a_teacher_was_guided(files):
    options = TeacherOptions(files / "guide.safetensors", 2.0)
    side = Side(files / "teacher.safetensors", "cpu", 2, "random", 1.0, options)
    described = side.describe()
    assert described["sampling"] == "18 Heun steps, guided by guide.safetensors with w 2"
    assert described["guide"]["guidance"] == 2 and len(described["guide"]["sha256"]) == 64
    assert isinstance(side.network, Autoguided)
    gan = Side(files / "gan.safetensors", "cpu", 2, "random", 1.0, options)
    assert "guide" not in gan.describe() and not gan.is_teacher
    options.check_used([gan.is_teacher, side.is_teacher])
    by_w, by_kwargs = TeacherOptions(guidance=2.0), TeacherOptions(kwargs={})
    for unused, said in ((options, "--guide"), (by_w, "--guidance"), (by_kwargs, "--teacher-kwargs")):
        with pytest.raises(ValueError, match=f"{said} is about diffusion models; expected one among the networks"):
            unused.check_used([False, False])
    assert TeacherOptions().check_used([False]) == []
    assert TeacherOptions(guide="g").check_used([True]) == ["--guide has no part in this: --guidance is 1"]


def test_banks_of_guided_teachers_are_told_apart(files):
    plain, guide = TeacherSource.of(files / "teacher.safetensors"), TeacherSource.of(files / "guide.safetensors")
    guided, usual = dataclasses.replace(plain, guide=guide, guidance=2.0), SamplerSettings()
    sources = [plain, guided, dataclasses.replace(guided, guidance=3.0), dataclasses.replace(plain, guidance=2.0)]
    assert len({describe_bank(source, 10, usual) for source in sources}) == 4
    unasked = dataclasses.replace(plain, guide=guide)  # w = 1
    assert describe_bank(unasked, 10, usual) == describe_bank(plain, 10, usual) and plain.identity == plain.sha256
