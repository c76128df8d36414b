"""Student and teacher as a pair: whether they fit, and the labels that both are given."""

from typing import Any

import torch

from refine.bridge import Bridge, plan_bridge


def check_pair(student: Any, teacher: Any) -> Bridge:
    """The way from a student's images and labels to a teacher's.

    Args:
        student, teacher: Networks, or what `refine.checkpoints.peek` says of them.

    Raises:
        ValueError: There is none.
    """
    return plan_bridge(
        (student.img_resolution, student.img_channels, student.c_dim),
        (teacher.img_resolution, teacher.img_channels, teacher.label_dim),
    )


def check_label_dist(prior: tuple[float, ...] | None, student: Any, teacher: Any) -> torch.Tensor | None:
    """The prior of the classes as a tensor on the CPU, or None for uniform.

    Raises:
        ValueError: It does not fit the networks.
    """
    if prior is None:
        return None
    classes = student.c_dim or teacher.label_dim
    if len(prior) != classes:
        raise ValueError(f"--label-dist has {len(prior)} numbers; expected one per class, which are {classes}")
    return torch.tensor(prior, dtype=torch.float32)


def draw_labels(n: int, classes: int, prior: torch.Tensor | None, device: torch.device | str) -> torch.Tensor:
    """One-hot labels (n, classes), uniform over the classes or by their `prior` (classes,), which need not sum to 1.

    A prior on another device is copied there at every call.
    """
    if prior is None:
        index = torch.randint(classes, [n, 1], device=device)
    else:
        index = torch.multinomial(prior.to(device), n, replacement=True)[:, None]
    return torch.zeros(n, classes, device=device).scatter_(1, index, 1.0)  # F.one_hot checks its input on the host
