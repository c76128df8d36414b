"""Self-attention: what is given to torch's own, whose fused kernels for GPUs want a pixel's numbers side by side."""

import pytest
import torch
import torch.nn.functional as F

from refine.networks import attention
from refine.networks.attention import SplitHeads, by_pixel, merge_heads, split_heads, thirds
from refine.networks.edm2 import Block
from refine.networks.edm_layers import QKV, UNetBlock

MODULES = {
    "EDM, one head": lambda: UNetBlock(16, 16, 8, attention=True, num_heads=1),
    "EDM, two heads": lambda: UNetBlock(16, 16, 8, attention=True, channels_per_head=8),
    "EDM2": lambda: Block(16, 16, 8, attention=True, channels_per_head=8),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", MODULES)
def test_conditions_of_fused_attention(monkeypatch, name, layout):
    """Without a GPU torch cannot be asked whether it would take its fused kernels: these are the conditions."""
    block, seen, fused = MODULES[name](), [], F.scaled_dot_product_attention
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)

    def noted(*arguments, **options):
        seen.append((arguments, options))
        return fused(*arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    x = torch.randn(2, 16, 4, 6).contiguous(memory_format=layout)
    y = block.to(memory_format=layout)(x, torch.randn(2, 8))
    ((q, k, v), options) = seen[0]
    assert not options
    for part in (q, k, v):
        assert part.shape[0] == 2 and part.shape[2] == 24 and part.shape[3] in (8, 16)
        assert part.stride(-1) == 1
    assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("heads", [1, 2])
def test_heads_are_split_as_in_published_weights_and_merged_again(heads, layout):
    """Within a head the channels run q0 k0 v0 q1 k1 v1 …"""
    qkv = torch.randn(2, 24, 4, 6).contiguous(memory_format=layout)
    sorted_qkv = torch.stack([thirds(image) for image in qkv]).contiguous(memory_format=layout)
    pixels = by_pixel(sorted_qkv, heads)
    assert pixels.data_ptr() == sorted_qkv.data_ptr() or layout == torch.contiguous_format
    for index, part in enumerate(split_heads(pixels)):
        assert part.shape == (2, heads, 8 // heads, 24)
        merged = merge_heads(part, like=qkv)
        assert torch.equal(merged, qkv[:, index::3])
        assert merged.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("heads", [1, 2])
def test_heads_as_a_gpu_makes_them(monkeypatch, heads, layout):
    """The same as on a CPU, with the same derivatives, to the second; attention gives gradients of any strides."""
    monkeypatch.setattr(attention, "as_products", lambda x: x.is_contiguous())
    layer = QKV(8, 24, kernel=1).double()
    weights = [parameter.detach().normal_().requires_grad_() for parameter in (layer.weight, layer.bias)]
    x = torch.randn(3, 8, 4, 6, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()

    def on_gpu(x, weight, bias):
        return SplitHeads.apply(x, weight, bias, (thirds(weight).detach(), thirds(bias).detach()), heads)

    def plain(x, weight, bias):
        return split_heads(by_pixel(F.conv2d(x, thirds(weight), thirds(bias)), heads))

    found = []
    for function in (on_gpu, plain):
        parts = function(x, *weights)
        loss = sum(((index + part.mT.contiguous()) ** 3).sum() for index, part in enumerate(parts))
        first = torch.autograd.grad(loss, [x, *weights], create_graph=True)
        found.append([*parts, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), [x, *weights])])
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected)
    assert found[0][3].is_contiguous(memory_format=layout)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["EDM", "EDM2"])
def test_a_gpu_takes_its_fused_kernel(monkeypatch, name, dtype, layout):
    """By torch's own conditions, at the sizes of CIFAR-10's DDPM++ and of EDM2, with gradients."""
    seen, fused = [], F.scaled_dot_product_attention
    make = {"EDM": lambda **options: UNetBlock(**options, num_heads=1), "EDM2": Block}[name]
    block = make(in_channels=256, out_channels=256, emb_channels=64, attention=True).cuda().to(memory_format=layout)

    def noted(*arguments):
        parameters = torch.backends.cuda.SDPAParams(*arguments, None, 0.0, False, False)
        flash, efficient = torch.backends.cuda.can_use_flash_attention, torch.backends.cuda.can_use_efficient_attention
        seen.append((flash if dtype != torch.float32 else efficient)(parameters, True))
        return fused(*arguments)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    x = torch.randn(2, 256, 16, 16, device="cuda", dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    y = block(x, torch.randn(2, 64, device="cuda", dtype=dtype))
    (dx,) = torch.autograd.grad(y.float().square().sum(), x)
    assert seen == [True] and dx.isfinite().all()
