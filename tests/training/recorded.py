"""A CUDA graph for the CPU: what a part does is noted operator by operator, and done again on the same tensors.

As with a real graph, Python is not asked again: numbers and choices stay those of the recording, results go to the
places where they went, and random numbers come from the default generator. Unlike a real one, recording already does
what is recorded; so the first replay does nothing.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from refine.training.graphs import Graphs
from refine.training.trainer import Trainer


class Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero"), f"{name} looks at a number, which a graph cannot"
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):  # no view
            self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def again(self):
        for func, args, kwargs, out in self.calls:
            found = func(*args, **kwargs)
            if not func._schema.is_mutable:
                for place, x in zip(tree_leaves(out), tree_leaves(found), strict=True):
                    if isinstance(x, torch.Tensor):
                        place.copy_(x)


class Recorded:
    def __init__(self, part):
        self._recording, self._fresh = Recording(), True
        with self._recording:
            part()

    def replay(self):
        if not self._fresh:
            self._recording.again()
        self._fresh = False


class GraphsOnHost(Graphs):
    def _begun(self):
        return True

    def _beside(self, part):
        part()

    def _recorded(self, part):
        return Recorded(part)


def with_graphs(trainer: Trainer) -> Trainer:
    """The same trainer, on the way that one on CUDA takes."""
    trainer.graphs = GraphsOnHost(trainer.device)
    object.__setattr__(trainer.batches, "once", True)
    for optimizer in trainer.optimizers.values():
        optimizer._rate, optimizer._stays = torch.zeros([]), True
    return trainer
