"""Small helpers that know nothing of torch, GANs or diffusion: everything here is the standard library."""

from refine.dnnlib.util import (
    EasyDict,
    check_outdir,
    format_bytes,
    format_count,
    format_kimg,
    format_time,
    kimg_to_nimg,
    replaced_atomically,
    sha256_of_file,
)

__all__ = [
    "EasyDict",
    "check_outdir",
    "format_bytes",
    "format_count",
    "format_kimg",
    "format_time",
    "kimg_to_nimg",
    "replaced_atomically",
    "sha256_of_file",
]
