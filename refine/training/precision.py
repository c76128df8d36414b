"""How an iteration computes: number and memory formats, loss scale of float16, torch.compile. Weights are float32."""

import contextlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence

import torch
from torch import nn

from refine.networks.bases import MixedPrecision
from refine.training.halves import HalfWeights

COMPUTE_DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,  # float32 storage; on Ampere and later, products of 10-bit mantissas
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def chosen_precision(precision: str, device: torch.device) -> tuple[str, str | None]:
    """What --precision means on a device, and a line on why where that was 'auto' and the device is a GPU.

    bf16 where the GPU has units for it, which compute several times as fast as those for float32, otherwise fp32.
    """
    if precision != "auto" or device.type != "cuda":
        return ("fp32" if precision == "auto" else precision), None
    name, version = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    what = f"{name} (compute capability {version[0]}.{version[1]})"
    if version >= (8, 0) and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", f"auto: bf16, for which this {what} has units; weights and metrics stay float32"
    return "fp32", f"auto: fp32, because this {what} has no units for bfloat16"


@contextlib.contextmanager
def tuned_convolutions(device: torch.device) -> Iterator[None]:
    """Inside, cuDNN tries its algorithms for every new size and keeps the fastest: an iteration's sizes never change.

    Elsewhere it does not: batches of metrics come in many sizes, and their numbers are not to depend on a race.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def prepare(
    networks: Sequence[nn.Module], trained: Container[nn.Module], precision: str, compiled: bool, device: torch.device
) -> list[str]:
    """Makes networks compute in a format, and fast.

    Args:
        networks: All that take part in an iteration.
        trained: Those of them whose weights change.
        precision: A key of `COMPUTE_DTYPES`.
        compiled: Whether torch.compile translates them.
        device: Where they run.

    Returns:
        Lines on what could not be done on this machine.
    """
    remarks = [set_precision(precision, networks, device)]
    if compiled:  # a compiler joins casts of weights with what they are for
        remarks += [compile_networks(networks, device)]
    elif COMPUTE_DTYPES[precision] != torch.float32:
        for network in networks:
            HalfWeights(network, COMPUTE_DTYPES[precision], frozen=network not in trained)
    return [remark for remark in remarks if remark]


def set_precision(precision: str, networks: Iterable[nn.Module], device: torch.device) -> str | None:
    """Let networks compute in a format; what their files ask for (NVIDIA's `use_fp16`) gives way to it.

    Weights, noise levels, styles, images and D_x stay float32; what changes is the activations, and with them the
    convolutions and normalisations between. fp32 and tf32 set torch's global switches for products on CUDA.

    Args:
        precision: A key of `COMPUTE_DTYPES`.
        networks: Those of `refine.networks`; others stay as they are.
        device: Where they run.

    Returns:
        What a user should know about this format on this device, or None.
    """
    dtype = COMPUTE_DTYPES[precision]
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    for module in (module for network in networks for module in network.modules()):
        if isinstance(module, MixedPrecision):
            module.compute_dtype, module.use_fp16 = dtype, False
    if device.type == "cuda":
        if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16: this GPU has no bfloat16 units and emulates them, which may be slower than fp32"
    elif precision == "tf32":
        return "tf32: a format of CUDA devices; here the same as fp32"
    elif precision == "fp16" or (precision == "bf16" and not _cpu_has_bf16()):
        return f"{precision}: this processor has no units for it and emulates them, which is slower than fp32"
    return None


def _cpu_has_bf16() -> bool:
    probe = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # a build without oneDNN has no such op
    return probe is not None and probe()


class LossScale:
    """Gradients of float16 networks, kept in float16's range: scaled up before backward, down afterwards.

    Halved after a step with NaN or infinite gradients, doubled after `interval` steps without. It lives on the device:
    no step waits for it. Formats other than fp16 keep it at 1.
    """

    def __init__(self, precision: str, device: torch.device, interval: int = 1000):
        self.enabled, self.interval = precision == "fp16", interval
        # Scale, and steps since it last changed. The auxiliary network of the shipped pair overflows from 256 on.
        self.state = torch.tensor([64.0 if self.enabled else 1.0, 0.0], device=device)

    def scale(self, gradient: torch.Tensor) -> torch.Tensor:
        """A loss, or a gradient that backward begins with, times the scale."""
        return gradient * self.state[0] if self.enabled else gradient

    @torch.no_grad()
    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients of parameters by the scale, in place."""
        grads = [p.grad for p in parameters if p.grad is not None]
        if self.enabled and grads:
            torch._foreach_div_(grads, self.state[0])

    def update(self, norm: torch.Tensor) -> None:
        """After a step whose gradients had this norm."""
        if not self.enabled:
            return
        scale, steps = self.state
        finite = norm.isfinite()
        grown = torch.where(steps + 1 >= self.interval, scale * 2, scale)
        scale = torch.where(finite, grown, scale / 2).clamp(1.0, 2.0**24)
        self.state.copy_(torch.stack([scale, torch.where(finite, (steps + 1) % self.interval, 0.0)]))


def inference_format(precision: str, device: torch.device) -> torch.memory_format:
    """The memory format in which networks are evaluated fastest.

    A GPU's units for tf32, bf16 and fp16 want channels_last. The compiled group normalisation reads it; without
    compiled ops torch copies around every group normalisation, for which it has no kernel in that format. In fp32 a GPU
    convolves contiguous images.
    """
    return torch.contiguous_format if precision == "fp32" and device.type != "cpu" else torch.channels_last


def training_format(network: torch.nn.Module, precision: str, device: torch.device) -> torch.memory_format:
    """The memory format in which a network trains fastest.

    On a CPU channels_last makes every forward pass faster (1.05 to 1.14 times) but, in wide networks, weight gradients
    slower. Forward and backward, contiguous and channels_last: 88 and 77 ms for the shipped student, 247 and 232 for
    its U-Net; 1.6 and 2.1 s, 4.1 and 4.7 s for those of CIFAR-10's size. (torch 2.13, one thread, AVX2)
    """
    wide = any(p.ndim == 4 and p.shape[1] >= 256 for p in network.parameters())
    return torch.contiguous_format if wide and device.type == "cpu" else inference_format(precision, device)


def compile_networks(
    networks: Iterable[nn.Module], device: torch.device, backend: str | Callable = "inductor"
) -> str | None:
    """Have torch.compile translate networks at their first call; names and types of the modules stay.

    Returns:
        None, or one line on why torch.compile does not work here, with the networks left as they were.
    """
    try:  # the compiler is only looked for when something is compiled: better now than in the middle of a step
        torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.zeros(8, device=device))
    except Exception as error:  # noqa: BLE001  every backend raises its own kind
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return f"--compile: torch.compile does not work here, the run goes on without it: {reason[:150]}"
    for network in networks:
        network.compile(backend=backend)
    return None
