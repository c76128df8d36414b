"""When the numbers of a run diverge: it ends with a hint, or goes back to its best state with half the rates."""

import contextlib
from pathlib import Path
from typing import Any, Protocol

import torch

from refine.config import RefineConfig
from refine.torch_utils import distributed
from refine.training.finding import training_states
from refine.training.run_dir import RunDir
from refine.training.snapshots import Best, Snapshots
from refine.training.state import Progress, load_training_state, save_training_state
from refine.training.trainer import Trainer


class Run(Protocol):
    """What a `TrainingRun` is to one that sends it back."""

    trainer: Trainer
    config: RefineConfig
    run_dir: RunDir
    snapshots: Snapshots
    progress: Progress

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Diverged(ValueError):
    """Gradients or weights are not finite; all processes find the same in the same iteration."""


def check_steps(trainer: Trainer, max_skips: int) -> None:
    """Raises Diverged if so many steps in a row were left out; a CPU–GPU synchronisation."""
    for name, optimizer in trainer.optimizers.items():
        _, row = optimizer.skips.read()
        if row >= max_skips:
            raise Diverged(
                f"{row} steps of the {name} network in a row had gradients that were NaN or infinite, at "
                f"{trainer.nimg / 1000:.1f} kimg"
            )


@torch.no_grad()
def check_before_saving(trainer: Trainer, max_skips: int) -> None:
    """Raises Diverged as `check_steps`, and if a parameter is NaN or infinite or a buffer is NaN."""
    check_steps(trainer, max_skips)
    networks: dict[str, torch.nn.Module] = {name: getattr(trainer, name) for name in trainer.stateful}
    networks |= {f"average {length}": network for length, network in trainer.averages.networks.items()}
    for label, network in networks.items():
        names, broken = [], []
        for name, x in (*network.named_parameters(), *network.named_buffers()):
            if x.is_floating_point():
                names.append(f"{label}.{name}")
                broken.append(~x.isfinite().all() if isinstance(x, torch.nn.Parameter) else x.isnan().any())
        if broken and (found := torch.stack(broken).nonzero().flatten().tolist()):
            raise Diverged(f"{names[found[0]]} became NaN or infinite, at {trainer.nimg / 1000:.1f} kimg")


def go_back(training: Run, error: Diverged) -> None:
    """Loads the best state, or else the newest good one, and halves both rates; every process must come here.

    The state is written anew with the count of rollbacks, and newer ones, which lead to where the numbers diverged, are
    removed: a run that is killed now goes on from there, too.

    Raises:
        ValueError: `--rollback` does not allow it, or there is no good state; a line that says how to go on.
    """
    progress, config, run_dir = training.progress, training.config, training.run_dir
    path = _state_of_all(_good_state(run_dir.path, training.snapshots.standing.best))
    if path is None or progress.rollbacks >= config.rollback:
        where = f"go on from before with --resume={path} and" if path else "try"
        spent = f" after {progress.rollbacks} rollbacks" if progress.rollbacks else ""
        raise ValueError(f"{error}{spent}; {where} a smaller --lr or --aux-lr") from error
    rollbacks = progress.rollbacks + 1
    training.load_state_dict({**load_training_state(path), "rollbacks": rollbacks})
    state = training.state_dict()
    distributed.wait_for_main()  # all have read it
    if distributed.is_main():
        states = training_states(run_dir.path)
        save_training_state(run_dir.path, state, path.stem.removeprefix("training-state-"), keep=len(states))
        for newer in states[: states.index(path)]:
            newer.unlink(missing_ok=True)
    run_dir.trim_after(training.trainer.nimg / 1000)
    run_dir.log(f"diverged    {error}")
    run_dir.log(
        f"rollback    {rollbacks} of {config.rollback}: going on from {path.name} with rates "
        f"{training.trainer.rate_factor:g} times --lr and --aux-lr"
    )
    distributed.wait_for_main()


def _good_state(folder: Path, best: Best | None) -> Path | None:
    """The state of the best snapshot if it is kept and whole, else the newest whole one; of the first process.

    One in the middle of a row of skipped steps holds the weights that they were skipped with: it is the last resort.
    """
    if not distributed.is_main():
        return None
    states = training_states(folder)
    if best is not None and (path := state_of(folder, best)) in states:
        states.insert(0, path)
    last_resort = None
    for path in states:
        with contextlib.suppress(ValueError):  # damaged
            skips = load_training_state(path)["skips"].values()
            if not any(int(row) for _, row in skips):
                return path
            last_resort = last_resort or path
    return last_resort


def state_of(folder: Path, best: Best) -> Path:
    """The training state that was saved with the best snapshot."""
    return folder / f"training-state-{Path(best.snapshot).stem.removeprefix('network-snapshot-')}.pt"


def _state_of_all(path: Path | None) -> Path | None:
    """What the first process found, in all of them."""
    distributed.wait_for_main()
    text = distributed.text_of_main(str(path) if path else "")
    return Path(text) if text else None
