"""The family of objectives around the same three networks: `--objective=ikl|dmd|sid|sim`.

Every objective is a function (teacher, aux, x, c, sigma, weighting) → (gradient, gap): the gradient on the student's
images, with which the caller goes on as `x.backward(gradient)`, and mean|D_aux − D_teacher| per image. Below, x_σ is
x + σn, D_T and D_φ are teacher and aux at (x_σ, σ), w is the weighting, n = mean|x − D_T| over one image's pixels.

| name | gradient on x, or loss L                                   | through both networks | source                  |
|------|------------------------------------------------------------|-----------------------|-------------------------|
| ikl  | w (D_φ − D_T)                                              | no                    | Luo et al., 2305.18455  |
| dmd  | w (D_φ − D_T) / n                                          | no                    | Yin et al., 2311.18828  |
| sid  | L = w ⟨D_T − D_φ, (D_T − x) − α (D_T − D_φ)⟩ / n           | yes                   | Zhou et al., 2404.04057 |
| sim  | L = w ⟨u, x − D_φ⟩, u = (D_φ − D_T) / √(‖D_φ − D_T‖² + C²) | yes                   | Luo et al., 2410.16794  |

ikl and dmd follow the KL divergence between the diffused student and the diffused data, sid and sim the distance of
their scores. The two latter have a value, and its gradient goes through x_σ into both networks, whose parameters rest.
"""

import functools
from collections.abc import Callable

import torch

from refine.diff_instruct import evaluating, student_gradient
from refine.noise import Weighting

# The pseudo-Huber constant is C = 0.00054 √d for d numbers in an image, the value of consistency models (Song &
# Dhariwal 2024, arXiv 2310.14189): it only rounds off the kink of ‖·‖ at zero.
PSEUDO_HUBER = 0.00054

Objective = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def make_objective(name: str, sid_alpha: float = 1.0) -> Objective:
    """The objective of that name, as (teacher, aux, x, c, sigma, weighting) → (gradient (N, C, H, W), gap (N,)).

    Args:
        name: 'ikl', 'dmd', 'sid' or 'sim'.
        sid_alpha: α of 'sid'.

    Raises:
        ValueError: Any other name.
    """
    table = {"ikl": student_gradient, "dmd": dmd, "sid": functools.partial(sid, alpha=sid_alpha), "sim": sim}
    if name not in table:
        raise ValueError(f"unknown objective {name!r}; expected one of {', '.join(table)}")
    return table[name]


def inverse_distance(x: torch.Tensor, D_teacher: torch.Tensor) -> torch.Tensor:
    """1 / mean|x − D_teacher| per image, (N, 1, 1, 1), no gradient: the normaliser of DMD and SiD.

    The more noise, the farther is the teacher's image from x: dividing by it gives all noise levels like weight.
    """
    distance = (x.detach() - D_teacher.detach()).abs().mean(dim=[1, 2, 3], keepdim=True)
    return 1 / distance.clamp_min(1e-8)


def dmd(teacher, aux, x, c, sigma, weighting: Weighting):
    """Distribution matching distillation: ikl whose weight also holds the normaliser, w / mean|x − D_teacher|."""

    def normalised(sigma, x, D_teacher):
        return weighting(sigma, x, D_teacher) * inverse_distance(x, D_teacher)

    return student_gradient(teacher, aux, x, c, sigma, normalised)


def sid(teacher, aux, x, c, sigma, weighting: Weighting, alpha: float = 1.0):
    """Score identity distillation: the Fisher divergence of the diffused distributions, without score of the student.

    The divergence is E‖D_T − D_q‖² with D_q the student's own, unknown denoiser. Because x is, on average over what
    gave x_σ, D_q(x_σ), the product ⟨D_T − D_q, D_T − x⟩ has the same mean as ‖D_T − D_q‖²; putting aux for D_q gives
    one estimate, ‖D_T − D_φ‖² another. The loss is the first minus α times the second: α = 1 leaves
    ⟨D_T − D_φ, D_φ − x⟩.
    """

    def loss(x, D_teacher, D_aux):
        gap = D_teacher - D_aux
        return inverse_distance(x, D_teacher) * gap * ((D_teacher - x) - alpha * gap)

    return _through_both(loss, teacher, aux, x, c, sigma, weighting)


def sim(teacher, aux, x, c, sigma, weighting: Weighting):
    """Score implicit matching with the pseudo-Huber distance d(y) = √(‖y‖² + C²) − C of y = D_aux − D_teacher.

    For any field u, E⟨u(x_σ), D_q(x_σ) − x⟩ = 0 over the student's x; differentiating this by the student turns the
    gradient of E d(y), in which the student's own denoiser stands, into that of −E⟨d′(y), D_aux − x⟩, in which it does
    not. With d(y) = ‖y‖² / 2 that loss is sid's at α = 1 without the normaliser.
    """

    def loss(x, D_teacher, D_aux):
        y = D_aux - D_teacher
        squared = y.square().sum(dim=[1, 2, 3], keepdim=True)
        C = PSEUDO_HUBER * y[0].numel() ** 0.5
        return y / (squared + C**2).sqrt() * (x - D_aux)

    return _through_both(loss, teacher, aux, x, c, sigma, weighting)


def _through_both(loss, teacher, aux, x, c, sigma, weighting: Weighting):
    """Gradient on x of Σ w · loss(x, D_teacher, D_aux), through x_σ and both networks in eval mode, and the gap.

    Only what leads to x is differentiated: parameters get no gradient and no memory for one.
    """
    with torch.enable_grad(), evaluating(teacher, aux):
        x = x.detach().requires_grad_(True)
        x_sigma = x + sigma * torch.randn_like(x)
        D_teacher, D_aux = teacher(x_sigma, sigma, c), aux(x_sigma, sigma, c)
        weight = weighting(sigma, x.detach(), D_teacher.detach())
        (gradient,) = torch.autograd.grad((weight * loss(x, D_teacher, D_aux)).sum(), x)
    return gradient, (D_aux - D_teacher).detach().abs().mean(dim=[1, 2, 3])
