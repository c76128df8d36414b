"""The networks of rosinality-style files, evaluated directly under the files' own names: the oracle of the tests.

Written from the layer rules alone and independent of `refine.networks`: grouped convolutions with explicit demodulated
kernels, plain zero-stuffing for upsampling.
"""

import math

import torch
import torch.nn.functional as F

FILTER = torch.tensor([1.0, 3.0, 3.0, 1.0])
KERNEL = FILTER.outer(FILTER) / FILTER.sum() ** 2


def random_generator(size=32, multiplier=2, layers=2, dim=512, seed=0):
    """State dict of a generator with random, non-trivial values everywhere."""
    rng = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=rng)

    def width(r):
        return 512 if r <= 32 else 16384 * multiplier // r

    def styled(name, cin, cout, up):
        state[f"{name}.conv.weight"] = randn(1, cout, cin, 3, 3)
        state[f"{name}.conv.modulation.weight"] = randn(cin, dim)
        state[f"{name}.conv.modulation.bias"] = 1 + 0.3 * randn(cin)
        if up:
            state[f"{name}.conv.blur.kernel"] = KERNEL * 4
        state[f"{name}.noise.weight"] = 0.3 * randn(1)
        state[f"{name}.activate.bias"] = 0.3 * randn(cout)

    def to_rgb(name, cin, up):
        state[f"{name}.bias"] = 0.3 * randn(1, 3, 1, 1)
        if up:
            state[f"{name}.upsample.kernel"] = KERNEL * 4
        state[f"{name}.conv.weight"] = randn(1, 3, cin, 1, 1)
        state[f"{name}.conv.modulation.weight"] = randn(cin, dim)
        state[f"{name}.conv.modulation.bias"] = 1 + 0.3 * randn(cin)

    state = {}
    for i in range(layers):
        state[f"style.{i + 1}.weight"], state[f"style.{i + 1}.bias"] = 100 * randn(dim, dim), 10 * randn(dim)
    state["input.input"] = randn(1, width(4), 4, 4)
    styled("conv1", width(4), width(4), up=False)
    to_rgb("to_rgb1", width(4), up=False)
    for j in range(int(math.log2(size)) - 2):
        r = 8 << j
        styled(f"convs.{2 * j}", width(r // 2), width(r), up=True)
        styled(f"convs.{2 * j + 1}", width(r), width(r), up=False)
    for j in range(int(math.log2(size)) - 2):
        to_rgb(f"to_rgbs.{j}", width(8 << j), up=True)
    for k in range(2 * int(math.log2(size)) - 3):
        state[f"noises.noise_{k}"] = randn(1, 1, 2 ** ((k + 5) // 2), 2 ** ((k + 5) // 2))
    return state


def _fir(x, kernel, up, pad):
    n, c, h, w = x.shape
    stuffed = x.new_zeros(n, c, h * up, w * up)
    stuffed[:, :, ::up, ::up] = x
    stuffed = F.pad(stuffed, [pad[0], pad[1], pad[0], pad[1]])
    return F.conv2d(stuffed.reshape(n * c, 1, *stuffed.shape[2:]), kernel.flip(0, 1)[None, None]).reshape(
        n, c, stuffed.shape[2] - kernel.shape[0] + 1, stuffed.shape[3] - kernel.shape[1] + 1
    )


def _modulated(state, name, x, w, demodulate, up):
    weight = state[f"{name}.conv.weight"]
    _, _, i, k, _ = weight.shape
    style = (
        w @ (state[f"{name}.conv.modulation.weight"] / math.sqrt(w.shape[1])).t()
        + state[f"{name}.conv.modulation.bias"]
    )
    kernel = weight / math.sqrt(i * k * k) * style[:, None, :, None, None]
    if demodulate:
        kernel = kernel * (kernel.square().sum(dim=[2, 3, 4], keepdim=True) + 1e-8).rsqrt()
    outputs = []
    for sample, own in zip(x, kernel, strict=True):
        if up:
            y = F.conv_transpose2d(sample[None], own.transpose(0, 1), stride=2)
            outputs.append(_fir(y, state[f"{name}.conv.blur.kernel"], 1, (1, 1)))
        else:
            outputs.append(F.conv2d(sample[None], own, padding=k // 2))
    return torch.cat(outputs)


def _styled(state, name, x, w, noise, up=False):
    x = _modulated(state, name, x, w, True, up) + state[f"{name}.noise.weight"] * noise
    return F.leaky_relu(x + state[f"{name}.activate.bias"][:, None, None], 0.2) * math.sqrt(2)


def _to_rgb(state, name, x, w, image):
    y = _modulated(state, name, x, w, False, False) + state[f"{name}.bias"]
    return y if image is None else y + _fir(image, state[f"{name}.upsample.kernel"], 2, (2, 1))


def generate(state, z, psi=1.0, latent_avg=None):
    """Images of the state dict's generator with its constant noise."""
    x = z * (z.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()
    for i in range(sum(name.startswith("style.") for name in state) // 2):
        weight, bias = (
            state[f"style.{i + 1}.weight"] * 0.01 / math.sqrt(z.shape[1]),
            state[f"style.{i + 1}.bias"] * 0.01,
        )
        x = F.leaky_relu(x @ weight.t() + bias, 0.2) * math.sqrt(2)
    w = x if psi == 1 else latent_avg + psi * (x - latent_avg)
    h = state["input.input"].repeat(len(z), 1, 1, 1)
    h = _styled(state, "conv1", h, w, state["noises.noise_0"])
    image = _to_rgb(state, "to_rgb1", h, w, None)
    for j in range(sum(name.endswith("upsample.kernel") for name in state)):
        h = _styled(state, f"convs.{2 * j}", h, w, state[f"noises.noise_{2 * j + 1}"], up=True)
        h = _styled(state, f"convs.{2 * j + 1}", h, w, state[f"noises.noise_{2 * j + 2}"])
        image = _to_rgb(state, f"to_rgbs.{j}", h, w, image)
    return image
