"""Weights in the 16-bit format that a network computes in: all of them are cast at once, not each by its layer.

Layers hold float32 weights and cast them to the dtype of what they are given. In a U-Net of CIFAR-10's size these are
600 casts a forward pass, and as many backward, each a launch of its own for a few kilobytes. Here one launch casts all
weights ahead of a forward pass, layers find them in the format that they want, and one launch brings the gradients back
to float32. The numbers are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class HalfWeights:
    """Puts 16-bit weights into a network for as long as it runs, and the float32 ones back afterwards.

    Which weights: those that the network only ever casts to this format, found out in its first run. What it also looks
    at in float32 (StyleGAN2's demodulation, embeddings of the noise level) stays as it is.

    Args:
        network: A network whose layers cast their weights, see `refine.networks.bases.MixedPrecision`. A call with
            force_fp32=True is left alone.
        dtype: bfloat16 or float16.
        frozen: The weights never change: they are cast once and kept.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype, frozen: bool = False):
        self._dtype, self._frozen = dtype, frozen
        self._watch: _Watch | None = None
        self._layout: _Layout | None = None  # None until the first run has been watched
        self._places: list[tuple[dict[str, Any], str, nn.Parameter]] = []
        self._kept: Sequence[torch.Tensor] | None = None
        network.register_forward_pre_hook(self._before, with_kwargs=True)
        network.register_forward_hook(self._after, with_kwargs=True, always_call=True)

    def _before(self, network: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("force_fp32"):
            return
        if self._layout is None:
            self._watch = _Watch(network, self._dtype)
            self._watch.__enter__()
        elif self._places:
            halves = self._halves([parameter for _, _, parameter in self._places])
            for (owner, name, _), half in zip(self._places, halves, strict=True):
                owner[name] = half

    def _after(self, network: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if kwargs.get("force_fp32"):
            return
        if self._watch is not None:
            self._watch.__exit__(None, None, None)
            found, self._watch = self._watch.found(), None
            owners = [(module._parameters, name) for module in network.modules() for name in module._parameters]
            entries = [(owner, name, owner[name]) for owner, name in owners]
            self._places = [(owner, name, p) for owner, name, p in entries if p is not None and id(p) in found]
            self._layout = _Layout([parameter for _, _, parameter in self._places])
        else:
            for owner, name, parameter in self._places:
                owner[name] = parameter

    def _halves(self, parameters: list[nn.Parameter]) -> Sequence[torch.Tensor]:
        assert self._layout is not None
        if self._kept is not None:
            return self._kept
        halves = _Cast.apply(self._layout, self._dtype, *parameters)
        if self._frozen:
            self._kept = halves
        return halves


class _Layout:
    """How tensors lie in one piece of memory, each with the strides of its own."""

    def __init__(self, tensors: Sequence[torch.Tensor]):
        self._parts, self._size = [], 0
        for x in tensors:
            self._parts.append((x.shape, x.stride(), self._size))
            self._size += -(-x.numel() // 16) * 16  # all begin at a multiple of 32 bytes, as kernels like it

    def empty(self, like: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        flat = torch.empty(self._size, dtype=dtype, device=like.device)
        return [flat.as_strided(*part) for part in self._parts]


class _Cast(torch.autograd.Function):
    """float32 tensors to another dtype, all at once; their gradients come back to float32 in the same way."""

    @staticmethod
    def forward(ctx: Any, layout: _Layout, dtype: torch.dtype, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.layout, ctx.formats = layout, [x.dtype for x in tensors]
        ctx.set_materialize_grads(False)
        halves = layout.empty(tensors[0], dtype)
        torch._foreach_copy_(halves, list(tensors))
        ctx.mark_non_differentiable(*(half for half, x in zip(halves, tensors, strict=True) if not x.requires_grad))
        return tuple(halves)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        there = [index for index, gradient in enumerate(gradients) if gradient is not None]
        result: list[torch.Tensor | None] = [None] * len(gradients)
        if there:
            found = [gradient for gradient in gradients if gradient is not None]
            places = ctx.layout.empty(found[0], ctx.formats[0])
            torch._foreach_copy_([places[index] for index in there], found)
            for index in there:
                result[index] = places[index]
        return None, None, *result


class _Watch(TorchDispatchMode):
    """Notes what becomes of the parameters of a network in a run."""

    def __init__(self, network: nn.Module, dtype: torch.dtype):
        super().__init__()
        self._dtype = dtype
        self._parameters = {id(p) for p in network.parameters() if p.dtype == torch.float32}
        self._cast: set[int] = set()
        self._otherwise: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        cast = func.overloadpacket is torch.ops.aten._to_copy and kwargs.get("dtype") == self._dtype
        for x in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor) and id(x) in self._parameters:
                (self._cast if cast else self._otherwise).add(id(x))
        return func(*args, **kwargs)

    def found(self) -> set[int]:
        """ids of those that were cast and not looked at in any other way."""
        return self._cast - self._otherwise
