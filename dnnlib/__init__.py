"""Small helpers that know nothing of torch, GANs or diffusion: everything here is the standard library."""

from refine.dnnlib.caches import distrust, keep_from_others, make_folder, named_folder, user_cache
from refine.dnnlib.streams import Outlet, descriptor, tell
from refine.dnnlib.util import check_outdir, format_bytes, format_kimg, format_time, read_text, sha256_of_file
from refine.dnnlib.writing import append_text, naming, replaced_atomically

__all__ = [
    "Outlet",
    "append_text",
    "check_outdir",
    "descriptor",
    "distrust",
    "format_bytes",
    "format_kimg",
    "format_time",
    "keep_from_others",
    "make_folder",
    "named_folder",
    "naming",
    "read_text",
    "replaced_atomically",
    "sha256_of_file",
    "tell",
    "user_cache",
]
