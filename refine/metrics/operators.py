"""The operators of which programs of torch.export may consist, by their exact names.

Each is a function of its arguments alone: none draws random numbers, reads memory that was not set, or touches files.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

_POINTWISE = """abs.default add.Scalar add.Tensor ceil.default clamp.Tensor clamp.default clamp_max.default
clamp_min.default cos.default div.Scalar div.Tensor div.Tensor_mode elu.default eq.Scalar eq.Tensor erf.default
exp.default floor.default ge.Scalar ge.Tensor gelu.default gt.Scalar gt.Tensor hardsigmoid.default hardswish.default
hardtanh.default le.Scalar le.Tensor leaky_relu.default log.default log1p.default logical_and.default
logical_not.default logical_or.default lt.Scalar lt.Tensor masked_fill.Scalar maximum.default minimum.default
mish.default mul.Scalar mul.Tensor ne.Scalar ne.Tensor neg.default pow.Tensor_Scalar pow.Tensor_Tensor
reciprocal.default relu.default relu6.default remainder.Scalar remainder.Tensor round.default rsqrt.default
rsub.Scalar sigmoid.default silu.default sin.default softplus.default sqrt.default square.default sub.Scalar
sub.Tensor tanh.default where.self"""
_IN_PLACE = """add_.Scalar add_.Tensor clamp_.default clamp_max_.default clamp_min_.default detach_.default
div_.Scalar div_.Tensor elu_.default hardsigmoid_.default hardswish_.default hardtanh_.default leaky_relu_.default
mish_.default mul_.Scalar mul_.Tensor relu6_.default relu_.default sigmoid_.default silu_.default sub_.Scalar
sub_.Tensor tanh_.default"""
_REDUCTIONS = """amax.default amin.default argmax.default cumsum.default linalg_vector_norm.default log_softmax.int
logsumexp.default max.default max.dim mean.default mean.dim min.default min.dim softmax.int std.correction sum.default
sum.dim_IntList var.correction"""
_SHAPES = """_to_copy.default alias.default cat.default chunk.default clone.default contiguous.default detach.default
expand.default expand_as.default flatten.using_ints flip.default gather.default index.Tensor index_select.default
lift_fresh_copy.default movedim.int permute.default pixel_shuffle.default pixel_unshuffle.default repeat.default
reshape.default roll.default select.int slice.Tensor split.Tensor split.sizes split_with_sizes.default squeeze.default
squeeze.dim squeeze.dims stack.default t.default to.device to.dtype to.dtype_layout transpose.int type_as.default
unbind.int unflatten.int unsqueeze.default view.default"""
_LAYERS = """_upsample_bicubic2d_aa.default _upsample_bicubic2d_aa.vec _upsample_bilinear2d_aa.default
_upsample_bilinear2d_aa.vec adaptive_avg_pool2d.default adaptive_max_pool2d.default addmm.default avg_pool2d.default
baddbmm.default batch_norm.default bmm.default constant_pad_nd.default conv1d.default conv2d.default conv2d.padding
convolution.default dropout.default embedding.default group_norm.default layer_norm.default linear.default
matmul.default max_pool2d.default max_pool2d_with_indices.default mm.default native_layer_norm.default pad.default
reflection_pad2d.default replication_pad2d.default rms_norm.default scaled_dot_product_attention.default
upsample_bicubic2d.default upsample_bicubic2d.vec upsample_bilinear2d.default upsample_bilinear2d.vec
upsample_nearest2d.default upsample_nearest2d.vec"""
_CREATION = """arange.default arange.start arange.start_step full.default full_like.default linspace.default
new_full.default new_ones.default new_zeros.default ones.default ones_like.default scalar_tensor.default zeros.default
zeros_like.default"""

#: Every operator of ATen that a program may name; `sym_size` and the arithmetic on sizes beside.
OPERATORS = frozenset(" ".join((_POINTWISE, _IN_PLACE, _REDUCTIONS, _SHAPES, _LAYERS, _CREATION)).split())
ARITHMETIC: dict[str, Callable[..., Any]] = {
    **{f"_operator.{name}": getattr(operator, name) for name in ("add", "sub", "mul", "floordiv", "mod", "neg")},
    **{f"_operator.{name}": getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    "torch.sym_max": max,
    "torch.sym_min": min,
}
CHECKS = {f"torch.ops.aten.{name}" for name in ("_assert_scalar.default", "_assert_tensor_metadata.default")}
CHECKS |= {"torch.ops.aten.sym_constrain_range_for_size.default", "torch.ops.aten.sym_constrain_range.default"}
# Arguments with which a result is no function of the images.
OFF = {"batch_norm": "training", "dropout": "train", "scaled_dot_product_attention": "dropout_p"}
IN_PLACE = frozenset(_IN_PLACE.split())  # that change their first argument
LIKE = {f"{kind}_like" for kind in ("full", "ones", "zeros")} | {f"new_{kind}" for kind in ("full", "ones", "zeros")}
