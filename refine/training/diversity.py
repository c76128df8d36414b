"""What preserves a student's diversity without data: its own pairwise distances before refinement."""

import torch


def distance_gradient(x: torch.Tensor, x_start: torch.Tensor) -> torch.Tensor:
    """Gradient on a batch of images of the distances that it lost since the run began.

    For images i, j of the batch with distance d_ij, and d⁰_ij between the images that the student drew from the same
    latents and labels before refinement: the potential is Σ_ij max(d⁰_ij − d_ij, 0)² / (4 (N − 1)). Pairs that have
    come apart are left alone, as sharper images are farther from each other. In units of images, like D_aux −
    D_teacher, and zero while nothing has changed. A reverse KL barely penalises missing modes and has no such term.

    Args:
        x: Images (N, C, H, W).
        x_start: Images of the student before refinement, from the same latents and labels.

    Returns:
        (N, C, H, W): 1 / (N − 1) Σ_j (1 − d⁰_ij / d_ij)⁻ (x_i − x_j), with (·)⁻ the negative part; zeros for N = 1.
    """
    flat, start = x.detach().flatten(1), x_start.detach().flatten(1)
    d, d_start = torch.cdist(flat, flat), torch.cdist(start, start)
    weight = (1 - d_start / d.clamp_min(1e-8)).clamp(-1e4, 0).fill_diagonal_(0)
    gradient = weight.sum(dim=1, keepdim=True) * flat - weight @ flat
    return (gradient / max(len(x) - 1, 1)).view_as(x)
