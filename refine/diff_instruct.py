"""Diff-Instruct (Luo et al., NeurIPS 2023, arXiv 2305.18455): improve a generator with a diffusion model, without data.

Three networks: the *student* x = G(z, c); the *teacher*, a diffusion model of the data; and *aux*, a diffusion model
that follows the student's own distribution q. Diffused to noise level σ, q and the data's p become q_σ and p_σ, and

    D_IKL(q, p) = E_σ [ w(σ) KL(q_σ, p_σ) ]                                              (integral KL divergence)
    ∂D_IKL/∂x   = E_σ [ w(σ) (∇ log q_σ(x_σ) − ∇ log p_σ(x_σ)) ],   x_σ = x + σ n

A denoiser D gives a score: ∇ log p_σ(x_σ) = (D(x_σ; σ) − x_σ) / σ² (Karras et al. 2022, eq. 3). So the difference of
the two scores is that of the two *denoisers* over σ², and the gradient on the student's images is
w'(σ) (D_aux − D_teacher) with w' = w / σ². Algorithm 1 of the paper repeats the two functions below, each followed by a
step of its own optimiser.
This is the reverse KL, KL(student ‖ data), which is mode-seeking: it penalises images that the teacher finds unlikely
and barely penalises missing modes.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F

from refine.noise import Weighting


def aux_loss(aux, x, c, sigma, noise, sigma_data=0.5):
    """Denoising score matching on the student's images, which makes aux follow the student (Algorithm 1, first step).

    Args:
        aux: Denoiser D(x, sigma, c), to be trained.
        x: Images of the student (N, C, H, W), detached here.
        c: Their labels (N, label_dim), or None.
        sigma, noise: Noise levels (N, 1, 1, 1), and unit noise n like x.
        sigma_data: Standard deviation of images, which balances the noise levels.

    Returns:
        Loss per sample (N,): λ(σ) ‖D(x + σn; σ) − x‖², λ = 1 / σ² + 1 / σ_data² (Karras et al. 2022, eq. 8).
    """
    x = x.detach()
    D_x = aux(torch.addcmul(x, sigma, noise), sigma, c)
    weight = sigma**-2 + sigma_data**-2
    return (weight * F.mse_loss(D_x, x, reduction="none")).sum(dim=[1, 2, 3])


@torch.no_grad()
def student_gradient(teacher, aux, x, c, sigma, noise, weighting: Weighting):
    """The gradient of the integral KL on the student's images (Algorithm 1, second step).

    No gradient flows through either denoiser: the caller goes on with `x.backward(gradient)`.

    Args:
        teacher, aux: Denoisers D(x, sigma, c); run in eval mode (no dropout) and left as they were.
        x: Images of the student (N, C, H, W).
        c: Their labels (N, label_dim), or None.
        sigma, noise: Noise levels (N, 1, 1, 1), and unit noise n like x.
        weighting: Gives w' from (sigma, x, D_teacher), see `noise.make_weighting`.

    Returns:
        gradient (N, C, H, W) = w' (D_aux − D_teacher), and the unweighted gap mean|D_aux − D_teacher| per sample (N,).
    """
    x_sigma = torch.addcmul(x, sigma, noise)
    with evaluating(teacher, aux):
        D_teacher = teacher(x_sigma, sigma, c)
        D_aux = aux(x_sigma, sigma, c)
    gap = D_aux - D_teacher
    return weighting(sigma, x, D_teacher) * gap, gap.abs().mean(dim=[1, 2, 3])


@contextmanager
def evaluating(*networks):
    """Eval mode inside, the previous mode of every module afterwards."""
    training = [module for network in networks for module in network.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
