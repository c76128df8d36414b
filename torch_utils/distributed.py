"""Several processes that train one network, as `torchrun` starts them; with one process, everything here does nothing.

All processes hold equal networks and draw equal random numbers (`torch_utils.batch_slice`). They differ in the rows of
a batch that they work on, and rank 0 writes the files. Two groups connect them: one for gradients (NCCL between GPUs,
gloo between CPUs), and one of gloo for numbers that live on the host, which needs no GPU synchronisation.

How failures spread: a process that dies closes its connections, so that the others fail in their next exchange, at
once. Before a process that raises goes, it leaves its message in the store; whoever loses the connection looks there
for the reason. What neither dies nor answers is given up after TIMEOUT: exchanges in step have it as their limit, and
`pulse` ends whoever waits for a silent process elsewhere, also while they join. The store may be held by the very
process that is silent, so nothing asks it without a limit either. Nobody waits for 60 seconds.

Between GPUs it is `pulse` alone that keeps this promise. NCCL does not see that a process is gone, and its own limit,
after which it aborts the program, only ends what neither side is alive to end. After an error its communicators are
aborted, as destroying them would wait for exchanges that never come to an end. No GPU was at hand: that NCCL behaves as
its documentation says is not tested, only that it is asked to.
"""

import contextlib
import io
import os
import pickle
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from refine.torch_utils.pulse import Pulse, within

T = TypeVar("T")
TIMEOUT = timedelta(seconds=40)  # for a process to join, and for any exchange between CPUs in step
GPU_TIMEOUT = timedelta(minutes=15)  # for an exchange between GPUs, which may be queued behind minutes of work
SILENCE = timedelta(seconds=4)  # beyond TIMEOUT, before `pulse` ends whoever waits: exchanges that fail say more
ROLL_CALL = timedelta(seconds=10)  # how long a process that failed before joining waits for the others
PATIENCE = timedelta(hours=24)  # for rank 0 to write, and for all to measure, which takes them unequal time
BUCKET = 2**24  # elements that are averaged at once: 64 MiB of float32

_groups: dict[str, dist.ProcessGroup] = {}  # empty outside of `session`
_store: list[dist.Store] = []
_pulse: list[Pulse] = []


