"""What networks state of themselves is what they can do."""

import pytest
import torch
from torch import nn

from refine.networks import edm2
from refine.networks.bases import Network, records_init_kwargs
from refine.networks.denoiser import Preconditioner
from refine.networks.edm import EDMPrecond
from refine.networks.one_step import OneStepGenerator
from tests.metrics.networks import PlainGenerator
from tests.training.test_trainer import make_student, make_teacher

SONG = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1], "num_blocks": 1}


class Given(Network):
    @records_init_kwargs(defaults=False)
    def __init__(self, size, widths=(1, 2), table=None, **others):
        super().__init__()


class All(Network):
    @records_init_kwargs(defaults=True)
    def __init__(self, size, widths=(1, 2), table=None):
        super().__init__()


def test_init_kwargs_are_recorded_by_name_as_json_gives_them_back():
    table = {"a": (1, (2, 3))}
    assert Given(3).init_kwargs == {"size": 3}
    given = Given(3, table=table, depth=(4,)).init_kwargs
    assert given == {"size": 3, "table": {"a": [1, [2, 3]]}, "depth": [4]}
    assert All(size=3).init_kwargs == {"size": 3, "widths": [1, 2], "table": None}
    assert list(All(3, table=table).init_kwargs) == ["size", "widths", "table"]
    table["a"] = 0
    assert given["table"] == {"a": [1, [2, 3]]}
    with pytest.raises(TypeError, match="size"):
        Given(width=3)


@pytest.mark.parametrize(
    ("G", "modes", "truncates", "parts"),
    [
        (make_student(), 3, True, {"all", "mapping", "synthesis"}),
        (OneStepGenerator.from_teacher(make_teacher(), 2.5), 0, False, {"all"}),
        (PlainGenerator(c_dim=3), 0, False, {"all"}),
    ],
    ids=["StyleGAN2", "one-step", "plain"],
)
def test_generators_take_what_they_state(G, modes, truncates, parts):
    assert (len(G.noise_modes), G.takes_truncation, set(G.trainable_parts)) == (modes, truncates, parts)
    z, c = torch.randn(2, G.z_dim), torch.eye(3)[:2]
    for mode in G.noise_modes or ("const",):
        options = G.accepted(noise_mode=mode, truncation_psi=0.5)
        assert options.keys() == {*["noise_mode"] * bool(modes), *["truncation_psi"] * truncates}
        assert G(z, c, **options).shape == (2, 1, 8, 8)
    assert G.accepted() == {}
    assert {id(p) for part in G.trainable_parts for p in G.part(part).parameters()} == {id(p) for p in G.parameters()}


def test_a_null_label_is_one_of_a_network_with_classes_and_label_dropout():
    assert EDMPrecond(8, 1, 3, **SONG, label_dropout=0.1).has_null_label
    assert not EDMPrecond(8, 1, 3, **SONG).has_null_label
    assert not EDMPrecond(8, 1, 0, **SONG, label_dropout=0.1).has_null_label
    small = {"model_channels": 16, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    assert not edm2.Precond(8, 1, 3, **small).has_null_label


class Halving(Preconditioner):
    """D = x / 2 + sigma · F(x), told nothing but ln sigma."""

    inner_name = "core"

    def scalings(self, sigma):
        return 0.5, sigma, 1.0, sigma.log()


class Inner(nn.Module):
    """Any network: gives the noise level it is told, in two channels too many."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones([]))

    def forward(self, x, c_noise, class_labels=None, augment_labels=None):
        self.asked = (x.dtype, class_labels, augment_labels)
        return (self.weight * c_noise.exp().reshape(-1, 1, 1, 1)).to(x.dtype).expand(len(x), 3, *x.shape[2:])


def test_any_network_can_be_preconditioned():
    net = Halving(Inner(), 4, 1, 3)
    assert list(net.state_dict()) == ["core.weight"]
    x, sigma, c = torch.randn(2, 1, 4, 4), torch.tensor([0.5, 2.0]), torch.eye(3)[:2]
    expected = x / 2 + sigma.reshape(2, 1, 1, 1) ** 2
    torch.testing.assert_close(net(x, sigma, c), expected)
    assert net.inner.asked[0] == torch.float32 and torch.equal(net.inner.asked[1], c)
    net.compute_dtype = torch.bfloat16
    assert net(x, sigma).dtype == torch.float32
    assert net.inner.asked[0] == torch.bfloat16 and torch.equal(net.inner.asked[1], torch.zeros(1, 3))
    net(x, sigma, force_fp32=True)
    assert net.inner.asked[0] == torch.float32
