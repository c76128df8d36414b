"""What one iteration asks of a GPU before any arithmetic: operators, clones, copies between host and device, waits.

    python benchmarks/dispatch.py [--precisions=fp32,bf16] [--batch=64] [--top=0] [--lines=0]

At CIFAR-10's official sizes (`iteration.cifar10_pair`), on tensors that have shapes and no memory (torch's device
meta, which takes the path of a GPU), so that no GPU is needed and seconds are enough. A compiled op counts as one
operator, and so does attention, which is fused on a GPU; views are counted apart. Every operator costs the processor
some microseconds, in which a GPU is not fed, unless the iteration is a CUDA graph. The second table says where they are
from; convolutions, norms, products of matrices and attention are what cannot be left out. Prints Markdown. tests/cuda
looks for waits and copies with values.
"""

import contextlib
import ctypes
import re
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch.optim import optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.iteration import cifar10_pair
from refine.config import PRECISIONS, RefineConfig
from refine.torch_utils.build import custom_ops
from refine.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
VIEWS = {
    *("view", "_unsafe_view", "_reshape_alias", "expand", "permute", "transpose", "t", "slice", "select", "unbind"),
    *("unsqueeze", "squeeze", "detach", "alias", "as_strided", "split", "split_with_sizes", "narrow", "chunk"),
    *("_record_function_enter_new", "_record_function_exit"),  # torch's profiler: nothing is launched, either
}
KINDS = {
    "convolution": {"convolution", "convolution_backward", "upfirdn2d"},
    "norm": {
        *("native_group_norm", "native_group_norm_backward", "group_norm_silu", "group_norm_silu_grad"),
        *("sum_group_norm_silu", "sum_group_norm_silu_grad"),
        *("native_layer_norm", "native_layer_norm_backward"),
    },
    "matrices": {"addmm", "mm", "bmm", "baddbmm"},
    "attention": {"_scaled_dot_product_efficient_attention", "_scaled_dot_product_efficient_attention_backward"},
}
NETWORKS = ("G", "aux", "teacher")
WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "bincount"}


class Counting(TorchDispatchMode):
    """Counts operators by name, and what they make the processor wait for or the bus carry; also by line if `lines`."""

    def __init__(self, lines: bool) -> None:
        super().__init__()
        self.by_line = lines
        self.operators: Counter[str] = Counter()
        self.copies = self.waits = 0
        self.places: dict[str, Counter[str]] = {}  # where → kind → operators beside views
        self.inside: list[str] = []
        self.lines: Counter[str] = Counter()  # network, line and operator → operators beside views

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        self.operators[name] += 1
        if name not in VIEWS:
            backward = torch._C._current_graph_task_id() != -1
            place = (
                "backward" if backward else f"forward of {self.inside[-1]}" if self.inside else "around the networks"
            )
            kind = next((kind for kind, names in KINDS.items() if name in names), "other")
            self.places.setdefault(place, Counter())[kind] += 1
            if self.by_line:
                self.lines[f"{place}: {name} in {_gradient_of() if backward else _line()}"] += 1
        if name in WAITS:
            self.waits += 1
            if name == "_local_scalar_dense":
                return 1.0
        if name == "_fused_adam_":  # knows real devices only
            return None
        out = func(*args, **kwargs)
        if name in ("convolution", "convolution_backward"):
            out = as_cudnn(out, args)
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            self.copies += source.device.type != out.device.type
        return out

    @contextlib.contextmanager
    def of(self, trainer: Trainer) -> Iterator[None]:
        """Counts, and notes which network is running."""
        handles = []
        for name in NETWORKS:
            network = getattr(trainer, name)
            handles.append(network.register_forward_pre_hook(lambda *_, name=name: self.inside.append(name)))
            handles.append(network.register_forward_hook(lambda *_: self.inside.pop() and None, always_call=True))
        noting = torch.autograd.set_detect_anomaly(self.by_line, check_nan=False)  # it notes where nodes are from
        with Fused(), noting, self:
            yield
        for handle in handles:
            handle.remove()

    def row(self) -> dict[str, int]:
        views = sum(count for name, count in self.operators.items() if name in VIEWS)
        return {
            "operators": self.operators.total(),
            "of these views": views,
            "clones": self.operators["clone"],
            "casts and copies": self.operators["_to_copy"] + self.operators["copy_"],
            "host copies": self.copies,
            "waits": self.waits,
        }


