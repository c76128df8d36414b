"""Generators of the user's own code: `package.module:function`."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from refine import load_generator
from refine.checkpoints import describe, peek, source_file
from refine.checkpoints.native import load_loose, read_metadata, save_networks
from refine.checkpoints.sources import custom
from refine.evaluation.generate import generate
from tests.cli.test_refine import call
from tests.training.test_trainer import make_teacher

MODULE = """
import torch

class Net(torch.nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.z_dim, self.c_dim, self.img_resolution, self.img_channels = 4, 3, 8, 1
        self.layers = torch.nn.Sequential(torch.nn.Linear(7, width), torch.nn.Tanh(), torch.nn.Linear(width, 64))
        self.register_buffer("steps", torch.zeros([], dtype=torch.int64))

    def forward(self, z, c):
        return self.layers(torch.cat([z, c], dim=1)).reshape(-1, 1, 8, 8)

def make():
    torch.manual_seed(3)
    return Net()

def wide():
    return Net(16)

def broken():
    raise RuntimeError("no weights\\nat home")

def no_module():
    return 7

def no_sizes():
    return torch.nn.Linear(2, 2)

def wrong_shape():
    net = Net()
    net.img_resolution = 16
    return net

def no_gradient():
    net = Net()
    net.forward = lambda z, c: torch.zeros(len(z), 1, 8, 8)
    return net

def leaves():
    import sys
    sys.exit()

class Stop(BaseException):
    pass

def stops():
    raise Stop("at once")

class Alone(Net):
    def __deepcopy__(self, memo):
        raise Stop("no second one")

def sparse():
    net = Net()
    net.forward = lambda z, c: torch.zeros(len(z), 1, 8, 8).to_sparse()
    return net

class Moody(Net):
    @property
    def z_dim(self):
        raise RuntimeError("not today")
    @z_dim.setter
    def z_dim(self, value):
        pass

def fails():
    net = Net()
    net.z_dim = 5
    return net

def not_finite():
    net = Net()
    torch.nn.init.constant_(net.layers[2].bias, float("nan"))
    return net

class TwoParts(Net):
    def __init__(self):
        super().__init__()
        self.mapping, self.synthesis = torch.nn.Linear(7, 5), torch.nn.Linear(5, 64)
        del self.layers

    def forward(self, z, c):
        return self.draw(self.mapping(torch.cat([z, c], dim=1)))

    def draw(self, w, noise_mode="none"):
        x = self.synthesis(w)
        x = {"random": lambda: x + torch.randn_like(x), "const": lambda: x + 1, "none": lambda: x}[noise_mode]()
        return x.reshape(-1, 1, 8, 8)

def two_parts():
    torch.manual_seed(3)
    return TwoParts()

class Named(TwoParts):
    def forward(self, z, c, truncation_psi=1.0, *, noise_mode="random"):
        return self.draw(truncation_psi * self.mapping(torch.cat([z, c], dim=1)), noise_mode)

class PassedOn(TwoParts):
    def forward(self, z, c, truncation_psi=1.0, **options):
        return self.draw(truncation_psi * self.mapping(torch.cat([z, c], dim=1)), **options)

class NotPassedOn(TwoParts):
    def forward(self, z, c, truncation_psi=1.0, **options):
        return self.draw(truncation_psi * self.mapping(torch.cat([z, c], dim=1), **options))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with the module in it."""
    (tmp_path / "own_gan.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("own_gan", None)


def test_what_is_a_reference(here):
    assert custom.parse("own_gan:make") == custom.Reference("own_gan", "make", None)
    assert custom.parse("a.b.c:d@some/file.safetensors") == custom.Reference("a.b.c", "d", "some/file.safetensors")
    for text in ("digits-gan", "https://x.y/z.pkl", "C:\\nets\\g.pkl", "a:b:c", "own_gan.py", "a-b:c", "s3://bucket/x"):
        assert custom.parse(text) is None
    (here / "odd:name").touch()
    assert custom.parse("odd:name") is None  # a file that is there


def test_it_is_called_and_ready_for_use(here):
    before = list(sys.path)
    G = load_generator("own_gan:make")
    assert sys.path == before
    assert not G.training and not any(p.requires_grad for p in G.parameters())
    assert G(torch.zeros(2, 4), torch.eye(3)[:2]).shape == (2, 1, 8, 8)
    assert source_file("own_gan:make").name == "own_gan.py"
    assert peek("own_gan:make", "generator").classes == 3


FAULTS = {
    "nowhere_at_all:make": "cannot be imported: ModuleNotFoundError",
    "own_gan:nothing": "has no function nothing",
    "own_gan:broken": "RuntimeError: no weights at home",
    "own_gan:no_module": "gave int",
    "own_gan:no_sizes": "z_dim is None",
    "own_gan:wrong_shape": r"expected floats \(2, 1, 16, 16\)",
    "own_gan:no_gradient": "do not depend differentiably",
    "own_gan:leaves": "failed: SystemExit",
    "own_gan:stops": "failed: Stop: at once",
    "own_gan:Alone": "cannot be used: Stop: no second one",
    "own_gan:sparse": "sparse_coo on cpu; expected plain tensors",
    "own_gan:Moody": "cannot be used: RuntimeError: not today",
    "own_gan:fails": "fails at G",
    "own_gan:not_finite": "hold NaN or infinity",
}


@pytest.mark.parametrize("text", FAULTS)
def test_faults_are_named_in_one_line(here, text):
    with pytest.raises(ValueError, match=FAULTS[text]) as error:
        load_generator(text)
    assert "\n" not in str(error.value)


def test_saved_it_needs_its_maker_again(here):
    G = load_generator("own_gan:make")
    with torch.no_grad():
        G.network.layers[0].weight.add_(1)
        G.network.steps.add_(7)
    save_networks("g.safetensors", {"G_ema": G, "G": load_generator("own_gan:make")}, provenance={})
    again = load_generator("own_gan:make@g.safetensors")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in G.state_dict().items())
    assert source_file("own_gan:make@g.safetensors").name == "g.safetensors"
    with pytest.raises(ValueError, match=r"own_gan:make@g\.safetensors"):  # says how to read it
        load_generator("g.safetensors")
    with pytest.raises(ValueError, match="made with own_gan:make; expected own_gan:wide"):
        load_generator("own_gan:wide@g.safetensors")
    shutil.copy("own_gan.py", "other_gan.py")
    with pytest.raises(ValueError, match="expected other_gan:make"):
        load_generator("other_gan:make@g.safetensors")
    report = describe.inspect_file("g.safetensors")
    assert report["networks"]["G_ema"]["kind"] == "generator" and report["networks"]["G_ema"]["classes"] == 3
    assert "own_gan:make" in describe.as_text(report)


def test_another_shape_of_the_same_function_is_refused(here):
    G = load_generator("own_gan:wide")
    G.init_kwargs["reference"] = "own_gan:make"
    save_networks("g.safetensors", {"G_ema": G}, provenance={})
    with pytest.raises(ValueError, match=r"layers\.0\.(bias|weight) has shape"):
        load_generator("own_gan:make@g.safetensors")


def test_reading_a_file_imports_nothing_that_it_names(here):
    """A file that names a module with side effects: neither loading nor inspecting runs it."""
    (here / "trap_gan.py").write_text("open('sprung', 'w').close()\n" + MODULE)
    G = load_generator("own_gan:make")
    G.init_kwargs["reference"] = "trap_gan:make"
    save_networks("trap.safetensors", {"G_ema": G}, provenance={})
    code = "from refine.checkpoints import describe, load_generator\ndescribe.inspect_file('trap.safetensors')\n"
    code += "try:\n    load_generator('trap.safetensors')\nexcept ValueError as e:\n    print(e)\n"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(p for p in sys.path if p)})
    assert not (here / "sprung").exists()
    with pytest.raises(ValueError, match="made with trap_gan:make"):
        load_generator("own_gan:make@trap.safetensors")


@pytest.mark.parametrize(
    ("made", "noise", "truncation"),
    [("TwoParts", False, False), ("Named", True, True), ("PassedOn", True, True), ("NotPassedOn", False, True)],
)
def test_its_options_are_those_that_a_call_takes(here, made, noise, truncation):
    G = load_generator(f"own_gan:{made}")
    assert (G.noise_modes, G.takes_truncation) == (("random", "const", "none") if noise else (), truncation)
    z, c = torch.randn(2, 4), torch.eye(3)[:2]
    const, plain, flat = (
        G(z, c, **G.accepted(noise_mode=mode, truncation_psi=psi))
        for mode, psi in (("const", 1), ("none", 1), ("none", 0))
    )
    assert torch.allclose(const - plain, torch.full_like(plain, float(noise)), atol=1e-6)
    assert torch.equal(flat[0], flat[1]) == truncation


def test_files_hold_its_tensors_under_its_own_names(here):
    G = load_generator("own_gan:make")
    names = ["layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias", "steps"]
    assert sorted(G.state_dict()) == sorted(names)
    save_networks("g.safetensors", {"G_ema": G}, provenance={})
    assert sorted(load_loose("g.safetensors", "G_ema")) == sorted(names)
    sizes = {"img_resolution": 8, "img_channels": 1, "c_dim": 3, "z_dim": 4}
    (entry,) = read_metadata("g.safetensors")["networks"].values()
    assert entry == {"class": "custom", "init_kwargs": {"reference": "own_gan:make", **sizes}}


@pytest.mark.parametrize("train", ["all", "synthesis"])
def test_parts_without_noise_modes_can_be_refined(here, capsys, train):
    """A generator with `synthesis` is not a StyleGAN2 for that: it is not asked for a noise mode."""
    save_networks("teacher.safetensors", {"ema": make_teacher()}, provenance={})
    options = (
        "--kimg=0.004",
        "--batch=4",
        "--lr=0.01",
        "--metrics=none",
        "--adversarial=0",
        "--outdir=runs",
        "--desc=own",
        f"--train={train}",
    )
    code, _, err = call(capsys, "--gan=own_gan:two_parts", "--teacher=teacher.safetensors", *options)
    assert code == 0, err
    start = load_generator("own_gan:two_parts")
    (snapshot,) = (here / "runs/00000-own").glob("network-snapshot-0*.safetensors")
    refined = load_generator(f"own_gan:two_parts@{snapshot}")
    parts = ("mapping", "synthesis")
    moved = {part for part in parts if not torch.equal(refined.part(part).weight, start.part(part).weight)}
    assert moved == (set(parts) if train == "all" else {train})
    code, _, err = call(capsys, "--gan=own_gan:make", "--teacher=teacher.safetensors", *options[:-1], "--train=mapping")
    assert code == 2 and "--train is mapping" in err and "expected all" in err


def test_a_run_its_snapshot_and_going_on(here, capsys):
    save_networks("teacher.safetensors", {"ema": make_teacher()}, provenance={})
    options = (
        "--kimg=0.008",
        "--batch=4",
        "--tick=0.004",
        "--snap=1",
        "--lr=0.01",
        "--metrics=none",
        "--adversarial=0",
        "--outdir=runs",
        "--desc=own",
    )
    code, out, err = call(capsys, "--gan=own_gan:make", "--teacher=teacher.safetensors", *options)
    assert code == 0, err
    assert "use them as own_gan:make@FILE" in out
    snapshot = max((here / "runs/00000-own").glob("network-snapshot-0*.safetensors")).relative_to(here)
    refined = load_generator(f"own_gan:make@{snapshot}")
    assert not torch.equal(refined.network.layers[0].weight, load_generator("own_gan:make").network.layers[0].weight)
    files = json.loads((here / "runs/00000-own/training_options.json").read_text())["files"]
    assert files["student"]["file"] == "own_gan.py"
    assert len(generate(f"own_gan:make@{snapshot}", [0, 1], "out", progress=False)) == 3
    again = ("--teacher=teacher.safetensors", *options[:-1], "--desc=again")
    assert call(capsys, f"--gan=own_gan:make@{snapshot}", *again)[0] == 0
    code, _, err = call(capsys, "--resume=runs/00001-again")
    assert code == 2 and f"--gan=own_gan:make@{here / snapshot}" in err  # code is imported at the user's word only
    assert call(capsys, "--resume=runs/00001-again", f"--gan=own_gan:make@{snapshot}")[0] == 0
