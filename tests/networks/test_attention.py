"""Self-attention: what is given to torch's own, whose fused kernels for GPUs want a pixel's numbers side by side."""

import pytest
import torch
import torch.nn.functional as F

from refine.networks.edm2 import Block
from refine.networks.edm_layers import UNetBlock, merge_heads, split_heads

MODULES = {
    "EDM, one head": lambda: UNetBlock(16, 16, 8, attention=True, num_heads=1),
    "EDM, two heads": lambda: UNetBlock(16, 16, 8, attention=True, channels_per_head=8),
    "EDM2": lambda: Block(16, 16, 8, attention=True, channels_per_head=8),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", MODULES)
def test_conditions_of_fused_attention(monkeypatch, name, layout):
    """Without a GPU torch cannot be asked whether it would take its fused kernels: these are the conditions."""
    block, seen, attention = MODULES[name](), [], F.scaled_dot_product_attention
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)

    def noted(*arguments, **options):
        seen.append((arguments, options))
        return attention(*arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    x = torch.randn(2, 16, 4, 6).contiguous(memory_format=layout)
    y = block.to(memory_format=layout)(x, torch.randn(2, 8))
    ((q, k, v), options) = seen[0]
    assert not options
    for part in (q, k, v):
        assert part.shape[0] == 2 and part.shape[2] == 24 and part.shape[3] in (8, 16)
        assert part.is_contiguous()
    assert y.is_contiguous(memory_format=layout) or name == "EDM, one head"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("heads", [1, 2])
def test_heads_are_split_as_in_published_weights_and_merged_again(heads, layout):
    """Within a head the channels run q0 k0 v0 q1 k1 v1 …"""
    qkv = torch.randn(2, 24, 4, 6).contiguous(memory_format=layout)
    parts = split_heads(qkv, heads)
    assert parts.shape == (3, 2, heads, 8 // heads, 24)
    for index, part in enumerate(parts):
        merged = merge_heads(part, like=qkv)
        assert torch.equal(merged, qkv[:, index::3])
        assert merged.is_contiguous(memory_format=layout) or heads == 1
