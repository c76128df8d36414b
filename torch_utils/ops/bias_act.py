"""Bias, activation, gain and clamp in one call (StyleGAN2's pointwise epilogue)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Activation(NamedTuple):
    """An activation and the gain and alpha it has when the caller names none."""

    apply: Callable[[torch.Tensor, float], torch.Tensor]
    gain: float
    alpha: float


# The default gains keep the variance of a unit-normal input near one.
ACTIVATIONS: dict[str, Activation] = {
    "linear": Activation(lambda x, alpha: x, 1.0, 0.0),
    "relu": Activation(lambda x, alpha: F.relu(x), math.sqrt(2), 0.0),
    "lrelu": Activation(lambda x, alpha: F.leaky_relu(x, alpha), math.sqrt(2), 0.2),
    "tanh": Activation(lambda x, alpha: torch.tanh(x), 1.0, 0.0),
    "sigmoid": Activation(lambda x, alpha: torch.sigmoid(x), 1.0, 0.0),
    "elu": Activation(lambda x, alpha: F.elu(x), 1.0, 0.0),
    "selu": Activation(lambda x, alpha: F.selu(x), 1.0, 0.0),
    "softplus": Activation(lambda x, alpha: F.softplus(x), 1.0, 0.0),
    "swish": Activation(lambda x, alpha: x * torch.sigmoid(x), math.sqrt(2), 0.0),
}


def bias_act(
    x: torch.Tensor,
    b: torch.Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> torch.Tensor:
    """clamp(act(x + b) · gain, −clamp, +clamp), differentiable to any order.

    Args:
        x: Any shape, any floating dtype.
        b: 1-D bias along `dim` of `x`, or None.
        dim: The dimension that `b` runs along; ignored without `b`.
        act: A key of `ACTIVATIONS`.
        alpha: Negative slope of 'lrelu'; other activations ignore it. None = 0.2.
        gain: Factor after the activation. None = the activation's default.
        clamp: Limit of the absolute value after the gain, ≥ 0. None = off.

    Returns:
        A tensor of the shape and dtype of `x`.

    Raises:
        ValueError: Unknown activation, negative clamp, or a bias that does not fit `x`.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"act is {act!r}; expected one of {', '.join(ACTIVATIONS)}")
    if clamp is not None and clamp < 0:
        raise ValueError(f"clamp is {clamp}; expected None or a number ≥ 0")
    spec = ACTIVATIONS[act]
    if b is not None:
        if b.ndim != 1 or b.shape[0] != x.shape[dim]:
            raise ValueError(f"bias has shape {tuple(b.shape)}; expected ({x.shape[dim]},) for dimension {dim} of x")
        x = x + b.reshape([-1 if i == dim % x.ndim else 1 for i in range(x.ndim)])
    x = spec.apply(x, spec.alpha if alpha is None else float(alpha))
    gain = spec.gain if gain is None else float(gain)
    if gain != 1:
        x = x * gain
    if clamp is not None:
        x = x.clamp(-clamp, clamp)
    return x
