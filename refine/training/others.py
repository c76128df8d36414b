"""Where the images come from that the critic of `--adversarial` compares the student's with."""

from pathlib import Path

import torch
from tqdm import tqdm

from refine.checkpoints.teachers import TeacherSource
from refine.images import to_uint8
from refine.metrics.bank import teacher_bank
from refine.metrics.image_sets import ImageSet
from refine.metrics.pipeline import rank_and_world
from refine.metrics.sampling import sensible_batch
from refine.pair import Bridge
from refine.training.adversary import Others

MAX_BYTES = 4 << 30  # of images that are kept in memory, as the teacher takes them


def images_of_teacher(teacher: Path | TeacherSource, num: int, bridge: Bridge, device: torch.device) -> Others:
    """A bank of the teacher: the run stays free of data.

    Where it is too small to hold every class, the critic does not look at labels.

    Args:
        teacher: The teacher, or its file.
        num: Number of images.
        bridge: Says which classes student and teacher have.
        device: Where images are drawn and kept.
    """
    batch = sensible_batch(bridge.teacher[0])
    bank = teacher_bank(teacher, num, batch=batch, device=device, progress=True)
    classes, labels = bridge.student[2], bank.classes
    if labels is not None and len(labels.unique()) < classes:
        labels = None
    return Others(bank.images, labels if classes else None, classes, device)


def images_of_data(images: ImageSet, bridge: Bridge, device: torch.device) -> Others:
    """Real images, of the student's size or of the teacher's, as the teacher takes them; grey ones do for RGB.

    Where they would take more than `MAX_BYTES`, every second, third … is left out. Every process keeps all of them.

    Args:
        images: With classes or without; without, the critic does not look at labels.
        bridge: The way from the student's images to the teacher's.
        device: Where they are kept.

    Raises:
        ValueError: Images of another size, classes that the student does not have, or a dataset.json that gives none
            to a student with classes.
    """
    if bridge.student[2] and images.no_classes:
        raise ValueError(images.no_classes)
    (size, channels, classes), (t_size, t_channels, _) = bridge.student, bridge.teacher
    step = -(-len(images) * t_channels * t_size**2 // MAX_BYTES)
    chosen, read, known = range(0, len(images), step), [], ((size, channels), (t_size, t_channels))
    with tqdm(total=len(chosen), unit="img", desc=f"images of {images.path.name}", **_shown()) as bar:
        for batch, _ in images.batches(100, chosen):
            _, c, height, width = batch.shape
            for s, k in known:
                if (height, width) == (s, s) and c in (1, k):  # grey images among colours, or nothing but them
                    found = batch.expand(-1, k, -1, -1)
                    of_student = (s, k) == known[0]
                    read.append(to_uint8(bridge.images(found.float() / 127.5 - 1)) if of_student else found)
                    break
            else:
                wanted = " or ".join(dict.fromkeys(f"{s}×{s}×{k}" for s, k in known))
                raise ValueError(f"{images.path} holds images of {height}×{width}×{c}; expected {wanted}")
            bar.update(len(batch))
    labels = images.classes[::step] if images.classes is not None and classes else None
    return Others(torch.cat(read), labels, classes, device)


def _shown() -> dict[str, object]:
    return {"disable": None if rank_and_world()[0] == 0 else True, "leave": False}
