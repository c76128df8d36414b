"""Three diffusion models of your own code as teachers: a D(x, σ), one of k-diffusion, and an ε(x, t).

export PYTHONPATH=docs
python refine.py --gan=digits-gan --teacher=example_teacher:denoiser --preset=demo
"""

import torch
from torch import nn

import refine


class Denoising(nn.Module):
    """A model that is called as model(x, sigma, labels) and gives the denoised image."""

    img_resolution, img_channels, label_dim = 32, 1, 10

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.sigma_min, self.sigma_max = 0.002, 80.0

    def forward(self, x, sigma, class_labels):  # (N, C, R, R), (N,), one-hot (N, label_dim)
        return self.model(x, sigma, class_labels)


class KDiffusion(nn.Module):
    """A denoiser of k-diffusion (K.Denoiser, K.external.OpenAIDenoiser, …), called as model(x, sigma, **extra_args)."""

    img_resolution, img_channels, label_dim = 32, 1, 10

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x, sigma, class_labels):
        return self.model(x, sigma, class_cond=class_labels.argmax(dim=1))


class PredictingNoise(nn.Module):
    """A model that is called as model(x_t, t, y) and gives the noise in x_t = √ᾱ_t x + √(1 − ᾱ_t) n."""

    img_resolution, img_channels, label_dim = 32, 1, 10
    predicts = "epsilon"

    def __init__(self, model: nn.Module, betas: torch.Tensor):
        super().__init__()
        self.model = model
        self.alphas_cumprod = (1 - betas.double()).cumprod(dim=0)  # ᾱ_t of t = 0 … T − 1

    def forward(self, x_t, t, class_labels):  # t: (N,), between two steps where the noise level is
        return self.model(x_t, t, class_labels.argmax(dim=1))


def denoiser() -> nn.Module:
    """What `--teacher=example_teacher:denoiser` calls; here the model is the shipped one."""
    return Denoising(refine.load_teacher("digits-teacher-2"))


class NoiseOf(nn.Module):
    """The shipped teacher as a model that predicts noise, so that there is one to wrap."""

    def __init__(self, betas: torch.Tensor):
        super().__init__()
        self.denoise = refine.load_teacher("digits-teacher-2")
        self.register_buffer("signal", (1 - betas.double()).cumprod(dim=0).float())

    def forward(self, x_t, t, y):
        low = t.floor().long().clamp(max=len(self.signal) - 2)
        level = [((1 - s) / s).sqrt().log() for s in (self.signal[low], self.signal[low + 1])]
        sigma = torch.lerp(*level, t - low).exp()[:, None, None, None]
        x = x_t * (1 + sigma**2).sqrt()
        return (x - self.denoise(x, sigma, nn.functional.one_hot(y, 10).float())) / sigma


def noise_predictor() -> nn.Module:
    """`--teacher=example_teacher:noise_predictor`."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    return PredictingNoise(NoiseOf(betas), betas)


class LikeKDiffusion(nn.Module):
    """The shipped teacher with the call of k-diffusion's denoisers."""

    def __init__(self):
        super().__init__()
        self.inner_model = refine.load_teacher("digits-teacher-2")

    def forward(self, x, sigma, class_cond):
        return self.inner_model(x, sigma, nn.functional.one_hot(class_cond, 10).float())


def k_diffusion() -> nn.Module:
    """`--teacher=example_teacher:k_diffusion`."""
    return KDiffusion(LikeKDiffusion())
