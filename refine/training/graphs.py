"""The parts of an iteration as CUDA graphs: what a part launches is recorded once and from then on launched as a whole.

An iteration at CIFAR-10's sizes launches thousands of kernels of a few microseconds each, and the processor takes about
as long to launch one as a GPU to run it. A graph is launched at once. What a part does may therefore not depend on
anything that Python would look at anew: step sizes are tensors that are filled before, sums are added to in place, and
what differs from step to step (a penalty, a gradient that is kept) is part of a key, with a graph for each key.

Why parts and not whole iterations: student, auxiliary network and critic differ in what they do in which step, so that
whole iterations would come in more kinds, and the number of auxiliary steps may change. What is left between the parts
is a fill and two launches for each average of the student.

Random numbers are those of the default generator, which torch registers with every graph: the numbers are the same with
and without graphs, and so is the generator's state afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from refine.config import RefineConfig
from refine.networks.own import OwnGenerator
from refine.networks.own_teacher import OwnTeacher
from refine.torch_utils import distributed

WARM_UP = 2  # runs of a part before it is recorded: what is made, chosen or compiled at first use has to be there


@dataclass
class _Known:
    """What is known of a key."""

    runs: int = 0
    graph: Any = None


class Graphs:
    """Runs parts of an iteration, as graphs where that is possible.

    Args:
        device: Where they run; graphs are made on CUDA only.
        reason: Why no graphs are to be made; None = they are.

    Attributes:
        reason: The same, or what made an attempt fail for good.
        say: Where a line goes that tells of a part without a graph; each part is told of once.
    """

    def __init__(self, device: torch.device, reason: str | None = None):
        self.device, self.reason = device, reason
        self.say: Callable[[str], None] = lambda line: None
        self._known: dict[Hashable, _Known] = {}
        self._without: set[str] = set()  # parts that cannot be recorded
        self._stream: Any = None
        self._pool: Any = None

    @property
    def made(self) -> int:
        """How many graphs there are now."""
        return sum(known.graph is not None for known in self._known.values())

    def run(self, name: str, variant: Hashable, part: Callable[[], None]) -> None:
        """Run a part: at first as it is, beside the default stream, then as a graph.

        Args:
            name: Of the part, for people.
            variant: What the part's Python depends on; each gets a graph of its own.
            part: What is done. It returns nothing, and leaves nothing behind but what it writes into tensors that were
                there before.
        """
        if self.reason is not None or name in self._without or not self._begun():
            part()
            return
        known = self._known.setdefault((name, variant), _Known())
        if known.graph is None and known.runs < WARM_UP:
            known.runs += 1
            self._beside(part)
            return
        if known.graph is None:
            try:
                known.graph = self._recorded(part)
            except Exception as error:  # noqa: BLE001  whatever a part cannot do while it is recorded
                self._give_up(name, error)
                part()
                return
        known.graph.replay()

    def forget(self) -> None:
        """The tensors that parts write into have been replaced: everything is recorded anew."""
        self._known.clear()
        self._pool = None  # memory without a graph cannot be taken up again

    def _begun(self) -> bool:
        """Makes the stream in which all graphs are recorded."""
        if self._stream is None:
            try:
                self._stream = torch.cuda.Stream(self.device)
            except (RuntimeError, AttributeError) as error:
                self.reason = _first_line(error)
                self.say(f"cuda graphs: none, {self.reason}")
                return False
        return True

    def _beside(self, part: Callable[[], None]) -> None:
        """In the stream of the graphs, where whatever is made for good belongs."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            part()
        current.wait_stream(self._stream)

    def _recorded(self, part: Callable[[], None]) -> Any:
        if self._pool is None:  # shared: no part needs another one's memory, but for what was there before
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads (autograd's, NCCL's) may do what they like: 'thread_local'.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            part()
        return graph

    def _give_up(self, name: str, error: BaseException) -> None:
        """After a recording that failed: its generator may believe that it is still being recorded from.

        A fresh one in the same state is put in its place. The other graphs belong to the old one: they are made anew.
        """
        self._without.add(name)
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())
        for known in self._known.values():
            known.graph = None
        self._pool = None
        while error.__context__ is not None:  # what is said last is only that recording has failed
            error = error.__context__
        self.say(f"cuda graphs: the {name} step goes without: {_first_line(error)}")


def why_none(config: RefineConfig, device: torch.device, networks: Iterable[nn.Module]) -> str | None:
    """Why a run makes no graphs, in words; None where it does.

    Args:
        config: All options.
        device: Where the run computes.
        networks: Those that take part in a step.
    """
    if not config.cuda_graphs:
        return "--cuda-graphs is off"
    if device.type != "cuda":
        return "they are for CUDA"
    if distributed.world_size() > 1:
        return "several processes exchange gradients within a step"
    if any(isinstance(module, OwnGenerator | OwnTeacher) for network in networks for module in network.modules()):
        return "a network is of your own code, and a graph would not see what it does on the host"
    if (config.dropout or config.aux_dropout) and config.batch_gpu is not None and config.batch_gpu < config.batch:
        return "dropout with --batch-gpu would need the masks of the whole batch"
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
