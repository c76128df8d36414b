"""One-step generators that were distilled from a diffusion model: `one-step:FILE`, the denoiser of a file used once.

SiD, Diff-Instruct and DMD leave a network of the teacher's own class. What makes it a generator is how it is called:
G(z, c) = D(sigma_init · z; sigma_init, c). Nothing in the file tells, so whoever names the file does.
"""

from __future__ import annotations

import os

PREFIX = "one-step:"
SIGMA_INIT = 2.5  # of SiD (Zhou et al. 2024) and Diff-Instruct; in units of [-1, 1] images


def file_of(path_or_name: str | os.PathLike) -> str | None:
    """What is behind the prefix, or None."""
    text = os.fspath(path_or_name)
    return text.removeprefix(PREFIX) if isinstance(text, str) and text.startswith(PREFIX) else None
