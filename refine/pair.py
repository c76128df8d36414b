"""Student and teacher as a pair: whether they fit, the way across where they differ, and their labels.

| student → teacher           | rule                                                                                |
|-----------------------------|-------------------------------------------------------------------------------------|
| larger, by a whole factor   | the teacher sees the images reduced by an anti-aliased filter (Lanczos)             |
| smaller, or no whole factor | refused: what the student does not draw cannot be judged                            |
| grey → RGB                  | the grey channel three times                                                        |
| RGB → grey                  | luma, 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601)                                    |
| no classes → classes        | "no label" where the teacher was trained with it, otherwise a label drawn per image |
| classes → no classes        | the student's labels are drawn, the teacher does not see them                       |
| other numbers of classes    | refused                                                                             |

aux is a copy of the teacher and lives on the teacher's side, so that only the student's gradient crosses.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch

LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Bridge:
    """How a student's images and labels become those of a teacher; made by `plan_bridge`.

    Attributes:
        student, teacher: (img_resolution, img_channels, classes) of both.
    """

    student: tuple[int, int, int]
    teacher: tuple[int, int, int]

    def images(self, x: torch.Tensor) -> torch.Tensor:
        """Images of the student (N, C, R, R) as the teacher takes them; x itself where both agree. Differentiable."""
        if self.student[1] == 3 and self.teacher[1] == 1:  # before reducing: a third of the work
            x = (x * _luma(x.device, x.dtype)[:, None, None]).sum(dim=1, keepdim=True)
        if self.student[0] != self.teacher[0]:
            x = reduce_images(x, self.teacher[0])
        if self.student[1] == 1 and self.teacher[1] == 3:
            x = x.expand(-1, 3, -1, -1)
        return x

    def messages(self, null_label: bool) -> list[str]:
        """One line for every difference, for the log."""
        (size, channels, classes), (t_size, t_channels, t_classes) = self.student, self.teacher
        lines = []
        if size != t_size:
            lines.append(
                f"the student's {size}×{size} images reach the teacher reduced to {t_size}×{t_size}; "
                "details finer than that are not judged"
            )
        if channels != t_channels:
            how = "luma of its RGB images" if t_channels == 1 else "its grey channel three times"
            lines.append(f"the teacher sees {how}")
        if t_classes and not classes:
            how = "is asked without a label, as it was in part of its training"
            drawn = "knows no missing label and gets one drawn per image: it pulls towards a mixture of the classes"
            lines.append(f"the student has no classes; the teacher {how if null_label else drawn}")
        if classes and not t_classes:
            lines.append("the teacher has no classes: it judges the images, not whether they show their label")
        return lines


def plan_bridge(student: tuple[int, int, int], teacher: tuple[int, int, int]) -> Bridge:
    """The way from one kind of image to the other, each (img_resolution, img_channels, classes).

    Raises:
        ValueError: There is none; the message says what both have and what was expected.
    """
    (size, channels, classes), (t_size, t_channels, t_classes) = student, teacher
    if size < t_size or size % t_size:
        problem = "img_resolution", size, t_size, f"the teacher's resolution or a whole multiple of {t_size}"
    elif channels != t_channels and {channels, t_channels} != {1, 3}:
        problem = "img_channels", channels, t_channels, "equal numbers, or grey (1) and RGB (3)"
    elif classes and t_classes and classes != t_classes:
        problem = "classes", classes, t_classes, "the same classes, or none on one side"
    else:
        return Bridge(student, teacher)
    name, found, expected, wanted = problem
    raise ValueError(f"--gan has {name} {found}, but --teacher has {expected}; expected {wanted}")


def reduce_images(x: torch.Tensor, size: int) -> torch.Tensor:
    """(N, C, R, R) → (N, C, size, size) by a Lanczos filter that is widened to keep aliases out. Differentiable.

    The numbers of Pillow's `resize(…, LANCZOS)`, with which the public 64×64 data sets were made, without its rounding
    to 8 bits: overshoot at edges is kept.
    """
    matrix = _reduction(x.shape[-1], size, x.device, x.dtype)
    return matrix @ x @ matrix.T


# Both stay on their device: copying them there would wait for a GPU once a step.


@functools.lru_cache(maxsize=8)
def _luma(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(LUMA, device=device, dtype=dtype)


@functools.lru_cache(maxsize=8)
def _reduction(size_in: int, size_out: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return lanczos_matrix(size_in, size_out).to(device=device, dtype=dtype)


def lanczos_matrix(size_in: int, size_out: int, lobes: int = 3) -> torch.Tensor:
    """(size_out, size_in) float64: rows are sinc(t) sinc(t / lobes) around an output pixel's centre, with sum 1.

    t counts output pixels, so that the filter is the wider, the stronger the reduction.
    """
    scale = size_in / size_out
    centres = (torch.arange(size_out, dtype=torch.float64, device="cpu") + 0.5) * scale
    t = (torch.arange(size_in, dtype=torch.float64, device="cpu") + 0.5 - centres[:, None]) / scale
    weight = torch.where(t.abs() < lobes, torch.sinc(t) * torch.sinc(t / lobes), 0.0)
    return weight / weight.sum(dim=1, keepdim=True)


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
