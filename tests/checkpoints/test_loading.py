"""What makes loading quick changes no number: piecewise conversion, tensors that replace others, no first weights."""

import pytest
import torch

from refine.checkpoints import load_generator, load_teacher, registry
from refine.checkpoints.pickles import tensors
from tests.checkpoints.builders import Format, edm_file, write


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"channels_last": True}, {"protocol": 2}], ids=str)
def test_numbers_are_converted_piece_by_piece(dtype, options, net, tmp_path, monkeypatch):
    path = write(tmp_path / "x.pkl", edm_file(Format(dtype=dtype, **options), net))
    expected = {name: value.to(dtype).float() for name, value in net.state_dict().items()}
    for piece in (1, 7, 1 << 18):
        monkeypatch.setattr(tensors, "_PIECE", piece)
        found = load_teacher(path).state_dict()
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert value.dtype == torch.float32 and value.is_contiguous() and torch.equal(value, expected[name]), name


def named(network):
    return [*network.named_parameters(), *network.named_buffers()]


def test_fill_does_what_load_state_dict_does(net):
    values = {name: value.detach().clone() for name, value in net.state_dict().items()}
    one, two = (registry.build_empty("edm.EDMPrecond", net.init_kwargs) for _ in range(2))
    registry.fill(one, values)
    two.load_state_dict(values, strict=True, assign=True)
    for (name, value), (same_name, same) in zip(named(one), named(two), strict=True):
        assert name == same_name and type(value) is type(same) and torch.equal(value, same)
        assert value.requires_grad == same.requires_grad and value.data_ptr() == values[name].data_ptr()
    assert one.state_dict().keys() == values.keys()


def test_a_one_step_generator_is_its_denoiser_and_draws_nothing(net, tmp_path):
    path = write(tmp_path / "x.pkl", edm_file(Format(), net))
    before = torch.get_rng_state()
    G = load_generator(f"one-step:{path}")
    assert torch.equal(torch.get_rng_state(), before)
    assert not G.training and not any(value.requires_grad for value in G.parameters())
    found = G.denoiser.state_dict()
    assert found.keys() == net.state_dict().keys()
    assert all(torch.equal(value, found[name]) for name, value in net.state_dict().items())


def test_layers_of_torch_are_built_without_first_weights():
    before = torch.get_rng_state()
    with registry.without_weights():
        layers = torch.nn.Linear(100, 100), torch.nn.Conv2d(64, 64, 3), torch.nn.GroupNorm(4, 64)
    assert torch.equal(torch.get_rng_state(), before)
    assert layers[0].weight.is_meta and layers[1].weight.is_meta
    assert torch.equal(layers[2].weight, torch.ones(64)) and not layers[2].weight.is_meta
