"""StyleGAN3 and StyleGAN-XL as students: from their pickle through a run, images and a comparison, and back into it."""

import pytest
import torch

from refine import load_generator
from refine.checkpoints.export import write_like
from refine.checkpoints.native import save_networks
from refine.cli.main import run_command
from refine.config import RefineConfig
from refine.training.rates import STUDENT_SHARE, learning_rates
from tests.checkpoints.builders import write
from tests.checkpoints.foreign.test_nvidia import assert_same
from tests.checkpoints.stylegan3_files import Form, projected_discriminator, stylegan3_file, t_generator, xl_generator
from tests.training.test_trainer import make_teacher


def call(capsys, command, *args):
    with pytest.raises(SystemExit) as stop:
        run_command(command, [str(arg) for arg in args])
    captured = capsys.readouterr()
    assert stop.value.code == 0, captured.err
    return captured.out


@pytest.mark.parametrize("kind", ["t", "xl"])
def test_a_student_and_its_pickle(kind, tmp_path, capsys):
    G, form = (t_generator(), Form()) if kind == "t" else (xl_generator(), Form(dill=2))
    D = projected_discriminator(form) if kind == "xl" else None
    gan = write(tmp_path / "gan.pkl", stylegan3_file(form, G, G=G, D=D))
    save_networks(tmp_path / "t.safetensors", {"ema": make_teacher(3, G.img_resolution)}, provenance={})
    options = [f"--gan={gan}", f"--teacher={tmp_path}/t.safetensors", f"--outdir={tmp_path}/runs", "--metrics=none"]
    options += ["--kimg=0.004", "--batch=4", "--tick=0.004", "--snap=1", "--lr=0.01", "--adversarial=0"]
    assert '"batch": 4' in call(capsys, "refine", *options, "--dry-run")
    call(capsys, "refine", *options)

    (pickled,) = tmp_path.glob("runs/*/network-snapshot-*.pkl")
    refined, native = load_generator(pickled), load_generator(pickled.with_suffix(".safetensors"))
    assert pickled.stat().st_size == gan.stat().st_size
    for (name, a), b, c in zip(
        G.state_dict().items(), refined.state_dict().values(), native.state_dict().values(), strict=True
    ):
        assert torch.equal(b, c), name
        constant = name.endswith(("magnitude_ema", "_filter", "transform", "freqs", "phases"))
        assert torch.equal(a, b) == constant, name
    write_like(gan, tmp_path / "again.pkl", {"G_ema": native})
    assert_same(load_generator(tmp_path / "again.pkl"), native)

    for psi in (1, 0.3):  # per class in StyleGAN-XL
        out = call(
            capsys, "generate", f"--network={pickled}", "--seeds=0,1", f"--outdir={tmp_path}/{psi}", f"--trunc={psi}"
        )
        assert out.startswith("2 images")
    pictures = [(tmp_path / str(psi) / "seed0000.png").read_bytes() for psi in (1, 0.3)]
    assert pictures[0] != pictures[1]


def test_the_rate_is_that_of_stylegan3():
    for G in (t_generator(), xl_generator()):
        lr, _ = learning_rates(RefineConfig("g", "t", batch=32), G, make_teacher())
        assert lr == pytest.approx(STUDENT_SHARE * 2.5e-3)


def test_xl_truncates_towards_the_mean_of_each_class():
    G = xl_generator()
    G.mapping.w_avg.copy_(torch.randn(3, 8))
    z, c = torch.randn(3, 8), torch.eye(3)[[2, 0, 2]]
    assert torch.equal(G.mapping(z, c, 0.0)[:, 0], G.mapping.w_avg[[2, 0, 2]])
    soft = c * 0.7 + 0.1  # only the largest entry counts
    assert torch.equal(G.mapping(z, soft), G.mapping(z, c))
    with pytest.raises(ValueError, match="c is missing"):
        G(z)


def test_the_means_of_classes_follow_each_sample_in_turn():
    G = xl_generator().train()
    w = G.eval().mapping(z := torch.randn(6, 8), c := torch.eye(3)[[0, 2, 0, 0, 2, 0]])[:, 0]
    expected = torch.zeros(3, 8)
    for label, sample in zip(c.argmax(1), w, strict=True):
        expected[label] = 0.998 * expected[label] + (1 - 0.998) * sample
    G.train().mapping(z, c)
    torch.testing.assert_close(G.mapping.w_avg, expected, rtol=1e-5, atol=1e-8)
    assert not G.mapping.w_avg[1].any()
