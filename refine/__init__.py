"""Refine a pretrained GAN with a pretrained diffusion model, data-free, by Diff-Instruct.

    import refine
    G = refine.load_generator('digits-gan')       # a name from pretrained/index.toml, or a path
    x = G(z, c, truncation_psi=1.0)               # NCHW float32 in about [-1, 1]
    T = refine.load_teacher('digits-teacher')
    D_x = T(x, sigma, class_labels=c)             # denoised image, float32

`import refine` is cheap: torch is imported when a function of this API is first used.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refine.checkpoints import load_generator, load_teacher

# Our `dnnlib` and `torch_utils` are `refine.dnnlib` and `refine.torch_utils` to every import, so that they neither hide
# NVIDIA's packages of these names nor are hidden by them. In a wheel they lie in this folder; in a checkout, beside it.
if not (Path(__file__).parent / "dnnlib").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

__version__ = "0.1.0"
__all__ = ["__version__", "load_generator", "load_teacher"]


def __getattr__(name: str) -> Any:
    if name in ("load_generator", "load_teacher"):
        return getattr(importlib.import_module("refine.checkpoints"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