def is_launched() -> bool:
    """Whether a launcher started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    return int(os.environ.get("RANK", "0")) if is_launched() else 0


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1")) if is_launched() else 1


def is_main() -> bool:
    return rank() == 0


def local_device(name: str) -> str:
    """'cuda' → the GPU of this process; other names as they are.

    Raises:
        ValueError: The machine has fewer GPUs than processes, or one GPU is named for all of them.
    """
    if not is_launched() or not name.startswith("cuda"):
        return name
    if name != "cuda":
        raise ValueError(f"found {name!r} with {world_size()} processes; expected cuda (a GPU for each) or cpu")
    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= count:
        raise ValueError(f"process {index} of this machine finds {count} GPUs; expected one for each process")
    return f"cuda:{index}"


class LostProcess(ConnectionError):
    """The run ends because another process did; `told` if that process has said why."""

    def __init__(self, text: str, told: bool):
        super().__init__(text)
        self.told = told


@contextlib.contextmanager
def session(cuda: bool) -> Iterator[None]:
    """Joins the other processes, and leaves them at the end.

    Args:
        cuda: Whether they train on GPUs; `torch.cuda.set_device` is due before the first exchange then.

    Raises:
        ConnectionError: A process did not come in time.
        LostProcess: A process was lost later; the message holds its last words where it left some.
    """
    if not is_launched():
        yield
        return
    try:
        _join(cuda)
    except BaseException:
        _stop_pulse()
        _pulse.clear()
        raise
    failed = True
    try:
        yield
        _part()
        failed = False
    except LostProcess:
        raise
    except BaseException as error:
        if is_lost_connection(error):
            raise _loss() from error
        if not _leave_message(str(error) or type(error).__name__):
            raise _loss() from error  # all of them met the same: one voice is enough
        raise
    finally:
        _leave(failed)


def speaks_for_all(text: str) -> bool:
    """Whether this process, which fails before it joins the others, is the one to say so.

    The others are told. Of several that fail the first one speaks, and so does whoever reaches nobody.
    """
    try:
        return min(within(TIMEOUT.total_seconds(), lambda: _failures(_meet(text)))) == rank()
    except (ValueError, OSError, RuntimeError):
        return True


def _join(cuda: bool) -> None:
    store = _reached()
    try:
        if failed := within(ROLL_CALL.total_seconds(), _failures, store):
            raise LostProcess(f"another process failed; {failed[min(failed)]}", told=True)
        place: dict[str, Any] = {"store": dist.PrefixStore("groups", store), "rank": rank(), "world_size": world_size()}
        if cuda:  # with its GPU named, a process neither guesses it from its rank nor puts memory onto another one's
            device = torch.device("cuda", torch.cuda.current_device())
            dist.init_process_group("nccl", **place, timeout=GPU_TIMEOUT, device_id=device)
        else:
            dist.init_process_group("gloo", **place, timeout=TIMEOUT)
        _store.append(store)
        _groups["numbers"] = dist.new_group(backend="gloo", timeout=TIMEOUT)
        _groups["waiting"] = dist.new_group(backend="gloo", timeout=PATIENCE)
    except (RuntimeError, TimeoutError) as error:
        raise ConnectionError(f"rank {rank()} lost the others while joining: {_first_line(error)}") from None


def _reached() -> dist.TCPStore:
    """The store, once all processes have been there. Raises ConnectionError: one of them did not come."""
    try:
        return within(TIMEOUT.total_seconds() + 2, _meet)
    except TimeoutError:
        where = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise ConnectionError(
            f"rank {rank()} got no answer of rank 0 at {where} within {TIMEOUT.seconds} s: "
            "it was not started, hangs, or another program listens there"
        ) from None


def _meet(failure: str | None = None) -> dist.TCPStore:
    """Connects to the store and waits for all processes to have been there, with what made this one fail, if so."""
    try:
        store = _connected(is_main() and not _agent_holds_store())
    except RuntimeError as error:
        where = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise ConnectionError(f"rank {rank()} did not reach rank 0 at {where}: {_first_line(error)}") from None
    if failure is not None:
        store.set(f"failed/{rank()}", _signed(failure))
    else:  # from here on: one that dies while the others wait for a third one is missed, too
        _pulse.append(Pulse(_connected(False), rank(), world_size(), (TIMEOUT + SILENCE).total_seconds()))
    store.set(f"here/{rank()}", socket.gethostname())
    names = [f"here/{other}" for other in range(world_size())]
    try:
        store.wait(names, TIMEOUT if failure is None else ROLL_CALL)
    except (dist.DistStoreError, RuntimeError):
        if failure is None:
            raise ConnectionError(
                f"{_missing(store, names)} of {world_size()} did not come within {TIMEOUT.seconds} s; "
                "were all machines started?"
            ) from None
    return store


def _connected(mine: bool) -> dist.TCPStore:
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"WORLD_SIZE is set, but not {error}; expected to be started by torchrun") from None
    return dist.TCPStore(address, port, world_size(), mine, timeout=TIMEOUT, wait_for_workers=False, multi_tenant=True)


def _failures(store: dist.TCPStore) -> dict[int, str]:
    """By rank, what processes said that failed before they joined. Who holds the store waits until all have looked."""
    names = {other: f"failed/{other}" for other in range(world_size())}
    found = {other: store.get(name).decode() for other, name in names.items() if store.check([name])}
    if found:
        store.set(f"seen/{rank()}", "")
        if is_main():
            with contextlib.suppress(RuntimeError):
                store.wait([f"seen/{other}" for other in names], timedelta(seconds=3))
    return found


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _missing(store: dist.Store, names: list[str]) -> str:
    try:
        return "rank " + ", ".join(name.removeprefix("here/") for name in names if not store.check([name]))
    except RuntimeError:  # rank 0, which held the list, has given up a moment ago
        return "some process"


def _part() -> None:
    """Nobody hangs up before all have finished: the last exchange of a slow process needs the others' connections."""
    with contextlib.suppress(Exception):  # the store went: its holder saw all of us here
        _store[0].set(f"done/{rank()}", "")
        names = [f"done/{other}" for other in range(world_size())]
        within(TIMEOUT.total_seconds(), _store[0].wait, names, TIMEOUT)


def _stop_pulse() -> None:
    for pulse in _pulse:
        pulse.stop()


def _leave(failed: bool) -> None:
    _groups.clear()
    _stop_pulse()
    # An error closes this process's connections, so that the others notice; the store goes last (see _linger).
    with contextlib.suppress(Exception):
        if failed and dist.get_backend() == "nccl":
            within(SILENCE.total_seconds(), dist.distributed_c10d._abort_process_group)
        else:
            dist.destroy_process_group()
    _linger()
    _pulse.clear()
    _store.clear()


def _linger() -> None:
    """The process that holds the store stays until the others had time to read a message in it."""
    if _store and is_main() and not _agent_holds_store():
        with contextlib.suppress(Exception):
            if _store[0].check(["message"]):
                time.sleep(3)


