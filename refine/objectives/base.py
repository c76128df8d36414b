"""What an objective is: something that gives the student's images a gradient, from what teacher and aux say of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from refine.diff_instruct import evaluating
from refine.noise import Weighting

Denoiser = Callable[..., torch.Tensor]  # D(x, sigma, c) → D_x; in fact a torch.nn.Module, whose mode is switched


@dataclass(frozen=True)
class Guidance:
    """What an objective says of a batch of images.

    Attributes:
        gradient: On the images, (N, C, H, W); the caller goes on with `x.backward(gradient)`.
        gap: mean|D_aux − D_teacher| of each image, (N,).
        logged: What is to be reported beside, by its TensorBoard tag: values of each image (N,), or a scalar. The
            tags are those of the objective's `logs`.
    """

    gradient: torch.Tensor
    gap: torch.Tensor
    logged: dict[str, torch.Tensor] = field(default_factory=dict)


class Objective(ABC):
    """Base of the objectives, which are frozen dataclasses: their fields are their parameters.

    A parameter `alpha` of the objective `sid` is filled from the run's option `sid_alpha`, see `make_objective`.

    Attributes:
        name: What `--objective` calls it.
        further_networks: Names of networks that it needs beside teacher and aux.
    """

    name: ClassVar[str]
    further_networks: tuple[str, ...] = ()

    @property
    def logs(self) -> tuple[str, ...]:
        """Tags of what it reports, the keys of `Guidance.logged`."""
        return ()

    @abstractmethod
    def __call__(
        self,
        teacher: Denoiser,
        aux: Denoiser,
        x: torch.Tensor,
        c: torch.Tensor | None,
        sigma: torch.Tensor,
        noise: torch.Tensor,
        weighting: Weighting,
    ) -> Guidance:
        """The gradient on images. Nothing is drawn here, and the networks are left as they were.

        An objective whose gradient goes through the networks is a `LossObjective`. Others look at them without
        gradients, so that in a sum they may be given what the networks have already answered.

        Args:
            teacher, aux: Denoisers D(x, sigma, c), asked in eval mode at x + sigma · noise.
            x: Images of the student (N, C, H, W).
            c: Their labels (N, label_dim), or None.
            sigma: Noise levels (N, 1, 1, 1).
            noise: Unit noise like x.
            weighting: Gives w from (sigma, x, D_teacher), see `refine.noise.make_weighting`.
        """


class LossObjective(Objective):
    """An objective with a value: its gradient goes through x_σ and both networks, whose parameters are frozen."""

    @abstractmethod
    def loss(self, x: torch.Tensor, D_teacher: torch.Tensor, D_aux: torch.Tensor) -> torch.Tensor:
        """What is summed over pixels, without the weight w, (N, C, H, W); differentiable by all three arguments."""

    @property
    def logs(self) -> tuple[str, ...]:
        return (f"Loss/{self.name}",)

    def __call__(self, teacher, aux, x, c, sigma, noise, weighting: Weighting) -> Guidance:
        answers = ask(teacher, aux, x, c, sigma, noise, graph=True)
        return self.differentiate(answers, sigma, weighting)

    def differentiate(self, answers: "Answers", sigma: torch.Tensor, weighting: Weighting, keep: bool = False):
        """The guidance from answers of the networks that were given with `graph`, which stays if `keep`."""
        x, D_teacher, D_aux = answers.x, answers.D_teacher, answers.D_aux
        with torch.enable_grad():
            weight = weighting(sigma, x.detach(), D_teacher.detach())
            loss = weight * self.loss(x, D_teacher, D_aux)
            # Only what leads to x is differentiated: parameters get no gradient and no memory for one.
            (gradient,) = torch.autograd.grad(loss.sum(), x, retain_graph=keep)
        return Guidance(gradient, answers.gap, {f"Loss/{self.name}": loss.detach().sum(dim=[1, 2, 3])})


@dataclass(frozen=True)
class Answers:
    """What both denoisers make of images under noise: x, D_teacher and D_aux, all (N, C, H, W)."""

    x: torch.Tensor
    D_teacher: torch.Tensor
    D_aux: torch.Tensor

    @property
    def gap(self) -> torch.Tensor:
        """mean|D_aux − D_teacher| of each image, (N,)."""
        return (self.D_aux - self.D_teacher).detach().abs().mean(dim=[1, 2, 3])


def ask(teacher, aux, x, c, sigma, noise, graph: bool) -> Answers:
    """Evaluate both denoisers once, in eval mode, at x_σ = x + σn; with `graph` they can be differentiated by x."""
    with torch.set_grad_enabled(graph), evaluating(teacher, aux):
        x = x.detach().requires_grad_(graph)
        x_sigma = torch.addcmul(x, sigma, noise)
        return Answers(x, teacher(x_sigma, sigma, c), aux(x_sigma, sigma, c))


def inverse_distance(x: torch.Tensor, D_teacher: torch.Tensor) -> torch.Tensor:
    """1 / mean|x − D_teacher| per image, (N, 1, 1, 1), no gradient: the normaliser of DMD and SiD.

    The teacher's prediction moves further from x as noise grows: dividing by the distance gives all noise levels a
    similar weight.
    """
    distance = (x.detach() - D_teacher.detach()).abs().mean(dim=[1, 2, 3], keepdim=True)
    return 1 / distance.clamp_min(1e-8)
