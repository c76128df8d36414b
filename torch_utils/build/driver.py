"""NVIDIA's driver, by ctypes: compiled device code → kernels that can be started, in the context that torch uses.

Only the standard library at import; libcuda is opened by the first call.
"""

import ctypes
import functools
import os
import re
import struct

SHARED_BYTES = 48 * 1024  # of shared memory that every GPU grants a block without asking
_DYNAMIC_SHARED_LIMIT = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

_Handle, _Record = ctypes.c_void_p, ctypes.c_char_p * 1
_SIGNATURES = {
    "cuDevicePrimaryCtxRetain": [ctypes.POINTER(_Handle), ctypes.c_int],
    "cuDeviceGet": [ctypes.POINTER(ctypes.c_int), ctypes.c_int],
    "cuCtxPushCurrent_v2": [_Handle],
    "cuCtxPopCurrent_v2": [ctypes.POINTER(_Handle)],
    "cuModuleLoadData": [ctypes.POINTER(_Handle), ctypes.c_char_p],
    "cuModuleGetFunction": [ctypes.POINTER(_Handle), _Handle, ctypes.c_char_p],
    "cuFuncSetAttribute": [_Handle, ctypes.c_int, ctypes.c_int],
    "cuGetErrorName": [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)],
    "cuGetErrorString": [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)],
    "cuLaunchKernel": [_Handle, *[ctypes.c_uint] * 7, _Handle, ctypes.POINTER(ctypes.c_char_p), _Handle],
}


class Failed(RuntimeError):
    """The driver reports an error; one line."""


@functools.cache
def library() -> ctypes.CDLL:
    """libcuda with the signatures of what is used of it. Raises Failed where there is none."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        for name, arguments in _SIGNATURES.items():
            getattr(cuda, name).argtypes = arguments
    except (OSError, AttributeError) as error:
        raise Failed(f"no NVIDIA driver that can be used: {error}") from None
    return cuda


def version() -> tuple[int, int] | None:
    """The newest CUDA that the installed driver runs, (13, 0); None = no driver."""
    number = ctypes.c_int()
    try:
        failed = library().cuDriverGetVersion(ctypes.byref(number))
    except Failed:
        return None
    return None if failed else (number.value // 1000, number.value % 1000 // 10)


def _check(name: str, status: int) -> None:
    if not status:
        return
    words = []
    for function in (library().cuGetErrorName, library().cuGetErrorString):
        text = ctypes.c_char_p()
        if function(status, ctypes.byref(text)) == 0 and text.value:
            words.append(text.value.decode(errors="replace"))
    raise Failed(f"{name} failed with {': '.join(words) or f'CUDA error {status}'}")


def _call(name: str, *arguments: object) -> None:
    _check(name, getattr(library(), name)(*arguments))


@functools.cache
def _context(device: int) -> ctypes.c_void_p:
    """The primary context of a device, which is torch's; kept for as long as the process lives."""
    number, context = ctypes.c_int(), _Handle()
    _call("cuDeviceGet", ctypes.byref(number), device)
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), number)
    return context


class Kernel:
    """One kernel on one device."""

    def __init__(self, image: bytes, device: int):
        """Loads an image, cubin or PTX, with one kernel in it. Raises Failed if the driver refuses it."""
        name, module, self._function = entry_of(image), _Handle(), _Handle()
        self._context, self._granted = _context(device), SHARED_BYTES
        _call("cuCtxPushCurrent_v2", self._context)
        try:
            _call("cuModuleLoadData", ctypes.byref(module), image)
            _call("cuModuleGetFunction", ctypes.byref(self._function), module, name.encode())
        finally:
            library().cuCtxPopCurrent_v2(ctypes.byref(_Handle()))

    def launch(self, blocks: int, threads: int, shared: int, stream: int, record: bytes) -> None:
        """Starts it on a stream, see `native.launch`; the calling thread needs no context. Raises Failed."""
        cuda = library()
        if status := cuda.cuCtxPushCurrent_v2(self._context):
            _check("cuCtxPushCurrent", status)
        try:
            if shared > self._granted:
                _call("cuFuncSetAttribute", self._function, _DYNAMIC_SHARED_LIMIT, shared)
                self._granted = shared
            status = cuda.cuLaunchKernel(
                self._function, blocks, 1, 1, threads, 1, 1, shared, stream, _Record(record), None
            )
        finally:
            cuda.cuCtxPopCurrent_v2(ctypes.byref(_Handle()))
        if status:
            _check("cuLaunchKernel", status)


def entry_of(image: bytes) -> str:
    """Name of the one kernel in an image: PTX says .entry NAME, a cubin has a section .nv.constant0.NAME with its
    arguments. Raises Failed if there is not exactly one."""
    if image[:4] == b"\x7fELF" and len(image) > 64:
        (sections,) = struct.unpack_from("<Q", image, 40)
        size, count, names_at = struct.unpack_from("<3H", image, 58)
        starts = [struct.unpack_from("<I20xQ", image, sections + size * index) for index in range(count)]
        table = starts[names_at][1] if starts else 0
        names = (image[table + name : image.index(b"\0", table + name)] for name, _ in starts)
        found = [name[len(b".nv.constant0.") :] for name in names if name.startswith(b".nv.constant0.")]
    else:
        found = re.findall(rb"\.entry\s+(\w+)", image)
    if len(found) != 1:
        raise Failed(f"an image holds {len(found)} kernels, expected 1")
    return found[0].decode()
