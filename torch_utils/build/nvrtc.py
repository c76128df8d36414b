"""NVRTC, NVIDIA's compiler as a library: it comes with torch, and needs neither nvcc, a C++ compiler nor any header.

Only the standard library at import. `find` looks at files; `Nvrtc` opens one of them.
"""

import ctypes
import glob
import os
import re
import site
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from refine.torch_utils.build.toolchain import Missing

# No --use_fast_math: a NaN has to stay one.
OPTIONS = ("--std=c++17", "--ptxas-options=-v")

_Program = ctypes.c_void_p
_TEXTS = ctypes.POINTER(ctypes.c_char_p)
_SIGNATURES = {
    "nvrtcVersion": [ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_int)],
    "nvrtcGetNumSupportedArchs": [ctypes.POINTER(ctypes.c_int)],
    "nvrtcGetSupportedArchs": [ctypes.POINTER(ctypes.c_int)],
    "nvrtcCreateProgram": [
        ctypes.POINTER(_Program), ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int, _TEXTS, _TEXTS
    ],
    "nvrtcDestroyProgram": [ctypes.POINTER(_Program)],
    "nvrtcAddNameExpression": [_Program, ctypes.c_char_p],
    "nvrtcCompileProgram": [_Program, ctypes.c_int, _TEXTS],
}  # fmt: skip


def candidates() -> list[str]:
    """Where libnvrtc may be, likeliest first: beside torch, in this Python's packages, in toolkits, in the system.
    Absolute paths only; neither the current folder nor LD_LIBRARY_PATH is searched."""
    torch = getattr(sys.modules.get("torch"), "__file__", None)
    packages = [Path(torch).parents[1]] if torch else []
    packages += map(Path, [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()])
    if site.ENABLE_USER_SITE:
        packages.append(Path(site.getusersitepackages()))
    folders = [folder / name for folder in packages for name in ("nvidia/*/lib", "torch/lib")]
    folders.append(Path(sys.prefix, "lib"))
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    homes += [Path("/usr/local/cuda"), *map(Path, sorted(glob.glob("/usr/local/cuda-*"), reverse=True))]
    folders += [home / name for home in homes for name in ("lib64", "lib", "targets/*/lib")]
    folders += [Path("/usr/lib64"), Path("/usr/lib"), *map(Path, sorted(glob.glob("/usr/lib/*-linux-gnu")))]
    patterns = [f"{folder}/libnvrtc*.so*" for folder in folders if folder.is_absolute()]
    found = (path for pattern in patterns for path in sorted(glob.glob(pattern)))
    return list(dict.fromkeys(path for path in found if _major(path)))


def _major(path: str) -> str | None:
    """'13' of libnvrtc.so.13, '11' of torch's own libnvrtc-672ee683.so.11.2; None = no NVRTC, or it does not say."""
    match = re.fullmatch(r"libnvrtc(-[0-9a-f]+)?\.so\.(\d+)(\.\d+)*", os.path.basename(path))
    return match[2] if match else None


def find(torch_cuda: str | None) -> str | None:
    """The library to use: of torch's CUDA major; of a torch without CUDA the first. None = there is none."""
    major = (torch_cuda or "").split(".")[0]
    return next((path for path in candidates() if not major or _major(path) == major), None)


class Nvrtc:
    """An opened NVRTC: its version, '13.0', and targets, 'sm_75', …, oldest first."""

    name = "NVRTC"

    def __init__(self, path: str):
        """Raises Missing if it cannot be used."""
        self.path = path
        try:
            self._library = ctypes.CDLL(path)
            for name, arguments in _SIGNATURES.items():
                getattr(self._library, name).argtypes = arguments
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        except (OSError, AttributeError) as error:
            raise Missing(f"NVRTC in {path} cannot be used: {error}") from None
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", numbers)
        self.version, self.targets = f"{major.value}.{minor.value}", tuple(f"sm_{number}" for number in sorted(numbers))
        # NVRTC opens this by its name alone, which 13.0 finds in the system's folders only, unless it is open already
        builtins = Path(path).with_name(f"libnvrtc-builtins.so.{self.version}")
        if builtins.exists():
            ctypes.CDLL(str(builtins))

    def _call(self, name: str, *arguments: object) -> None:
        if status := getattr(self._library, name)(*arguments):
            raise Missing(f"{name} of {self.path} failed: {self._library.nvrtcGetErrorString(status).decode()}")

    def compile(self, source: str, headers: Mapping[str, bytes], expression: str, target: str) -> tuple[bytes, str]:
        """One kernel.

        Args:
            source: Name of the .cu, one of `headers`.
            headers: File name → text, of all that the source includes.
            expression: The kernel as C++ names it.
            target: 'sm_90' = machine code, 'ptx_90' = PTX.

        Returns:
            The image, b"" where the compiler found errors; what the compiler said.
        """
        program = _Program()
        texts = (ctypes.c_char_p * len(headers))(*headers.values())
        names = (ctypes.c_char_p * len(headers))(*(name.encode() for name in headers))
        arguments = (headers[source], source.encode(), len(headers), texts, names)
        self._call("nvrtcCreateProgram", ctypes.byref(program), *arguments)
        try:
            self._call("nvrtcAddNameExpression", program, expression.encode())
            options = [*OPTIONS, f"--gpu-architecture={target.replace('ptx', 'compute')}"]
            given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            status = self._library.nvrtcCompileProgram(program, len(options), given)
            log = self._output(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            if status:
                reason = self._library.nvrtcGetErrorString(status).decode()
                return b"", log or f"error: {reason}"
            image = self._output(program, "PTX" if target.startswith("ptx") else "CUBIN")
            return image.rstrip(b"\0") if target.startswith("ptx") else image, log
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _output(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw
