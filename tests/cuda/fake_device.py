"""A CUDA device that is not there. To be imported before torch, which asks once whether there is CUDA.

    DEVICE = fake_device.install()
    with fake_device.watched() as events:
        trainer.step()

Its tensors are real ones of device cuda:0, with the host's memory (fake_device.cpp), and the compiled ops are the .cu
sources, run thread by thread on the host (on_host.h). What a GPU would be waited for, and what would be copied between
it and the host, is noted with the line of the project that asks for it.
"""

import contextlib
import ctypes
import os
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(os.environ["FAKE_CUDA"])  # where `building.build` put the libraries

assert "torch" not in sys.modules
_device = ctypes.CDLL(str(FOLDER / "libdevice.so"))

import torch

CAPABILITY = (9, 0)
ROOT = Path(__file__).resolve().parents[2]

_noted: list[str] | None = None


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """For as long as the block lasts, notes waits and copies: 'what they are, at file:line text'."""
    global _noted
    _noted = events = []
    try:
        yield events
    finally:
        _noted = None


@ctypes.CFUNCTYPE(None, ctypes.c_char_p)
def _note(text: bytes) -> None:
    if _noted is not None:
        _noted.append(f"{text.decode()}, at {_line_of_the_project()}")


def _line_of_the_project() -> str:
    ours = [str(ROOT / name) for name in ("refine", "torch_utils", "dnnlib")]
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(tuple(ours)):
            return f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno} {frame.line}"
    return "a line of torch's own"


def install(kernels: bool = True) -> torch.device:
    """Puts the device into this process.

    Args:
        kernels: Whether the compiled ops are there. The CPU has none, so that both compute what torch does.
    """
    _device.fake_device_callback(_note)
    for name, value in _module().items():
        setattr(torch.cuda, name, value)
    torch.Tensor.__deepcopy__ = _deepcopy(torch.Tensor.__deepcopy__)
    from refine.torch_utils.build import custom_ops
    from refine.torch_utils.ops import native

    library = ctypes.CDLL(str(FOLDER / "libkernels.so")) if kernels else None

    def launch(op, x, expression, blocks, threads, shared, record):
        sizes = ctypes.c_uint(blocks), threads, ctypes.c_size_t(shared)
        status = library[f"launch_{op}"](expression.encode(), *sizes, record, ctypes.c_size_t(len(record)))
        if status:
            raise RuntimeError(f"{op} on {x.device}: status {status} of {expression}")

    native.launch = launch
    custom_ops.set_mode("auto")
    custom_ops._ready |= {"cpu": None, "cuda": library}
    return torch.device("cuda")


class _Generator:
    """The device's default generator, as far as the project uses one."""

    def __init__(self) -> None:
        ops = torch.ops.fake_device
        self.get_state, self.set_state, self.manual_seed = ops.get_state, ops.set_state, ops.manual_seed


class _Context:
    def __init__(self, device: object = None):
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def _module() -> dict[str, object]:
    """What torch.cuda says of the device."""
    generator = _Generator()
    properties = types.SimpleNamespace(
        name="fake", major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=80 << 30, multi_processor_count=132
    )
    stream = types.SimpleNamespace(cuda_stream=0, stream_id=0, device_index=0, device_type=1)

    def synchronize(device: object = None) -> None:
        _note(b"wait: torch.cuda.synchronize")

    return {
        "_lazy_init": lambda: None,
        "is_initialized": lambda: True,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_name": lambda device=None: "fake",
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda including_emulation=True: True,
        "synchronize": synchronize,
        "current_stream": lambda device=None: stream,
        "device": _Context,
        "max_memory_allocated": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "default_generators": (generator,),
        "get_rng_state": lambda device="cuda": generator.get_state(),
        "set_rng_state": lambda state, device="cuda": generator.set_state(state),
        "manual_seed": generator.manual_seed,
        "manual_seed_all": generator.manual_seed,
    }


def _deepcopy(original):
    """A storage is copied by CUDA's own allocator, which is not there."""

    def deepcopy(tensor, memo):
        if not tensor.is_cuda or id(tensor) in memo:
            return original(tensor, memo)
        with torch.no_grad():
            made = tensor.detach().clone()
        if isinstance(tensor, torch.nn.Parameter):
            made = torch.nn.Parameter(made, tensor.requires_grad)
        memo[id(tensor)] = made.requires_grad_(tensor.requires_grad)
        return memo[id(tensor)]

    return deepcopy
