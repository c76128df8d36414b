"""What reading a network or detector would do beyond opening files of this machine; for names that a file gives."""

import os
import re

from refine.checkpoints.sniff import sniff
from refine.checkpoints.sources.fetch import is_url
from refine.checkpoints.sources.index import RemoteEntry, read_index

_CODE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*(@.*)?", re.DOTALL)
_PROGRAMS = {"torchscript", "zip"}  # of detectors: they run what is in the file


def reach_of(text: str, detector: bool = False) -> str | None:
    """'a download', 'code to be imported' or 'a program'; None if it is a file on this machine, or nothing at all.

    Args:
        text: As a command line or a training state names it.
        detector: Whether it is a detector, which may be a program.
    """
    if is_url(text):
        return "a download"
    if os.path.exists(text):
        return "a program" if detector and os.path.isfile(text) and sniff(text).kind in _PROGRAMS else None
    if _CODE.fullmatch(text):
        return "code to be imported"
    entry = read_index().get(text)
    if isinstance(entry, RemoteEntry) and not entry.is_cached:
        return "a download"
    return None
