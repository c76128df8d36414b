"""On a full disk every writer of networks raises OSError, and what was there is as it was."""

import resource
import signal

import pytest
import torch

from refine.checkpoints import deploy, export
from refine.checkpoints.foreign.state_dicts import save_plain
from refine.checkpoints.native import save_networks
from refine.networks import stylegan2
from tests.cli.test_main import run


@pytest.fixture
def full_disk():
    """No file may become longer than 20 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture(scope="module")
def G():
    torch.manual_seed(0)
    synthesis = {"channel_base": 256, "channel_max": 32, "architecture": "skip"}
    return stylegan2.Generator(32, 0, 32, 16, 3, {"num_layers": 2, "lr_multiplier": 0.01}, synthesis).eval()


WRITERS = {
    "native": ("safetensors", lambda path, G: save_networks(path, {"G_ema": G}, provenance={})),
    "plain": ("safetensors", save_plain),
    "rosinality": ("pt", lambda path, G: export.write_rosinality(path, {"G_ema": G})),
    "program": ("pt2", deploy.write_graph),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_an_os_error_and_leaves_what_was_there(writer, G, tmp_path, full_disk):
    suffix, write = WRITERS[writer]
    path = tmp_path / f"out.{suffix}"
    path.write_text("before")
    with pytest.raises(OSError, match="File too large"):
        write(path, G)
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("options", ["--out=x.safetensors", "--out=x.safetensors --format=plain", "--out=x.pt2"])
def test_export_blames_the_file_that_it_cannot_write(options, G, tmp_path, capsys, monkeypatch, request):
    from refine.cli.main import load_command

    save_networks(tmp_path / "G.safetensors", {"G_ema": G}, provenance={})
    request.getfixturevalue("full_disk")
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, load_command("export"), "--network=G.safetensors", *options.split())
    assert code == 2 and err.splitlines()[-1].startswith("Error: --out: ") and "File too large" in err
    assert [path.name for path in tmp_path.iterdir()] == ["G.safetensors"]
