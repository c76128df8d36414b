"""Small helpers that know nothing of torch, GANs or diffusion: everything here is the standard library."""

from refine.dnnlib.util import (
    check_outdir,
    format_bytes,
    format_kimg,
    format_time,
    replaced_atomically,
    sha256_of_file,
)

__all__ = ["check_outdir", "format_bytes", "format_kimg", "format_time", "replaced_atomically", "sha256_of_file"]
