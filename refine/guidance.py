"""The teacher with and without a label: classifier-free guidance."""

import torch


def has_null_label(teacher: torch.nn.Module) -> bool:
    """Whether a conditional teacher was trained to denoise without a label, too (with label dropout)."""
    return teacher.label_dim > 0 and getattr(getattr(teacher, "model", None), "label_dropout", 0) > 0


class Guided(torch.nn.Module):
    """A denoiser under classifier-free guidance: D(x; σ) + w (D(x; σ, c) − D(x; σ)) (Ho & Salimans 2022).

    Args:
        teacher: Denoiser that was trained with label dropout.
        guidance: w; 1 = none, more moves images towards what is typical of their class.

    Raises:
        ValueError: The teacher does not know a missing label.
    """

    def __init__(self, teacher: torch.nn.Module, guidance: float):
        super().__init__()
        if not has_null_label(teacher):
            what = "was trained without label dropout" if teacher.label_dim else "has no classes"
            raise ValueError(f"found {guidance:g}, but --teacher {what}; expected a teacher that knows a missing label")
        self.teacher, self.guidance = teacher, guidance

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        if class_labels is None:
            return self.teacher(x, sigma)
        # one batch of both: no larger peak than aux's own backward pass, and half the launches
        twice = self.teacher(
            torch.cat([x, x]), torch.cat([sigma, sigma]), torch.cat([torch.zeros_like(class_labels), class_labels])
        )
        free, labelled = twice.chunk(2)
        return free + self.guidance * (labelled - free)


def guided(teacher: torch.nn.Module, guidance: float) -> torch.nn.Module:
    """The teacher under classifier-free guidance. Raises ValueError where it does not know a missing label."""
    try:
        return Guided(teacher, guidance)
    except ValueError as error:
        raise ValueError(f"--guidance: {error}") from None
