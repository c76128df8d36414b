"""Weights & Biases: the same numbers and pictures as in TensorBoard, over kimg."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from refine.dnnlib import replaced_atomically
from refine.images import to_pil

_ID = "wandb-id.txt"  # in the run folder, so that a resumed run goes on in its own


def check_available() -> None:
    """Raises ValueError where the package is not installed."""
    if find_spec("wandb") is None:
        raise ValueError("wandb is not installed; pip install 'gan-refine[wandb]' brings it")


class WeightsAndBiases:
    """A `Monitor` that writes a run of Weights & Biases, which keeps its own files in the run folder.

    Project and mode are those of $WANDB_PROJECT (default: gan-refine) and $WANDB_MODE; with WANDB_MODE=offline nothing
    leaves this machine, and `wandb sync` sends it later. Numbers of a run that went back are seen beside the new ones.

    Args:
        folder: The run folder.
        options: All options, as JSON has them.

    Raises:
        ValueError: The package is missing or does not let us in.
    """

    def __init__(self, folder: Path, options: dict[str, Any]):
        check_available()
        import wandb

        self._wandb: Any = wandb
        place = {"project": os.environ.get("WANDB_PROJECT", "gan-refine"), "name": folder.name, "dir": str(folder)}
        try:
            self._run: Any = wandb.init(
                **place, id=_run_id(folder), resume="allow", config=options, settings=wandb.Settings(console="off")
            )
        except Exception as error:  # of a service that is not there, or wants a key
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"wandb cannot begin ({reason}); WANDB_MODE=offline goes without its service") from error
        self._run.define_metric("kimg", hidden=True)
        self._run.define_metric("*", step_metric="kimg")
        self._told: dict[str, Any] = {}

    def begin(self, options: dict[str, Any], leading: Mapping[str, str]) -> None:
        """The options are told when the run is opened, also by one that goes on."""

    def scalars(self, values: Mapping[str, float], kimg: float) -> None:
        self._told |= values

    def image(self, name: str, image: torch.Tensor, kimg: float) -> None:
        self._told[name] = self._wandb.Image(to_pil(image))

    def class_histogram(self, counts: list[float], kimg: float) -> None:
        self._told["Classes/histogram"] = self._wandb.Histogram(np_histogram=(counts, list(range(len(counts) + 1))))
        self._told["Classes/rarest_share"] = min(counts)

    def tick(self, kimg: float) -> None:
        told, self._told = self._told, {}
        if told:
            self._run.log({"kimg": kimg, **told})

    def outcome(self, numbers: Mapping[str, float]) -> None:
        self._run.summary.update({f"Result/{name}": value for name, value in numbers.items()})

    def forget_after(self, kimg: float) -> None:
        self._told = {}

    def flush(self) -> None:
        """It sends what it has by itself."""

    def close(self) -> None:
        self._run.finish()


def _run_id(folder: Path) -> str:
    path = folder / _ID
    if not path.is_file():
        with replaced_atomically(path) as temporary:
            temporary.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    text = path.read_text(encoding="utf-8").strip()
    if not text.isalnum() or len(text) > 64:
        raise ValueError(f"{path} holds no id of a run; expected letters and digits")
    return text
