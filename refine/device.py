"""The device of a process and the ops that run on it; torch is imported only where it is needed."""

from __future__ import annotations

from refine.errors import option


def choose_device(name: str | None) -> str:
    """'cpu', 'cuda' or 'cuda:N', if this machine has it; None = CUDA where there is one.

    Raises:
        ValueError: There is no such device.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"found {name!r}; expected cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"found {name!r}; expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(
            f"found {name!r}; expected {f'cuda:0 to cuda:{count - 1}, or cpu' if count else 'cpu'}: "
            f"torch sees {count} CUDA devices here"
        )
    return name


def choose_ops(mode: str | None, device: str) -> None:
    """Which form of the ops runs from here on.

    Args:
        mode: 'auto', 'native' or 'ref'; None = as REFINE_OPS says, else auto.
        device: Where they will run.

    Raises:
        ValueError: The compiled ops are asked for and are not available on this device, or REFINE_OPS is
            not one of these words.
    """
    from refine.torch_utils.build import custom_ops

    if mode is not None:
        custom_ops.set_mode(mode)
    if custom_ops.get_mode() == "native":
        try:
            custom_ops.load(device.partition(":")[0])
        except custom_ops.NativeUnavailable as error:
            raise ValueError(f"--ops=native: {error}") from None


def prepare_device(name: str | None, ops: str | None) -> str:
    """The device of this process, under torchrun a GPU of its own, with threads and ops chosen for it.

    Args:
        name: As for `choose_device`.
        ops: As for `choose_ops`.

    Raises:
        ValueError: As these say; the message begins with the option.
    """
    from refine.torch_utils.distributed import local_device
    from refine.torch_utils.threads import set_threads

    set_threads()
    with option("--device"):
        device = local_device(choose_device(name))
    choose_ops(ops, device)
    return device
