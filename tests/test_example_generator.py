"""The example of docs/generators.md: it trains, fulfils the protocol and refines."""

import pytest
import torch

from refine import load_generator
from tests.conftest import ROOT
from tests.training.test_trainer import make_run, make_teacher, run


@pytest.fixture
def example(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    monkeypatch.setenv("DECODER", str(tmp_path / "decoder.pt"))
    import example_generator

    return example_generator


def test_it_learns_and_is_refined(example, tmp_path):
    centres = torch.randn(10, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3).sign()
    labels = torch.eye(10).repeat(20, 1)
    images = centres.repeat(20, 1, 1, 1)
    decoder = example.train(images, labels, steps=40, batch=16)
    error = (decoder(torch.zeros(10, 16), torch.eye(10)) - centres).square().mean()
    assert error < 0.7 * centres.var()
    torch.save(decoder.state_dict(), tmp_path / "decoder.pt")
    G = load_generator("example_generator:decoder")
    trainer = run(make_run(tmp_path / "run", G, make_teacher(0, 32), kimg=0.004, aux_warmup_kimg=0.0))
    assert any(not torch.equal(p, q) for p, q in zip(trainer.G.parameters(), G.parameters(), strict=True))