def _line() -> str:
    """The line of the project that is being executed, and who called that."""
    frames = [frame for frame in traceback.extract_stack() if _is_ours(frame.filename)]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[:-4:-1])


def _is_ours(filename: str) -> bool:
    return f"{ROOT}/refine/" in filename or f"{ROOT}/torch_utils/" in filename


def _gradient_of() -> str:
    """The node of autograd's graph that is being executed, and the line that made it."""
    node = torch._C._current_autograd_node()
    if node is None:
        return "autograd"
    made = [line for line in node.metadata.get("traceback_", []) if "refine/" in line or "torch_utils/" in line]
    found = [re.search(r'File "([^"]+)", line (\d+)', line) for line in made[:-4:-1]]
    lines = [f"{Path(match[1]).name}:{match[2]}" for match in found if match]
    return f"{node.name()} of {' < '.join(lines) or 'autograd'}"


def as_cudnn(out, args):
    """In channels_last where an input is, which torch does not know of tensors without a device."""
    inputs = [x for x in args if isinstance(x, torch.Tensor) and x.ndim == 4]
    if all(x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last) for x in inputs):
        return out
    if isinstance(out, torch.Tensor):
        return torch.empty_like(out, memory_format=torch.channels_last)
    return tuple(as_cudnn(x, args) if x is not None and x.ndim == 4 else x for x in out)


class Fused(TorchFunctionMode):
    """Kernels that a GPU has, under the conditions under which they are used, where torch would take them apart for a
    device that has none."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention and all(x.stride(-1) == 1 for x in args):
            return torch.ops.aten._scaled_dot_product_efficient_attention(*args, None, True)[0]
        if func is F.rms_norm:  # on a GPU one operator, and one backward, as this is
            return torch.ops.aten.native_layer_norm(*args, None, None, kwargs["eps"])[0]
        return func(*args, **(kwargs or {}))


def count(precision: str, batch: int, lines: bool, iterations: int = 2) -> Counting:
    """The last of some iterations: the first makes Adam's state."""
    custom_ops.OPS["meta"] = custom_ops.OPS["cuda"]
    custom_ops._ready["meta"] = ctypes.CDLL(None)  # nobody calls it: the ops know shapes
    optimizer.__dict__["_get_fused_kernels_supported_devices"] = lambda: ["meta"]
    config = RefineConfig("student", "teacher", batch=batch, adversarial=0.0, precision=precision)
    trainer = Trainer(config, *cifar10_pair(), device="meta")
    for _ in range(iterations):
        counting = Counting(lines)
        with counting.of(trainer):
            trainer.step()
    return counting


@click.command(help=__doc__.split("\n\n")[0], context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--precisions", default="fp32,bf16", show_default=True, help="Which, comma-separated.")
@click.option("--batch", type=click.IntRange(min=2), default=64, show_default=True)
@click.option("--top", type=click.IntRange(min=0), default=0, show_default=True, help="The commonest operators, too.")
@click.option("--lines", type=click.IntRange(min=0), default=0, show_default=True, help="The lines with most, too.")
def main(precisions: str, batch: int, top: int, lines: int) -> None:
    chosen = precisions.split(",")
    if unknown := set(chosen) - set(PRECISIONS):
        raise click.BadParameter(f"found {', '.join(sorted(unknown))}; expected {', '.join(PRECISIONS)}")
    counted = {precision: count(precision, batch, lines > 0) for precision in chosen}
    heads = list(next(iter(counted.values())).row())
    print(f"| one iteration, batch {batch} | {' | '.join(heads)} |")
    print("|---" * (len(heads) + 1) + "|")
    for precision, counting in counted.items():
        print(f"| {precision} | {' | '.join(map(str, counting.row().values()))} |")
    print(f"\n| operators beside views | {' | '.join([*KINDS, 'other', 'all'])} |")
    print("|---" * (len(KINDS) + 3) + "|")
    for precision, counting in counted.items():
        for place, kinds in sorted(counting.places.items()):
            numbers = [kinds[kind] for kind in (*KINDS, "other")]
            print(f"| {precision}: {place} | {' | '.join(map(str, [*numbers, sum(numbers)]))} |")
    if top:
        for precision, counting in counted.items():
            names = ", ".join(f"{name} {number}" for name, number in counting.operators.most_common(top))
            print(f"\n{precision}: {names}")
    for precision, counting in counted.items():
        for line, number in counting.lines.most_common(lines):
            print(f"{precision}: {number} × {line}")


if __name__ == "__main__":
    main()
