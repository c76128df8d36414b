"""Which names of a file are of no concern: classes of other programs, whose objects stay closed boxes.

No name of a file is ever imported or called. But a file that names what runs programs or reaches for files is no
checkpoint, and is refused as a whole; and of the standard library, torch and numpy, whose contents are known, only what
holds data or describes a network has a reason to be there.
"""

from __future__ import annotations

import sys

_DATA = {  # of modules of which only a part has a place in a file
    "argparse": {"Namespace"},
    "builtins": {
        *("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "range", "set"),
        *("slice", "str", "tuple"),
    },
    "collections": {"ChainMap", "Counter", "OrderedDict", "UserDict", "UserList", "defaultdict", "deque"},
    "logging": {"Logger", "getLogger"},
    "numpy": {"matrix", "recarray", "str_", "bool_", "bytes_", "void", "object_", "number", "generic"},
    "random": {"Random"},
    "re": {"_compile"},
    "time": {"struct_time"},
    "torch": {"Generator", "Size", "Tensor", "dtype", "layout", "memory_format", "channels_last", "strided"},
    "types": {"MappingProxyType", "SimpleNamespace"},
}
_DATA["__builtin__"] = _DATA["builtins"] | {"long", "unicode", "xrange"}
_DATA_MODULES = {  # of which everything has
    *("datetime", "decimal", "enum", "fractions", "ipaddress", "math", "ntpath", "numbers", "pathlib", "posixpath"),
    *("uuid", "zoneinfo", "_strptime"),
}
_DATA_PACKAGES = (
    *("numpy.random.", "numpy.ma.", "numpy.dtypes.", "torch.nn.", "torch.optim.", "torch.distributions."),
    *("torch._utils._rebuild_", "torch._tensor._rebuild_", "torch.utils.data.", "torch.amp.", "torch.cuda.amp."),
)
_NUMBER_TYPES = ("float", "bfloat", "int", "uint", "complex", "bool", "half", "double", "long", "short", "qint")
_KNOWN = {*sys.stdlib_module_names, "__builtin__", "copy_reg", "numpy", "torch"}
# Of other programs, names that load code or run it.
_REFUSED = ("refine.", "torch_utils.persistence.", "dill.", "cloudpickle.", "joblib.", "numba.", "tensorflow.")


def is_harmless(module: str, name: str) -> bool:
    """Whether an object of this name can stay in a file unread."""
    full = f"{module}.{name}"
    parts = full.split(".")
    if len(full) > 200 or not all(part.isidentifier() for part in parts) or full.startswith(_REFUSED):
        return False
    if any(part.startswith("__") and part.endswith("__") for part in parts[1:]):
        return False
    if parts[0] not in _KNOWN:
        return True
    if name in _DATA.get(module, ()) or module in _DATA_MODULES or full.startswith(_DATA_PACKAGES):
        return True
    return module in ("numpy", "torch") and name.startswith(_NUMBER_TYPES)
