"""What the encoders of diffusion models give as features."""

import pytest
import torch

from refine.networks import edm, edm2
from refine.networks.bases import Denoiser

SONG = {"model_type": "SongUNet", "model_channels": 8, "channel_mult": [1, 2, 3], "num_blocks": 2}
NETWORKS = {
    "ddpm++": (lambda: edm.EDMPrecond(16, 1, 3, **SONG), [8, 16, 24]),
    "ncsn++": (lambda: edm.VEPrecond(16, 3, 0, **SONG, encoder_type="residual"), [8, 16, 24]),
    "skip": (lambda: edm.VPPrecond(16, 3, 0, **SONG, encoder_type="skip"), [8, 16, 24]),
    "adm": (lambda: edm.iDDPMPrecond(16, 3, 0, **{**SONG, "model_type": "DhariwalUNet"}), [8, 16, 24]),
    "edm2": (lambda: edm2.Precond(16, 3, 3, model_channels=8, channel_mult=[1, 2], num_blocks=1), [8, 16]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_means_of_the_encoder(name):
    make, widths = NETWORKS[name]
    torch.manual_seed(0)
    network = make().eval().requires_grad_(False)
    x = torch.rand(4, network.img_channels, 16, 16) * 2 - 1
    before = network(x, 0.1)
    means = network.encode(x, 0.1)
    assert [list(part.shape) for part in means] == [[4, width] for width in widths]
    assert all(part.isfinite().all() and part.std(dim=0).max() > 0 for part in means)
    torch.testing.assert_close(network.encode(x[1:3], 0.1)[-1], means[-1][1:3], rtol=1e-4, atol=1e-5)
    assert torch.equal(network(x, 0.1), before)  # nothing is left behind
    assert not any(module._forward_hooks for module in network.modules())
    with pytest.raises(ValueError, match="images have shape"):
        network.encode(x[:, :, :8], 0.1)
    assert not any(module._forward_hooks for module in network.modules())


def test_they_are_those_at_the_end_of_each_resolution():
    network = NETWORKS["ddpm++"][0]().eval().requires_grad_(False)
    seen = {}
    for layer in ("16x16_block1", "8x8_block1", "4x4_block1"):
        network.model.enc[layer].register_forward_hook(lambda _m, _i, out, layer=layer: seen.update({layer: out.total}))
    x = torch.rand(2, 1, 16, 16)
    network(x, 0.1)
    for found, expected in zip(network.encode(x, 0.1), list(seen.values()), strict=True):
        torch.testing.assert_close(found, expected.mean(dim=(2, 3)))


def test_a_unet_of_diffusers():
    pytest.importorskip("diffusers")
    from refine.networks.ddpm import DDPMPrecond

    kwargs = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    kwargs |= {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    network = DDPMPrecond(16, 3, **kwargs).eval().requires_grad_(False)
    seen = {}
    network.unet.mid_block.register_forward_pre_hook(lambda _m, args: seen.update(deepest=args[0]))
    x = torch.rand(2, 3, 16, 16)
    network(x, 0.1)
    means = network.encode(x, 0.1)
    assert [part.shape[1] for part in means] == [8, 16]
    torch.testing.assert_close(means[-1], seen["deepest"].mean(dim=(2, 3)))
    of_classes = DDPMPrecond(16, 3, 4, **kwargs).eval().requires_grad_(False)
    assert [part.shape for part in of_classes.encode(x, 0.1)] == [part.shape for part in means]
    with pytest.raises(ValueError, match="trained with classes only"):
        of_classes(x, 0.1)


def test_a_network_without_encoder_says_so():
    class Formula(Denoiser):
        def forward(self, x, sigma, class_labels=None):
            return x

    with pytest.raises(ValueError, match="a Formula has no encoder"):
        Formula().encode(torch.zeros(1, 1, 8, 8), 0.1)
