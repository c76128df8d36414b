"""Refine a pretrained GAN with a pretrained diffusion model, data-free, by Diff-Instruct.

    import refine
    result = refine.refine('digits-gan', 'digits-teacher-2', preset='demo')
    images = refine.sample(result.best, range(16))
    print(refine.compare('digits-gan', result.best, ref='digits-reference'))

    G = refine.load_generator('digits-gan')       # a name from pretrained/index.toml, or a path
    x = G(z, c, truncation_psi=1.0)               # NCHW float32 in about [-1, 1]
    T = refine.load_teacher('digits-teacher')
    D_x = T(x, sigma, class_labels=c)             # denoised image, float32

docs/python.md has the rest. `import refine` is cheap: torch is imported when a function of this API is first used.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refine.api import (
        Bridge,
        Comparison,
        Event,
        Measured,
        MetricFunction,
        OwnMetric,
        Result,
        bridge,
        compare,
        load_generator,
        load_teacher,
        refine,
        sample,
    )


class _BesideFinder:
    """Finds `refine.dnnlib` and `refine.torch_utils` in a checkout, where they lie beside this package.

    They are called so everywhere, so that they neither hide NVIDIA's packages of these names nor are hidden by them.
    A wheel has them inside this package. With the checkout's root in `__path__`, every folder and script there would
    become a module of this package.
    """

    @staticmethod
    def find_spec(fullname: str, *_: Any) -> ModuleSpec | None:
        if fullname in ("refine.dnnlib", "refine.torch_utils"):
            return PathFinder.find_spec(fullname, [str(Path(__file__).parents[1])])
        return None


if not (Path(__file__).parent / "dnnlib" / "__init__.py").is_file():
    # First, because a finder that an editable install of another checkout brought would be asked before a last one.
    sys.meta_path.insert(0, _BesideFinder)

__version__ = "0.1.0"
__all__ = [
    "Bridge",
    "Comparison",
    "Event",
    "Measured",
    "MetricFunction",
    "OwnMetric",
    "Result",
    "__version__",
    "bridge",
    "compare",
    "load_generator",
    "load_teacher",
    "refine",
    "sample",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("refine.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