def _agent_holds_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _leave_message(text: str) -> bool:
    """Say why this process ends; False if another one spoke first."""

    def leave() -> bool:
        if _store[0].add("messages", 1) > 1:
            return False
        _store[0].set("message", _signed(text))
        return True

    try:
        return within(2, leave)
    except Exception:  # noqa: BLE001 - nobody to say it to
        return True


def _signed(text: str) -> str:
    return f"rank {rank()} on {socket.gethostname()}: {' '.join(text.split())[:400]}"


def _loss() -> LostProcess:
    def message() -> str:
        while not _store[0].check(["message"]):
            time.sleep(0.1)
        return _store[0].get("message").decode()

    if _store:
        with contextlib.suppress(Exception):
            return LostProcess(f"another process failed; {within(2, message)}", told=True)
    lost = "lost another process, which left no message: it was killed or stopped, or its machine is gone"
    return LostProcess(f"rank {rank()} {lost}", told=False)


def is_lost_connection(error: BaseException) -> bool:
    """Whether an exchange failed because another process is gone."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    texts = ("onnection closed by peer", "Connection reset", "Broken pipe", "Timed out", "timeout")  # gloo's words
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def is_joined() -> bool:
    """Whether this process is in a `session` with others."""
    return bool(_groups)


# Exchanges. Every process must come to each of them, in the same order.


def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Replace gradients by their sums over all processes, bit for bit the same everywhere.

    Losses are divided by the size of the whole batch beforehand, so sums are what one process would have found, but
    for the order of additions. Plain reduction of flat buffers, not DistributedDataParallel: the student's backward
    starts from a gradient on images and micro-batches add up first, which leaves one exchange a step either way.
    """
    sum_tensors([p.grad for p in parameters if p.grad is not None])


@torch.no_grad()
def sum_tensors(tensors: list[torch.Tensor]) -> None:
    """Replace tensors by their sums over all processes, many in one exchange."""
    if not _groups:
        return
    bucket: list[torch.Tensor] = []
    for index, x in enumerate(tensors):
        bucket.append(x)
        if index == len(tensors) - 1 or sum(y.numel() for y in bucket) + tensors[index + 1].numel() > BUCKET:
            flat = torch.cat([y.reshape(-1) for y in bucket])
            dist.all_reduce(flat)
            parts = flat.split([y.numel() for y in bucket])
            torch._foreach_copy_(bucket, [part.view(y.shape) for part, y in zip(parts, bucket, strict=True)])
            bucket = []


def sum_tensor(x: torch.Tensor) -> torch.Tensor:
    """The sum of x over all processes, on x's device, in place."""
    if _groups:
        dist.all_reduce(x)
    return x


def largest(number: int) -> int:
    """The largest number of all processes; on the host, a fraction of a millisecond."""
    if not _groups:
        return number
    x = torch.tensor([number])
    dist.all_reduce(x, op=dist.ReduceOp.MAX, group=_groups["numbers"])
    return int(x)


def text_of_main(text: str) -> str:
    """The text that the first process gives, in all of them."""
    if not _groups:
        return text
    texts = [text]
    dist.broadcast_object_list(texts, src=0, group=_groups["numbers"])
    return texts[0]


def gathered(value: T) -> list[T]:
    """The values of all processes in the order of their ranks, pickled, on the host; waits for the slowest for long.

    Tensors arrive on the CPU: those of a GPU would be put on the GPU of the same number, which another process uses or
    this machine lacks.
    """
    if not _groups:
        return [value]
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, packed(value), group=_groups["waiting"])
    return [pickle.loads(data) for data in everyone]  # noqa: S301 - of processes of this run, which pickled it above


def packed(value: object) -> bytes:
    """A pickle of a value in which all tensors are on the CPU."""
    buffer = io.BytesIO()
    _OnHost(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


class _OnHost(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.device.type != "cpu":
            return value.detach().cpu().__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return NotImplemented


def wait_for_main() -> None:
    """All processes go on together, however long rank 0 takes; if it dies, they fail at once."""
    if _groups:
        dist.barrier(group=_groups["waiting"])


def check_equal(networks: list[torch.nn.Module]) -> None:
    """Raise RuntimeError if the weights of the processes drifted apart, as by a faulty GPU."""
    if not _groups:
        return
    sums = torch.stack([p.detach().double().abs().sum() for net in networks for p in net.parameters()]).cpu()
    low, high = sums.clone(), sums.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN, group=_groups["numbers"])
    dist.all_reduce(high, op=dist.ReduceOp.MAX, group=_groups["numbers"])
    if not torch.equal(low, high):
        raise RuntimeError("the weights of the processes are not equal any more")
