"""Generators as graphs for other runtimes, run there and compared with the networks that they were made of."""

import pytest
import torch

from refine.checkpoints import deploy, load_generator, native
from refine.cli.main import run_command
from refine.networks.edm import EDMPrecond
from refine.networks.one_step import OneStepGenerator
from refine.networks.r3gan import Generator as R3GAN
from refine.networks.stylegan2 import Generator
from refine.torch_utils.build import custom_ops
from tests.checkpoints.stylegan3_files import xl_generator

pytestmark = pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="torch < 2.7")


def stylegan2():
    small = {"mapping_kwargs": {"num_layers": 1}, "synthesis_kwargs": {"channel_base": 64, "channel_max": 8}}
    G = Generator(4, 2, 4, 8, 3, **small).requires_grad_(False)
    for p in G.parameters():
        p.add_(torch.randn_like(p) * 0.2)
    G.mapping.w_avg.normal_()
    return G


def r3gan():
    G = R3GAN(4, 0, 8, 3, widths=[8, 4], cardinalities=[4, 2], blocks=[1, 1]).requires_grad_(False)
    for p in G.parameters():
        p.add_(torch.randn_like(p) * 0.2)
    return G


def stylegan_xl():
    G = xl_generator().requires_grad_(False)
    G.mapping.w_avg.normal_()  # one mean for each class
    return G


def one_step():
    kwargs = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1}
    T = EDMPrecond(8, 3, 3, **kwargs, attn_resolutions=[4]).eval().requires_grad_(False)
    for p in T.parameters():
        p.add_(torch.randn_like(p) * 0.1)
    return OneStepGenerator.from_teacher(T, 2.5)


FAMILIES = [
    (stylegan2, ["z", "c", "psi"]),
    (r3gan, ["z"]),
    (stylegan_xl, ["z", "c", "psi"]),
    (one_step, ["z", "c"]),
]


def run(capsys, *args):
    with pytest.raises(SystemExit) as caught:
        run_command("export", [str(arg) for arg in args])
    return caught.value.code, *capsys.readouterr()


@pytest.mark.parametrize("make, inputs", FAMILIES)
@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_graphs(suffix, make, inputs, capsys, tmp_path):
    if suffix == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    native.save_networks(tmp_path / "x.safetensors", {"G_ema": make()}, provenance={})
    G, out, mode = load_generator(tmp_path / "x.safetensors"), tmp_path / f"x.{suffix}", custom_ops.get_mode()
    code, text, _ = run(capsys, f"--network={tmp_path / 'x.safetensors'}", f"--out={out}")
    assert code == 0 and text.startswith(f"Wrote {out}\n  {', '.join(inputs)} → image (N, {G.img_channels}, ")
    assert "it was run" in text
    assert custom_ops.get_mode() == mode
    values = {"z": torch.randn(5, G.z_dim), "psi": torch.tensor(0.5)}
    values["c"] = torch.eye(max(G.c_dim, 1))[[index % max(G.c_dim, 1) for index in (0, 1, 2, 1, 1)]]
    given = [values[name] for name in inputs]
    expected = G(values["z"], values["c"] if G.c_dim else None, **G.accepted(truncation_psi=0.5, noise_mode="const"))
    if suffix == "pt2":
        program = torch.export.load(out)
        found = program.module()(*given)
        assert not [node for node in program.graph.nodes if "refine" in str(node.target)]
    else:
        import onnx
        import onnxruntime

        assert {node.domain for node in onnx.load(out).graph.node} == {""}  # nothing but ONNX's own operators
        session = onnxruntime.InferenceSession(out)
        feeds = dict(zip(inputs, (value.numpy() for value in given), strict=True))
        found = torch.from_numpy(session.run(["image"], feeds)[0])
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-4


def test_a_graph_that_is_another_function_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(
        deploy._WRITERS, "pt2", (lambda graph, path: path.write_bytes(b"x"), lambda *_: torch.zeros([]))
    )
    with pytest.raises(ValueError, match=r"differ by .*; expected at most 0.0001"):
        deploy.write_graph(tmp_path / "x.pt2", r3gan())
    assert not list(tmp_path.iterdir())


def test_networks_without_a_graph_are_refused_in_one_line(tmp_path):
    class Looking(R3GAN):
        def forward(self, z, c=None):
            return super().forward(z, c) * (2.0 if z.sum() > 0 else 1.0)

    with pytest.raises(ValueError, match="this network cannot be made into a graph: ") as refusal:
        deploy.write_graph(tmp_path / "x.pt2", Looking(4, 0, 8, 3, widths=[8, 4], cardinalities=[4, 2], blocks=[1, 1]))
    assert "\n" not in str(refusal.value) and not list(tmp_path.iterdir())


def test_packages_that_are_missing(monkeypatch):
    monkeypatch.setattr(deploy.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"ONNX needs onnx, onnxscript, onnxruntime; pip install 'gan-refine\[deploy\]'"
    ):
        deploy.check_installed("onnx")
    deploy.check_installed("pt2")
