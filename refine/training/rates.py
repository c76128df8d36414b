"""Learning rates for networks of any kind and size, where the options give none."""

from refine.config import RefineConfig
from refine.networks.bases import Denoiser, Generator

#: Of the rate that a generator of this kind is trained with. On digits (docs/results.md) larger rates reach a distance
#: sooner and keep less recall.
STUDENT_SHARE = 0.5


def learning_rates(config: RefineConfig, student: Generator, teacher: Denoiser) -> tuple[float, float]:
    """Adam's rates of the student and of the auxiliary network, which is one of the teacher's kind.

    They follow from what networks of the kind are trained with (`Network.training_rate`), which knows of width and
    parametrisation, and from the batch: the auxiliary network takes that rate, the student `STUDENT_SHARE` of it.
    """
    lr, aux_lr = config.lr, config.aux_lr
    if lr is None:
        lr = STUDENT_SHARE * student.training_rate.at(config.batch)
    return lr, teacher.training_rate.at(config.batch) if aux_lr is None else aux_lr
